"""The paged cache: the interpreted TPU kernel against XLA, whole lives, and a real TPU program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kv_reference import extend, extend_all, stream
from tiny_runs import quick_compile
from tpu_programs import FOUR_CHIPS, kernel_calls

from jaxllm.kvcompress.bucketed_cache import bucketed_cache
from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.paged import pack, paged_attention
from jaxllm.kvcompress.plan import plan_of
from jaxllm.kvcompress.scorers import Accumulated
from jaxllm.parallel.mesh import MeshConfig, make_mesh


def half(x):
    """Rounded to bfloat16, as the kernel does to keys and values."""
    return jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)


def rows(groups, batch=2, heads=2, slots=24, dim=128):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((batch, heads, groups, dim)), jnp.float32)
    k, v = (half(rng.standard_normal((batch, heads, slots, dim))) for _ in range(2))
    length = jnp.asarray(rng.integers(1, slots + 1, (batch, heads)), jnp.int32).at[0, 0].set(0)
    return q, k, v, length


def by_loops(q, k, v, length, soft_cap=None):
    out = np.zeros(q.shape)
    for b, n, g in np.ndindex(q.shape[:3]):
        seen = int(length[b, n])
        scores = (
            np.asarray(k, np.float64)[b, n, :seen] @ np.asarray(q)[b, n, g] / q.shape[-1] ** 0.5
        )
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max(initial=0))
        if seen:
            out[b, n, g] = weights @ np.asarray(v)[b, n, :seen] / weights.sum()
    return out


@pytest.mark.parametrize(("groups", "soft_cap"), [(1, None), (4, 3.0), (8, None)])
def test_the_kernel_gives_every_kv_head_its_own_length(groups, soft_cap):
    q, k, v, length = rows(groups)
    with pltpu.force_tpu_interpret_mode():
        found = paged_attention(q, k, v, length, 8, soft_cap)
    np.testing.assert_allclose(found, by_loops(q, k, v, length, soft_cap), atol=1e-5)


def test_the_kernel_runs_on_each_devices_own_rows_and_heads():
    q, k, v, length = rows(2, batch=4)
    with pltpu.force_tpu_interpret_mode(), jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        found = jax.jit(functools.partial(paged_attention, page=8))(q, k, v, length)
    assert found.addressable_shards[0].data.shape == (1, 1, 2, 128)
    np.testing.assert_allclose(found, by_loops(q, k, v, length), atol=1e-5)


@functools.cache
def prefilled():
    """Three ragged rows of 12 tokens in a cache of 3 KV heads, and the stream they are from."""
    s = stream([22, 15, 9], 22, 2, kv_heads=3)
    eviction = Eviction(window=2, sinks=1, scorer=Accumulated())
    plan = plan_of("test", [[5, 0, 5]], 6, eviction)
    return s, extend_all(bucketed_cache(plan, 0, 3, 6, 8), s, (12,))[1]


def test_decoding_in_pages_equals_buckets_through_compressions():
    s, buckets = prefilled()
    pages = pack(buckets, 4)
    assert [keys.shape for keys in pages.keys] == [(3, 2, 12, 8), (3, 1, 8, 8)]
    for at in range(12, 22):
        expected, buckets = extend(buckets, s.part(at, at + 1))
        found, pages = extend(pages, s.part(at, at + 1))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        for a, b in zip(buckets.rungs, pages.outline.rungs, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)


def test_many_tokens_at_once_go_through_the_buckets():
    s, buckets = prefilled()
    expected, after = extend(buckets, s.part(12, 22))
    found, pages = extend(pack(buckets, 4), s.part(12, 22))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(pages.outline.rungs[0].positions, after.rungs[0].positions)


@pytest.mark.parametrize("count", [1, 10])
def test_a_prompt_into_empty_pages_equals_one_into_buckets(count):
    s, _ = prefilled()
    plan = plan_of("test", [[5, 0, 5]], 6, Eviction(window=2, sinks=1))
    buckets = bucketed_cache(plan, 0, 3, 6, 8).begin_prompt()
    pages = pack(bucketed_cache(plan, 0, 3, 6, 8), 4).begin_prompt()
    assert pages.least_queries(count) == buckets.least_queries(count) == min(count, 2)
    expected, buckets = extend(buckets, s.part(10 - count, 10))
    found, pages = extend(pages, s.part(10 - count, 10))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not pages.outline.ring.empty
    for a, b in zip(pages.outline.rungs, buckets.rungs, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)


def test_a_padded_token_leaves_no_entry():
    s, buckets = prefilled()
    part = s.part(12, 13)._replace(positions=jnp.array([[12], [-1], [-1]], jnp.int32))
    cache = pack(buckets, 4)
    out, after = extend(cache, part)
    grown = np.concatenate(after.lengths(), axis=1) - np.concatenate(cache.lengths(), axis=1)
    np.testing.assert_array_equal(grown, [[1] * 3, [0] * 3, [0] * 3])
    assert np.all(out[1:] == 0) and np.any(out[0] != 0)


def test_a_decode_step_through_the_kernel_equals_xla():
    s = stream([14, 9], 14, 2, dim=128)
    s = s._replace(k=np.asarray(half(s.k)), v=np.asarray(half(s.v)))
    plan = plan_of("test", [[4, 4]], 8, Eviction(window=2))
    _, held = extend_all(bucketed_cache(plan, 0, 2, 4, 128), s, (12,))
    part = s.part(12, 13)
    expected, _ = extend(pack(held, 8), part)
    with pltpu.force_tpu_interpret_mode(), quick_compile():
        found, _ = jax.jit(lambda cache, part: cache.extend(*part))(pack(held, 8, "pallas"), part)
    np.testing.assert_allclose(found, expected, atol=1e-5)


PROGRAM = """
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxllm.kvcompress.bucketed_cache import bucketed_cache
from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.paged import pack
from jaxllm.kvcompress.plan import plan_of

plan = plan_of("test", [[96, 16, 16, 96]], 32, Eviction(), shards=2)
place = NamedSharding(mesh, P())


def step(cache, q, k, v, positions):
    out, cache = cache.extend(q, k, v, positions)
    return out, cache


with jax.set_mesh(mesh):
    make = lambda: pack(bucketed_cache(plan, 0, 4, 16, 128, jnp.bfloat16), 16)
    shape = lambda s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=place)
    cache = jax.tree.map(lambda x: shape(x.shape, x.dtype), jax.eval_shape(make))
    q, k = shape((4, 1, 16, 128)), shape((4, 1, 4, 128))
    args = cache, q, k, k, shape((4, 1), jnp.int32)
    print(jax.jit(step).lower(*args).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", FOUR_CHIPS)
def test_a_tpu_decodes_with_the_paged_kernel(topology):
    """Each of four chips runs the kernel on its own two rows and one head of each rung."""
    calls = kernel_calls(PROGRAM, topology)
    # 96 + 32 and 16 + 32 entries in pages of 16, two (row, head) sequences each: 16 and 6 pages.
    for pages in (16, 6):
        assert any(f"bf16[1,{pages},16,128]" in line for line in calls), pages
