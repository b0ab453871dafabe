"""FSQ: index bijection, golden values of the bound, integer arithmetic, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.quantize import FSQ


def preimage(config, vectors):
    """Inputs that are bounded onto the grid vectors, or just inside them at the margin."""

    def artanh(x):
        return np.arctanh(np.clip(x, -1 + 1e-6, 1 - 1e-6))

    levels = np.asarray(config.levels, np.float64)
    half = (levels - 1) * (1 - config.eps) / 2
    if config.symmetric:
        return artanh(np.asarray(vectors, np.float64) * (levels - 1) / 2 / half)
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    steps = np.asarray(vectors, np.float64) * (levels // 2)
    return artanh((steps + offset) / half) - np.arctanh(offset / half)


@pytest.mark.parametrize(
    ("levels", "size"), [((8, 6, 5), 240), ((8, 5, 5, 5), 1000), ((7, 5, 5, 5, 5), 4375)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_index_is_a_bijection(levels, size, symmetric, quantize):
    config = FSQ(levels, symmetric=symmetric)
    assert config.size == size
    codes = jnp.arange(size)[:, None]
    vectors = config.decode({}, {}, codes)
    assert len(np.unique(np.asarray(vectors), axis=0)) == size
    np.testing.assert_array_equal(config.codes(vectors), codes)
    output = quantize(config, {}, {}, jnp.asarray(preimage(config, vectors)), train=False)
    np.testing.assert_array_equal(output.codes, codes)
    np.testing.assert_array_equal(output.quantized, vectors)


def test_golden_values_for_levels_four_and_five(quantize):
    """By hand: level 4 takes -2..1 over 2, level 5 takes -2..2 over 2; basis (1, 4)."""
    config = FSQ((4, 5))
    z = jnp.array([[0.0, 0.0], [9.0, 9.0], [-9.0, -9.0], [0.5, 0.3]])
    output = quantize(config, {}, {}, z, train=False)
    # tanh(.5 + atanh(.5/1.4985)) 1.4985 - .5 = .524 -> 1;  tanh(.3) 1.998 = .582 -> 1
    expected = [[0.0, 0.0], [0.5, 1.0], [-1.0, -1.0], [0.5, 0.5]]
    np.testing.assert_array_equal(output.quantized, expected)
    np.testing.assert_array_equal(output.codes[:, 0], [2 + 2 * 4, 3 + 4 * 4, 0, 3 + 3 * 4])


def test_zero_is_bounded_to_zero():
    """With `tan` instead of `atanh` for the shift of even levels it is off by 1e-4."""
    config = FSQ((8, 6, 5, 4))
    bounded = config._bound(jnp.zeros(4)) - jnp.array([4.0, 3.0, 2.0, 2.0])
    np.testing.assert_allclose(bounded, 0.0, atol=1e-6)


def test_fsq_index_is_integer_arithmetic(quantize):
    """2^30 codes: the largest indices are not float32 numbers."""
    config = FSQ((32,) * 6, symmetric=True)
    z = jnp.array([[20.0] * 6, [-20.0] + [20.0] * 5, [20.0] * 5 + [-20.0]])
    output = quantize(config, {}, {}, z, train=False)
    expected = [2**30 - 1, 2**30 - 32, 2**25 - 1]
    np.testing.assert_array_equal(output.codes[:, 0], expected)
    assert int(np.float32(expected[0])) != expected[0]
    np.testing.assert_array_equal(config.decode({}, {}, output.codes), output.quantized)
    np.testing.assert_array_equal(config.digits(output.codes)[1], [0, 31, 31, 31, 31, 31])
    trace = str(jax.make_jaxpr(config._pack)(jnp.zeros((1, 6), jnp.int32)))
    assert "f32" not in trace


def test_symmetric_levels_cover_minus_one_to_one():
    config = FSQ((2, 3, 4), symmetric=True)
    table = np.asarray(config.codebook({}, {})[0])
    np.testing.assert_allclose(np.unique(table[:, 0]), [-1, 1])
    np.testing.assert_allclose(np.unique(table[:, 1]), [-1, 0, 1])
    np.testing.assert_allclose(np.unique(table[:, 2]), [-1, -1 / 3, 1 / 3, 1], atol=1e-6)


def test_gradient_is_that_of_the_bound(quantize):
    config = FSQ((8, 5))
    z = jnp.array([0.3, -0.7])
    gradient = jax.grad(lambda z: quantize(config, {}, {}, z, train=True).quantized.sum())(z)
    half = np.array([7.0, 4.0]) * 0.999 / 2
    shift = np.array([np.arctanh(0.5 / half[0]), 0.0])
    expected = half / np.array([4.0, 2.0]) * (1 - np.tanh(np.asarray(z) + shift) ** 2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_extreme_inputs_stay_on_the_grid(quantize):
    config = FSQ((8, 5, 3))
    z = jnp.array([[1e30, -1e30, 1e30], [-jnp.inf, jnp.inf, -jnp.inf]])
    output = quantize(config, {}, {}, z, train=False)
    np.testing.assert_array_equal(output.quantized, [[0.75, -1, 1], [-1, 1, -1]])
