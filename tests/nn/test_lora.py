"""LoRA: adapted in the scan = merged beforehand, only adapters have gradients, bad targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxllm.errors import InputError
from jaxllm.models.decoder import DECODER_KERNELS, DECODER_RULES, DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.lora import LoraConfig, init_adapters, lora_rules, merge
from jaxllm.nn.mlp import MlpConfig
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import leaf_paths, param_shardings

CONFIG = DecoderConfig(
    vocab_size=19,
    dim=16,
    layers=3,
    attention=AttentionConfig(4, 2, 4),
    mlp=MlpConfig(24),
    windows=(None, 4, 4),
    init_std=0.3,
)
LORA = LoraConfig(rank=2, alpha=6.0)
BLUEPRINT = decoder(CONFIG)


@pytest.fixture(scope="module")
def trees():
    params = jax.jit(BLUEPRINT.init)(jax.random.key(0))[0]
    fresh = init_adapters(jax.random.key(1), params, LORA, DECODER_KERNELS)
    leaves, structure = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return params, fresh, jax.tree.unflatten(structure, moved)


def hidden(params, adapters):
    tokens = jnp.arange(14).reshape(2, 7) % CONFIG.vocab_size
    given = None if adapters is None else (adapters, LORA.scale)
    return BLUEPRINT.build(params, {}).hidden(tokens, adapters=given)


def test_fresh_adapters_change_nothing_and_trained_ones_equal_the_merged_model(trees):
    params, fresh, moved = trees
    run = jax.jit(hidden)
    plain = run(params, None)
    np.testing.assert_array_equal(run(params, fresh), plain)
    adapted = run(params, moved)
    assert np.abs(adapted - plain).max() > 0.1
    merged = merge(params, moved, LORA, DECODER_KERNELS)
    np.testing.assert_allclose(adapted, run(merged, None), atol=2e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_the_merged_kernel_by_hand():
    kernel, kernels = jnp.zeros((2, 3)), ((r"^w$", 0, 1),)
    adapters = {"w": {"a": jnp.array([[1.0], [2.0], [0.0]])[:2], "b": jnp.array([[1.0, 0.0, -1]])}}
    found = merge({"w": kernel}, adapters, LoraConfig(1, 0.5), kernels)["w"]
    np.testing.assert_allclose(found, [[0.5, 0, -0.5], [1, 0, -1]])


def test_targets_choose_kernels_and_every_adapter_gets_a_gradient(trees):
    params, _, moved = trees
    some = dataclasses.replace(LORA, targets=("attn/qkv$", "down"))
    few = init_adapters(jax.random.key(0), params, some, DECODER_KERNELS)
    assert sorted(flatten_dict(few, sep="/")) == [
        f"layers/{kernel}/{part}" for kernel in ("attn/qkv", "mlp/down") for part in "ab"
    ]
    loss = lambda a: jnp.sum(hidden(params, a) ** 3)  # noqa: E731
    for path, gradient in leaf_paths(jax.jit(jax.grad(loss))(moved)):
        assert np.abs(gradient).max() > 0, path


def test_adapters_are_placed_like_their_kernels(trees):
    params, fresh, _ = trees
    paths = [path for path, _ in leaf_paths(params)]
    rules = lora_rules(DECODER_RULES, DECODER_KERNELS, paths)
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    specs = {p: tuple(s.spec) for p, s in leaf_paths(param_shardings(fresh, rules, mesh))}
    assert specs["layers/mlp/up/a"] == (None, "fsdp", None)
    assert specs["layers/mlp/up/b"] == (None, None, "tensor")
    assert specs["layers/attn/out/a"] == (None, "tensor", None, None)
    assert specs["layers/attn/out/b"] == (None, None, "fsdp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank 0"),
        ({"alpha": 0.0}, "lora.alpha 0.0"),
        ({"targets": ("(",)}, "no regular expression"),
        ({"targets": ("mlp/up$", "embed")}, "'embed' chooses none of the kernels"),
    ],
)
def test_bad_settings_are_refused(trees, options, message):
    with pytest.raises(InputError, match=message):
        init_adapters(jax.random.key(0), trees[0], LoraConfig(**options), DECODER_KERNELS)
