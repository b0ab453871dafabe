"""PyTorch checkpoint files read without PyTorch, and without running anything they contain.

A `.pt` or `.pth` file is a zip archive: `data.pkl` describes the object, `data/KEY` holds the bytes
of each storage. Before torch 1.6 it was a chain of pickles (magic number, protocol, machine,
object, storage keys) and then the storages. Pickles are read by an unpickler that resolves a short
list of names to harmless stand-ins defined here and refuses every other name, so a hostile file can
at worst fail to load.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from jaxllm.errors import InputError

# Element types by the names a pickle uses. The unpickler hands out the names, never a `np.dtype`,
# because a pickle can change the state of any object it holds.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_PLAIN = {*_STORAGES.values(), "uint16", "uint32", "uint64"} - {"bfloat16"}
_DTYPES = {name: np.dtype(name) for name in sorted(_PLAIN)} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}
_Ints = tuple[int, ...]
# The magic number 0x1950a86a20f9469cfc6c, pickled: the first bytes of files before torch 1.6.
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")


class Opaque:
    """Stands where a checkpoint holds an object that is no data, such as an OmegaConf container.

    Attributes:
      name: the qualified name of the class in the file; its arguments and state are dropped.
    """

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        """Takes any arguments and keeps none."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"Opaque({self.name})"


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """Reads a torch zip checkpoint into plain containers and NumPy arrays.

    Args:
      path: a `.pt` or `.pth` file, of torch 1.6 or newer (zip) or older (legacy).

    Returns:
      The saved object: dicts (an argparse namespace becomes one), lists, tuples, numbers, strings,
      and tensors as read-only NumPy arrays, bfloat16 as `ml_dtypes.bfloat16`. Tensors that share a
      storage share memory. Configuration objects become `Opaque`.

    Raises:
      InputError: the file is missing, truncated, no checkpoint, or names a global outside the list
        of allowed ones.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
                return _load_legacy(file)
            with zipfile.ZipFile(file) as archive:
                return _load_zip(archive)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}, expected a checkpoint") from error
    except Exception as error:  # whatever a broken or hostile file can make the two readers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: not a readable torch checkpoint ({reason})") from error


def load_state_dict(
    path: str | os.PathLike[str], keys: Sequence[str] = ("state_dict", "model", "module")
) -> dict[str, np.ndarray]:
    """Reads the named tensors of a checkpoint; see `load_checkpoint`."""
    return load_checkpoint(path, keys)[0]


def load_checkpoint(
    path: str | os.PathLike[str], keys: Sequence[str] = ("state_dict", "model", "module")
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the named tensors of a checkpoint and what lies beside them, `.safetensors` or torch.

    Args:
      path: the file.
      keys: accepted top-level keys, the first one present is taken; a file that is itself a
        dictionary of tensors needs none. To read an average of the weights ask for its key, such
        as `("ema",)`.

    Returns:
      Name -> array, without the leading `_orig_mod.` (torch.compile) and `module.` (data parallel);
      and the file's top level, empty if that is the dictionary of tensors itself.

    Raises:
      InputError: as `load_torch_file`; or no dictionary of tensors under an accepted key; or two
        names that become equal without their prefix.
    """
    if Path(path).suffix == ".safetensors":
        return named_tensors(_load_safetensors(path), path), {}
    found = load_torch_file(path)
    if isinstance(found, dict):
        for key in keys:
            if isinstance(found.get(key), dict):
                return named_tensors(found[key], path), found
    expected = f"tensors, or a dictionary of tensors under one of {', '.join(keys)}"
    return named_tensors(found, path, expected), {}


def named_tensors(
    found: Any, where: str | os.PathLike[str], expected: str = "tensors"
) -> dict[str, np.ndarray]:
    """Returns a loaded dictionary of tensors without the prefixes that wrappers put before names.

    Args:
      found: what `load_torch_file` returned, or a part of it.
      where: what an error calls it, such as the file.
      expected: what an error asks for.

    Returns:
      Name -> array, without the leading `_orig_mod.` (torch.compile) and `module.` (data parallel).

    Raises:
      InputError: not a dictionary of tensors, or two names that become equal without their prefix.
    """
    if not isinstance(found, dict):
        raise InputError(f"{where}: holds a {type(found).__name__}, expected a dictionary")
    tensors: dict[str, np.ndarray] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise InputError(f"{where}: {name!r} is a {type(value).__name__}, expected {expected}")
        short = name
        while short.startswith(("_orig_mod.", "module.")):
            short = short.split(".", 1)[1]
        if short in tensors:
            raise InputError(f"{where}: two tensors are named {short} once prefixes are stripped")
        tensors[short] = value
    return tensors


