"""EMA codebook against loops in NumPy, restart, and the fixed point."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.quantize import ResidualVQ
from jaxllm.quantize.codebook import Book, draw_rows, update_book

EPS = 1e-5


def loop_smooth(m, c):
    total, size = c.sum(), len(c)
    out = np.zeros_like(m)
    for j in range(size):
        out[j] = m[j] / ((c[j] + EPS) * total / (total + size * EPS))
    return out


def loop_assign(residual, table):
    codes = []
    for r in residual:
        codes.append(int(np.argmin([((r - e) ** 2).sum() for e in table])))
    return np.array(codes)


def loop_training(z, table, depth, mode, steps, decay=0.99):
    """EMA of one shared codebook over the same batch, vector by vector, in float64."""
    e = table.astype(np.float64)
    c, m = np.ones(len(e)), e.copy()

    def step(pairs):
        nonlocal c, m, e
        n, s = np.zeros_like(c), np.zeros_like(m)
        for residual, codes in pairs:
            for r, k in zip(residual, codes, strict=True):
                n[k] += 1
                s[k] += r
        c, m = decay * c + (1 - decay) * n, decay * m + (1 - decay) * s
        e = loop_smooth(m, c)

    for _ in range(steps):
        residual, pairs = z.astype(np.float64), []
        for _ in range(depth):
            codes = loop_assign(residual, e)
            pairs.append((residual, codes))
            residual = residual - e[codes]
            if mode == "sequential":
                step(pairs[-1:])
        if mode == "pooled":
            step(pairs)
    return e, c, m


@pytest.mark.parametrize("mode", ["pooled", "sequential"])
@pytest.mark.parametrize("depth", [1, 3])
def test_ema_equals_numpy_loop(mode, depth, quantize):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 3)).astype(np.float32)
    config = ResidualVQ(6, 3, depth=depth, ema_mode=mode, restart_below=0.0)
    _, state = config.init(jax.random.key(0))
    table = np.asarray(state["codebook"][0])
    for _ in range(4):
        state = quantize(config, {}, state, jnp.asarray(z), train=True).state
    e, c, m = loop_training(z, table, depth, mode, steps=4)
    np.testing.assert_allclose(state["codebook"][0], e, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(state["counts"][0], c, rtol=1e-5)
    np.testing.assert_allclose(state["sums"][0], m, rtol=2e-5, atol=2e-6)
    calls = 4 if mode == "pooled" else 4 * depth
    levels = depth if mode == "pooled" else 1
    decayed = 6 * 0.99**calls + 40 * levels * (1 - 0.99**calls)
    np.testing.assert_allclose(float(state["counts"].sum()), decayed, rtol=1e-5)


def test_separate_codebooks_equal_plain_vq_on_each_residual(quantize):
    """Level i of separate codebooks is a VQ of its own, fed with the residuals of level i - 1."""
    z = jax.random.normal(jax.random.key(0), (50, 3))
    config = ResidualVQ(5, 3, depth=3, shared=False, restart_below=0.0)
    _, state = config.init(jax.random.key(1))
    output = quantize(config, {}, state, z, train=True)
    single = dataclasses.replace(config, depth=1, shared=True)
    residual = z
    for i in range(3):
        own = {name: value[i : i + 1] for name, value in state.items()}
        level = quantize(single, {}, own, residual, train=True)
        np.testing.assert_array_equal(output.codes[:, i], level.codes[:, 0])
        for name in own:
            np.testing.assert_allclose(output.state[name][i], level.state[name][0], rtol=1e-6)
        residual = residual - level.quantized


def test_modes_coincide_at_depth_one_and_differ_at_depth_two(quantize):
    z = jax.random.normal(jax.random.key(0), (64, 3))

    def train(depth, mode):
        config = ResidualVQ(8, 3, depth=depth, ema_mode=mode, restart_below=0.0)
        _, state = config.init(jax.random.key(1))
        for _ in range(3):
            state = quantize(config, {}, state, z, train=True).state
        return state["codebook"]

    np.testing.assert_array_equal(train(1, "pooled"), train(1, "sequential"))
    assert float(jnp.abs(train(2, "pooled") - train(2, "sequential")).max()) > 1e-3


def test_restart_replaces_exactly_entries_below_the_threshold():
    count = jnp.array([0.2, 5.0, 2.0, 0.5, 3.0])
    vectors = jnp.arange(10.0).reshape(5, 2)
    book = Book(vectors, count, vectors * count[:, None])
    rows = 100.0 + jnp.arange(10.0).reshape(5, 2)
    options = {"decay": 0.5, "epsilon": EPS}
    zeros = jnp.zeros(5), jnp.zeros((5, 2))
    plain = update_book(book, *zeros, None, restart_below=1.0, **options)
    new = update_book(book, *zeros, (rows, jnp.array(True)), restart_below=1.0, **options)
    dead = np.asarray(plain.counts) < 1.0
    np.testing.assert_array_equal(dead, [True, False, False, True, False])
    np.testing.assert_array_equal(new.counts, np.where(dead, 1.0, plain.counts))
    np.testing.assert_array_equal(new.sums[~dead], plain.sums[~dead])
    # Dead entries take the first candidates in order.
    np.testing.assert_array_equal(new.sums[dead], rows[:2])
    np.testing.assert_allclose(
        new.codebook, loop_smooth(np.asarray(new.sums), np.asarray(new.counts)), rtol=1e-5
    )


def test_restarted_codes_are_vectors_of_the_batch(quantize):
    """From count 0, the first step restarts every entry that got fewer than 100 vectors."""
    z = jax.random.normal(jax.random.key(0), (64, 4)) + 3.0
    config = ResidualVQ(16, 4)
    _, state = config.init(jax.random.key(1))
    state = quantize(config, {}, state, z, train=True, key=jax.random.key(2)).state
    gaps = np.abs(np.asarray(state["codebook"][0])[:, None] - np.asarray(z)[None]).max(-1)
    assert gaps.min(1).max() < 1e-3
    assert len(set(gaps.argmin(1))) == 16  # distinct vectors
    np.testing.assert_array_equal(state["counts"], 1.0)


def test_restart_persists_after_empty_ema_step(quantize):
    """A restart that left sums and counts behind would be undone by the next step."""
    z = 5.0 + jax.random.normal(jax.random.key(0), (64, 4))
    config = ResidualVQ(16, 4)
    _, state = config.init(jax.random.key(1))
    restarted = quantize(config, {}, state, z, train=True, key=jax.random.key(2)).state
    nothing = jnp.zeros(64, bool)
    later = quantize(
        config, {}, restarted, z, train=True, key=jax.random.key(3), mask=nothing
    ).state
    gaps = np.abs(np.asarray(later["codebook"][0])[:, None] - np.asarray(z)[None]).max(-1)
    assert gaps.min(1).max() < 1e-3
    np.testing.assert_allclose(later["codebook"], restarted["codebook"], rtol=1e-5)
    np.testing.assert_allclose(later["counts"], 0.99)


def test_restart_choice_is_a_function_of_the_key(quantize):
    z = jax.random.normal(jax.random.key(0), (64, 4))
    config = ResidualVQ(8, 4, depth=2)
    _, state = config.init(jax.random.key(1))

    def run(seed):
        return quantize(config, {}, state, z, train=True, key=jax.random.key(seed)).state[
            "codebook"
        ]

    np.testing.assert_array_equal(run(2), run(2))
    assert not np.array_equal(run(2), run(3))


def test_draw_rows_is_without_replacement_and_repeats_with_noise():
    pool = jnp.arange(12.0).reshape(1, 6, 2)
    valid = jnp.array([[True, False, True, True, False, False]])
    allowed = np.asarray(pool[0])[[0, 2, 3]]
    rows, available = draw_rows(jax.random.key(0), pool, valid, 3)
    assert bool(available)
    np.testing.assert_array_equal(np.sort(rows, axis=0), allowed)
    rows = np.asarray(draw_rows(jax.random.key(0), pool, valid, 8)[0])
    gaps = rows[:, None] - allowed
    nearest = np.abs(gaps).sum(-1).argmin(1)
    np.testing.assert_array_equal(np.sort(np.bincount(nearest)), [2, 3, 3])
    noise = gaps[np.arange(8), nearest]
    assert noise.min() >= 0 and noise.max() < 0.01 / np.sqrt(2) + 1e-6
    assert len(np.unique(rows, axis=0)) == 8
    assert not bool(draw_rows(jax.random.key(0), pool, jnp.zeros((1, 6), bool), 8)[1])


def test_pooled_restart_draws_from_the_residuals_of_all_levels(quantize):
    """Entries come from level 1 and from level 2 residuals, which here are far apart."""
    z = 50.0 + jax.random.normal(jax.random.key(0), (40, 2))
    config = ResidualVQ(30, 2, depth=2)
    _, state = config.init(jax.random.key(1))
    table = jnp.full((1, 30, 2), 50.0)
    state |= {"codebook": table, "sums": table}
    state = quantize(config, {}, state, z, train=True, key=jax.random.key(2)).state
    norms = np.linalg.norm(state["codebook"][0], axis=-1)
    assert (norms > 60).sum() > 5 and (norms < 10).sum() > 5


def test_ema_fixed_point_is_the_cluster_mean(quantize):
    rng = np.random.default_rng(0)
    centres = np.array([[8.0, 0.0], [0.0, 8.0], [-8.0, -8.0]])
    z = (centres[:, None] + rng.normal(size=(3, 20, 2))).astype(np.float32)
    config = ResidualVQ(3, 2, decay=0.5, restart_below=0.0)
    state = {
        "codebook": jnp.asarray(centres[None], jnp.float32),
        "counts": jnp.ones((1, 3)),
        "sums": jnp.asarray(centres[None], jnp.float32),
    }
    for _ in range(40):
        state = quantize(config, {}, state, jnp.asarray(z.reshape(-1, 2)), train=True).state
    np.testing.assert_allclose(state["codebook"][0], z.mean(1), rtol=1e-4)
    np.testing.assert_allclose(state["counts"][0], 20.0, rtol=1e-5)


def test_unassigned_code_without_restart_does_not_explode(quantize):
    """Counts start at 1 without restart: at 0, the smoothing constant would divide the code."""
    config = ResidualVQ(4, 2, restart_below=0.0)
    _, state = config.init(jax.random.key(0))
    state["codebook"] = state["codebook"].at[0, 0].set(30.0)
    state["sums"] = state["codebook"]
    for _ in range(5):
        state = quantize(config, {}, state, jnp.zeros((10, 2)), train=True).state
    assert float(jnp.abs(state["codebook"][0, 0]).max()) < 31.0


def test_cosine_ema_keeps_unit_codes(quantize):
    z = 7.0 * jax.random.normal(jax.random.key(0), (64, 4))
    config = ResidualVQ(8, 4, cosine=True)
    _, state = config.init(jax.random.key(1))
    for step in range(3):
        output = quantize(config, {}, state, z, train=True, key=jax.random.key(step))
        state = output.state
    norms = jnp.linalg.norm(config.codebook({}, state), axis=-1)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(output.quantized, axis=-1), 1.0, rtol=1e-5)
