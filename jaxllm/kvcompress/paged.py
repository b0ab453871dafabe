"""Decoding on a TPU: the compressed cache in pages, read by the Pallas paged-attention kernel.

The kernel knows one length per sequence. Folding KV heads into the batch, each (row, KV head) with
its G query heads as one sequence of one KV head, gives it per-head lengths unchanged; the lanes of
a head's pages past its length are never fetched. The entries of a head are therefore packed to the
front: kept ones, then the ring's, without gaps. Everything else (which entries stay) is the
bucketed cache's, into which a paged one unpacks to compress.

The kernel rounds keys and values to bfloat16 whatever they are stored in.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.decoding.text_cache import attend_buffer, grouped, ungrouped
from jaxllm.errors import InputError
from jaxllm.kvcompress.bucketed_cache import (
    BucketedCache,
    cut_heads,
    inverse,
    join_heads,
    reordered,
    with_room,
)
from jaxllm.kvcompress.compress import Kept
from jaxllm.parallel.mesh import target_platform
from jaxllm.parallel.sharding import activation_spec

Implementation = Literal["auto", "xla", "pallas"]
_BLOCK_TOKENS = 512
"""Entries the kernel loads at once, where a head has as many pages."""


@struct.dataclass
class PagedCache:
    """One layer's compressed cache as pages.

    Attributes:
      keys: One [B, n, S, H] per rung, S = capacity + ring rounded up to whole pages.
      values: The same for values.
      outline: The bucketed cache without its keys and values: positions, queries, counters.
      page: Entries of a page.
      implementation: `auto` is the kernel on a TPU and XLA elsewhere.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    outline: BucketedCache
    page: int = struct.field(pytree_node=False)
    implementation: Implementation = struct.field(pytree_node=False, default="auto")

    def lengths(self) -> list[jax.Array]:
        """Returns the number of entries [B, n] of every head, rung by rung."""
        ring = jnp.sum(self.outline.ring.positions >= 0, axis=1)
        return [
            (jnp.sum(kept.positions >= 0, axis=-1) + ring[:, None]).astype(jnp.int32)
            for kept in self.outline.rungs
        ]

    def extend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, PagedCache]:
        """As `BucketedCache.extend`; one token goes through the pages, more through the buckets."""
        if k.shape[1] > 1:
            out, cache = unpack(self).extend(q, k, v, positions)
            return out, pack(cache, self.page, self.implementation)
        start = with_room(self, 1) if self.outline.makes_room else self
        return start._decode(q, k, v, positions)

    @property
    def fill(self) -> jax.Array:
        """Slots of the ring in use, int32 scalar."""
        return self.outline.fill

    @property
    def slots(self) -> int:
        """Slots of the ring."""
        return self.outline.slots

    @property
    def block(self) -> int:
        """As `BucketedCache.block`."""
        return self.outline.block

    @property
    def free(self) -> None:
        """As `BucketedCache.free`."""
        return None

    def begin_prompt(self) -> PagedCache:
        """As `BucketedCache.begin_prompt`."""
        return dataclasses.replace(self, outline=self.outline.begin_prompt())

    def least_queries(self, count: int) -> int:
        """As `BucketedCache.least_queries`."""
        return self.outline.least_queries(count)

    def begin_block(self, count: int) -> PagedCache:
        """As `BucketedCache.begin_block`."""
        room = with_room(self, count)
        return dataclasses.replace(
            room, outline=dataclasses.replace(room.outline, makes_room=False)
        )

    def end_block(self) -> PagedCache:
        """As `BucketedCache.end_block`."""
        return dataclasses.replace(self, outline=self.outline.end_block())

    def compress(self) -> PagedCache:
        """As `BucketedCache.compress`."""
        return pack(unpack(self).compress(), self.page, self.implementation)

    def _decode(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, PagedCache]:
        layer, kv_heads = self.outline.layer, k.shape[2]
        q_BKGTH = reordered(grouped(q, kv_heads), layer.order, 1)
        k_BKH, v_BKH = (reordered(x[:, 0], layer.order, 1) for x in (k, v))
        written = self._written(k_BKH, v_BKH, positions)
        after = dataclasses.replace(written, outline=_noted(self.outline, q_BKGTH, positions))
        parts = []
        slices, lengths = self.outline.slices(), after.lengths()
        for heads, keys, values, length in zip(
            slices, after.keys, after.values, lengths, strict=True
        ):
            own = cut_heads(q_BKGTH[..., 0, :], heads, layer.shards)
            parts.append(self._attend(own, keys, values, length))
        out = join_heads(parts, layer.shards)[..., None, :]
        out = jnp.where((positions >= 0)[:, None, None, :, None], out, 0.0)
        return ungrouped(reordered(out, inverse(layer.order), 1)).astype(q.dtype), after

    def _written(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> PagedCache:
        """Puts one entry [B, K, H] behind the others of every head; padding is not written."""
        shards = self.outline.layer.shards
        keys: list[jax.Array] = []
        values: list[jax.Array] = []
        for heads, old_k, old_v, length in zip(
            self.outline.slices(), self.keys, self.values, self.lengths(), strict=True
        ):
            slot = jnp.where(positions >= 0, length, old_k.shape[2])
            rows, places = jnp.indices(slot.shape)
            for held, old, new in ((keys, old_k, k), (values, old_v, v)):
                entry = cut_heads(new, heads, shards).astype(old.dtype)
                held.append(old.at[rows, places, slot].set(entry, mode="drop"))
        return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

    def _attend(
        self, q: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array
    ) -> jax.Array:
        """Attention of one query per head [B, n, G, H]; float32."""
        soft_cap = self.outline.ring.soft_cap
        chosen = self.implementation
        if chosen == "auto":
            chosen = "pallas" if target_platform() == "tpu" else "xla"
        if chosen == "pallas":
            return paged_attention(q, keys, values, length, self.page, soft_cap)
        seen = (jnp.arange(keys.shape[2]) < length[..., None])[:, :, None, None]
        return attend_buffer(q[..., None, :], keys, values, seen, soft_cap).out[..., 0, :]


def paged_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    length: jax.Array,
    page: int,
    soft_cap: float | None = None,
) -> jax.Array:
    """The Pallas kernel with KV heads as sequences, on each device's own rows and heads.

    Args:
      q: [B, n, G, H], one query per query head.
      keys: [B, n, S, H], S a multiple of `page`.
      values: [B, n, S, H].
      length: int32 [B, n], entries of each head.
      page: Entries of a page.
      soft_cap: Soft cap of the scores.

    Returns:
      float32 [B, n, G, H].
    """
    local = functools.partial(_paged_local, page=page, soft_cap=soft_cap)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, keys, values, length)
    spec = activation_spec(mesh, keys.shape, ("batch", "heads", None, None))
    flat = activation_spec(mesh, length.shape, ("batch", "heads"))
    return jax.shard_map(local, in_specs=(spec, spec, spec, flat), out_specs=spec, check_vma=False)(
        q, keys, values, length
    )


