"""The compressed cache of one layer: rungs of kept entries and one ring of new ones for all heads.

A rung is a dense array of the heads that have one capacity; attention runs over each rung and over
the ring and is merged by log-sum-exp. Keys are stored rotated with their absolute positions, so
the order of entries is free and padding is just position -1.

`extend` makes room before it writes: when the new tokens do not fit the ring it compresses (inside
`lax.cond`, the shapes never change). More tokens at once than `Plan.chunk` are a prompt: attention
is exact over everything held and all the new tokens, then one compression leaves the plan's
entries. Prefill, chunks and decoding therefore share one function, `compress`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.decoding.text_cache import (
    Attention,
    DenseCache,
    attend_buffer,
    attend_prompt,
    by_query_chunks,
    dense_cache,
    grouped,
    grow,
    merge,
    ungrouped,
    visible,
)
from jaxllm.errors import InputError
from jaxllm.kvcompress.compress import Eviction, Kept, compress_heads
from jaxllm.kvcompress.plan import LayerPlan, Plan
from jaxllm.kvcompress.scorers import Entries
from jaxllm.parallel.sharding import constrain


@struct.dataclass
class BucketedCache:
    """One layer's state, a value: extending it leaves the old one usable for another question.

    Attributes:
      rungs: One `Kept` per rung of the plan, heads in storage order.
      ring: New entries of all heads in storage order; [B, K, R, H].
      queries: [B, K, G, Q, H], the newest queries, as many as the scorer asks for.
      query_positions: int32 [B, Q], -1 where there is none.
      window_scores: float32 [B, K, window] running scores of the first ring entries, or None.
      layer: Rungs and head order.
      eviction: Which entries stay.
      makes_room: Whether `extend` compresses a full ring by itself. XLA copies the whole cache
        through that conditional, so the decode loop asks once per block (`begin_block`).
    """

    rungs: tuple[Kept, ...]
    ring: DenseCache
    queries: jax.Array
    query_positions: jax.Array
    window_scores: jax.Array | None
    layer: LayerPlan = struct.field(pytree_node=False)
    eviction: Eviction = struct.field(pytree_node=False)
    makes_room: bool = struct.field(pytree_node=False, default=True)

    def extend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, BucketedCache]:
        """Appends T positions, attends over everything held, and compresses where needed.

        Args:
          q: [B, Q, N, H] rotated queries of the last Q positions, `least_queries(T)` or more.
          k: [B, T, K, H] rotated keys.
          v: [B, T, K, H] values.
          positions: int32 [B, T] absolute positions, ascending in a row, -1 for left padding.

        Returns:
          The attention output [B, Q, N, H], 0 for padding, and the new cache.
        """
        count = k.shape[1]
        order = self.layer.order
        k_own, v_own = reordered(k, order, 2), reordered(v, order, 2)
        q_BKGTH = reordered(grouped(q, k.shape[2]), order, 1)
        if count <= self.block:
            start = with_room(self, count) if self.makes_room else self
            held = after = start._append(q_BKGTH, k_own, v_own, positions)
        else:
            held = dataclasses.replace(self, ring=grow(self.ring, count))
            held = held._append(q_BKGTH, k_own, v_own, positions)
            after = held._compressed(self.ring.length, self.queries.shape[3])
        if self.ring.empty:
            window, soft_cap = self.ring.window, self.ring.soft_cap
            return attend_prompt(q, k, v, positions, window=window, soft_cap=soft_cap), after
        out = by_query_chunks(held._attention, q_BKGTH, positions[:, count - q.shape[1] :])
        return ungrouped(reordered(out, inverse(order), 1)).astype(q.dtype), after

    @property
    def fill(self) -> jax.Array:
        """Slots of the ring in use, int32 scalar."""
        return self.ring.fill

    @property
    def slots(self) -> int:
        """Slots of the ring."""
        return self.ring.positions.shape[1]

    @property
    def block(self) -> int:
        """Tokens that fit before the ring must be compressed: `Plan.chunk`."""
        return self.slots - self.eviction.window

    @property
    def free(self) -> None:
        """None: old entries give way to new ones."""
        return None

    def begin_prompt(self) -> BucketedCache:
        """Returns the cache, which holds nothing, marked so until something is written."""
        return dataclasses.replace(self, ring=self.ring.begin_prompt())

    def least_queries(self, count: int) -> int:
        """Those that its scorer asks for, if it asks after `count` more."""
        return min(count, self.eviction.scorer.queries(self.eviction.window, self.slots + count))

    def begin_block(self, count: int) -> BucketedCache:
        """Returns the cache with `count` free ring slots that `extend` takes without a check."""
        return dataclasses.replace(with_room(self, count), makes_room=False)

    def end_block(self) -> BucketedCache:
        """Returns the cache as `extend` takes it for any number of tokens."""
        return dataclasses.replace(self, makes_room=True)

    def compress(self) -> BucketedCache:
        """Moves what the ring holds beyond the window into the rungs, whatever it holds.

        Calling it after a context and before a question makes the choice blind to the question.
        """
        return self._compressed(self.ring.length, self.queries.shape[3])

    def _append(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> BucketedCache:
        """Writes entries into the ring and the newest queries behind the stored ones."""
        return dataclasses.replace(
            self.append_queries(q, positions), ring=self.ring.append(k, v, positions)
        )

    def append_queries(self, q: jax.Array, positions: jax.Array) -> BucketedCache:
        """Puts queries q [B, K, G, Q, H] behind the stored; as many stay as the scorer asks for."""
        queries = jnp.concatenate([self.queries, q.astype(self.queries.dtype)], axis=3)
        own = positions[:, positions.shape[1] - q.shape[3] :]
        at = jnp.concatenate([self.query_positions, own], axis=1)
        # Of a ring grown by a prompt, a scorer that adds up attention wants all its queries.
        wanted = self.eviction.scorer.queries(self.eviction.window, self.slots)
        first = queries.shape[3] - wanted
        return dataclasses.replace(
            self, queries=queries[:, :, :, first:], query_positions=at[:, first:]
        )

    def _attention(self, q: jax.Array, positions: jax.Array) -> jax.Array:
        """Attends with q [B, K, G, T, H], heads in storage order; float32 [B, K, G, T, H]."""
        ring = self.ring.attention(q, positions)
        shards, parts = self.layer.shards, []
        for kept, heads in zip(self.rungs, self.slices(), strict=True):
            part = Attention(*(cut_heads(x, heads, shards) for x in ring))
            if kept.positions.shape[-1]:
                seen = visible(positions, kept.positions, self.ring.window)
                own = attend_buffer(
                    cut_heads(q, heads, shards), kept.keys, kept.values, seen, self.ring.soft_cap
                )
                part = merge(own, part)
            parts.append(part.out)
        return join_heads(parts, shards)

    def slices(self) -> list[tuple[int, int]]:
        """Returns the first head and the number of heads of each rung within one shard."""
        found, start = [], 0
        for _, heads in self.layer.rungs:
            found.append((start, heads // self.layer.shards))
            start += heads // self.layer.shards
        return found

    def _compressed(self, length: int, stored: int) -> BucketedCache:
        """Compresses into a ring of `length` slots that remembers `stored` queries."""
        ring, window, shards = self.ring, self.eviction.window, self.layer.shards
        start = jnp.maximum(ring.fill - window, 0)
        scores = self.window_scores
        if scores is not None:
            scores = jnp.pad(scores, ((0, 0), (0, 0), (0, ring.length - window)))
        # The window is cut out of the ring; before it are candidates, behind it nothing.
        older = jnp.where(jnp.arange(ring.length) < start, ring.positions, -1)
        fresh = Kept(ring.keys, ring.values, older, scores)

        def last(x: jax.Array, axis: int = 2) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, window, axis)

        recent = Kept(
            last(ring.keys),
            last(ring.values),
            last(ring.positions, axis=1),
            None if scores is None else last(scores),
        )
        context = Entries(
            queries=self.queries,
            query_positions=self.query_positions,
            keys=ring.keys,
            values=ring.values,
            positions=ring.positions,
            newest=ring.positions.max(axis=1),
            sliding_window=ring.window,
            soft_cap=ring.soft_cap,
        )
        survivors: list[Kept] = []
        window_scores: list[jax.Array] = []
        for kept, heads in zip(self.rungs, self.slices(), strict=True):
            left, running = compress_heads(
                kept,
                _of_rung(fresh, heads, shards),
                _of_rung(recent, heads, shards),
                context._replace(queries=cut_heads(self.queries, heads, shards)),
                self.eviction,
            )
            survivors.append(left)
            if running is not None:
                window_scores.append(running)
        first = self.queries.shape[3] - stored
        query_positions = self.query_positions[:, first:]
        if scores is not None:  # What adds up must not count a query twice.
            query_positions = jnp.full_like(query_positions, -1)
        return dataclasses.replace(
            self,
            rungs=tuple(survivors),
            ring=_restarted(ring, recent, length, jnp.minimum(ring.fill, window)),
            queries=self.queries[:, :, :, first:],
            query_positions=query_positions,
            window_scores=None if scores is None else join_heads(window_scores, shards),
        )


def with_room(cache: Any, count: int) -> Any:
    """Returns the cache with `count` free slots in its ring, compressed if that is what it takes.

    Args:
      cache: Any cache with `fill`, `slots` and `compress`.
      count: At most `Plan.chunk`.
    """
    full = cache.fill + count > cache.slots
    return jax.lax.cond(full, lambda cache: cache.compress(), lambda cache: cache, cache)


def _of_rung(entries: Kept, heads: tuple[int, int], shards: int) -> Kept:
    """Cuts one rung's heads out of ring entries, each with its own copy of the positions [B, M]."""
    keys, values = (cut_heads(x, heads, shards) for x in (entries.keys, entries.values))
    positions = jnp.broadcast_to(entries.positions[:, None], keys.shape[:3])
    scores = None if entries.scores is None else cut_heads(entries.scores, heads, shards)
    return Kept(keys, values, positions, scores)


