"""Hugging Face folders in and out: golden logits, exact round trips, placement, refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_reference import CONFIGS, GOLDEN, logits, tokens, weight, write_folder
from safetensors.numpy import load_file, save_file

from jaxllm.errors import InputError
from jaxllm.hub.hf_folder import TensorFiles, is_hf_folder, load_decoder, save_decoder
from jaxllm.models.decoder import DECODER_RULES, DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import param_shardings


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_the_golden_ones_and_tensors_come_back_bit_for_bit(family, tmp_path):
    with np.load(GOLDEN / f"hf_{family}.npz") as golden:
        assert json.loads(str(golden["config"])) == CONFIGS[family]
        expected = golden["logits"]
    tensors = write_folder(tmp_path / "in", CONFIGS[family])
    config, blueprint, params = load_decoder(tmp_path / "in")
    found = logits(blueprint, params, tokens(config.vocab_size))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    save_decoder(tmp_path / "out", config, params, source=tmp_path / "in")
    assert same(load_file(tmp_path / "out/model.safetensors"), tensors)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == x.dtype and np.array_equal(found[name], x)
        for name, x in expected.items()
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_exact_both_ways(dtype, tmp_path):
    tensors = write_folder(tmp_path / "in", CONFIGS["gpt_neox"], dtype)
    config, blueprint, wide = load_decoder(tmp_path / "in")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    assert blueprint.build(wide, {}).dtype == jnp.float32
    _, blueprint, narrow = load_decoder(tmp_path / "in", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype(dtype)}
    assert blueprint.build(narrow, {}).hidden(tokens(37)).dtype == dtype
    save_decoder(tmp_path / "wide", config, wide, dtype=dtype)
    save_decoder(tmp_path / "narrow", config, narrow)
    for name in ("wide", "narrow"):
        assert same(load_file(tmp_path / name / "model.safetensors"), tensors)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["torch_dtype"] == np.dtype(dtype).name


def test_large_models_are_written_in_several_files_with_an_index(tmp_path):
    tensors = write_folder(tmp_path / "in", CONFIGS["llama"])
    config, _, params = load_decoder(tmp_path / "in")
    save_decoder(tmp_path / "out", config, params, max_file_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 6 and files[-1].name == "model-00006-of-00006.safetensors"
    assert all(sum(x.nbytes for x in load_file(file).values()) <= 20_000 for file in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    _, _, again = load_decoder(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_companions_and_token_ids_are_carried_over(tmp_path):
    config = CONFIGS["mistral"] | {"sliding_window": None, "eos_token_id": [2, 5]}
    write_folder(tmp_path / "in", config)
    (tmp_path / "in/tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "in/other.txt").write_text("stays")
    parsed, _, params = load_decoder(tmp_path / "in")
    (tmp_path / "out").mkdir()
    save_decoder(tmp_path / "out", parsed, params, source=tmp_path / "in")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"a": 1}'
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["eos_token_id"] == [2, 5] and written["model_type"] == "mistral"


def test_files_of_the_bare_model_and_recomputed_tables(tmp_path):
    tensors = write_folder(tmp_path, CONFIGS["gpt2"])
    _, _, expected = load_decoder(tmp_path)
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 24, 24), np.float32)
    save_file(bare, tmp_path / "model.safetensors")
    _, _, found = load_decoder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_repeat_of_tied_embeddings_must_be_one(tmp_path):
    embed = weight("model.embed_tokens.weight", (37, 32))
    write_folder(tmp_path, CONFIGS["qwen3"], **{"lm_head.weight": embed})
    load_decoder(tmp_path)
    write_folder(tmp_path, CONFIGS["qwen3"], **{"lm_head.weight": embed + 1})
    with pytest.raises(InputError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_decoder(tmp_path)


# -- placement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_host_reads_each_leaf_once_and_only_what_its_devices_hold(family, tmp_path, monkeypatch):
    tensors = write_folder(tmp_path, CONFIGS[family])
    reads = []
    read = TensorFiles.read

    def logged(self, name, ranges):
        found = read(self, name, ranges)
        reads.append((name, found.nbytes))
        return found

    monkeypatch.setattr(TensorFiles, "read", logged)
    config, _, expected = load_decoder(tmp_path)
    assert sum(size for _, size in reads) == sum(x.nbytes for x in tensors.values())
    reads.clear()
    mesh = make_mesh(MeshConfig(2, 2, 2))
    _, _, params = load_decoder(tmp_path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    shardings = param_shardings(decoder(config).abstract_params, DECODER_RULES, mesh)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
    # A tensor split over fsdp and tensor is read in four parts, none twice although the data axis
    # holds two copies. GPT-2's fused qkv keeps heads inside each third: both halves are read whole.
    twice = sum(x.nbytes for n, x in tensors.items() if "c_attn" in n)
    assert sum(size for _, size in reads) == sum(x.nbytes for x in tensors.values()) + twice
    down = {"llama": "layers.1.mlp.down_proj", "gpt2": "h.1.mlp.c_proj"}
    name = down.get(family, "layers.1.mlp.dense_4h_to_h") + ".weight"
    parts = [(n, size) for n, size in reads if n.endswith(name)]
    assert len(parts) == 4 and {size for _, size in parts} == {tensors[parts[0][0]].nbytes // 4}


def test_no_more_than_one_leaf_is_held_at_a_time(tmp_path, monkeypatch):
    """Blocks of NumPy memory that are alive at once, counted where they are made and freed."""
    write_folder(tmp_path, CONFIGS["llama"])
    alive, most, made = [0], [0], []

    class Counted(np.ndarray):
        def __del__(self):
            alive[0] -= self.nbytes if self.base is None else 0

    def counted(shape, dtype):
        block = Counted(shape, dtype)
        alive[0] += block.nbytes
        most[0] = max(most[0], alive[0])
        made.append(block.nbytes)
        return block

    place = jax.make_array_from_callback

    def copying(shape, sharding, block, dtype):
        # On a CPU the placed array may be the block itself.
        return place(shape, sharding, lambda index: np.array(block(index)), dtype=dtype)

    monkeypatch.setattr(jax, "make_array_from_callback", copying)
    monkeypatch.setattr("jaxllm.hub.hf_folder.np.empty", counted)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    config, _, params = load_decoder(tmp_path, mesh=mesh)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(made) == total > 3 * largest
    assert most[0] <= largest


# -- refusals -------------------------------------------------------------------------------------


def spoiled(x, value):
    x = x.copy()
    x[0, 0] = value
    return x


NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME: None}, f"tensor {NAME} is missing"),
        ({"model.layers.9.x": np.zeros(2, np.float32)}, "unknown tensor model.layers.9.x"),
        (
            {NAME: np.zeros((32, 16), np.float32)},
            rf"{NAME} has shape \(32, 16\), expected",
        ),
        ({NAME: np.zeros((16, 32), np.int32)}, f"{NAME} is I32, expected F32, F16, BF16"),
        ({NAME: spoiled(weight(NAME, (16, 32)), np.nan)}, f"{NAME} holds a value that is not fini"),
        ({"lm_head.weight": None}, "tensor lm_head.weight is missing"),
    ],
)
def test_bad_tensors_are_refused_by_name(changes, message, tmp_path):
    write_folder(tmp_path, CONFIGS["llama"], **changes)
    with pytest.raises(InputError, match=message) as error:
        load_decoder(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_values_that_overflow_the_wanted_dtype_are_refused(tmp_path):
    write_folder(tmp_path, CONFIGS["llama"], **{NAME: spoiled(weight(NAME, (16, 32)), 1e6)})
    load_decoder(tmp_path)
    with pytest.raises(InputError, match=f"{NAME} holds a value that is not finite in float16"):
        load_decoder(tmp_path, dtype=jnp.float16)


def test_bad_files_are_refused_by_name(tmp_path):
    write_folder(tmp_path, CONFIGS["llama"])
    single = tmp_path / "model.safetensors"
    content = single.read_bytes()
    for damaged in (b"", content[:100], content[:-7]):
        single.write_bytes(damaged)
        with pytest.raises(InputError, match="model.safetensors: not a readable safetensors file"):
            load_decoder(tmp_path)
    single.unlink()
    with pytest.raises(InputError, match="model.safetensors: not a readable safetensors file"):
        load_decoder(tmp_path)


def test_bad_indexes_are_refused_by_name(tmp_path):
    write_folder(tmp_path / "in", CONFIGS["llama"])
    config, _, params = load_decoder(tmp_path / "in")
    save_decoder(tmp_path / "out", config, params, max_file_bytes=20_000)
    path = tmp_path / "out/model.safetensors.index.json"
    index = json.loads(path.read_text())

    def refused(weight_map, message):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            load_decoder(tmp_path / "out")

    names = index["weight_map"]
    refused(names | {NAME: "../in/model.safetensors"}, "names a file outside the folder")
    refused(names | {NAME: "a.safetensors"}, "a.safetensors: not a readable")
    refused(names | {"lm_head.bias": names[NAME]}, f"{names[NAME]}: lacks lm_head.bias")
    refused({n: f for n, f in names.items() if n != NAME}, f"holds {NAME}, which .* elsewhere")
    refused([], "not a readable index with a weight_map")
    path.write_text("{")
    with pytest.raises(InputError, match="not a readable index"):
        load_decoder(tmp_path / "out")


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    write_folder(tmp_path / "in", CONFIGS["llama"])
    config, _, params = load_decoder(tmp_path / "in")
    with pytest.raises(InputError, match="exists, expected a new or an empty folder"):
        save_decoder(tmp_path / "in", config, params)
    with pytest.raises(InputError, match="expected the source folder"):
        save_decoder(tmp_path / "out", config, params, source=tmp_path)
    broken = params | {"norm": {"scale": object()}}
    with pytest.raises(TypeError):
        save_decoder(tmp_path / "out", config, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_a_hugging_face_folder(tmp_path):
    assert not is_hf_folder(tmp_path) and not is_hf_folder(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert not is_hf_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert is_hf_folder(tmp_path)


def test_fresh_models_go_out_and_come_back(tmp_path):
    config = DecoderConfig(
        vocab_size=11, dim=8, layers=1, attention=AttentionConfig(2, 1, 4), mlp=MlpConfig(12)
    )
    params, _ = jax.jit(decoder(config).init)(jax.random.key(0))
    save_decoder(tmp_path / "out", config, params)
    back, blueprint, found = load_decoder(tmp_path / "out")
    assert back == config
    jax.tree.map(np.testing.assert_array_equal, found, params)
