"""From head weights to whole numbers of cache entries: Eq. 4 of arXiv:2410.19258 and its repair.

Eq. 4 gives head h `(b - b/beta) + S_h * (b/beta) * L * H` entries and caps nothing: what a head
gets beyond the length of the prompt is lost (17 % of the budget in one of the paper's own settings;
`lost_share`). `water_fill` gives the same proportions under a cap and hands the surplus on.
Capacities are then rounded to whole entries, or to the rungs of a ladder, so that heads share few
array shapes. All of this runs on the host, once, before anything is compiled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from jaxllm.errors import InputError


def official_capacities(shares: ArrayLike, kv_size: int, window: int, beta: float) -> np.ndarray:
    """The released code's capacities: rounded to nearest, not capped.

    The pool share is Python's floor division of floats: 120 // 1.01 is 118.0, not 118.8.

    Args:
      shares: [L, N] shares that sum to 1.
      kv_size: Nominal entries per head, the window included (the paper's KV size).
      window: The newest entries, kept on top.
      beta: At least 1; a smaller one makes the shared pool larger.

    Returns:
      int [L, N] entries without the window.
    """
    shares = np.asarray(shares, np.float64)
    budget = kv_size - window
    pool = budget // beta
    return np.rint((budget - pool) + pool * shares.size * shares).astype(int)


def beta_weights(shares: ArrayLike, beta: float) -> np.ndarray:
    """Returns Eq. 4 as weights that sum to 1: `(1 - 1/beta) / (L*K) + S / beta`.

    Args:
      shares: [L, K] shares that sum to 1.
      beta: At least 1; infinity is uniform.

    Raises:
      InputError: beta below 1.
    """
    if not beta >= 1:
        raise InputError(f"beta {beta} must be 1 or more")
    shares = np.asarray(shares, np.float64)
    return (1 - 1 / beta) / shares.size + shares / beta


def water_fill(weights: ArrayLike, total: float, floor: float, cap: float) -> np.ndarray:
    """Splits `total` in proportion to weights with every part in [floor, cap].

    Args:
      weights: Non-negative, any shape.
      total: What to hand out.
      floor: Least part.
      cap: Largest part.

    Returns:
      float64 parts of the shape of `weights`: `clip(c * weight, floor, cap)` with the c that makes
      them sum to `total`; less only where everything is at the cap.

    Raises:
      InputError: The floors alone exceed the total, or floor exceeds cap.
    """
    weights = np.asarray(weights, np.float64)
    if not 0 <= floor <= cap:
        raise InputError(f"floor {floor} and cap {cap}, expected 0 <= floor <= cap")
    if floor * weights.size > total * (1 + 1e-12):
        raise InputError(
            f"a floor of {floor} entries for {weights.size} heads exceeds the budget of {total:g}"
        )
    if total >= cap * weights.size:
        return np.full(weights.shape, float(cap))
    # Heads of no weight take part once all others are at the cap.
    scaled = np.maximum(weights / weights.sum(), 1e-15)

    def filled(level: float) -> np.ndarray:
        return np.clip(level * scaled, floor, cap)

    low, high = 0.0, 2 * cap / scaled.min()
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if filled(middle).sum() <= total else (low, middle)
    return filled(low)


def lost_share(capacities: ArrayLike, available: int) -> float:
    """Returns the share of the entries that prompts of `available` entries leave unused."""
    capacities = np.asarray(capacities)
    return float(np.maximum(capacities - available, 0).sum() / capacities.sum())


def geometric_ladder(lowest: int, cap: int, ratio: float = 2.0, tile: int = 1) -> tuple[int, ...]:
    """Returns ascending capacities from `lowest` to `cap`, multiples of `tile` in between.

    Args:
      lowest: First rung, 0 allowed.
      cap: Last rung.
      ratio: Between neighbours, above 1.
      tile: Rows of a hardware tile: 8 in float32, 16 in bfloat16, 32 in int8 on a TPU.

    Raises:
      InputError: For a ratio of 1 or less, a tile below 1, or lowest above cap.
    """
    if not ratio > 1 or tile < 1 or not 0 <= lowest <= cap:
        raise InputError(
            f"ladder from {lowest} to {cap} with ratio {ratio} and tile {tile}, expected "
            "0 <= lowest <= cap, ratio > 1, tile >= 1"
        )
    rungs, value = [lowest], max(lowest, tile)
    while value < cap:
        if value % tile == 0 and value > rungs[-1]:
            rungs.append(value)
        value = max(value + tile, int(value * ratio)) // tile * tile
    return tuple(rungs) if rungs[-1] == cap else (*rungs, cap)


def largest_remainder(parts: ArrayLike, total: int, cap: int, group: int = 1) -> np.ndarray:
    """Rounds parts to whole numbers whose sum is the total, as near as groups allow.

    Args:
      parts: [L, K] real numbers.
      total: Sum to reach: exactly when `group` is 1 and the cap allows, else less than a group
        below it.
      cap: Largest part.
      group: Heads of a layer, ranked by part, that get the same number.
    """
    units, ranks = _units(parts, group)
    whole = np.floor(units + 1e-9)
    spare = int((total - group * whole.sum()) // group)
    for index in np.argsort(whole - units, axis=None, kind="stable").tolist() * 2:
        if spare <= 0:
            break
        if whole.flat[index] < cap:
            whole.flat[index] += 1
            spare -= 1
    return _heads(whole, ranks, group)


def round_to_ladder(
    parts: ArrayLike, total: int, ladder: tuple[int, ...], group: int = 1
) -> np.ndarray:
    """Rounds parts to rungs, so that no entry is lost between a part and an array's shape.

    The largest scalar whose scaled parts, rounded down to rungs, fit the total; then the heads with
    the largest deficit are promoted while the total allows.

    Args:
      parts: [L, K] real numbers, the ideal capacities.
      total: Largest sum.
      ladder: Ascending rungs.
      group: Heads of a layer, ranked by part, that are promoted together: with the degree of tensor
        parallelism every shard gets the same shapes.

    Raises:
      InputError: The lowest rung for all heads exceeds the total.
    """
    units, ranks = _units(parts, group)
    rungs = np.asarray(ladder)
    if group * units.size * rungs[0] > total:
        raise InputError(
            f"ladder starts at {rungs[0]}: {group * units.size} heads exceed the total {total}"
        )

    def below(level: float) -> np.ndarray:
        return np.maximum(np.searchsorted(rungs, level * units + 1e-9, side="right") - 1, 0)

    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        fits = group * rungs[below(middle)].sum() <= total
        low, high = (middle, high) if fits else (low, middle)
    index = below(low)
    spare = total - group * int(rungs[index].sum())
    while True:
        step = np.append(np.diff(rungs), np.iinfo(np.int64).max // group)[index] * group
        deficit = np.where(step <= spare, units - rungs[index], -np.inf)
        best = int(deficit.argmax())
        if not np.isfinite(deficit.flat[best]):
            return _heads(rungs[index], ranks, group)
        spare -= int(step.flat[best])
        index.flat[best] += 1


def _units(parts: ArrayLike, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `group` heads of similar rank [L, K/group], and the rank of every head [L, K]."""
    parts = np.asarray(parts, np.float64)
    if parts.shape[1] % group:
        raise InputError(f"{parts.shape[1]} KV heads do not divide into groups of {group}")
    order = np.argsort(-parts, axis=1, kind="stable")
    ranked = np.take_along_axis(parts, order, axis=1)
    return ranked.reshape(len(parts), -1, group).mean(axis=-1), np.argsort(order, axis=1)


def _heads(units: np.ndarray, ranks: np.ndarray, group: int) -> np.ndarray:
    """Gives every head the number of its unit."""
    return np.take_along_axis(np.repeat(units, group, axis=1), ranks, axis=1).astype(int)
