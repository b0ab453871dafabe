"""Codebooks fitted to data: k-means, training by EMA, depth, shared against separate."""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.quantize import (
    ResidualVQ,
    error_stats,
    kmeans_start,
    residual_kmeans_start,
    usage_report,
)
from jaxllm.quantize.usage import count_codes


def mixture(key, tokens=1000):
    """Vectors of 12 clusters of different width, `[tokens, 4]`."""
    choice_key, noise_key = jax.random.split(key)
    centres = 2.0 * jax.random.normal(jax.random.key(9), (12, 4))
    choice = jax.random.randint(choice_key, (tokens,), 0, 12)
    widths = jnp.linspace(0.2, 0.8, 12)[choice]
    return centres[choice] + widths[:, None] * jax.random.normal(noise_key, (tokens, 4))


@partial(jax.jit, static_argnums=0)
def measure(config, params, state, z):
    codes = config.quantize(params, state, z, train=False).codes
    stats = error_stats(z, config.embed_levels(params, state, codes))
    return count_codes(codes, config.size), stats


def relative_errors(config, params, state, z):
    return usage_report(*measure(config, params, state, z))


fit = jax.jit(residual_kmeans_start, static_argnums=(0, 3))


def test_kmeans_finds_separated_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    sizes = [10, 20, 30, 40]
    z = np.concatenate(
        [c + 0.1 * rng.normal(size=(n, 2)) for c, n in zip(centres, sizes, strict=True)]
    )
    table, counts = kmeans_start(jax.random.key(1), jnp.asarray(z, jnp.float32), 4, 20)
    order = ((centres[:, None] - np.asarray(table)) ** 2).sum(-1).argmin(-1)
    expected = [z[sum(sizes[:i]) : sum(sizes[: i + 1])].mean(0) for i in range(4)]
    np.testing.assert_allclose(table[order], expected, atol=1e-3)
    np.testing.assert_allclose(counts[order], sizes)


def test_kmeans_iteration_equals_numpy_lloyd():
    z = mixture(jax.random.key(0), 60)
    key = jax.random.key(1)
    before, _ = kmeans_start(key, z, 5, 2)
    after, counts = kmeans_start(key, z, 5, 3)
    codes = ((np.asarray(z)[:, None] - np.asarray(before)) ** 2).sum(-1).argmin(-1)
    assert (np.bincount(codes, minlength=5) > 0).all()
    means = np.stack([np.asarray(z)[codes == k].mean(0) for k in range(5)])
    np.testing.assert_allclose(after, means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(counts, np.bincount(codes, minlength=5))


def test_kmeans_with_fewer_vectors_than_codes_keeps_codes_apart():
    table, _ = kmeans_start(jax.random.key(0), mixture(jax.random.key(1), 3), 8, 3)
    assert np.isfinite(table).all()
    assert len(np.unique(np.asarray(table), axis=0)) == 8


def test_kmeans_refuses_no_vectors():
    with pytest.raises(InputError, match="expected at least one"):
        kmeans_start(jax.random.key(0), jnp.zeros((0, 4)), 8)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("shared", [True, False])
def test_residual_kmeans_start_fits_every_level(update, shared):
    z = mixture(jax.random.key(0))
    config = ResidualVQ(16, 4, depth=3, shared=shared, update=update)
    params, state = fit(config, jax.random.key(1), z, 10)
    fresh_params, fresh_state = config.init(jax.random.key(1))
    assert jax.tree.structure((params, state)) == jax.tree.structure((fresh_params, fresh_state))
    fitted = relative_errors(config, params, state, z)["relative_error"]
    fresh = relative_errors(config, fresh_params, fresh_state, z)["relative_error"]
    assert fitted[-1] < 0.5 * fresh[-1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_separate_beats_shared_at_small_size_and_error_falls_with_depth(seed):
    """The order of a measured table on digits: at K = 16 sharing costs, depth always helps.

    Mean error over the fitted data; the error of a single vector may grow with depth.
    """
    z = mixture(jax.random.key(seed))
    held_out = mixture(jax.random.key(seed + 100))
    errors = {}
    for shared in (True, False):
        config = ResidualVQ(16, 4, depth=4, shared=shared)
        params, state = fit(config, jax.random.key(seed), z, 20)
        errors_by_depth = relative_errors(config, params, state, z)["relative_error"]
        assert all(b < a for a, b in itertools.pairwise(errors_by_depth))
        errors[shared] = relative_errors(config, params, state, held_out)["relative_error"]
    assert errors[False][-1] < 0.5 * errors[True][-1]


def test_ema_training_fits_without_kmeans(quantize):
    """From N(0, 1) codes, restart and EMA reach a tenth of the variance and use every code."""
    config = ResidualVQ(16, 4, depth=2, shared=False, decay=0.9, restart_below=0.5)
    _, state = config.init(jax.random.key(0))
    step = jax.jit(lambda state, z, key: quantize(config, {}, state, z, train=True, key=key).state)
    for i in range(60):
        key = jax.random.key(i)
        state = step(state, mixture(key, 256), key)
    report = relative_errors(config, {}, state, mixture(jax.random.key(1000)))
    assert report["relative_error"][1] < 0.1
    assert report["relative_error"][1] < 0.5 * report["relative_error"][0]
    assert min(report["usage"]) > 0.9


LYRA = (
    Path(os.environ.get("JAXLLM_TEST_DATA", "shared/data"))
    / "lyra_rvq/rvq_codebooks_46x16x64_f32.npy"
)


@pytest.mark.skipif(not LYRA.is_file(), reason=f"{LYRA} is not there; set JAXLLM_TEST_DATA")
def test_lyra_codebooks_encode_like_a_greedy_search(quantize):
    """Released residual codebooks of a speech codec (google/lyra): 8 of 46 stages of 16 codes."""
    table = np.load(LYRA)[:8]
    norms = np.linalg.norm(table, axis=-1).mean(-1)
    np.testing.assert_allclose(norms[:4], [39.7, 11.9, 10.1, 9.7], atol=0.06)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (100, 8))
    z = table[np.arange(8), codes].sum(1) + 0.1 * rng.normal(size=(100, 64)).astype(np.float32)
    config = ResidualVQ(16, 64, depth=8, shared=False, update="gradient")
    params = {"codebook": jnp.asarray(table)}
    output = quantize(config, params, {}, jnp.asarray(z, jnp.float32), train=False)
    residual = z.astype(np.float64)
    for level in range(8):
        chosen = ((residual[:, None] - table[level]) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(output.codes[:, level], chosen)
        residual = residual - table[level, chosen]
    report = relative_errors(config, params, {}, jnp.asarray(z, jnp.float32))
    assert report["relative_error"][-1] < 0.2 * report["relative_error"][0]
