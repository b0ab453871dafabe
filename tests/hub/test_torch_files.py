"""Checkpoints written by hand with pickle and zipfile, hostile ones among them; no torch needed."""

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_writer import (
    Call,
    Global,
    Part,
    Storage,
    TorchPickler,
    tensor,
    write,
    write_legacy,
)

from jaxllm.errors import InputError
from jaxllm.hub.torch_files import Opaque, load_state_dict, load_torch_file

TAEF2 = Path(__file__).parents[2].parent / "shared/data/taef2/taef2_encoder.pth"


SIX = Storage("0", "FloatStorage", 6)
SIX_DATA = {"0": np.arange(6, dtype=np.float32)}


def test_strides_offsets_and_shared_storages(tmp_path):
    saved = OrderedDict(
        whole=tensor(SIX, (2, 3), (3, 1)),
        transposed=tensor(SIX, (3, 2), (1, 3)),
        tail=tensor(SIX, (2,), (1,), offset=4, parameter=True),
        every_second=tensor(SIX, (3,), (2,), offset=1),
        expanded=tensor(SIX, (2, 2), (0, 1)),
        scalar=tensor(SIX, (), (), offset=5),
        empty=tensor(SIX, (0, 3), (3, 1), offset=6),
    )
    loaded = load_torch_file(write(tmp_path / "a.pt", saved, SIX_DATA))
    expected = {
        "whole": [[0, 1, 2], [3, 4, 5]],
        "transposed": [[0, 3], [1, 4], [2, 5]],
        "tail": [4, 5],
        "every_second": [1, 3, 5],
        "expanded": [[0, 1], [0, 1]],
        "scalar": 5,
        "empty": np.zeros((0, 3)),
    }
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], np.asarray(array, np.float32), strict=True)


def test_element_types(tmp_path):
    arrays = {
        "DoubleStorage": np.array([0.1, -1]),
        "HalfStorage": np.array([0.1, -1], np.float16),
        "BFloat16Storage": np.array([0.1, -1], ml_dtypes.bfloat16),
        "LongStorage": np.array([-(2**60), 3]),
        "IntStorage": np.array([-(2**30), 3], np.int32),
        "ShortStorage": np.array([-300, 3], np.int16),
        "CharStorage": np.array([-3, 3], np.int8),
        "ByteStorage": np.array([250, 3], np.uint8),
        "BoolStorage": np.array([True, False]),
        "ComplexFloatStorage": np.array([1j, 2], np.complex64),
    }
    saved = {kind: tensor(Storage(kind, kind, 2), (2,), (1,)) for kind in arrays}
    v3 = Global("torch._utils", "_rebuild_tensor_v3")
    untyped = ("storage", Global("torch.storage", "UntypedStorage"), "CharStorage", "cpu", 2)

    class UntypedPickler(TorchPickler):
        def persistent_id(self, obj):
            return untyped if obj == "untyped" else super().persistent_id(obj)

    saved["v3"] = Call(
        v3, ("untyped", 0, (1,), (1,), False, OrderedDict(), Global("torch", "uint16"))
    )
    buffer = io.BytesIO()
    UntypedPickler(buffer, 2).dump(saved)
    path = write(tmp_path / "a.pt", None, arrays, buffer.getvalue())
    loaded = load_torch_file(path)
    for kind, array in arrays.items():
        np.testing.assert_array_equal(loaded[kind], array, strict=True)
    np.testing.assert_array_equal(loaded["v3"], np.array([0x03FD], np.uint16), strict=True)


def test_what_training_scripts_save_beside_tensors(tmp_path):
    metadata = OrderedDict({"": {"version": 1}})
    config = Global("omegaconf.dictconfig", "DictConfig")
    new = Call(Global("torch", "Size"), ((2, 3),))
    any_type = Global("typing", "Any")
    state = OrderedDict(w=tensor(SIX, (6,), (1,)))
    state._metadata = metadata
    saved = {
        "model": state,
        "args": argparse.Namespace(lr=0.1, name="B"),
        "epoch": 3,
        "size": new,
        "config": Call(config, (), {"_content": {"type": any_type}}),
        "best": np.float64(0.25),
        "rng": ("MT19937", np.arange(4, dtype=np.uint32), 7),
    }
    loaded = load_torch_file(write(tmp_path / "a.pt", saved, SIX_DATA))
    assert loaded["args"] == {"lr": 0.1, "name": "B"} and isinstance(loaded["args"], dict)
    assert (loaded["epoch"], loaded["size"], loaded["best"]) == (3, (2, 3), 0.25)
    assert isinstance(loaded["config"], Opaque)
    assert loaded["config"].name == "omegaconf.dictconfig.DictConfig"
    np.testing.assert_array_equal(loaded["rng"][1], np.arange(4, dtype=np.uint32))
    np.testing.assert_array_equal(loaded["model"]["w"], SIX_DATA["0"])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("numpy", "load"),
        ("torch", "load"),
        ("torch.nn.modules.linear", "Linear"),
        ("jaxllm.hub.torch_files", "load_torch_file"),
    ],
)
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, module, name):
    marker = tmp_path / "ran"
    path = write(tmp_path / "a.pt", {"w": Call(Global(module, name), (f"touch {marker}",))})
    shown = f"{module}.{name}".replace("__builtin__", "builtins")
    with pytest.raises(InputError, match=f"a.pt: names {shown}, expected"):
        load_torch_file(path)
    assert not marker.exists()


