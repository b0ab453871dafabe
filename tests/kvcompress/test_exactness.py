"""A cache with room for everything equals the full cache, whatever was compressed on the way."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kv_reference import attention_loops, compress, counted, extend, extend_all, stream

from jaxllm.decoding.text_cache import DenseCache, dense_cache
from jaxllm.errors import InputError
from jaxllm.kvcompress.bucketed_cache import bucketed_cache, bucketed_caches, nbytes
from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.paged import pack, unpack
from jaxllm.kvcompress.plan import full_plan, plan_of
from jaxllm.kvcompress.scorers import SCORERS, Accumulated, Window
from jaxllm.parallel.mesh import MeshConfig, make_mesh

LENGTHS = [40, 31, 22]
EVICTION = Eviction(window=3)


def make(capacities, *, groups=2, ring=8, eviction=EVICTION, shards=1, batch=3, **options):
    plan = plan_of("test", [capacities], ring, eviction, shards)
    heads = len(capacities)
    return plan, bucketed_cache(plan, 0, batch, heads * groups, 8, **options)


def test_a_full_plan_is_bit_for_bit_the_dense_cache():
    s = stream([12, 9], 12, 2)
    (cache,) = bucketed_caches(full_plan(1, 2, 16), 2, 4, 8)
    assert isinstance(cache, DenseCache)
    found, cache = extend_all(cache, s, (7, 1, 1, 3))
    expected, dense = extend_all(dense_cache(2, 2, 16, 8), s, (7, 1, 1, 3))
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, cache, dense)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_prefill_and_repeated_decode_compression_drop_nothing_that_fits(groups):
    s = stream(LENGTHS, 40, groups)
    portions = (20, *(1,) * 20)
    _, cache = make([41, 60 if groups == 2 else 41], groups=groups)
    run, traces = counted()
    found, cache = extend_all(cache, s, portions, run)
    np.testing.assert_allclose(found, attention_loops(s), atol=1e-5)
    dense, _ = extend_all(dense_cache(3, 2, 40, 8), s, portions)
    np.testing.assert_allclose(found, dense, atol=1e-5)
    assert traces == [20, 1]
    # 20 single tokens through a ring with 5 free slots: compressed three times after the prompt.
    assert int(cache.ring.fill) == 8
    for row, length in enumerate(LENGTHS):
        for kept in cache.rungs:
            held = np.append(kept.positions[row, 0], cache.ring.positions[row])
            assert sorted(held[held >= 0].tolist()) == list(range(length))


@pytest.mark.parametrize(
    ("portions", "options"),
    [((5,) * 8, {}), ((3, 30, 7), {}), ((20, 5, 5, 5, 5), {"window": 7, "soft_cap": 2.0})],
)
def test_chunks_of_any_size_equal_one_prompt(portions, options):
    s = stream(LENGTHS, 40, 2)
    found, _ = extend_all(make([41, 41], **options)[1], s, portions)
    np.testing.assert_allclose(found, attention_loops(s, **options), atol=1e-5)


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_every_scorer_keeps_everything_that_fits(name):
    s = stream(LENGTHS, 40, 2)
    eviction = Eviction(window=3, scorer=SCORERS[name]())
    found, _ = extend_all(make([41, 41], eviction=eviction)[1], s, (5,) * 8)
    np.testing.assert_allclose(found, attention_loops(s), atol=1e-5)


def test_a_second_turn_may_be_padded():
    s = stream([40, 40, 40], 40, 2)
    s.positions[1, 25:] = np.arange(23, 38)
    s.positions[1, 23:25] = -1  # Two places of padding before the second turn of row 1.
    found, _ = extend_all(make([41, 41])[1], s, (5,) * 8)
    np.testing.assert_allclose(found, attention_loops(s), atol=1e-5)


def test_one_prompt_through_the_kernel_of_an_empty_cache(monkeypatch):
    from jaxllm.decoding import text_cache

    monkeypatch.setattr(text_cache, "target_platform", lambda: "tpu")
    monkeypatch.setattr(text_cache, "_KERNEL_BLOCK", 4)
    s = stream(LENGTHS, 40, 2)
    found, _ = extend_all(make([41, 41])[1].begin_prompt(), s, (20, 20), counted()[0])
    np.testing.assert_allclose(found, attention_loops(s), atol=1e-5)


@pytest.mark.parametrize("name", sorted(SCORERS))
@pytest.mark.parametrize("prompt", [4, 20])
def test_a_prompt_needs_only_the_queries_that_the_scorer_asks_for(name, prompt):
    """What is held after a prompt and ten more tokens does not depend on the other queries."""
    s = stream(LENGTHS, 40, 2)
    _, cache = make([6, 2], eviction=Eviction(window=3, scorer=SCORERS[name]()))
    expected, whole = extend(cache, s.part(10, 10 + prompt))
    least = cache.least_queries(prompt)
    assert 0 <= least <= prompt
    part, last = s.part(10, 10 + prompt), max(least, 1)
    found, few = extend(cache.begin_prompt(), part._replace(q=part.q[:, -last:]))
    np.testing.assert_allclose(found, expected[:, -last:], atol=1e-6)
    for at in range(10 + prompt, 20 + prompt):
        expected, whole = extend(whole, s.part(at, at + 1))
        found, few = extend(few, s.part(at, at + 1))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, few)


# -- with eviction --------------------------------------------------------------------------------

CAPACITIES = [6, 2, 6, 0]


@functools.cache
def evicting():
    """A stream of 4 KV heads through a cache far too small for it: plan, outputs, all states."""
    s = stream(LENGTHS, 40, 2, kv_heads=4)
    plan, cache = make(CAPACITIES, eviction=Eviction(window=3, sinks=2))
    outputs, states = [], []
    for start, stop in [(0, 20), *((t, t + 1) for t in range(20, 40))]:
        out, cache = extend(cache, s.part(start, stop))
        outputs.append(out)
        states.append(cache)
    return s, plan, np.concatenate(outputs, axis=1), states


def test_shapes_totals_and_protected_entries_hold_at_every_step():
    s, _, _, states = evicting()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), states[0])
    for step, cache in enumerate(states):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == shapes
        now = s.positions[:, 19 + step]
        for (capacity, _), kept in zip(cache.layer.rungs, cache.rungs, strict=True):
            for row, head in np.ndindex(kept.positions.shape[:2]):
                own = np.asarray(kept.positions[row, head])
                ring = np.asarray(cache.ring.positions[row])
                held = np.concatenate([own[own >= 0], ring[ring >= 0]])
                assert len(set(held.tolist())) == len(held) and held.max() == now[row]
                assert np.all(np.diff(own[own >= 0]) > 0) and np.all(np.diff(own) >= 0)
                window = set(range(max(now[row] - 2, 0), now[row] + 1))
                assert window <= set(held.tolist())
                older = int(now[row]) + 1 - int((ring >= 0).sum())
                assert (own >= 0).sum() == min(capacity, older)
                assert set(range(min(2, capacity, older))) <= set(held.tolist())


def test_a_loop_in_blocks_needs_no_conditional():
    s, plan, expected, states = evicting()
    state = dataclasses.replace(states[0], makes_room=False)
    outputs, start = [], 20
    for _ in range(20 // plan.chunk):
        for at in range(start, start + plan.chunk):
            out, state = extend(state, s.part(at, at + 1))
            outputs.append(out)
        start += plan.chunk
        state = compress(state)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected[:, 20:], atol=1e-6)
    for a, b in zip(state.rungs, compress(states[-1]).rungs, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
    assert "cond" not in str(jax.make_jaxpr(lambda c, p: c.extend(*p))(state, s.part(0, 1)))


def test_stored_entries_are_those_of_their_positions():
    s, _, _, states = evicting()
    layer = states[-1].layer
    assert [tuple(rung) for rung in layer.rungs] == [(6, 2), (2, 1), (0, 1)]
    assert layer.order == (0, 2, 1, 3)
    for row in range(3):
        for head, (positions, keys, values) in held_by_head(states[-1], row).items():
            at = 40 - LENGTHS[row] + positions
            np.testing.assert_array_equal(keys, s.k[row, at, head])
            np.testing.assert_array_equal(values, s.v[row, at, head])


def held_by_head(cache, row):
    """For each KV head of the model: positions, keys and values of one row, in any order."""
    held, place = {}, 0
    for kept in cache.rungs:
        for own in range(kept.positions.shape[1]):
            parts = [(kept.positions[row, own], kept.keys[row, own], kept.values[row, own])]
            parts.append((cache.ring.positions[row], cache.ring.keys[row, place]))
            parts[1] += (cache.ring.values[row, place],)
            joined = [
                np.concatenate([np.asarray(a), np.asarray(b)]) for a, b in zip(*parts, strict=True)
            ]
            there = joined[0] >= 0
            held[cache.layer.order[place]] = [x[there] for x in joined]
            place += 1
    return held


def test_every_layout_of_the_same_entries_agrees():
    """Packed, segment and padded layouts in NumPy, pages in XLA, against the buckets."""
    s, _, outputs, states = evicting()
    found, after = outputs[:, 39:], states[-1]
    paged, _ = extend(pack(states[-2], page=4, implementation="xla"), s.part(39, 40))
    np.testing.assert_allclose(paged, found, atol=1e-6)
    for row in range(3):
        held = held_by_head(after, row)
        lengths = [len(held[h][0]) for h in range(4)]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        keys, values = (np.concatenate([held[h][i] for h in range(4)]) for i in (1, 2))
        segment = np.repeat(np.arange(4), lengths)
        padded = np.full((4, max(lengths), 8), 1e3)
        for head in range(4):
            padded[head, : lengths[head]] = held[head][1]
        for n in range(8):
            head, q = n // 2, s.q[row, 39, n].astype(np.float64) / np.sqrt(8)
            own = slice(starts[head], starts[head + 1])
            packed = np.exp(keys[own] @ q)
            packed = packed @ values[own] / packed.sum()
            everywhere = np.exp(np.einsum("mh,h->m", keys, q)) * (segment == head)
            segmented = everywhere @ values / everywhere.sum()
            mask = np.arange(max(lengths)) < lengths[head]
            weights = np.exp(np.where(mask, padded[head] @ q, -np.inf))
            masked = weights[: lengths[head]] @ held[head][2] / weights.sum()
            for layout in (packed, segmented, masked):
                np.testing.assert_allclose(found[row, 0, n], layout, atol=1e-5)


def test_permuting_heads_offline_changes_nothing():
    s, plan, found, _ = evicting()
    order = plan.layers[0].order
    queries = np.arange(8).reshape(4, 2)[list(order)].reshape(-1)
    moved = s._replace(q=s.q[:, :, queries], k=s.k[:, :, order], v=s.v[:, :, order])
    cache = bucketed_cache(plan.folded(), 0, 3, 8, 8)
    assert cache.layer.order == (0, 1, 2, 3)
    again, _ = extend_all(cache, moved, (20, *(1,) * 20))
    np.testing.assert_allclose(again, found[:, :, queries], atol=1e-6)


def test_a_state_answers_many_questions():
    s, _, _, states = evicting()
    before = states[-2]
    first, _ = extend(before, s.part(39, 40))
    other = s.part(39, 40)._replace(q=jnp.asarray(s.q[:, 39:40] * -1))
    second, _ = extend(before, other)
    again, _ = extend(before, s.part(39, 40))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    both = jnp.stack([s.part(39, 40).q, other.q])
    part = s.part(39, 40)
    mapped, _ = jax.jit(jax.vmap(lambda q: before.extend(q, *part[1:])))(both)
    np.testing.assert_allclose(mapped, jnp.stack([first, second]), atol=1e-6)


def test_compressing_before_the_question_does_not_look_at_it():
    s, _, _, states = evicting()
    question, aware, blind = s.part(25, 26), [], []
    for q in (question.q, -question.q):
        asked = question._replace(q=q)
        aware.append(compress(extend(states[5], asked)[1]).rungs[0].positions)
        blind.append(extend(compress(states[5]), asked)[1].rungs[0].positions)
    assert not np.array_equal(*aware)
    np.testing.assert_array_equal(*blind)


def test_compressing_twice_changes_nothing():
    once = compress(evicting()[3][-1])
    twice = compress(once)
    for a, b in zip(once.rungs, twice.rungs, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.keys, b.keys)
    np.testing.assert_array_equal(once.ring.positions, twice.ring.positions)
    assert int(twice.ring.fill) == 3
    empty = compress(make(CAPACITIES, eviction=twice.eviction)[1])
    assert int(empty.ring.fill) == 0 and np.all(empty.rungs[0].positions == -1)


@pytest.mark.parametrize(
    ("scorer", "dtype"), [(Window(), jnp.float32), (Accumulated(), jnp.bfloat16)]
)
def test_bytes_are_those_of_the_plan(scorer, dtype):
    eviction = Eviction(window=3, scorer=scorer)
    plan = plan_of("test", [[6, 2, 12, 0], [5, 5, 5, 5]], 8, eviction)
    caches = bucketed_caches(plan, 3, 8, 16, dtype)
    assert nbytes(caches) == plan.nbytes(3, 8, 16, dtype(0).itemsize)
    s = stream([20, 9, 1], 20, 2, kv_heads=4, dim=16)
    for layer, cache in enumerate(caches):
        for count in (12, 5, 1):
            _, after = jax.eval_shape(lambda c, p: c.extend(*p), cache, s.part(0, count))
            held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(after))
            assert held == plan.layer_bytes(layer, 3, 8, 16, dtype(0).itemsize)
    full = full_plan(2, 4, 30)
    assert nbytes(bucketed_caches(full, 3, 8, 16, dtype)) == full.nbytes(
        3, 8, 16, dtype(0).itemsize
    )


def test_heads_split_over_devices_with_equal_shapes():
    s = stream([20, 12, 20, 7], 20, 2, kv_heads=4)
    plan = plan_of("test", [[9, 3, 3, 9]], 8, EVICTION, shards=2)
    assert plan.layers[0].order == (0, 1, 3, 2) and plan.layers[0].shards == 2
    np.testing.assert_array_equal(plan.capacities, [[9, 3, 3, 9]])
    cache = bucketed_cache(plan, 0, 4, 8, 8)
    single = bucketed_cache(plan_of("one", [[9, 3, 3, 9]], 8, EVICTION), 0, 4, 8, 8)
    expected, _ = extend_all(single, s, (5,) * 4)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        cache = jax.jit(lambda: bucketed_cache(plan, 0, 4, 8, 8))()
        found, _ = extend_all(cache, s, (5,) * 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    local = [kept.keys.sharding.shard_shape(kept.keys.shape) for kept in cache.rungs]
    assert local == [(1, 1, 9, 8), (1, 1, 3, 8)]


def test_pages_unpack_to_the_same_cache():
    s, _, _, states = evicting()
    padded = s.part(20, 21)._replace(positions=jnp.array([[20], [-1], [2]], jnp.int32))
    _, gap = extend(states[0], padded)  # Row 1 has a hole in its ring.
    _, gap = extend(gap, s.part(21, 22))
    there_and_back = jax.jit(lambda cache: unpack(pack(cache, page=4)))
    for held in (states[0], states[-1], gap):
        back = there_and_back(held)
        # Slots without an entry come back as zeros.
        for a, b in zip((*held.rungs, held.ring), (*back.rungs, back.ring), strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            there = np.asarray(a.positions >= 0)
            there = there if there.ndim == 3 else there[:, None]
            for x, y in ((a.keys, b.keys), (a.values, b.values)):
                np.testing.assert_array_equal(np.where(there[..., None], x, 0), y)
        assert int(held.ring.fill) == int(back.ring.fill)


def test_bad_shapes_are_refused():
    with pytest.raises(InputError, match="ring 5 must be at least twice the window 3"):
        plan_of("test", [[4]], 5, EVICTION)
    with pytest.raises(InputError, match="6 query heads are not a multiple of 4"):
        bucketed_cache(plan_of("test", [[4] * 4], 8, EVICTION), 0, 1, 6, 8)
    for options, message in [
        ({"window": 0}, "window 0"),
        ({"sinks": -1}, "sinks -1"),
        ({"scorer": Window(pool=4)}, "pool 4"),
        ({"group": "median"}, "group 'median'"),
    ]:
        with pytest.raises(InputError, match=message):
            Eviction(**options)
    _, cache = make([4, 4], window=5)
    with pytest.raises(InputError, match="no sliding window"):
        pack(cache)
    with pytest.raises(InputError, match="page 0"):
        pack(dataclasses.replace(make([4, 4])[1]), page=0)