def _restarted(ring: DenseCache, window: Kept, length: int, fill: jax.Array) -> DenseCache:
    """A ring of `length` slots that holds the window and nothing else."""
    wide = ((0, 0), (0, 0), (0, length - window.positions.shape[1]), (0, 0))
    return dataclasses.replace(
        ring,
        keys=jnp.pad(window.keys, wide),
        values=jnp.pad(window.values, wide),
        positions=jnp.pad(window.positions, (wide[0], wide[2]), constant_values=-1),
        fill=fill,
    )


def reordered(x: jax.Array, order: tuple[int, ...], axis: int) -> jax.Array:
    """Permutes heads; free where the order is the model's own."""
    if order == tuple(range(len(order))):
        return x
    return jnp.take(x, jnp.asarray(order), axis=axis)


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def cut_heads(x: jax.Array, heads: tuple[int, int], shards: int) -> jax.Array:
    """Cuts the heads of one rung out of [B, K, ...], the same places in every shard."""
    start, count = heads
    if shards == 1:
        return x[:, start : start + count]
    split = x.reshape(x.shape[0], shards, -1, *x.shape[2:])[:, :, start : start + count]
    return split.reshape(x.shape[0], -1, *x.shape[2:])


def join_heads(parts: list[jax.Array], shards: int) -> jax.Array:
    """Puts the heads of all rungs [B, n, ...] back into storage order [B, K, ...]."""
    if shards == 1:
        return jnp.concatenate(parts, axis=1)
    split = [x.reshape(x.shape[0], shards, -1, *x.shape[2:]) for x in parts]
    joined = jnp.concatenate(split, axis=2)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])