def test_a_pickle_cannot_change_what_the_next_file_sees(tmp_path):
    # Push an allowed function, build it with the state {"mark": 1}: sets an attribute on it.
    name = b"ctorch._utils\n_rebuild_parameter\n"
    path = write(tmp_path / "a.pt", None, pickled=b"\x80\x02" + name + b"}U\x04markK\x01sb.")
    assert load_torch_file(path).mark == 1
    path = write(tmp_path / "b.pt", None, pickled=b"\x80\x02" + name + b".")
    assert not hasattr(load_torch_file(path), "mark")


@pytest.mark.parametrize(
    ("saved", "culprit"),
    [
        (tensor(SIX, (2, 3), (3, 1), offset=1), "offset 1"),
        (tensor(SIX, (2, 3), (6, 1)), r"stride \(6, 1\)"),
        (tensor(SIX, (3,), (-1,), offset=3), r"stride \(-1,\)"),
        (tensor(SIX, (-1,), (1,)), r"size \(-1,\)"),
        (tensor(SIX, (2,), (1, 1)), r"size \(2,\)"),
        (tensor(SIX, (2**62, 2**62), (0, 0)), "not a readable"),
        (tensor(Storage("0", "FloatStorage", 7), (7,), (1,)), "24 bytes"),
        (tensor(Storage("0", "FloatStorage", -1), (7,), (1,)), "persistent id"),
        (tensor(Storage("9", "FloatStorage", 1), (1,), (1,)), "data/9"),
        (tensor([1.0], (1,), (1,)), "over a list"),
        (tensor(np.zeros(2), (1,), (1,)), "over a _NumpyArray"),
        (np.array(["text"]), "'U4'"),
        (np.array([{}], object), "'O8'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, saved, culprit):
    with pytest.raises(InputError, match=culprit):
        load_torch_file(write(tmp_path / "a.pt", saved, SIX_DATA))


def test_legacy_files_with_views_and_old_parameters(tmp_path):
    two = Storage("1", "HalfStorage", 2)
    old = Call(Global("torch._utils", "_rebuild_tensor"), (SIX, 1, (2,), (3,)))
    parameter = Global("torch.nn.parameter", "Parameter")
    saved = OrderedDict(
        transposed=tensor(SIX, (3, 2), (1, 3)),
        half=tensor(two, (2,), (1,)),
        part=tensor(Part(SIX, ("9", 3, 2)), (2,), (1,)),
        old=old,
        parameter=Call(parameter, (old,), (True, False, OrderedDict())),
    )
    stored = SIX_DATA | {"1": np.array([0.5, -2], np.float16)}
    loaded = load_torch_file(write_legacy(tmp_path / "a.pth", {"state_dict": saved}, stored))
    expected = {
        "transposed": np.array([[0, 3], [1, 4], [2, 5]], np.float32),
        "half": stored["1"],
        "part": np.array([3, 4], np.float32),
        "old": np.array([1, 4], np.float32),
        "parameter": np.array([1, 4], np.float32),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded["state_dict"][name], array)
        assert loaded["state_dict"][name].dtype == array.dtype
    assert list(load_state_dict(tmp_path / "a.pth")) == list(expected)


def test_damaged_or_hostile_legacy_files(tmp_path):
    path, w = tmp_path / "a.pth", {"w": tensor(SIX, (6,), (1,))}
    good = write_legacy(path, w, SIX_DATA).read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(InputError, match="storage 0 has 23 bytes"):
        load_torch_file(path)
    path.write_bytes(good[:40])
    with pytest.raises(InputError, match="not a readable torch checkpoint"):
        load_torch_file(path)
    large = Storage("0", "FloatStorage", 2**40)
    other = {"w": w["w"], "x": tensor(Storage("0", "IntStorage", 6), (6,), (1,))}
    outside = {"w": tensor(Part(SIX, ("9", 3, 4)), (4,), (1,))}
    big_endian = {"little_endian": False}
    cases = [
        (({"w": tensor(large, (1,), (1,))}, SIX_DATA), {}, "larger than the file"),
        ((other, SIX_DATA), {}, "named as 6 int32 and as another"),
        ((outside, SIX_DATA), {}, "persistent id"),
        ((w, SIX_DATA), {"counts": {"0": 7}}, "24 bytes for 7 elements"),
        ((w, SIX_DATA), {"keys": []}, "lists 0 storages, expected the 1"),
        ((w, SIX_DATA), {"machine": big_endian}, "expected 1001, little endian"),
        (({"w": Global("os", "system")}, SIX_DATA), {}, "names os.system"),
    ]
    for arguments, options, culprit in cases:
        with pytest.raises(InputError, match=culprit):
            load_torch_file(write_legacy(path, *arguments, **options))


def test_files_that_are_no_checkpoint(tmp_path):
    good = write(tmp_path / "a.pt", {"w": tensor(SIX, (6,), (1,))}, SIX_DATA).read_bytes()
    pickled = pickle.dumps({"w": SIX_DATA["0"]}, 2)
    legacy = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    cases = {
        "truncated": (good[: len(good) // 2], "BadZipFile"),
        "empty": (b"", "BadZipFile"),
        "legacy that ends early": (legacy, "EOFError"),
        "bare pickle": (pickled, "BadZipFile"),
        "damaged": (good.replace(SIX_DATA["0"].tobytes(), b"\xff" * 24), "CRC"),
    }
    path = tmp_path / "b.pt"
    for content, culprit in cases.values():
        path.write_bytes(content)
        with pytest.raises(InputError, match=culprit) as error:
            load_torch_file(path)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "no pickle")
    with pytest.raises(InputError, match="0 records named"):
        load_torch_file(path)
    write(path, None, pickled=b"\x80\x02}U\x01wK")
    with pytest.raises(InputError, match="not a readable"):
        load_torch_file(path)
    with pytest.raises(InputError, match="No such file"):
        load_torch_file(tmp_path / "absent.pt")


def test_state_dict_under_accepted_keys_without_prefixes(tmp_path):
    w = tensor(SIX, (6,), (1,))
    named = OrderedDict({"_orig_mod.module.layers.0.weight": w, "module_list.bias": w})
    for saved in ({"epoch": 1, "model": named}, {"state_dict": named, "optimizer": {}}, named):
        path = write(tmp_path / "a.pt", saved, SIX_DATA)
        assert list(load_state_dict(path)) == ["layers.0.weight", "module_list.bias"]
    path = write(tmp_path / "a.pt", {"model": {"a": w}, "ema": {"b": w}}, SIX_DATA)
    assert list(load_state_dict(path, keys=("ema",))) == ["b"]
    cases = [
        ({"weights": {"a": w}}, "'weights' is a dict"),
        ({"model": {"module.a": w, "a": w}}, "two tensors are named a"),
        ([w], "holds a list"),
    ]
    for saved, culprit in cases:
        with pytest.raises(InputError, match=culprit):
            load_state_dict(write(path, saved, SIX_DATA))


def test_state_dict_from_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {"module.a": np.arange(3, dtype=np.float16), "b": np.ones((2, 1), ml_dtypes.bfloat16)}
    save_file(arrays, path)
    loaded = load_state_dict(path)
    np.testing.assert_array_equal(loaded["a"], arrays["module.a"], strict=True)
    np.testing.assert_array_equal(loaded["b"], arrays["b"], strict=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="a.safetensors: not a readable safetensors file"):
        load_state_dict(path)


@pytest.mark.skipif(not TAEF2.exists(), reason="the TAEF2 weights are not beside the repository")
def test_real_half_precision_checkpoint():
    tensors = load_state_dict(TAEF2)
    assert len(tensors) == 79 and sum(t.size for t in tensors.values()) == 1_338_528
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    assert tensors["0.weight"].shape == (64, 3, 3, 3) and tensors["14.bias"].shape == (32,)
    assert all(np.isfinite(t).all() for t in tensors.values())


@pytest.mark.parametrize("zipped", [True, False])
def test_parity_with_torch(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    shared = torch.arange(12.0).reshape(3, 4)
    saved = {
        "model": model.state_dict(),
        "extra": {"t": shared.T, "row": shared[1], "p": torch.nn.Parameter(shared[:, ::2])},
        "u16": torch.arange(3).to(torch.uint16),
        "args": argparse.Namespace(dtype=torch.float32, device=torch.device("cpu")),
    }
    path = tmp_path / "a.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    loaded = load_torch_file(path)
    for name, value in saved["model"].items():
        np.testing.assert_array_equal(
            loaded["model"][name].astype(np.float32), value.float().numpy()
        )
    for name, value in saved["extra"].items():
        np.testing.assert_array_equal(loaded["extra"][name], value.detach().numpy(), strict=True)
    np.testing.assert_array_equal(loaded["u16"], np.arange(3, dtype=np.uint16), strict=True)
    assert loaded["args"]["dtype"] == "float32"
