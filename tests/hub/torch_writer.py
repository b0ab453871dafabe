"""Writes torch checkpoint files, zip and legacy, without torch."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Global(NamedTuple):
    """Pickled as a bare global, whether or not the module exists."""

    module: str
    name: str

    def __call__(self):
        raise AssertionError("only pickled")


class Call(NamedTuple):
    """Pickled as a call of `function`, with an optional state."""

    function: Global
    args: tuple
    state: object = None


class Storage(NamedTuple):
    key: str
    kind: str
    numel: int


class TorchPickler(pickle._Pickler):
    dispatch = dict(pickle._Pickler.dispatch)

    def save_global_by_name(self, obj):
        self.write(f"c{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save_reduce(obj.function, obj.args, state=obj.state)

    dispatch[Global] = save_global_by_name
    dispatch[Call] = save_call

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Global("torch", obj.kind), obj.key, "cpu", obj.numel)
        return None


def tensor(storage, size, stride, offset=0, parameter=False):
    built = Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        (storage, offset, size, stride, False, OrderedDict()),
    )
    if parameter:
        return Call(Global("torch._utils", "_rebuild_parameter"), (built, True, OrderedDict()))
    return built


def write(path, obj, storages=None, pickled=None):
    buffer = io.BytesIO()
    TorchPickler(buffer, 2).dump(obj)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled or buffer.getvalue())
        for key, array in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", np.asarray(array).tobytes())
    return path


class LegacyPickler(TorchPickler):
    """Before torch 1.6 a persistent id ended with the part of the storage, or None."""

    def persistent_id(self, obj):
        storage, view = obj if isinstance(obj, Part) else (obj, None)
        pid = super().persistent_id(storage)
        return pid and (*pid, view)


class Part(NamedTuple):
    """Some elements of a storage: (key of the view, offset, number of elements)."""

    storage: Storage
    view: tuple


def write_legacy(path, obj, storages, keys=None, counts=None, machine=None):
    """The chain of pickles, then for each storage an int64 count and its bytes."""
    buffer = io.BytesIO()
    sizes = {"short": 2, "int": 4, "long": 4}
    machine = machine or {"protocol_version": 1001, "type_sizes": sizes, "little_endian": True}
    parts = (0x1950A86A20F9469CFC6C, 1001, machine, obj, list(storages) if keys is None else keys)
    for part in parts:
        LegacyPickler(buffer, 2).dump(part)
    for key, array in storages.items():
        buffer.write(int.to_bytes((counts or {}).get(key, array.size), 8, "little"))
        buffer.write(array.tobytes())
    path.write_bytes(buffer.getvalue())
    return path


KINDS = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage"}


def save(path, value, *, legacy=False):
    """Like torch.save of dictionaries, lists, plain values and arrays as tensors."""
    storages = {}

    def convert(part):
        if isinstance(part, dict):
            return type(part)((key, convert(x)) for key, x in part.items())
        if not isinstance(part, np.ndarray):
            return part
        key = str(len(storages))
        storages[key] = np.array(part, order="C")
        strides = [step // part.itemsize for step in storages[key].strides]
        kind = KINDS[part.dtype.str[1:]]
        return tensor(Storage(key, kind, part.size), part.shape, tuple(strides))

    return (write_legacy if legacy else write)(Path(path), convert(value), storages)
