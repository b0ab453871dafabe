"""The dense cache of ragged text: any portions, windows and caps against loops over all keys."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kv_reference import attention_loops, counted, extend, extend_all, stream

from jaxllm.decoding import text_cache
from jaxllm.decoding.text_cache import attend_buffer, dense_cache, grouped, merge
from jaxllm.errors import InputError
from jaxllm.nn import attention


def check(found, s, **options):
    np.testing.assert_allclose(found, attention_loops(s, **options), atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "portions"), [(1, (8, 1, 1, 1)), (2, (5, 3, 3)), (4, (1,) * 11), (2, (11,))]
)
def test_any_portions_equal_attending_to_everything(groups, portions):
    s = stream([11, 7, 4], 11, groups)
    found, cache = extend_all(dense_cache(3, 2, 16, 8), s, portions)
    check(found, s)
    np.testing.assert_array_equal(cache.positions[:, :11], s.positions)
    np.testing.assert_array_equal(cache.keys[:, :, :11], s.k.swapaxes(1, 2))
    assert int(cache.fill) == 11 and np.all(cache.positions[:, 11:] == -1)
    assert np.all(found[s.positions < 0] == 0)  # Padding gives zeros, not NaN.


@pytest.mark.parametrize(
    "options", [{"window": 4}, {"soft_cap": 1.5}, {"window": 3, "soft_cap": 2}]
)
def test_sliding_window_and_soft_cap(options):
    s = stream([12, 9], 12, 2)
    found, _ = extend_all(dense_cache(2, 2, 12, 8, **options), s, (7, 1, 1, 3))
    check(found, s, **options)


@pytest.mark.parametrize("portions", [(2, *(1,) * 18), (20,), (9, 1, 4, 1, 5), (3, 2, 5, 10)])
def test_rolling_holds_the_window_only(portions):
    s = stream([20, 13, 18], 20, 2)
    cache = dense_cache(3, 2, 64, 8, window=5, rolling=True)
    assert cache.length == 5
    found, cache = extend_all(cache, s, portions)
    check(found, s, window=5)
    for row in range(3):
        assert sorted(cache.positions[row].tolist()) == s.positions[row, -5:].tolist()


def test_a_second_turn_may_be_padded_too():
    """Row 1 asks a shorter question: its padding lies between its own entries."""
    s = stream([9, 9], 9, 2)
    s.positions[1] = [0, 1, 2, 3, 4, -1, -1, 5, 6]
    for options in ({}, {"window": 4}, {"window": 4, "rolling": True}):
        for portions in ((5, 3, 1), (2, 5, 1, 1), (7, 2), (9,)):
            found, _ = extend_all(dense_cache(2, 2, 12, 8, **options), s, portions)
            check(found, s, window=options.get("window"))


def test_long_prompts_are_scored_in_chunks_of_queries(monkeypatch):
    s = stream([13, 6], 13, 2)
    whole, _ = extend_all(dense_cache(2, 2, 16, 8), s, (13,))
    monkeypatch.setattr(text_cache, "_QUERY_CHUNK", 4)
    chunked, _ = extend_all(dense_cache(2, 2, 16, 8), s, (13,), counted()[0])
    np.testing.assert_allclose(chunked, whole, atol=1e-6)
    shapes = jax.make_jaxpr(lambda c, p: c.extend(*p)[0])(dense_cache(2, 2, 16, 8), s.part(0, 13))
    assert "2,2,2,4,16" in str(shapes) and "2,2,2,13,16" not in str(shapes)


@pytest.mark.parametrize("queries", [1, 4, 11], ids="{} queries".format)
@pytest.mark.parametrize(
    "options", [{}, {"window": 4, "soft_cap": 1.5}, {"window": 4, "rolling": True}], ids=str
)
def test_a_prompt_into_an_empty_cache_reads_nothing_but_itself(options, queries, monkeypatch):
    monkeypatch.setattr(attention, "_XLA_BLOCK", 3)
    s = stream([11, 7, 4], 11, 2)
    whole, expected = extend(dense_cache(3, 2, 16, 8, **options), s.part(0, 11))
    empty, part = dense_cache(3, 2, 16, 8, **options).begin_prompt(), s.part(0, 11)
    if not empty.rolling:  # Nothing that lies in the slots shows.
        empty = dataclasses.replace(empty, keys=empty.keys + jnp.nan, values=empty.values + jnp.nan)
    found, cache = counted()[0](empty, part._replace(q=part.q[:, -queries:]))
    np.testing.assert_allclose(found, whole[:, -queries:], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, cache, expected)
    assert not cache.empty


def test_a_prompt_does_not_score_what_it_cannot_see(monkeypatch):
    part = stream([11, 7, 4], 11, 2).part(0, 11)
    shapes = str(jax.make_jaxpr(lambda c: c.extend(*part)[0])(dense_cache(3, 2, 16, 8)))
    assert "3,2,2,11,16" in shapes
    empty = dense_cache(3, 2, 16, 8).begin_prompt()
    shapes = str(jax.make_jaxpr(lambda c: c.extend(*part)[0])(empty))
    assert "3,2,2,11,11" in shapes and "3,2,2,11,16" not in shapes
    monkeypatch.setattr(attention, "_XLA_BLOCK", 3)  # Four blocks see 3, 6, 9 and 11 keys.
    shapes = str(jax.make_jaxpr(lambda c: c.extend(*part)[0])(empty))
    assert all(s in shapes for s in ("3,2,2,3,3", "3,2,2,3,6", "3,2,2,3,9", "3,2,2,2,11"))
    assert "3,2,2,11,11" not in shapes


def test_a_prompt_may_use_a_causal_kernel(monkeypatch):
    s = stream([13, 6, 1], 13, 2)
    kernel, calls, (run, _) = text_cache._attend_causally, [], counted()

    def noted(*args):
        calls.append(1)
        return kernel(*args)

    monkeypatch.setattr(text_cache, "target_platform", lambda: "tpu")
    monkeypatch.setattr(text_cache, "_KERNEL_BLOCK", 4)
    monkeypatch.setattr(text_cache, "_attend_causally", noted)
    found, _ = extend_all(dense_cache(3, 2, 16, 8).begin_prompt(), s, (6, 6, 1), run)
    check(found, s)  # The second portion finds a cache in use.
    assert len(calls) == 1
    extend_all(dense_cache(3, 2, 16, 8, window=4).begin_prompt(), s, (6,), run)
    few = s.part(0, 6)._replace(q=s.part(4, 6).q)
    out, _ = run(dense_cache(3, 2, 16, 8).begin_prompt(), few)
    np.testing.assert_allclose(out, found[:, 4:6], atol=1e-5)
    assert len(calls) == 1


def test_storage_may_be_narrower_than_the_computation():
    s = stream([6, 3], 6, 2)
    found, cache = extend_all(dense_cache(2, 2, 6, 8, jnp.bfloat16), s, (6,))
    assert cache.keys.dtype == jnp.bfloat16 and found.dtype == np.float32
    np.testing.assert_allclose(found, attention_loops(s), atol=0.05)


def test_softmax_is_float32_under_bfloat16():
    s = stream([6], 6, 2)
    parts = [jnp.asarray(x, jnp.bfloat16) for x in s[:3]]
    cache = dense_cache(1, 2, 6, 8, jnp.bfloat16)
    out, _ = cache.extend(*parts, jnp.asarray(s.positions))
    assert out.dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(lambda *a: cache.extend(*a)[0])(*parts, jnp.asarray(s.positions))
    kinds = {str(e.outvars[0].aval.dtype) for e in jaxpr.jaxpr.eqns if e.primitive.name == "exp"}
    assert kinds == {"float32"}
    np.testing.assert_allclose(out.astype(jnp.float32), attention_loops(s), atol=0.05)


def test_merging_two_buffers_equals_one():
    rng = np.random.default_rng(0)
    q = grouped(jnp.asarray(rng.standard_normal((2, 3, 4, 8)), jnp.float32), 2)
    k, v = (jnp.asarray(rng.standard_normal((2, 2, 9, 8)), jnp.float32) for _ in range(2))
    seen = jnp.asarray(rng.random((2, 1, 1, 3, 9)) < 0.5).at[0, :, :, 0].set(False)
    whole = attend_buffer(q, k, v, seen)
    parts = [attend_buffer(q, k[:, :, s], v[:, :, s], seen[..., s]) for s in np.s_[:4, 4:]]
    joined = merge(*parts)
    np.testing.assert_allclose(joined.out, whole.out, atol=1e-6)
    np.testing.assert_allclose(joined.lse, whole.lse, atol=1e-6)
    assert np.all(joined.out[0, :, :, 0] == 0) and np.all(joined.lse[0, :, :, 0] == -np.inf)


def test_gradients_through_padding_are_finite():
    s = stream([4, 2], 4, 2)

    def loss(k):
        part = s.part(0, 4)._replace(k=k)
        return jnp.sum(dense_cache(2, 2, 4, 8).extend(*part)[0] ** 2)

    grads = jax.grad(loss)(jnp.asarray(s.k))
    assert np.isfinite(grads).all() and np.any(np.asarray(grads) != 0)


def test_decoding_traces_once():
    s = stream([30, 30], 30, 2)
    run, traces = counted()
    extend_all(dense_cache(2, 2, 32, 8), s, (4, *(1,) * 26), run)
    assert traces == [4, 1]


def test_what_does_not_fit_is_refused():
    s = stream([9], 9, 2)
    with pytest.raises(InputError, match="9 new tokens, the cache holds 8"):
        dense_cache(1, 2, 8, 8).extend(*s.part(0, 9))
    with pytest.raises(InputError, match="needs a sliding window"):
        dense_cache(1, 2, 8, 8, rolling=True)