def bucketed_cache(
    plan: Plan,
    layer: int,
    batch: int,
    query_heads: int,
    head_dim: int,
    dtype: Any = jnp.float32,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> BucketedCache | DenseCache:
    """Returns the empty cache of one layer; of a plan that drops nothing, a dense one.

    Args:
      plan: What to keep.
      layer: Which layer.
      batch: Rows B.
      query_heads: N.
      head_dim: H.
      dtype: Storage dtype.
      window: Sliding window of the layer's attention.
      soft_cap: Soft cap of its scores.

    Raises:
      InputError: N is not a multiple of the plan's KV heads.
    """
    kv_heads = plan.kv_heads
    if query_heads % kv_heads:
        raise InputError(f"{query_heads} query heads are not a multiple of {kv_heads} KV heads")
    ring = dense_cache(
        batch, kv_heads, plan.ring, head_dim, dtype, window=window, soft_cap=soft_cap
    )
    if plan.eviction is None:
        return ring
    running = plan.eviction.scorer.decay is not None

    def zeros(*shape: int, dtype: Any = dtype) -> jax.Array:
        names = ("batch", "heads", *(None,) * (len(shape) - 2))
        return constrain(jnp.zeros(shape, dtype), *names)

    rungs = tuple(
        Kept(
            zeros(batch, heads, capacity, head_dim),
            zeros(batch, heads, capacity, head_dim),
            zeros(batch, heads, capacity, dtype=jnp.int32) - 1,
            zeros(batch, heads, capacity, dtype=jnp.float32) if running else None,
        )
        for capacity, heads in plan.layers[layer].rungs
    )
    queries = plan.eviction.scorer.queries(plan.eviction.window, plan.ring)
    return BucketedCache(
        rungs=rungs,
        ring=ring,
        queries=zeros(batch, kv_heads, query_heads // kv_heads, queries, head_dim),
        query_positions=jnp.full((batch, queries), -1, jnp.int32),
        window_scores=(
            zeros(batch, kv_heads, plan.eviction.window, dtype=jnp.float32) if running else None
        ),
        layer=plan.layers[layer],
        eviction=plan.eviction,
    )


def bucketed_caches(
    plan: Plan, batch: int, query_heads: int, head_dim: int, dtype: Any = jnp.float32
) -> list[BucketedCache | DenseCache]:
    """Returns the empty caches of all layers of a model without sliding windows or soft caps."""
    return [
        bucketed_cache(plan, layer, batch, query_heads, head_dim, dtype)
        for layer in range(len(plan.layers))
    ]


def nbytes(cache: Any) -> int:
    """Returns the bytes of all arrays of a cache or a list of them."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