def _paged_local(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    length: jax.Array,
    *,
    page: int,
    soft_cap: float | None,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    batch, heads, slots, dim = keys.shape
    pages = slots // page
    # The pages of a head lie one after the other: the table is a constant.
    table = jnp.arange(batch * heads * pages, dtype=jnp.int32).reshape(batch * heads, pages)
    fits = [n for n in range(1, pages + 1) if pages % n == 0 and n * page <= _BLOCK_TOKENS]
    out = kernel(
        (q.astype(jnp.float32) * dim**-0.5).reshape(batch * heads, -1, dim),
        keys.reshape(1, -1, page, dim),
        values.reshape(1, -1, page, dim),
        length.reshape(-1),
        table,
        pages_per_compute_block=max(fits, default=1),
        attn_logits_soft_cap=soft_cap,
    )
    return out.reshape(q.shape)


def pack(
    cache: BucketedCache, page: int = 16, implementation: Implementation = "auto"
) -> PagedCache:
    """Lays the entries of every head out without gaps, in whole pages.

    Args:
      cache: A bucketed cache.
      page: Entries of a page: a multiple of 8 for float32 and of 16 for bfloat16 on a TPU.
      implementation: How the pages are read.

    Raises:
      InputError: A page below 1, or a layer with a sliding window: the kernel cannot skip entries
        by position.
    """
    if page < 1:
        raise InputError(f"page {page} must be at least 1")
    if cache.ring.window is not None:
        raise InputError(
            f"paged attention has no sliding window, the layer has {cache.ring.window}"
        )
    ring, shards = cache.ring, cache.layer.shards
    keys: list[jax.Array] = []
    values: list[jax.Array] = []
    for kept, heads in zip(cache.rungs, cache.slices(), strict=True):
        positions = _positions(kept, ring.positions)
        slots = -(-positions.shape[-1] // page) * page
        # A stable sort of "is empty" moves the entries to the front in their order.
        order = jnp.argsort(positions < 0, axis=-1, stable=True)
        for packed, own, new in (
            (keys, kept.keys, ring.keys),
            (values, kept.values, ring.values),
        ):
            both = jnp.concatenate([own, cut_heads(new, heads, shards)], axis=2)
            moved = jnp.take_along_axis(both, order[..., None], axis=2)
            fill = slots - moved.shape[2]
            packed.append(jnp.pad(moved, ((0, 0), (0, 0), (0, fill), (0, 0))))
    return PagedCache(tuple(keys), tuple(values), _outline(cache), page, implementation)


def unpack(cache: PagedCache) -> BucketedCache:
    """Returns the bucketed cache that `pack` would give back."""
    outline, shards = cache.outline, cache.outline.layer.shards
    rungs: list[Kept] = []
    ring: dict[str, list[jax.Array]] = {"keys": [], "values": []}
    for kept, keys, values in zip(outline.rungs, cache.keys, cache.values, strict=True):
        positions = _positions(kept, outline.ring.positions)
        there = positions >= 0
        slot = jnp.maximum(jnp.cumsum(there, axis=-1) - 1, 0)
        capacity = kept.positions.shape[-1]
        parts = {}
        for name, packed in (("keys", keys), ("values", values)):
            spread = jnp.take_along_axis(packed, slot[..., None], axis=2)
            spread = jnp.where(there[..., None], spread, 0)
            parts[name] = spread[:, :, :capacity]
            ring[name].append(spread[:, :, capacity:])
        rungs.append(kept._replace(**parts))
    joined = dataclasses.replace(
        outline.ring,
        keys=join_heads(ring["keys"], shards),
        values=join_heads(ring["values"], shards),
    )
    return dataclasses.replace(outline, rungs=tuple(rungs), ring=joined)


def _outline(cache: BucketedCache) -> BucketedCache:
    """Drops the keys and values: a pytree of what is left."""
    nothing: Any = None
    rungs = tuple(kept._replace(keys=nothing, values=nothing) for kept in cache.rungs)
    return dataclasses.replace(
        cache, rungs=rungs, ring=dataclasses.replace(cache.ring, keys=nothing, values=nothing)
    )


def _noted(outline: BucketedCache, q: jax.Array, positions: jax.Array) -> BucketedCache:
    """Counts one more entry in the ring and remembers its queries [B, K, G, 1, H]."""
    ring = outline.ring
    at = jax.lax.dynamic_update_slice(ring.positions, positions, (0, ring.fill))
    ring = dataclasses.replace(ring, positions=at, fill=ring.fill + 1, empty=False)
    return dataclasses.replace(outline.append_queries(q, positions), ring=ring)


def _positions(kept: Kept, ring: jax.Array) -> jax.Array:
    """Positions [B, n, c + R] of a rung's kept entries and behind them the ring's."""
    shape = (*kept.positions.shape[:2], ring.shape[1])
    return jnp.concatenate([kept.positions, jnp.broadcast_to(ring[:, None], shape)], axis=2)
