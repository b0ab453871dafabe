"""Which entries stay: SnapKV in NumPy, position-aware pooling, and each scorer by its formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from kv_reference import extend_all, snapkv_kept, stream

from jaxllm.kvcompress.bucketed_cache import bucketed_cache
from jaxllm.kvcompress.compress import Eviction, choose, pool_positions
from jaxllm.kvcompress.plan import plan_of
from jaxllm.kvcompress.scorers import (
    Accumulated,
    Entries,
    Expected,
    KeyNorm,
    LastQuery,
    Recent,
    Window,
)

LENGTHS = [34, 26, 15]


def cache_of(eviction, capacities=(10, 5), ring=10):
    return bucketed_cache(plan_of("test", [list(capacities)], ring, eviction), 0, 3, 4, 8)


def positions_of(cache):
    """{(row, head of the model): kept positions}."""
    found, place = {}, 0
    for kept in cache.rungs:
        for own in range(kept.positions.shape[1]):
            for row in range(3):
                held = np.asarray(kept.positions[row, own])
                found[row, cache.layer.order[place]] = held[held >= 0].tolist()
            place += 1
    return found


@pytest.mark.parametrize(("group", "sinks"), [("mean", 0), ("max", 2), ("sum", 1)])
def test_what_is_kept_is_snapkv_at_prefill_and_again_in_decode(group, sinks):
    s = stream(LENGTHS, 34, 2)
    eviction = Eviction(window=4, sinks=sinks, group=group)
    _, prefilled = extend_all(cache_of(eviction), s, (24,))
    _, decoded = extend_all(cache_of(eviction), s, (24, *(1,) * 7))
    for (row, head), found in positions_of(prefilled).items():
        offset, capacity = 34 - LENGTHS[row], (10, 5)[head]
        now = 24 - offset

        def keys(positions, row=row, head=head, offset=offset):
            return {p: s.k[row, offset + p, head] for p in positions}

        def queries(end, row=row, head=head, offset=offset):
            at = np.arange(end - 4, end)
            return s.q[row, offset + at, 2 * head : 2 * head + 2], at

        options = dict(window=4, sinks=sinks, group=group)
        q, at = queries(now)
        kept = snapkv_kept(q, keys(range(now)), at, capacity, **options)
        assert found == kept
        # Six more tokens fill the ring of ten; the seventh compresses what it finds.
        q, at = queries(now + 6)
        held = keys([*kept, *range(now - 4, now + 6)])
        assert positions_of(decoded)[row, head] == snapkv_kept(q, held, at, capacity, **options)


def test_pooling_looks_at_positions_not_at_slots():
    scores = jnp.array([0.1, 9.0, 0.2, 0.3, 5.0, 0.0])
    positions = jnp.array([-1, 3, 6, 7, 30, 32])
    # 3 and 7 are four apart; 30 is next to 7 in slots only; the empty slot gives nothing away.
    pooled = pool_positions(scores, positions, 7)
    np.testing.assert_allclose(pooled[1:], [9.0, 9.0, 0.3, 5.0, 5.0])
    np.testing.assert_array_equal(pool_positions(scores, positions, 1), scores)
    np.testing.assert_allclose(pool_positions(scores, positions, 11)[1:], [9, 9, 9, 5, 5])


def test_pooling_equals_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    for width in (3, 7, 9):
        positions = np.sort(rng.choice(60, 25, replace=False))
        positions[:4] = -1
        scores = rng.random(25).astype(np.float32)
        pooled = pool_positions(jnp.asarray(scores), jnp.asarray(positions), width)
        for i in range(4, 25):
            near = [j for j in range(4, 25) if abs(positions[j] - positions[i]) <= width // 2]
            assert pooled[i] == scores[near].max()


def test_choice_does_not_depend_on_storage_order():
    rng = np.random.default_rng(0)
    positions = np.array([4, -1, 0, 9, 2, -1, 7, 5])
    scores = rng.integers(0, 3, 8).astype(np.float32)  # With ties.
    slots, kept = choose(
        jnp.asarray(scores)[None, None], jnp.asarray(positions)[None, None], 4, 1, 3
    )
    np.testing.assert_array_equal(positions[np.asarray(slots)], kept)
    for _ in range(5):
        order = rng.permutation(8)
        _, again = choose(
            jnp.asarray(scores[order])[None, None],
            jnp.asarray(positions[order])[None, None],
            4,
            1,
            3,
        )
        np.testing.assert_array_equal(again, kept)
    assert 0 in np.asarray(kept)  # The sink.
    _, everything = choose(
        jnp.asarray(scores)[None, None], jnp.asarray(positions)[None, None], 8, 0, 1
    )
    np.testing.assert_array_equal(everything[0, 0], [-1, -1, 0, 2, 4, 5, 7, 9])


# -- the other scorers ----------------------------------------------------------------------------


def probabilities(s, row, head, held, now):
    """float64 [G, len(held)] attention of the query at position `now` over held positions."""
    offset = s.q.shape[1] - int((s.positions[row] >= 0).sum())
    keys = s.k[row, offset + np.asarray(held), head].astype(np.float64)
    q = s.q[row, offset + now, 2 * head : 2 * head + 2].astype(np.float64)
    scores = np.where(np.asarray(held) <= now, q @ keys.T / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def best(held, window, score, capacity):
    candidates = [i for i, p in enumerate(held) if p not in window]
    ranked = sorted(candidates, key=lambda i: (-score[i], held[i]))
    return sorted(held[i] for i in ranked[:capacity])


def test_accumulated_attention_adds_up_over_the_whole_life_of_an_entry():
    s = stream(LENGTHS, 34, 2)
    _, cache = extend_all(cache_of(Eviction(window=4, scorer=Accumulated())), s, (24, *(1,) * 7))
    for (row, head), found in positions_of(cache).items():
        capacity, now = (10, 5)[head], 24 - (34 - LENGTHS[row])
        held = list(range(now))
        score = dict.fromkeys(range(now + 6), 0.0)
        for t in range(now):
            for p, mass in zip(held, probabilities(s, row, head, held, t).mean(0), strict=True):
                score[p] += mass
        kept = best(held, range(now - 4, now), [score[p] for p in held], capacity)
        held = [*kept, *range(now - 4, now + 6)]
        for t in range(now, now + 6):
            for p, mass in zip(held, probabilities(s, row, head, held, t).mean(0), strict=True):
                score[p] += mass
        assert found == best(held, range(now + 2, now + 6), [score[p] for p in held], capacity)


def test_last_query_key_norm_and_recent_rank_by_their_own_number():
    s = stream(LENGTHS, 34, 2)
    for scorer in (LastQuery(), KeyNorm(), Recent()):
        _, cache = extend_all(cache_of(Eviction(window=4, sinks=1, scorer=scorer)), s, (34,))
        for (row, head), found in positions_of(cache).items():
            now, offset = LENGTHS[row], 34 - LENGTHS[row]
            held = list(range(now))
            keys = s.k[row, offset:, head].astype(np.float64)
            score = {
                LastQuery: probabilities(s, row, head, held, now - 1).mean(0),
                KeyNorm: -np.linalg.norm(keys, axis=-1),
                Recent: np.arange(now, dtype=float),
            }[type(scorer)]
            score[0] = np.inf
            assert found == best(held, range(now - 4, now), score, (10, 5)[head])


def rotate(x, angle, interleaved):
    """Rotates the pairs of x [..., 4] by angle * (1, 0.1)."""
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    out = np.array(x, np.float64)
    for (i, j), speed in zip(pairs, (1.0, 0.1), strict=True):
        c, n = np.cos(angle * speed), np.sin(angle * speed)
        out[..., i], out[..., j] = x[..., i] * c - x[..., j] * n, x[..., j] * c + x[..., i] * n
    return out


@pytest.mark.parametrize("interleaved", [True, False])
def test_expected_attention_is_the_gaussian_average(interleaved):
    """By the formula, with rotation matrices written out."""
    rng = np.random.default_rng(0)
    count, held = 7, 5
    plain = rng.standard_normal((count, 4))
    where = np.array([-1, 3, 4, 5, 6, 7, 8])
    rotated = np.stack([rotate(x, p, interleaved) for x, p in zip(plain, where, strict=True)])
    keys, values = rng.standard_normal((2, held, 4))
    positions = np.array([-1, 0, 2, 5, 8])
    scorer = Expected((1.0, 0.1), interleaved, horizon=3, epsilon=0.02)
    entries = Entries(
        jnp.asarray(rotated, jnp.float32)[None, None, None],
        jnp.asarray(where)[None],
        jnp.asarray(keys, jnp.float32)[None, None],
        jnp.asarray(values, jnp.float32)[None, None],
        jnp.asarray(positions)[None, None],
        jnp.array([8]),
        None,
        None,
    )
    found = np.asarray(scorer.score(entries))[0, 0, 0]
    turn = np.mean([rotate(np.eye(4), p, interleaved).T for p in (9, 10, 11)], axis=0)
    mean, covariance = plain[1:].mean(0), np.cov(plain[1:].T, bias=True)
    linear = keys @ (turn @ mean) / 2
    spread = np.einsum("mi,ij,mj->m", keys, turn @ covariance @ turn.T, keys) / 8
    weights = np.where(positions >= 0, np.exp(linear + spread), 0)
    expected = (weights / weights.sum() + 0.02) * np.linalg.norm(values, axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_expected_attention_predicts_the_mean_of_sampled_queries():
    """log E[exp(q.k)] of a Gaussian, which the two terms are, against 200,000 draws."""
    rng = np.random.default_rng(1)
    mean, root = rng.standard_normal(4) * 0.5, rng.standard_normal((4, 4)) * 0.4
    keys = rng.standard_normal((6, 4))
    queries = mean + rng.standard_normal((200_000, 4)) @ root
    sampled = np.exp(queries @ keys.T / 2).mean(0)
    entries = Entries(
        jnp.asarray(queries[:20_000], jnp.float32)[None, None, None],
        jnp.zeros((1, 20_000), jnp.int32),
        jnp.asarray(keys, jnp.float32)[None, None],
        jnp.ones((1, 1, 6, 1)),
        jnp.arange(6)[None, None],
        jnp.array([6]),
        None,
        None,
    )
    found = np.asarray(Expected().score(entries))[0, 0, 0]
    np.testing.assert_allclose(found, sampled / sampled.sum(), atol=0.01)


def test_many_queries_are_scored_in_chunks():
    s = stream([150, 150, 150], 150, 2)
    scorer = Window(pool=1)
    positions = jnp.arange(150, dtype=jnp.int32)
    queries = jnp.asarray(s.q).reshape(3, 150, 2, 2, 8).transpose(0, 2, 3, 1, 4)
    entries = Entries(
        queries,
        jnp.broadcast_to(positions, (3, 150)),
        jnp.asarray(s.k).swapaxes(1, 2),
        jnp.asarray(s.v).swapaxes(1, 2),
        jnp.broadcast_to(positions, (3, 2, 150)),
        jnp.full(3, 149),
        None,
        None,
    )
    found = np.asarray(scorer.score(entries))
    held = list(range(150))
    expected = np.mean([probabilities(s, 1, 0, held, t) for t in held], axis=0)
    np.testing.assert_allclose(found[1, 0], expected, atol=1e-6)
