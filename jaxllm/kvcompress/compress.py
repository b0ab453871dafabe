"""Which entries of a KV head survive: the one rule used after prefill, between chunks, in decode.

The selection of SnapKV and HeadKV (section 3.3 of arXiv:2410.19258, its observation window), with
three differences from their code: KV heads instead of query heads, rows of any length, and pooling
over neighbouring *positions*. After a first compression slots next to each other are no longer
tokens next to each other, so pooling over slots would mix unrelated entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.kvcompress.scorers import Entries, Scorer, Window

Reduction = Literal["mean", "max", "sum"]
REDUCTIONS: dict[str, Any] = {"mean": jnp.mean, "max": jnp.max, "sum": jnp.sum}


@dataclass(frozen=True)
class Eviction:
    """How the entries of a head are chosen, the same for every head of a model.

    Attributes:
      window: The newest entries, alpha of the paper: always kept, and their queries score.
      sinks: Positions 0 .. sinks-1 are kept before all others.
      scorer: What the others are ranked by.
      group: How the scores of the query heads of a KV head become one.
    """

    window: int = 8
    sinks: int = 0
    scorer: Scorer = Window()
    group: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"window {self.window} must be at least 1")
        if self.sinks < 0:
            raise InputError(f"sinks {self.sinks} must be 0 or more")
        if self.scorer.pool < 1 or self.scorer.pool % 2 == 0:
            raise InputError(f"pool {self.scorer.pool} must be odd (1 is off)")
        if self.group not in REDUCTIONS:
            raise InputError(f"group {self.group!r} is not one of {', '.join(REDUCTIONS)}")


class Kept(NamedTuple):
    """Entries of n KV heads; c slots each, empty ones first, then by ascending position.

    Attributes:
      keys: [B, n, c, H].
      values: [B, n, c, H].
      positions: int32 [B, n, c], -1 is empty.
      scores: float32 [B, n, c] running scores of scorers with a `decay`, else None.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    scores: jax.Array | None


def pool_positions(scores: jax.Array, positions: jax.Array, width: int) -> jax.Array:
    """Max-pools scores over entries whose positions differ by at most width // 2.

    Args:
      scores: [..., M].
      positions: int [..., M], ascending and without repeats apart from empty ones (-1).
      width: Odd; 1 changes nothing.
    """
    pooled, reach = scores, width // 2
    for shift in range(1, min(reach, scores.shape[-1] - 1) + 1):
        # At most `shift` apart in position means at most `shift` apart in slots: positions ascend.
        near = positions[..., shift:] - positions[..., :-shift] <= reach
        near &= positions[..., :-shift] >= 0
        pad = [(0, 0)] * (scores.ndim - 1)
        right = jnp.where(near, scores[..., shift:], -jnp.inf)
        left = jnp.where(near, scores[..., :-shift], -jnp.inf)
        pooled = jnp.maximum(pooled, jnp.pad(right, [*pad, (0, shift)], constant_values=-jnp.inf))
        pooled = jnp.maximum(pooled, jnp.pad(left, [*pad, (shift, 0)], constant_values=-jnp.inf))
    return pooled


def score_entries(entries: Entries, eviction: Eviction) -> jax.Array:
    """Returns float32 [B, n, M], the scorer's numbers reduced over the query heads of a group."""
    return REDUCTIONS[eviction.group](eviction.scorer.score(entries), axis=2)


def choose(
    scores: jax.Array, positions: jax.Array, count: int, sinks: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the slots of the `count` best entries, in order of position with empty ones first.

    Args:
      scores: float32 [B, n, M].
      positions: int32 [B, n, M], -1 is empty; in any order.
      count: Entries to keep, at most M.
      sinks: Positions below it are kept before all others.
      width: Of the max-pooling.

    Returns:
      int32 [B, n, count] slots, and int32 [B, n, count] positions. Of equal scores the lower
      position stays, so that nothing depends on the order of storage.
    """
    order = jnp.argsort(positions, axis=-1)
    positions = jnp.take_along_axis(positions, order, axis=-1)
    scores = jnp.where(positions >= 0, jnp.take_along_axis(scores, order, axis=-1), -jnp.inf)
    pooled = pool_positions(scores, positions, width)
    ranked = jnp.where(positions >= sinks, pooled, jnp.inf)
    ranked = jnp.where(positions >= 0, ranked, -jnp.inf)
    chosen = jnp.sort(jax.lax.top_k(ranked, count)[1], axis=-1)
    slots, at = (jnp.take_along_axis(x, chosen, axis=-1) for x in (order, positions))
    return slots, at


def compress_heads(
    kept: Kept, fresh: Kept, window: Kept, seen_by: Entries, eviction: Eviction
) -> tuple[Kept, jax.Array | None]:
    """Keeps the best c of the c kept and the fresh entries of n KV heads.

    Args:
      kept: What the last compression left, c slots.
      fresh: Entries since then but the window; empty ones have position -1.
      window: The protected newest entries.
      seen_by: Queries, newest positions and attention options; its entries are not read.
      eviction: The rule.

    Returns:
      The survivors (c slots), and the running scores of the window or None.
    """
    capacity = kept.positions.shape[-1]
    if not capacity:
        return kept, window.scores  # Never compared with anything.
    keys, values, positions = (
        jnp.concatenate([getattr(part, name) for part in (kept, fresh, window)], axis=2)
        for name in ("keys", "values", "positions")
    )
    # What a sliding window has left behind can never be seen again.
    if seen_by.sliding_window is not None:
        alive = positions > (seen_by.newest - seen_by.sliding_window)[:, None, None]
        positions = jnp.where(alive, positions, -1)
    entries = seen_by._replace(keys=keys, values=values, positions=positions)
    scores = score_entries(entries, eviction)
    candidates = positions.shape[-1] - window.positions.shape[-1]
    if eviction.scorer.decay is not None:
        old = [part.scores for part in (kept, fresh, window) if part.scores is not None]
        scores = scores + eviction.scorer.decay * jnp.concatenate(old, axis=2)
    slots, positions = choose(
        scores[..., :candidates],
        positions[..., :candidates],
        capacity,
        eviction.sinks,
        eviction.scorer.pool,
    )
    running = eviction.scorer.decay is not None
    survivors = Kept(
        jnp.take_along_axis(keys, slots[..., None], axis=2),
        jnp.take_along_axis(values, slots[..., None], axis=2),
        positions,
        jnp.take_along_axis(scores, slots, axis=2) if running else None,
    )
    return survivors, scores[..., candidates:] if running else None
