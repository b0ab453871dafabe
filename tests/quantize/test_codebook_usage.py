"""Codebook metrics: hand-computed values, accumulation, masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.quantize import (
    ResidualVQ,
    attainable_usage,
    count_codes,
    error_stats,
    merge_errors,
    perplexity,
    usage,
    usage_report,
)


def test_counts_skip_dropped_and_masked_codes():
    codes = jnp.array([[[0, 1], [0, -1]], [[2, 3], [3, 3]]])
    np.testing.assert_array_equal(count_codes(codes, 4), [[2, 0, 1, 1], [0, 1, 0, 2]])
    mask = jnp.array([[True, True], [False, True]])
    np.testing.assert_array_equal(count_codes(codes, 4, mask), [[2, 0, 0, 1], [0, 1, 0, 1]])


def test_usage_perplexity_and_bits_by_hand():
    counts = np.array([[2, 2, 0, 0], [1, 1, 1, 1], [4, 0, 0, 0], [6, 2, 0, 0]])
    np.testing.assert_allclose(usage(counts), [0.5, 1.0, 0.25, 0.5])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(perplexity(counts), [2.0, 4.0, 1.0, np.exp(entropy)])
    report = usage_report(counts)
    np.testing.assert_allclose(report["bits"], [1.0, 2.0, 0.0, entropy / np.log(2)], atol=1e-12)
    assert report["tokens"] == [4, 4, 4, 8]
    assert report["bits_per_vector"] == 8.0
    assert np.isnan(perplexity(np.zeros((1, 3)))).all()


def test_usage_is_epoch_level():
    """Each batch uses one code in four; the epoch uses all."""
    batches = [jnp.full((5, 1), k) for k in range(4)]
    single = [usage(count_codes(codes, 4))[0] for codes in batches]
    assert single == [0.25] * 4
    total = sum(count_codes(codes, 4) for codes in batches)
    assert usage(total)[0] == 1.0
    np.testing.assert_allclose(perplexity(total), 4.0)


def test_attainable_usage():
    np.testing.assert_allclose(attainable_usage(2, 2), 0.75)
    np.testing.assert_allclose(attainable_usage(3, 4), 1 - 0.75**3)
    np.testing.assert_allclose(attainable_usage(16384, 16384), 1 - np.exp(-1), rtol=1e-4)
    np.testing.assert_allclose(attainable_usage(np.array([0, 5]), 1), [0.0, 1.0])
    draws = np.random.default_rng(0).integers(0, 50, (200, 40))
    observed = np.mean([len(np.unique(row)) / 50 for row in draws])
    np.testing.assert_allclose(attainable_usage(40, 50), observed, atol=0.02)


def test_merged_errors_equal_the_whole_set(quantize):
    config = ResidualVQ(8, 4, depth=3)
    _, state = config.init(jax.random.key(0))
    z = 10.0 + jax.random.normal(jax.random.key(1), (30, 4))
    codes = quantize(config, {}, state, z, train=False).codes
    levels = config.embed_levels({}, state, codes)
    parts = [error_stats(z[a:b], levels[a:b]) for a, b in ((0, 7), (7, 8), (8, 30))]
    merged = merge_errors(merge_errors(parts[0], parts[1]), parts[2])
    whole = error_stats(z, levels)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    report = usage_report(count_codes(codes, 8), whole)
    vectors, sums = np.asarray(z, np.float64), np.cumsum(np.asarray(levels, np.float64), 1)
    spread = ((vectors - vectors.mean(0)) ** 2).sum(-1).mean()
    error = ((vectors[:, None] - sums) ** 2).sum(-1).mean(0)
    np.testing.assert_allclose(report["relative_error"], error / spread, rtol=1e-4)
    norms = np.linalg.norm(np.asarray(levels, np.float64), axis=-1).mean(0)
    np.testing.assert_allclose(report["norm"], norms, rtol=1e-5)


def test_masked_vectors_change_no_error():
    z = jax.random.normal(jax.random.key(0), (6, 4))
    levels = jax.random.normal(jax.random.key(1), (6, 2, 4))
    mask = jnp.arange(6) < 4
    masked = error_stats(jnp.where(mask[:, None], z, jnp.nan), levels, mask)
    for a, b in zip(
        jax.tree.leaves(masked), jax.tree.leaves(error_stats(z[:4], levels[:4])), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    nothing = error_stats(z, levels, jnp.zeros(6, bool))
    for a, b in zip(
        jax.tree.leaves(merge_errors(nothing, masked)), jax.tree.leaves(masked), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_report_names_a_wrong_table():
    with pytest.raises(InputError, match="expected \\[C, K\\]"):
        usage_report(np.zeros(4))
