"""A cache that simulates any plan by masking: for comparisons of plans, not for saving memory.

Every slot of every head stays in memory and dropped ones get position -1, so that how many entries
a head keeps is data instead of a shape: one compiled program serves all plans, and also rules whose
budgets depend on the input (Ada-KV, arXiv:2407.11550), which no static shape can hold. With the
same capacities it keeps the same entries as `BucketedCache`, whose bytes and speed are the real
ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.decoding.text_cache import attend_buffer, grouped, ungrouped, visible
from jaxllm.errors import InputError
from jaxllm.kvcompress.compress import Eviction, pool_positions, score_entries
from jaxllm.kvcompress.scorers import Entries


class Choice(NamedTuple):
    """What a method keeps, as arrays; of one layer, or of all with a leading axis L.

    Attributes:
      capacities: int32 [K], entries of each head besides the window.
      recent: bool [K], heads that keep the newest entries instead of the best scored.
      adaptive: bool [], the best entries of all heads of a layer compete for the sum of capacities.
      floor: int32 [], entries that every head keeps of an adaptive budget.
      sinks: int32 [], positions below it are kept before all others.
    """

    capacities: jax.Array
    recent: jax.Array
    adaptive: jax.Array
    floor: jax.Array
    sinks: jax.Array

    def layer(self, number: int) -> Choice:
        """One layer of a choice for all."""
        return Choice(*(part[number] for part in self))


@struct.dataclass
class MaskedCache:
    """One layer's state; rows are not padded, and slot i holds position i.

    Attributes:
      keys: [B, K, S, H].
      values: [B, K, S, H].
      positions: int32 [B, K, S]; -1 is empty or dropped.
      fill: int32 scalar, slots in use.
      queries: [B, K, G, window, H], the newest.
      query_positions: int32 [B, window], -1 where there is none.
      eviction: Window, scorer and reduction over a group; its sinks are those of the choice.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    fill: jax.Array
    queries: jax.Array
    query_positions: jax.Array
    eviction: Eviction = struct.field(pytree_node=False)

    def extend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, MaskedCache]:
        """Appends T positions and attends over what is not dropped, as every cache does."""
        rows, heads, count = len(k), k.shape[2], k.shape[1]
        if count > self.keys.shape[2]:
            raise InputError(f"{count} new tokens, the cache holds {self.keys.shape[2]}")
        at = (0, 0, self.fill, 0)

        def write(held: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(held, new.transpose(0, 2, 1, 3), at)

        per_head = jnp.broadcast_to(positions[:, None], (rows, heads, count))
        q_BKGTH, window = grouped(q, heads), self.eviction.window
        queries = jnp.concatenate([self.queries, q_BKGTH], axis=3)
        query_positions = jnp.concatenate([self.query_positions, positions], axis=1)
        new = dataclasses.replace(
            self,
            keys=write(self.keys, k),
            values=write(self.values, v),
            positions=jax.lax.dynamic_update_slice(self.positions, per_head, at[:3]),
            fill=self.fill + count,
            queries=queries[:, :, :, queries.shape[3] - window :],
            query_positions=query_positions[:, query_positions.shape[1] - window :],
        )
        seen = visible(positions, new.positions)
        out = attend_buffer(q_BKGTH, new.keys, new.values, seen).out
        return ungrouped(out).astype(q.dtype), new

    def compress(self, choice: Choice) -> MaskedCache:
        """Drops all but the chosen entries and the window.

        Args:
          choice: Of this layer.
        """
        slots = jnp.arange(self.keys.shape[2])
        protected = slots >= self.fill - self.eviction.window
        candidate = (self.positions >= 0) & ~protected
        entries = Entries(
            queries=self.queries,
            query_positions=self.query_positions,
            keys=self.keys,
            values=self.values,
            positions=self.positions,
            newest=self.positions.max(axis=(1, 2)),
            sliding_window=None,
            soft_cap=None,
        )
        scores = jnp.where(candidate, score_entries(entries, self.eviction), -jnp.inf)
        scores = pool_positions(scores, self.positions, self.eviction.scorer.pool)
        newest = self.positions.astype(jnp.float32)
        scores = jnp.where(choice.recent[:, None], newest, scores)
        scores = jnp.where(self.positions < choice.sinks, jnp.inf, scores)
        scores = jnp.where(candidate, scores, -jnp.inf)
        rank = _ranks(scores)

        def shared() -> jax.Array:
            # Ada: a head's floor comes first, the rest by score whoever's it is.
            ranked = jnp.where((rank < choice.floor) & candidate, jnp.inf, scores)
            place = _ranks(ranked.reshape(len(scores), -1)).reshape(scores.shape)
            return place < choice.capacities.sum()

        own = rank < choice.capacities[:, None]
        kept = candidate & jax.lax.cond(choice.adaptive, shared, lambda: own)
        return dataclasses.replace(self, positions=jnp.where(kept | protected, self.positions, -1))

    def without_last(self) -> MaskedCache:
        """Forgets the newest entry, so that its token can be read again."""
        last = jnp.arange(self.keys.shape[2]) == self.fill - 1
        positions = jnp.where(last, -1, self.positions)
        return dataclasses.replace(self, positions=positions, fill=self.fill - 1)

    def repeated(self, times: int) -> MaskedCache:
        """Returns every row `times` times, one after the other, for as many continuations."""

        def repeat(x: jax.Array) -> jax.Array:
            return x if x.ndim == 0 else jnp.repeat(x, times, axis=0)

        return jax.tree.map(repeat, self)


def _ranks(scores: jax.Array) -> jax.Array:
    """Place of every score along the last axis, 0 for the highest, of equals the first."""
    # Counting what comes before each is faster than two sorts at the lengths simulated here.
    this, other = scores[..., :, None], scores[..., None, :]
    index = jnp.arange(scores.shape[-1])
    before = (other > this) | ((other == this) & (index < index[:, None]))
    return jnp.sum(before, axis=-1)


def masked_cache(
    batch: int,
    query_heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    eviction: Eviction,
    dtype: Any = jnp.float32,
) -> MaskedCache:
    """Returns the empty cache of one layer.

    Args:
      batch: Rows B.
      query_heads: N.
      kv_heads: K.
      length: Slots S, for everything that will ever come.
      head_dim: H.
      eviction: Window, scorer and reduction over a group.
      dtype: Storage dtype.

    Raises:
      InputError: A scorer that wants other queries than the window's.
    """
    if eviction.scorer.queries(eviction.window, length) != eviction.window:
        raise InputError(
            f"scorer {type(eviction.scorer).__name__} needs other queries than those of the "
            "window, which a masked cache does not keep"
        )
    shape = (batch, kv_heads, length, head_dim)
    group = query_heads // kv_heads
    return MaskedCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.full(shape[:3], -1, jnp.int32),
        fill=jnp.zeros((), jnp.int32),
        queries=jnp.zeros((batch, kv_heads, group, eviction.window, head_dim), dtype),
        query_positions=jnp.full((batch, eviction.window), -1, jnp.int32),
        eviction=eviction,
    )
