"""The dense key/value cache of ragged, left-padded text, and the attention that reads any cache.

Rows of a batch write the same slots; which slots a query sees is a comparison of the stored
absolute positions, so padding (position -1), sliding windows and entries out of order need no mask
of their own. Attention over several buffers is computed per buffer and merged by log-sum-exp
(Milakov and Gimelshein, arXiv:1805.02867), never by concatenating the buffers.

A layer of any cache is a pytree with one method:

    extend(q [B,Q,N,H], k [B,T,K,H], v [B,T,K,H], positions [B,T]) -> (out [B,Q,N,H], cache)

whose queries belong to the last Q of the T positions: what stands before them in a model's last
layer has no use. Two more serve the prompt: `begin_prompt()`, the cache where it is known to be
empty, and `least_queries(count)`, the queries that it needs of `count` positions for itself. Three
serve the decode loop: `block`, how many tokens fit one by one before room must be made;
`begin_block(count)`, the cache with room for that many; `end_block()`, as it was otherwise.

Keys and queries are already rotated. A model with another scale than 1/sqrt(H) scales `q` before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.errors import InputError
from jaxllm.nn.attention import attend, causal_blocks
from jaxllm.parallel.mesh import target_platform
from jaxllm.parallel.sharding import constrain

_QUERY_CHUNK = 256
"""Queries scored at once: a long prompt needs [B, N, 256, S] scores, not [B, N, T, S]."""
_KERNEL_BLOCK = 128
_FEW_QUERIES = 8
"""Queries per key/value head of one decode step, about."""


class Attention(NamedTuple):
    """Normalised attention over one buffer, and what it takes to merge it with another's.

    Attributes:
      out: float32 [B, K, G, T, H]; 0 where a query sees nothing.
      lse: float32 [B, K, G, T], log of the sum of exponentials; -inf where it sees nothing.
    """

    out: jax.Array
    lse: jax.Array


def grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """Returns queries [B, T, N, H] as [B, K, G, T, H]; query head n reads KV head n // G."""
    batch, queries, _, dim = q.shape
    return q.reshape(batch, queries, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)


def ungrouped(out: jax.Array) -> jax.Array:
    """Returns [B, K, G, T, H] as [B, T, N, H]."""
    batch, kv_heads, groups, queries, dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, kv_heads * groups, dim)


def visible(
    query_positions: jax.Array, key_positions: jax.Array, window: int | None = None
) -> jax.Array:
    """Marks what each query sees: keys not after it and, with a window, less than `window` before.

    Args:
      query_positions: int32 [B, T]; a negative one sees nothing.
      key_positions: int32 [B, S], or [B, K, S] where heads hold different entries; -1 is empty.
      window: Length of the sliding window, the query itself included; None is unlimited.

    Returns:
      bool [B, 1 or K, 1, T, S].
    """
    keys = key_positions if key_positions.ndim == 3 else key_positions[:, None]
    keys, queries = keys[:, :, None, None, :], query_positions[:, None, None, :, None]
    seen = (keys >= 0) & (keys <= queries)
    return seen if window is None else seen & (keys > queries - window)


