"""Norms, the gated MLP and dropout against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.dropout import dropout
from jaxllm.nn.mlp import Mlp, MlpConfig, swiglu_hidden
from jaxllm.nn.norm import GroupNorm, LayerNorm, NormConfig, RMSNorm, make_norm


def random(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm():
    x, scale = random(3, 4, 6, scale=5.0), random(6, seed=1)
    layer = RMSNorm(6)
    np.testing.assert_array_equal(layer.scale[...], 1.0)
    layer.scale[...] = jnp.asarray(scale)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)
    # eps decides for inputs near zero: rms 1e-4 against sqrt(1e-5).
    tiny = np.full((1, 6), 1e-4, np.float32)
    np.testing.assert_allclose(RMSNorm(6)(tiny), 1e-4 / np.sqrt(1e-8 + 1e-5), rtol=1e-5)


def test_rms_norm_is_float32_inside():
    """The result is the float32 one rounded once; squares in bfloat16 would be off by percents."""
    x = jnp.asarray(random(5, 4096, scale=3.0), jnp.bfloat16)
    found = RMSNorm(4096)(x)
    assert found.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8)


def test_rms_norm_with_unit_offset():
    layer = make_norm(6, NormConfig(eps=1e-6, unit_offset=True))
    np.testing.assert_array_equal(layer.scale[...], 0.0)
    x, offset = random(3, 6), random(6, seed=1)
    layer.scale[...] = jnp.asarray(offset)
    plain = RMSNorm(6, eps=1e-6)
    plain.scale[...] = jnp.asarray(1 + offset)
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-6)


def test_layer_norm():
    layer = make_norm(6, NormConfig("layer"))
    assert isinstance(layer, LayerNorm)
    layer.scale[...], layer.bias[...] = jnp.arange(6.0), -jnp.arange(6.0)
    x = random(2, 3, 6, scale=2.0) + 7.0
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * np.arange(6) - np.arange(6)
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormConfig("batch"), "norm kind 'batch' is not one of"),
        (lambda: NormConfig(eps=0.0), "norm eps 0.0 must be positive"),
        (lambda: NormConfig("layer", unit_offset=True), "unit_offset is for norm kind 'rms'"),
        (lambda: MlpConfig(0), "hidden 0 must be at least 1"),
        (lambda: MlpConfig(4, "tanh"), "activation 'tanh' is not one of"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_group_norm():
    x = random(2, 3, 4, 6, scale=2.0) + 7.0
    layer = GroupNorm(6, groups=3)
    layer.scale[...], layer.bias[...] = jnp.arange(6.0), -jnp.arange(6.0)
    expected = np.zeros(x.shape)
    for b in range(2):
        for group in range(3):
            part = x[b, :, :, 2 * group : 2 * group + 2].astype(np.float64)
            normal = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
            expected[b, :, :, 2 * group : 2 * group + 2] = normal
    np.testing.assert_allclose(layer(x), expected * np.arange(6) - np.arange(6), atol=1e-4)
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="6 channels do not split into 4 groups"):
        GroupNorm(6, groups=4)


def test_swiglu():
    layer = Mlp(4, MlpConfig(6), std=0.5, rngs=nnx.Rngs(params=jax.random.key(0)))
    x = random(3, 4)
    gate, up, down = (np.asarray(p[...], np.float64) for p in (layer.gate, layer.up, layer.down))
    a = x @ gate
    np.testing.assert_allclose(layer(x), (a / (1 + np.exp(-a)) * (x @ up)) @ down, atol=1e-5)


@pytest.mark.parametrize(("activation", "at_one"), [("gelu", 0.8413447), ("gelu_tanh", 0.8411920)])
def test_a_plain_mlp_with_biases(activation, at_one):
    config = MlpConfig(6, activation, gated=False, bias=True)
    layer = Mlp(4, config, std=0.5, rngs=nnx.Rngs(params=jax.random.key(0)))
    layer.up_bias[...], layer.down_bias[...] = jnp.arange(6.0) / 6, jnp.arange(4.0)
    x = random(3, 4)
    up, down = (np.asarray(p[...], np.float64) for p in (layer.up, layer.down))
    a = jax.nn.gelu(jnp.asarray(x @ up + np.arange(6) / 6), approximate=activation == "gelu_tanh")
    np.testing.assert_allclose(layer(x), a @ down + np.arange(4), atol=1e-5)
    # One input, one unit of weight one: the activation itself.
    one = Mlp(
        1, MlpConfig(1, activation, gated=False), std=0.5, rngs=nnx.Rngs(params=jax.random.key(0))
    )
    one.up[...] = one.down[...] = jnp.ones((1, 1))
    np.testing.assert_allclose(one(jnp.ones((1, 1))), [[at_one]], atol=1e-6)


def test_swiglu_hidden_of_the_released_sizes():
    sizes = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 2048: 5632}
    assert {dim: swiglu_hidden(dim) for dim in sizes} == sizes
    assert swiglu_hidden(48, multiple=32) == 128
    assert swiglu_hidden(100, multiple=1) == 266


def test_dropout():
    x = jnp.ones((100, 100))
    np.testing.assert_array_equal(dropout(x, 0.3, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)
    found = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(found), [0.0, 4 / 3], rtol=1e-6)
    # Four standard errors of the share that stays.
    np.testing.assert_allclose((found > 0).mean(), 0.75, atol=4 * np.sqrt(0.25 * 0.75 / 1e4))
    assert (dropout(x, 0.25, jax.random.key(1)) != found).any()
