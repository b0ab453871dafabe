"""Rotary tables: relative positions, the class token, and the pairs that turn."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_code_models import CASES, random_model

from jaxllm.errors import InputError
from jaxllm.nn.rope import (
    RopeConfig,
    apply_rotary,
    grid_coordinates,
    rotary_frequencies,
    rotary_rows,
    rotary_table,
)

Q, K = jax.random.normal(jax.random.key(0), (2, 8))


def scores(table):
    """q . k [T, T] for one query and one key vector put at every position."""
    length = table[0].shape[0]
    put = [apply_rotary(jnp.broadcast_to(x, (1, length, 1, 8)), table)[0, :, 0] for x in (Q, K)]
    return np.asarray(put[0] @ put[1].T)


def test_one_dimension_depends_on_the_distance_only():
    found = scores(rotary_table(np.arange(40), 8))
    for distance in range(-39, 40):
        same = np.diagonal(found, distance)
        np.testing.assert_allclose(same, same[0], atol=1e-5)
    assert np.ptp(found) > 0.5


def test_two_dimensions_depend_on_both_distances_only():
    height, width = 4, 6
    found = scores(rotary_table(grid_coordinates(height, width), 8)).reshape(*[height, width] * 2)
    for row in range(height):
        for column in range(width):
            for a, b in ((1, 2), (-1, 3), (0, -1)):
                if 0 <= row + a < height and 0 <= column + b < width:
                    one, other = found[row, column, row + a, column + b], (max(0, -a), max(0, -b))
                    corner = found[*other, other[0] + a, other[1] + b]
                    np.testing.assert_allclose(one, corner, atol=1e-5)
    assert abs(found[0, 0, 0, 1] - found[0, 0, 1, 0]) > 0.01  # Rows and columns are not the same.


def test_angles_and_pairs_by_hand():
    cos, sin = rotary_table(np.array([[2, 3]]), 8, base=100.0)
    # Two frequencies 1 and 1/10 for each axis, rows first.
    np.testing.assert_allclose(cos[0], np.cos([2, 0.2, 3, 0.3]), atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin([2, 0.2, 3, 0.3]), atol=1e-6)
    cos, sin = rotary_table(np.array([1]), 4)
    turned = apply_rotary(jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4), (cos, sin)).ravel()
    a, b = 1.0, 0.01
    expected = [
        np.cos(a) - 2 * np.sin(a),
        2 * np.cos(a) + np.sin(a),
        3 * np.cos(b) - 4 * np.sin(b),
        4 * np.cos(b) + 3 * np.sin(b),
    ]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_large_positions_keep_their_distance():
    """Angles in bfloat16 could not tell 257 from 256."""
    table = rotary_table(np.array([256, 257, 4096, 4097]), 8)
    found = scores(table)
    np.testing.assert_allclose(found[0, 1], found[2, 3], atol=1e-4)
    half = apply_rotary(jnp.ones((1, 4, 1, 8), jnp.bfloat16), table)
    assert half.dtype == jnp.bfloat16 and (half[0, 0] != half[0, 1]).any()


def test_a_head_size_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="head_dim 6 does not split into 2"):
        rotary_table(grid_coordinates(2, 2), 6)


@pytest.mark.parametrize("quirk", ["identity", "zero"])
def test_the_class_token(quirk):
    """`zero` makes its q and k the zero vector: every position gives it attention logit 0."""
    config = dataclasses.replace(CASES["dnd"], class_rotary=quirk)
    blueprint, params, extra = random_model(config)
    table = blueprint.build(params, extra).rotary()
    x = jax.random.normal(jax.random.key(1), (1, config.cells, 2, 8))
    turned = apply_rotary(x, table)
    np.testing.assert_allclose(turned[:, 0], x[:, 0] * (quirk == "identity"))
    logits = jnp.einsum("btnh,bsnh->bnts", turned, turned)
    assert (np.asarray(logits[..., 0]) == 0).all() == (quirk == "zero")
    # Position t carries cell t - 1 and has its coordinates.
    expected = rotary_table(grid_coordinates(2, 2)[:-1], 8)
    np.testing.assert_array_equal(table[0][1:], expected[0])
    np.testing.assert_array_equal(table[1][1:], expected[1])


def test_flat_repeats_the_coordinates_of_a_cell():
    config = CASES["flat"]
    blueprint, params, extra = random_model(config)
    cos, sin = blueprint.build(params, extra).rotary()
    cells = np.repeat(grid_coordinates(2, 2), 3, axis=0)[:-1]
    expected = rotary_table(cells, 8)
    np.testing.assert_array_equal(cos[1:], expected[0])
    np.testing.assert_array_equal(sin[1:], expected[1])


# -- positions of a language model ----------------------------------------------------------------


def test_rows_of_positions_equal_the_table():
    table = rotary_table(np.arange(50), 8)
    positions = np.array([[3, 0, 49], [-1, 7, 8]])
    rows = rotary_rows(jnp.asarray(positions), rotary_frequencies(RopeConfig(), 8))
    for found, whole in zip(rows, table, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], whole[positions[0]], atol=2e-6)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 2, 8)), jnp.float32)
    turned = apply_rotary(x, rows)
    for b in range(2):
        alone = apply_rotary(x[b : b + 1], tuple(part[b] for part in rows))
        np.testing.assert_allclose(turned[b], alone[0], atol=1e-6)


def test_a_fraction_of_the_dims_turns():
    frequencies = rotary_frequencies(RopeConfig(fraction=0.5), 8)
    np.testing.assert_allclose(frequencies, [1.0, 10000.0**-0.5])
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    turned = apply_rotary(x, rotary_rows(jnp.array([[1]]), frequencies)).ravel()
    np.testing.assert_array_equal(turned[4:], [4.0, 5.0, 6.0, 7.0])
    # The pair (0, 1) by one radian: (-sin 1, cos 1).
    np.testing.assert_allclose(turned[:2], [-0.841471, 0.540302], atol=1e-6)


def test_stretched_frequencies():
    plain = rotary_frequencies(RopeConfig(), 128)
    linear = rotary_frequencies(RopeConfig(scaling="linear", factor=4.0), 128)
    np.testing.assert_allclose(linear, plain / 4)
    llama = RopeConfig(base=500000.0, scaling="llama3", factor=8.0, original_positions=8192)
    plain, found = (
        rotary_frequencies(RopeConfig(base=500000.0), 128),
        rotary_frequencies(llama, 128),
    )
    wavelengths = 2 * np.pi / plain
    fast, slow = wavelengths < 2048, wavelengths > 8192
    np.testing.assert_array_equal(found[fast], plain[fast])
    np.testing.assert_allclose(found[slow], plain[slow] / 8)
    between = ~fast & ~slow
    assert fast.sum() == 29 and slow.sum() == 29 and between.sum() == 6
    # Pair 30: wavelength 2 pi 500000^(30/64) = 2948.30, share (8192/2948.3 - 1) / 3 = 0.59285.
    expected = plain[30] * (0.59285 + (1 - 0.59285) / 8)
    np.testing.assert_allclose(found[30], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scaling="yarn"), "rope scaling 'yarn' is not one of"),
        (dict(fraction=0.0), r"rope fraction 0.0 is outside \(0, 1\]"),
        (dict(base=-1.0), "rope base -1.0 and factor 1.0 must be positive"),
        (dict(scaling="llama3", high_freq_factor=1.0), "low_freq_factor 1.0 must be below"),
        (dict(fraction=0.4), "rotates 3 of 8 head dims, expected a positive even number"),
    ],
)
def test_rope_settings_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message):
        RopeConfig(**settings).dims(8)