def logits(q: jax.Array, keys: jax.Array, soft_cap: float | None = None) -> jax.Array:
    """Returns float32 [B, K, G, T, S] scaled scores of q [B, K, G, T, H] on keys [B, K, S, H]."""
    keys = keys.astype(q.dtype)
    if q.shape[2] * q.shape[3] <= _FEW_QUERIES:
        # Keys on the left: the CPU backend would copy them transposed to have them on the right.
        turned = jnp.einsum("bksh,bkgth->bksgt", keys, q, preferred_element_type=jnp.float32)
        scores = jnp.moveaxis(turned, 2, -1)
    else:
        scores = jnp.einsum("bkgth,bksh->bkgts", q, keys, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def attend_buffer(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array,
    soft_cap: float | None = None,
) -> Attention:
    """Attends over one buffer; softmax in float32.

    Args:
      q: [B, K, G, T, H].
      keys: [B, K, S, H].
      values: [B, K, S, H].
      seen: bool, broadcastable to [B, K, G, T, S].
      soft_cap: Scores become `soft_cap * tanh(scores / soft_cap)`.
    """
    scores = jnp.where(seen, logits(q, keys, soft_cap), -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    # A padded query sees nothing: its weights must be 0, not NaN, or they spread to other rows.
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1)
    out = jnp.einsum(
        "bkgts,bksh->bkgth",
        weights.astype(q.dtype),
        values.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return Attention(out / jnp.maximum(total, 1e-37)[..., None], top[..., 0] + jnp.log(total))


def merge(a: Attention, b: Attention) -> Attention:
    """Returns the attention over two disjoint buffers together."""
    top = jnp.maximum(a.lse, b.lse)
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    parts = jnp.exp(a.lse - shift), jnp.exp(b.lse - shift)
    total = parts[0] + parts[1]
    share = (parts[0] / jnp.maximum(total, 1e-37))[..., None]
    rest = (parts[1] / jnp.maximum(total, 1e-37))[..., None]
    out = share * a.out + rest * b.out
    return Attention(out, shift + jnp.log(total))


def by_query_chunks(
    attention: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, positions: jax.Array
) -> jax.Array:
    """Applies `attention(q [B,K,G,t,H], positions [B,t])` to at most 256 queries at a time."""
    length = q.shape[3]
    if length <= _QUERY_CHUNK:
        return attention(q, positions)
    chunks = -(-length // _QUERY_CHUNK)
    pad = chunks * _QUERY_CHUNK - length
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, pad), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1)
    q = jnp.moveaxis(q.reshape(*q.shape[:3], chunks, _QUERY_CHUNK, q.shape[-1]), 3, 0)
    positions = positions.reshape(-1, chunks, _QUERY_CHUNK).swapaxes(0, 1)
    out = jnp.moveaxis(jax.lax.map(lambda part: attention(*part), (q, positions)), 0, 3)
    return out.reshape(*out.shape[:3], -1, out.shape[-1])[..., :length, :]


def attend_prompt(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention among left-padded rows that start from an empty cache.

    Args:
      q: [B, Q, N, H], of the last Q positions.
      k: [B, T, K, H].
      v: [B, T, K, H].
      positions: int32 [B, T], -1 for the padding at the start of a row, then ascending.
      window: Sliding window.
      soft_cap: Soft cap of the scores.

    Returns:
      [B, Q, N, H]; 0 for padding.
    """
    platform = target_platform()
    fused = platform == "tpu" or (platform == "gpu" and q.dtype.itemsize == 2)
    plain = window is None and soft_cap is None
    if fused and plain and q.shape[1] == k.shape[1] >= _KERNEL_BLOCK:
        return _attend_causally(q, k, v, positions)
    q_BKGTH, k_BKSH, v_BKSH = grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    of_queries = positions[:, k.shape[1] - q.shape[1] :]
    blocks = []
    # Positions ascend, so that places say what is out of sight whatever the padding.
    for mine, keys in causal_blocks(q.shape[1], k.shape[1], window):

        def attention(q: jax.Array, at: jax.Array, keys: slice = keys) -> jax.Array:
            seen = visible(at, positions[:, keys], window)
            return attend_buffer(q, k_BKSH[:, :, keys], v_BKSH[:, :, keys], seen, soft_cap).out

        blocks.append(by_query_chunks(attention, q_BKGTH[:, :, :, mine], of_queries[:, mine]))
    return ungrouped(jnp.concatenate(blocks, axis=3)).astype(q.dtype)


def _attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """As `attend_prompt` through `attend`.

    Rows are moved to the left, where causality alone hides the padding: the fused kernels then
    need no mask, and T may be padded to a multiple of their block.
    """
    length = q.shape[1]
    padded = -(-length // _KERNEL_BLOCK) * _KERNEL_BLOCK
    pads = jnp.sum(positions < 0, axis=1, keepdims=True)

    def moved(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.clip(index, 0, length - 1)[..., None, None], axis=1)

    left = jnp.arange(padded) + pads
    out = attend(moved(q, left), moved(k, left), moved(v, left), causal=True)
    back = moved(out, jnp.arange(length) - pads)
    return jnp.where((positions >= 0)[..., None, None], back, 0.0).astype(q.dtype)


@struct.dataclass
class DenseCache:
    """Keys and values of one layer with the position of every slot.

    Attributes:
      keys: [B, K, S, H], heads before time, as the products need.
      values: [B, K, S, H].
      positions: int32 [B, S], the absolute position in each slot, -1 where there is none.
      fill: int32 scalar: the next `extend` writes here, in every row (modulo S when rolling).
      window: Sliding window of the attention, None for none.
      soft_cap: Soft cap of the scores, None for none.
      rolling: Overwrite the oldest slot when all are used. With S at least `window` nothing a
        query may see is lost.
      empty: Known to hold nothing, so that a prompt attends to itself alone.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    fill: jax.Array
    window: int | None = struct.field(pytree_node=False, default=None)
    soft_cap: float | None = struct.field(pytree_node=False, default=None)
    rolling: bool = struct.field(pytree_node=False, default=False)
    empty: bool = struct.field(pytree_node=False, default=False)

    @property
    def length(self) -> int:
        """Slots S."""
        return self.keys.shape[2]

    @property
    def block(self) -> int | None:
        """Tokens that fit before room must be made; None for no limit but the slots."""
        return None

    @property
    def free(self) -> jax.Array | None:
        """Slots left, int32 scalar; None where old entries give way to new ones."""
        return None if self.rolling else self.length - self.fill

    def begin_prompt(self) -> DenseCache:
        """Returns the cache, which holds nothing, marked so until something is written."""
        return dataclasses.replace(self, empty=True)

    def least_queries(self, count: int) -> int:
        """None of the `count` queries: it chooses nothing by them."""
        del count
        return 0

    def begin_block(self, count: int) -> DenseCache:
        """Returns the cache itself: it never makes room."""
        del count
        return self

    def end_block(self) -> DenseCache:
        """Returns the cache itself."""
        return self

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> DenseCache:
        """Writes T entries into the next slots; the caller sees to it that they are there.

        Args:
          k: [B, T, K, H].
          v: [B, T, K, H].
          positions: int32 [B, T].
        """
        count = k.shape[1]
        if count > self.length:
            raise InputError(f"{count} new tokens, the cache holds {self.length}")
        if self.rolling and count > 1:
            return self._append_shifting(k, v, positions)
        slot = self.fill % self.length if self.rolling else self.fill

        def write(held: jax.Array, new: jax.Array) -> jax.Array:
            new = new.transpose(0, 2, 1, 3).astype(held.dtype)
            if self.empty:  # Nothing to keep: written by all cores, as an update in place is not.
                wide = jnp.pad(new, ((0, 0), (0, 0), (0, self.length - count), (0, 0)))
                return constrain(wide, "batch", "heads", None, None)
            if len(held) == 1:  # See `folded`.
                return jax.lax.dynamic_update_slice(held[0], new[0], (0, slot, 0))[None]
            return jax.lax.dynamic_update_slice(held, new, (0, 0, slot, 0))

        return dataclasses.replace(
            self,
            keys=write(self.keys, k),
            values=write(self.values, v),
            positions=jax.lax.dynamic_update_slice(self.positions, positions, (0, slot)),
            fill=self.fill + count,
            empty=False,
        )

    def _append_shifting(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> DenseCache:
        """Keeps the last S of the held entries and the new ones, empty ones and padding first."""
        # Slot `fill mod S` is the oldest; while slots are unused, what comes first is empty.
        oldest_first = (jnp.arange(self.length) + self.fill) % self.length
        order = jnp.concatenate([oldest_first, self.length + jnp.arange(k.shape[1])])
        both = jnp.concatenate([self.positions, positions], axis=1)[:, order]
        # Padding of a later turn lies between entries of a row, which it must not push out.
        last = jnp.argsort(both >= 0, axis=1, stable=True)[:, -self.length :]
        slots = order[last][:, None, :, None]

        def kept(held: jax.Array, new: jax.Array) -> jax.Array:
            new = new.transpose(0, 2, 1, 3).astype(held.dtype)
            return jnp.take_along_axis(jnp.concatenate([held, new], axis=2), slots, axis=2)

        return dataclasses.replace(
            self,
            keys=kept(self.keys, k),
            values=kept(self.values, v),
            positions=jnp.take_along_axis(both, last, axis=1),
            fill=jnp.full_like(self.fill, self.length),
            empty=False,
        )

    def attention(self, q: jax.Array, positions: jax.Array) -> Attention:
        """Attends with q [B, K, G, T, H] at `positions` [B, T] over every slot."""
        seen = visible(positions, self.positions, self.window)
        return attend_buffer(q, self.keys, self.values, seen, self.soft_cap)

    def extend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, DenseCache]:
        """Appends T positions and attends by position over everything held.

        Args:
          q: [B, Q, N, H] rotated queries of the last Q positions.
          k: [B, T, K, H] rotated keys.
          v: [B, T, K, H] values.
          positions: int32 [B, T] absolute positions, ascending in a row, -1 for left padding.

        Returns:
          The attention output [B, Q, N, H], 0 for padding, and the new cache.

        Raises:
          InputError: T above the number of slots of a cache that does not roll.
        """
        count = k.shape[1]
        pushes_out = self.rolling and count > 1
        after = (self._append_shifting if pushes_out else self.append)(k, v, positions)
        if self.empty:
            window, soft_cap = self.window, self.soft_cap
            return attend_prompt(q, k, v, positions, window=window, soft_cap=soft_cap), after
        # What the new entries push out is still in sight of the first of them.
        held = self._grown(count).append(k, v, positions) if pushes_out else after
        out = by_query_chunks(
            lambda q, at: held.attention(q, at).out,
            grouped(q, k.shape[2]),
            positions[:, count - q.shape[1] :],
        )
        return ungrouped(out).astype(q.dtype), after

    def _grown(self, count: int) -> DenseCache:
        """Returns a cache that does not roll, with all S slots written and `count` free ones."""
        grown = grow(self, count)
        return dataclasses.replace(grown, fill=jnp.full_like(self.fill, self.length), rolling=False)


def grow(cache: DenseCache, count: int) -> DenseCache:
    """Returns `cache` with `count` more empty slots behind the others."""
    wide = ((0, 0), (0, 0), (0, count), (0, 0))
    return dataclasses.replace(
        cache,
        keys=jnp.pad(cache.keys, wide),
        values=jnp.pad(cache.values, wide),
        positions=jnp.pad(cache.positions, ((0, 0), (0, count)), constant_values=-1),
    )


def dense_cache(
    batch: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    dtype: Any = jnp.float32,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    rolling: bool = False,
) -> DenseCache:
    """Returns an empty cache of one layer.

    Args:
      batch: Rows B.
      kv_heads: Key/value heads K.
      length: Slots S: prompt and new tokens together; when rolling, at most `window` are made.
      head_dim: H.
      dtype: Storage dtype.
      window: Sliding window of the attention.
      soft_cap: Soft cap of the scores.
      rolling: Hold only the window.

    Raises:
      InputError: `rolling` without a window.
    """
    if rolling and window is None:
        raise InputError("a rolling cache needs a sliding window, found none")
    slots = min(length, window) if rolling and window is not None else length
    empty = jnp.zeros((batch, kv_heads, slots, head_dim), dtype)
    return DenseCache(
        keys=constrain(empty, "batch", "heads", None, None),
        values=constrain(empty, "batch", "heads", None, None),
        positions=constrain(jnp.full((batch, slots), -1, jnp.int32), "batch", None),
        fill=jnp.zeros((), jnp.int32),
        window=window,
        soft_cap=soft_cap,
        rolling=rolling,
    )


def folded(caches: Any) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Any]]:
    """Returns the arrays of caches for a loop to carry, and what makes caches of them again.

    Of a single row, [1, K, S, H], the loop carries [K, S, H]. The CPU backend takes an axis of
    length 1 away before its products; if it is there when a new entry is written, the compiler
    repeats the write before every product and copies the whole cache several times per token.
    """
    leaves, tree = jax.tree.flatten(caches)
    single = [leaf.ndim == 4 and len(leaf) == 1 for leaf in leaves]

    def unfold(carried: Sequence[jax.Array]) -> Any:
        pairs = zip(carried, single, strict=True)
        return jax.tree.unflatten(tree, [leaf[None] if one else leaf for leaf, one in pairs])

    return [leaf[0] if one else leaf for leaf, one in zip(leaves, single, strict=True)], unfold
