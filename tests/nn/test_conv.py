"""Convolutional blocks by hand and against loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.nn.conv import Conv, Downsample, ResnetBlock, SpatialAttention, Upsample


def rngs():
    return nnx.Rngs(params=jax.random.key(0))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_conv_equals_loops():
    layer = Conv(2, 3, rngs=rngs())
    layer.bias[...] = jnp.array([1.0, 2.0, 3.0])
    x, kernel = random(1, 4, 5, 2), np.asarray(layer.kernel[...])
    padded = np.pad(x[0], ((1, 1), (1, 1), (0, 0)))
    expected = np.zeros((4, 5, 3))
    for i, j in np.ndindex(4, 5):
        expected[i, j] = np.einsum("hwc,hwco->o", padded[i : i + 3, j : j + 3], kernel) + [1, 2, 3]
    np.testing.assert_allclose(layer(x)[0], expected, atol=1e-5)
    doubled = layer(x, 2 * layer.kernel[...])[0]
    np.testing.assert_allclose(doubled - np.array([1, 2, 3]), 2 * (expected - [1, 2, 3]), atol=1e-5)
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_conv_initialisation():
    fan_in = 9 * 64
    kernel = np.asarray(Conv(64, 64, rngs=rngs()).kernel[...])
    assert np.abs(kernel).max() <= fan_in**-0.5
    np.testing.assert_allclose(kernel.var(), 1 / (3 * fan_in), rtol=0.02)
    given = np.asarray(Conv(64, 64, std=0.02, rngs=rngs()).kernel[...])
    np.testing.assert_allclose(given.std(), 0.02, rtol=0.02)
    assert not hasattr(Conv(2, 2, bias=False, rngs=rngs()), "bias")


def test_downsample_pads_the_bottom_and_the_right_only():
    layer = Downsample(1, rngs=rngs())
    layer.conv.kernel[...] = jnp.arange(1.0, 10.0).reshape(3, 3, 1, 1)
    x = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    # Windows start at rows and columns 0 and 2; index 4 is the row or column of zeros.
    by_hand = [
        [
            1 * 1 + 2 * 2 + 3 * 3 + 4 * 5 + 5 * 6 + 6 * 7 + 7 * 9 + 8 * 10 + 9 * 11,
            1 * 3 + 2 * 4 + 4 * 7 + 5 * 8 + 7 * 11 + 8 * 12,
        ],
        [
            1 * 9 + 2 * 10 + 3 * 11 + 4 * 13 + 5 * 14 + 6 * 15,
            1 * 11 + 2 * 12 + 4 * 15 + 5 * 16,
        ],
    ]
    np.testing.assert_allclose(layer(x)[0, :, :, 0], by_hand)


def test_upsample_is_nearest_neighbour():
    layer = Upsample(1, rngs=rngs())
    layer.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)  # Nothing but a copy.
    found = layer(jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1))[0, :, :, 0]
    np.testing.assert_array_equal(found, [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])


def group_norm(x, groups):
    grouped = x.reshape(*x.shape[:2], groups, -1).astype(np.float64)
    centred = grouped - grouped.mean((0, 1, 3), keepdims=True)
    return (centred / np.sqrt((centred**2).mean((0, 1, 3), keepdims=True) + 1e-6)).reshape(x.shape)


def test_spatial_attention_is_one_head_with_scale_by_channels():
    layer = SpatialAttention(8, groups=2, rngs=rngs())
    x = random(1, 2, 3, 8)
    flat = group_norm(x[0], 2).reshape(6, 8)
    q, k, v = (flat @ np.asarray(f.kernel[...])[0, 0] * 1.0 for f in (layer.q, layer.k, layer.v))
    scores = q @ k.T / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    expected = x[0] + (mixed @ np.asarray(layer.out.kernel[...])[0, 0]).reshape(2, 3, 8)
    np.testing.assert_allclose(layer(x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("outputs", [4, 6])
def test_resnet_block(outputs):
    layer = ResnetBlock(4, outputs, groups=2, rngs=rngs())
    assert hasattr(layer, "shortcut") == (outputs != 4)
    x = random(1, 3, 3, 4)

    def silu(a):
        return a / (1 + np.exp(-a))

    h = np.asarray(layer.conv1(jnp.asarray(silu(group_norm(x[0], 2))[None], jnp.float32)))
    h = layer.conv2(jnp.asarray(silu(group_norm(h[0], 2))[None], jnp.float32))
    expected = h + (x if outputs == 4 else layer.shortcut(x))
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