def _load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except Exception as error:  # OSError, SafetensorError, or a dtype NumPy lacks
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable safetensors file ({reason})") from error


def _load_zip(archive: zipfile.ZipFile) -> Any:
    pickles = [n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise InputError(f"{len(pickles)} records named */data.pkl, expected 1")
    root = pickles[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise InputError(f"byte order {archive.read(order)!r}, expected little")
    stored: dict[str, bytes] = {}

    def read(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if key not in stored:
            stored[key] = archive.read(f"{root}data/{key}")
        if len(stored[key]) < count * dtype.itemsize:
            raise InputError(
                f"storage {key} has {len(stored[key])} bytes, expected {count} {dtype.name}"
            )
        return np.frombuffer(stored[key], dtype, count)

    return _Unpickler(archive.open(pickles[0]), read).load()


def _load_legacy(file: IO[bytes]) -> Any:
    """Reads the chain of pickles after the magic number, then the storages they speak of.

    Tensors are views of storages that are filled in afterwards, because the bytes come last.
    """
    size = os.fstat(file.fileno()).st_size
    stored: dict[str, np.ndarray] = {}

    def reserve(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if key not in stored:
            if count * dtype.itemsize + sum(x.nbytes for x in stored.values()) > size:
                raise InputError(f"storage {key} of {count} {dtype.name} is larger than the file")
            stored[key] = np.zeros(count, dtype)
        if stored[key].dtype != dtype or stored[key].size < count:
            raise InputError(f"storage {key} is named as {count} {dtype.name} and as another")
        return stored[key][:count]

    protocol, machine, found, keys = (_Unpickler(file, reserve).load() for _ in range(4))
    if protocol != 1001 or not machine["little_endian"]:
        raise InputError(f"protocol {protocol}, machine {machine}, expected 1001, little endian")
    if sorted(keys) != sorted(stored):
        raise InputError(f"lists {len(keys)} storages, expected the {len(stored)} its tensors use")
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        content = file.read(stored[key].nbytes)
        if count != stored[key].size or len(content) != stored[key].nbytes:
            raise InputError(
                f"storage {key} has {len(content)} bytes for {count} elements, "
                f"expected {stored[key].size} {stored[key].dtype.name}"
            )
        stored[key][:] = np.frombuffer(content, stored[key].dtype)
    return found


class _Unpickler(pickle.Unpickler):
    """Reads one pickle, resolving names to the stand-ins of `_allowed_globals`."""

    def __init__(self, file: IO[bytes], storage: Callable[[str, np.dtype, int], np.ndarray]):
        self._storage = storage
        self._globals = _allowed_globals()
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if module.split(".")[0] == "omegaconf":
            return _opaque(f"{module}.{name}")
        if (module, name) not in self._globals:
            raise InputError(f"names {module}.{name}, expected only tensors and plain data")
        return self._globals[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Finds a storage; pid is ("storage", type, key, device, number of elements).

        A legacy file adds None, or (key, offset, number of elements) of a part of the storage.
        """
        kind, dtype_name, key, _, count, *view = pid
        part = view[0][1:] if view and view[0] is not None else (0, count)
        numbers = (count, *part)
        whole = all(type(n) is int and n >= 0 for n in numbers) and sum(part) <= count
        if kind != "storage" or dtype_name not in _DTYPES or not whole or type(key) is not str:
            raise InputError(f"persistent id {pid!r}, expected a storage")
        elements = self._storage(key, _DTYPES[dtype_name], count)
        return _Storage(elements[part[0] : sum(part)])


class _Storage(NamedTuple):
    """One axis of elements; immutable, and made by `persistent_load` only."""

    elements: np.ndarray


def _opaque(name: str) -> type[Opaque]:
    return type("Opaque", (Opaque,), {"name": name})


class _Namespace(dict):
    """Stands for argparse.Namespace: a dict of its attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


class _Parameter(np.ndarray):
    """Stands for a parameter of torch before 0.4, whose state is whether it needs a gradient."""

    def __setstate__(self, state: Any) -> None:
        pass


class _NumpyDtype:
    """Stands for numpy.dtype: a name and a byte order, of numbers only."""

    def __init__(self, name: str, *_: Any):
        self._name, self._order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def resolve(self) -> np.dtype:
        if not re.fullmatch(r"[biufc]\d{1,2}", self._name) or self._order not in "<>=|":
            raise InputError(f"holds NumPy data of type {self._name!r}, expected numbers")
        return np.dtype(self._order + self._name)


class _NumpyArray(np.ndarray):
    """Stands for numpy.ndarray while it is filled in, so that only numbers ever enter it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran_order, data = state
        super().__setstate__((version, shape, dtype.resolve(), fortran_order, data))


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """Everything a checkpoint may name, with its stand-in.

    The functions are made anew for each file: a pickle can set attributes of a function it can
    name, and must not change one that outlives the reading.
    """

    def tensor(storage: Any, offset: int, size: _Ints, stride: _Ints, *_: Any) -> np.ndarray:
        return _strided(storage, offset, size, stride)

    def tensor_v3(
        storage: Any,
        offset: int,
        size: _Ints,
        stride: _Ints,
        grad: Any,
        hooks: Any,
        dtype: str,
        *_: Any,
    ) -> np.ndarray:
        return _strided(storage, offset, size, stride, dtype)

    def parameter(value: Any) -> np.ndarray:
        if not isinstance(value, np.ndarray):
            raise InputError(f"parameter over a {type(value).__name__}, expected a tensor")
        return value.view(_Parameter)

    def first(value: Any, *_: Any) -> Any:
        return value

    def empty_dict(*_: Any) -> dict[Any, Any]:
        return {}

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise InputError(f"bytes encoded as {encoding!r}, expected latin1")
        return text.encode("latin1")

    def scalar(dtype: _NumpyDtype, data: bytes) -> Any:
        return np.frombuffer(data, dtype.resolve(), 1)[0]

    def new_array(*_: Any) -> _NumpyArray:
        return np.ndarray.__new__(_NumpyArray, (0,), np.uint8)

    allowed: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor_v3"): tensor_v3,
        ("torch._utils", "_rebuild_parameter"): first,
        ("torch.nn.parameter", "Parameter"): parameter,
        ("torch", "Size"): tuple,
        ("torch", "device"): _opaque("torch.device"),
        ("torch.storage", "UntypedStorage"): _STORAGES["UntypedStorage"],
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "Counter"): dict,
        ("collections", "defaultdict"): empty_dict,
        ("argparse", "Namespace"): _Namespace,
        ("typing", "Any"): _opaque("typing.Any"),
        ("_codecs", "encode"): encode,
        ("numpy", "dtype"): _NumpyDtype,
        ("numpy", "ndarray"): _opaque("numpy.ndarray"),
    }
    for package in ("numpy.core", "numpy._core"):
        allowed[f"{package}.multiarray", "scalar"] = scalar
        allowed[f"{package}.multiarray", "_reconstruct"] = new_array
    allowed |= {("torch", name): dtype for name, dtype in _STORAGES.items()}
    allowed |= {("torch", name): name for name in _DTYPES}
    allowed |= {("builtins", t.__name__): t for t in (set, complex)}
    # Named as types by configurations, never as values.
    names = ("dict", "list", "tuple", "int", "long", "float", "bool", "str", "unicode", "bytes")
    return allowed | {("builtins", name): _opaque(name) for name in names}


def _strided(
    storage: Any, offset: int, size: _Ints, stride: _Ints, dtype: str | None = None
) -> np.ndarray:
    """The view of a storage that a tensor describes, after checking that it stays inside."""
    if not isinstance(storage, _Storage):
        raise InputError(f"tensor over a {type(storage).__name__}, expected a storage")
    elements = storage.elements if dtype is None else storage.elements.view(_DTYPES[dtype])
    numbers = (offset, *size, *stride)
    inside = len(size) == len(stride) and all(type(n) is int and n >= 0 for n in numbers)
    if inside and 0 in size:
        return np.zeros(size, elements.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
    if not inside or last >= elements.size:
        raise InputError(
            f"tensor of size {size}, stride {stride}, offset {offset}, "
            f"expected one inside its storage of {elements.size} elements"
        )
    strides = [step * elements.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(elements[offset:], size, strides, writeable=False)
