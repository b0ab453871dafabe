"""What makes a cache entry worth keeping: one small class per rule.

A scorer sees the candidates of some KV heads together with the protected window (the last entries,
kept whatever their score) and gives every entry of both a number; only the order counts.

  Window     attention of the last queries, max-pooled over neighbours (SnapKV, arXiv:2404.14469)
  Accumulated  all attention ever received (H2O, arXiv:2306.14048)
  LastQuery  attention of the newest query (TOVA, arXiv:2401.06104)
  KeyNorm    small keys first (arXiv:2406.11430)
  Expected   expected attention of queries to come (arXiv:2510.00636)
  Recent     the newest positions (StreamingLLM with sinks, arXiv:2309.17453)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxllm.decoding.text_cache import logits, visible

_QUERY_CHUNK = 64


class Entries(NamedTuple):
    """Everything a scorer may look at, for n KV heads of one layer.

    Attributes:
      queries: [B, n, G, Q, H], the newest queries in storage order.
      query_positions: int32 [B, Q]; -1 where there is none.
      keys: [B, n, M, H], the candidates and behind them the window.
      values: [B, n, M, H].
      positions: int32 [B, n, M]; -1 is empty.
      newest: int32 [B], the newest position of each row.
      sliding_window: Of the layer's attention, or None.
      soft_cap: Of the layer's attention, or None.
    """

    queries: jax.Array
    query_positions: jax.Array
    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    newest: jax.Array
    sliding_window: int | None
    soft_cap: float | None


class Scorer(Protocol):
    """A hashable rule."""

    @property
    def pool(self) -> int:
        """Width in positions of the max-pooling, odd; 1 is none."""
        ...

    @property
    def decay(self) -> float | None:
        """Factor on the scores of the last compression to which the new ones are added, or None."""
        ...

    def queries(self, window: int, ring: int) -> int:
        """How many of the newest queries a cache must keep for it."""
        ...

    def score(self, entries: Entries) -> jax.Array:
        """Returns float32 [B, n, G, M]."""
        ...


def attention_received(entries: Entries) -> tuple[jax.Array, jax.Array]:
    """Returns attention weights summed over the queries [B, n, G, M], and how many these are [B].

    Softmax runs over all M entries a query may see, in float32, 64 queries at a time.
    """
    batch, heads, groups, count, dim = entries.queries.shape
    valid = entries.query_positions >= 0

    def received(q: jax.Array, positions: jax.Array) -> jax.Array:
        seen = visible(positions, entries.positions, entries.sliding_window)
        scores = jnp.where(seen, logits(q, entries.keys, entries.soft_cap), -jnp.inf)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-37)
        return weights.sum(axis=3)

    if count <= _QUERY_CHUNK:
        return received(entries.queries, entries.query_positions), valid.sum(axis=1)
    chunks = -(-count // _QUERY_CHUNK)
    pad = chunks * _QUERY_CHUNK - count
    q = jnp.pad(entries.queries, ((0, 0),) * 3 + ((0, pad), (0, 0)))
    q = jnp.moveaxis(q.reshape(batch, heads, groups, chunks, _QUERY_CHUNK, dim), 3, 0)
    positions = jnp.pad(entries.query_positions, ((0, 0), (0, pad)), constant_values=-1)
    positions = positions.reshape(batch, chunks, _QUERY_CHUNK).swapaxes(0, 1)
    zeros = jnp.zeros((batch, heads, groups, entries.keys.shape[2]), jnp.float32)
    total, _ = jax.lax.scan(
        lambda total, part: (total + received(*part), None), zeros, (q, positions)
    )
    return total, valid.sum(axis=1)


@dataclass(frozen=True)
class Window:
    """Mean attention of the last queries, max-pooled over `pool` positions (SnapKV, HeadKV)."""

    pool: int = 7
    decay: ClassVar[None] = None

    def queries(self, window: int, ring: int) -> int:
        """The observation window."""
        return window

    def score(self, entries: Entries) -> jax.Array:
        """Mean over the queries that exist."""
        total, count = attention_received(entries)
        return total / jnp.maximum(count, 1)[:, None, None, None]


@dataclass(frozen=True)
class Accumulated:
    """Attention summed over every query, older sums multiplied by `decay` (1 is H2O)."""

    pool: int = 1
    decay: float = 1.0

    def queries(self, window: int, ring: int) -> int:
        """All queries since the last compression."""
        return ring

    def score(self, entries: Entries) -> jax.Array:
        """The sum over the queries since the last compression."""
        return attention_received(entries)[0]


@dataclass(frozen=True)
class LastQuery:
    """Attention of the newest query; TOVA averages it over all heads, here over a KV group only."""

    pool: int = 1
    decay: ClassVar[None] = None

    def queries(self, window: int, ring: int) -> int:
        """One."""
        return 1

    def score(self, entries: Entries) -> jax.Array:
        """The weights of one query."""
        return attention_received(entries)[0]


@dataclass(frozen=True)
class KeyNorm:
    """Keys of small Euclidean norm attract attention: they stay."""

    pool: int = 1
    decay: ClassVar[None] = None

    def queries(self, window: int, ring: int) -> int:
        """None."""
        return 0

    def score(self, entries: Entries) -> jax.Array:
        """Minus the norm."""
        norms = jnp.linalg.norm(entries.keys.astype(jnp.float32), axis=-1)
        groups = entries.queries.shape[2]
        return jnp.broadcast_to(-norms[:, :, None], (*norms.shape[:2], groups, norms.shape[2]))


@dataclass(frozen=True)
class Recent:
    """The newest entries; with sinks this is StreamingLLM."""

    pool: int = 1
    decay: ClassVar[None] = None

    def queries(self, window: int, ring: int) -> int:
        """None."""
        return 0

    def score(self, entries: Entries) -> jax.Array:
        """The position (exact in float32 below 2^24)."""
        positions = entries.positions.astype(jnp.float32)[:, :, None]
        groups = entries.queries.shape[2]
        return jnp.broadcast_to(positions, (*positions.shape[:2], groups, positions.shape[3]))


@dataclass(frozen=True)
class Expected:
    """Attention expected from a Gaussian of future queries, times the norm of the value.

    With mean m and covariance C of the queries before rotation and R the mean rotation over the
    next `horizon` positions, an entry scores `softmax(Rm.k/sqrt(H) + k'RCR'k/(2H)) * |v|`. The
    statistics are those of the queries since the last compression (the whole prompt at prefill).

    Attributes:
      frequencies: H/2 angular frequencies of the model's rotary embedding in radians per position;
        empty where queries are not rotated, which also skips moving them on.
      interleaved: Rotated pairs are (2j, 2j+1); otherwise (j, j + H/2).
      horizon: Positions ahead.
      epsilon: Added to the softmax, so that a value's norm counts where attention vanishes.
    """

    frequencies: tuple[float, ...] = ()
    interleaved: bool = True
    horizon: int = 512
    epsilon: float = 0.0
    pool: int = 1
    decay: ClassVar[None] = None

    def queries(self, window: int, ring: int) -> int:
        """All queries since the last compression."""
        return ring

    def score(self, entries: Entries) -> jax.Array:
        """One softmax over all entries of a head."""
        queries = entries.queries.astype(jnp.float32)
        valid = (entries.query_positions >= 0).astype(jnp.float32)[:, None, None, :, None]
        number = jnp.maximum(valid.sum(axis=3), 1.0)
        if self.frequencies:
            queries = self._rotate(queries, *self._angles(-entries.query_positions[..., None]))
        mean = (queries * valid).sum(axis=3) / number
        centred = (queries - mean[..., None, :]) * valid
        dim = queries.shape[-1]
        if self.frequencies:
            ahead = entries.newest[:, None] + 1 + jnp.arange(self.horizon)
            cos, sin = self._angles(ahead[..., None])
            turned = cos.mean(axis=-2, keepdims=True), sin.mean(axis=-2, keepdims=True)
            mean = self._rotate(mean[..., None, :], *turned)[..., 0, :]
            centred = self._rotate(centred, *turned)
        keys = entries.keys.astype(jnp.float32)
        linear = jnp.einsum("bngh,bnmh->bngm", mean, keys) / dim**0.5
        covariance = jnp.einsum("bngqh,bngqi->bnghi", centred, centred) / number[..., None]
        spread = jnp.einsum("bnmh,bnghi,bnmi->bngm", keys, covariance, keys) / (2 * dim)
        there = (entries.positions >= 0)[:, :, None]
        weights = jax.nn.softmax(jnp.where(there, linear + spread, -1e30), axis=-1)
        norms = jnp.linalg.norm(entries.values.astype(jnp.float32), axis=-1)
        return (weights + self.epsilon) * norms[:, :, None]

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, Q, H/2] of positions [B, Q, 1]."""
        angles = positions.astype(jnp.float32) * jnp.asarray(self.frequencies, jnp.float32)
        return jnp.cos(angles), jnp.sin(angles)

    def _rotate(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Rotates x [B, n, G, Q, H] by tables [B, Q, H/2] (or their means)."""
        cos, sin = (table[:, None, None] for table in (cos, sin))
        half = x.shape[-1] // 2
        if self.interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
        else:
            first, second = x[..., :half], x[..., half:]
        turned = first * cos - second * sin, second * cos + first * sin
        if self.interleaved:
            return jnp.stack(turned, axis=-1).reshape(x.shape)
        return jnp.concatenate(turned, axis=-1)


SCORERS: dict[str, type] = {
    "window": Window,
    "accumulated": Accumulated,
    "last_query": LastQuery,
    "key_norm": KeyNorm,
    "expected": Expected,
    "recent": Recent,
}
