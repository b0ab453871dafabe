"""Norms, the gated MLP and dropout against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.nn.dropout import dropout
from jaxllm.nn.mlp import SwiGLU, swiglu_hidden
from jaxllm.nn.norm import GroupNorm, RMSNorm


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
    layer = SwiGLU(4, 6, std=0.5, rngs=nnx.Rngs(params=jax.random.key(0)))
    x = random(3, 4)
    gate, up, down = (np.asarray(p[...], np.float64) for p in (layer.gate, layer.up, layer.down))
    a = x @ gate
    np.testing.assert_allclose(layer(x), (a / (1 + np.exp(-a)) * (x @ up)) @ down, atol=1e-5)


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
