"""Cache plans: how many entries every KV head of a model keeps, fixed before compilation.

HeadKV's budgets depend on the model alone (scores measured once, appendix F of arXiv:2410.19258),
so shapes are constants. A layer's heads are sorted into rungs, groups of heads with one capacity,
each of which is one dense array. Every method is a table of head weights that goes through the same
water-filling and rounding (`allocate`), so that methods differ in nothing but their weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxllm.errors import InputError
from jaxllm.kvcompress.allocation import (
    beta_weights,
    geometric_ladder,
    largest_remainder,
    official_capacities,
    round_to_ladder,
    water_fill,
)
from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.scorers import Recent
from jaxllm.kvcompress.scores import GroupReduction, reduce_groups, shares

Rounding = Literal["ladder", "largest_remainder", "official"]
Control = Literal["none", "random", "shuffled", "inverted", "layer_mean"]


class RungPlan(NamedTuple):
    """`heads` KV heads of `capacity` entries each."""

    capacity: int
    heads: int


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan.

    Attributes:
      rungs: By falling capacity; empty means one dense cache.
      order: Storage order: place i holds KV head `order[i]`. With tensor parallelism it goes shard
        by shard, each with the same rungs, so that head i of an axis cut in `shards` is at home.
      shards: Degree of tensor parallelism that the rungs divide by.
    """

    rungs: tuple[RungPlan, ...]
    order: tuple[int, ...]
    shards: int = 1

    def folded(self) -> LayerPlan:
        """The same layer for weights whose head axes were permuted by `order` beforehand."""
        return dataclasses.replace(self, order=tuple(range(len(self.order))))

    @property
    def capacities(self) -> np.ndarray:
        """Entries of each KV head in the model's order, int [K]."""
        sizes = [capacity for capacity, _ in self.rungs]
        per_shard = np.repeat(sizes, [heads // self.shards for _, heads in self.rungs])
        table = np.zeros(len(self.order), int)
        if self.rungs:
            table[list(self.order)] = np.tile(per_shard, self.shards)
        return table


@dataclass(frozen=True)
class Plan:
    """A whole model's cache; hashable, so that it can be a static argument.

    Attributes:
      name: For reports.
      layers: One per layer.
      ring: Slots of the buffer that new entries of all heads go to; compressing frees
        `ring - window` of them.
      eviction: Which entries stay; None is a dense cache of `ring` slots that drops nothing.
    """

    name: str
    layers: tuple[LayerPlan, ...]
    ring: int
    eviction: Eviction | None

    def __post_init__(self) -> None:
        if self.ring < 1:
            raise InputError(f"ring {self.ring} must be at least 1")
        if self.eviction is not None and self.ring < 2 * self.eviction.window:
            raise InputError(
                f"ring {self.ring} must be at least twice the window {self.eviction.window}"
            )

    @property
    def kv_heads(self) -> int:
        """KV heads K of every layer."""
        return len(self.layers[0].order)

    @property
    def capacities(self) -> np.ndarray:
        """Entries without the window, int [L, K], heads in the model's order."""
        return np.stack([layer.capacities for layer in self.layers])

    @property
    def chunk(self) -> int:
        """Most tokens `extend` takes within the plan's memory: the size of prefill chunks."""
        return self.ring - (0 if self.eviction is None else self.eviction.window)

    def layer_bytes(
        self, layer: int, batch: int, query_heads: int, head_dim: int, itemsize: int
    ) -> int:
        """Bytes of one layer's cache, everything included (positions, ring, queries, counters)."""
        kept, rows = int(self.layers[layer].capacities.sum()), batch * self.kv_heads
        total = 2 * (batch * kept + rows * self.ring) * head_dim * itemsize
        total += 4 * batch * kept + 4 * batch * self.ring + 4
        if self.eviction is not None:
            scorer, window = self.eviction.scorer, self.eviction.window
            queries = scorer.queries(window, self.ring)
            total += batch * queries * (query_heads * head_dim * itemsize + 4)
            if scorer.decay is not None:
                total += 4 * (batch * kept + rows * window)
        return total

    def nbytes(self, batch: int, query_heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of the caches of all layers.

        Args:
          batch: Rows B.
          query_heads: N, whose newest queries are stored.
          head_dim: H.
          itemsize: Bytes of a number, 2 for bfloat16.
        """
        sizes = (query_heads, head_dim, itemsize)
        return sum(self.layer_bytes(i, batch, *sizes) for i in range(len(self.layers)))

    def folded(self) -> Plan:
        """The plan for a model whose head axes were permuted by each layer's order beforehand."""
        return dataclasses.replace(self, layers=tuple(layer.folded() for layer in self.layers))


def layer_plan(capacities: ArrayLike, shards: int = 1) -> LayerPlan:
    """Sorts the KV heads of one layer into rungs.

    Args:
      capacities: int [K], entries of each head.
      shards: Degree of tensor parallelism.

    Raises:
      InputError: A negative capacity, or a rung whose heads do not divide by `shards`.
    """
    table = np.asarray(capacities, int)
    if table.min() < 0:
        raise InputError(f"capacity {table.min()} of head {table.argmin()} is negative")
    rungs, members = [], []
    for capacity in sorted(set(table.tolist()), reverse=True):
        heads = np.flatnonzero(table == capacity)
        if len(heads) % shards:
            raise InputError(
                f"{len(heads)} heads of capacity {capacity} do not divide by {shards} shards"
            )
        rungs.append(RungPlan(capacity, len(heads)))
        members.append(heads.reshape(shards, -1))
    order = np.concatenate(members, axis=1).reshape(-1)
    return LayerPlan(tuple(rungs), tuple(order.tolist()), shards)


def plan_of(
    name: str, capacities: ArrayLike, ring: int, eviction: Eviction, shards: int = 1
) -> Plan:
    """Returns the plan of a table [L, K] of capacities."""
    layers = tuple(layer_plan(row, shards) for row in np.asarray(capacities, int))
    return Plan(name, layers, ring, eviction)


def full_plan(layers: int, kv_heads: int, max_length: int) -> Plan:
    """Returns the plan that keeps everything in dense caches of `max_length` slots."""
    layer = LayerPlan((), tuple(range(kv_heads)))
    return Plan("full", (layer,) * layers, max_length, None)


@dataclass(frozen=True)
class Budget:
    """How weights become capacities.

    Attributes:
      entries: Mean entries per KV head, the window included: the paper's KV size.
      cap: Most entries a head can use: the longest prompt.
      floor: Fewest entries of a head, without the window.
      rounding: `ladder` rungs, `largest_remainder` whole numbers with the exact total, or
        `official` (nearest, neither floor nor cap; for `headkv` only).
      ratio: Of the ladder.
      tile: Of the ladder.
      shards: Degree of tensor parallelism.
    """

    entries: float
    cap: int
    floor: int = 0
    rounding: Rounding = "ladder"
    ratio: float = 2.0
    tile: int = 1
    shards: int = 1


def allocate(weights: ArrayLike, budget: Budget, window: int, group: int = 1) -> np.ndarray:
    """Returns int [L, K] capacities without the window, in proportion to weights [L, K].

    Args:
      weights: Non-negative.
      budget: Total, bounds and rounding.
      window: Entries of every head's budget that the window takes.
      group: Heads of a layer that must get the same, besides `budget.shards`.

    Raises:
      InputError: A budget within the window, or one that the floors exceed.
    """
    if budget.rounding == "official":
        raise InputError("official rounding is the rule of headkv from scores alone")
    weights = np.asarray(weights, np.float64)
    mean = budget.entries - window
    if mean < 0:
        raise InputError(f"budget {budget.entries} is smaller than the window {window}")
    total = round(mean * weights.size)
    parts = water_fill(weights, total, budget.floor, budget.cap)
    group = max(group, budget.shards)
    if budget.rounding == "largest_remainder":
        return largest_remainder(parts, total, budget.cap, group)
    ladder = geometric_ladder(budget.floor, budget.cap, budget.ratio, budget.tile)
    return round_to_ladder(parts, total, ladder, group)


def controlled(scores: ArrayLike, control: Control, seed: int = 0) -> np.ndarray:
    """Returns scores [L, N] as a control arm sees them.

    Args:
      scores: Non-negative.
      control: `random` uniform numbers; `shuffled` the same scores on other heads; `inverted` the
        same scores in reverse rank, the best head's to the worst; `layer_mean` each layer's mean.
      seed: Of `random` and `shuffled`.
    """
    scores = np.asarray(scores, np.float64)
    rng = np.random.default_rng(seed)
    if control == "random":
        return rng.random(scores.shape)
    if control == "shuffled":
        return rng.permutation(scores.reshape(-1)).reshape(scores.shape)
    if control == "inverted":
        ranks = np.argsort(np.argsort(scores, axis=None, kind="stable"))
        return np.sort(scores, axis=None)[::-1][ranks].reshape(scores.shape)
    if control == "layer_mean":
        return np.broadcast_to(scores.mean(axis=1, keepdims=True), scores.shape)
    return scores


def headkv_plan(
    scores: ArrayLike,
    kv_heads: int,
    budget: Budget,
    eviction: Eviction,
    ring: int,
    *,
    beta: float = 1.01,
    temperature: float = 1.0,
    reduction: GroupReduction = "mean",
    control: Control = "none",
    seed: int = 0,
) -> Plan:
    """Head-level budgets from head scores (section 3.2 of arXiv:2410.19258), or a control of them.

    Args:
      scores: [L, N] of query heads, or [L, K].
      kv_heads: K.
      budget: Total, bounds and rounding. `official` rounding reduces the released code's table of
        query heads by the mean, which keeps its total.
      eviction: Which entries stay.
      ring: Slots for new entries.
      beta: 1/beta of the budget is shared by score, the rest is equal.
      temperature: Exponent of the shares.
      reduction: From query heads to KV heads.
      control: Replaces the scores.
      seed: Of the control.
    """
    reduced = controlled(reduce_groups(scores, kv_heads, reduction), control, seed)
    name = "headkv" if control == "none" else f"headkv-{control}"
    share = shares(reduced, temperature)
    weights = beta_weights(share, beta)
    if budget.rounding == "official":
        table = official_capacities(share, round(budget.entries), eviction.window, beta)
    else:
        group = kv_heads if control == "layer_mean" else 1
        table = allocate(weights, budget, eviction.window, group)
    return plan_of(name, table, ring, eviction, budget.shards)


def layer_level_plan(
    shape: Literal["uniform", "pyramid", "inverse_pyramid"],
    layers: int,
    kv_heads: int,
    budget: Budget,
    eviction: Eviction,
    ring: int,
    name: str | None = None,
) -> Plan:
    """The same budget for all heads of a layer, named after its shape unless `name` is given.

    `uniform` is SnapKV (arXiv:2404.14469). `pyramid` is PyramidKV (arXiv:2406.02069): falling
    linearly over the layers from `2b - b/20` to `b/20`; `inverse_pyramid` rises.
    """
    weights = np.ones(layers)
    if shape != "uniform" and layers > 1:
        weights = np.linspace(2 - 1 / 20, 1 / 20, layers)
        weights = weights if shape == "pyramid" else weights[::-1]
    table = np.repeat(weights[:, None], kv_heads, axis=1)
    capacities = allocate(table, budget, eviction.window, group=kv_heads)
    return plan_of(name or shape, capacities, ring, eviction, budget.shards)


def duo_plan(
    scores: ArrayLike,
    kv_heads: int,
    cap: int,
    eviction: Eviction,
    ring: int,
    *,
    full: float = 0.5,
    recent: int = 256,
    reduction: GroupReduction = "mean",
    shards: int = 1,
) -> Plan:
    """Two levels (DuoAttention, arXiv:2410.10819): some heads keep all, the others sinks + recent.

    Args:
      scores: [L, N] or [L, K]; the highest `full` share of all KV heads keeps `cap` entries.
      kv_heads: K.
      cap: The longest prompt.
      eviction: Window and sinks; its scorer becomes the most recent entries.
      ring: Slots for new entries.
      full: Share of heads in [0, 1].
      recent: Entries of the other heads besides the sinks, the window included.
      reduction: From query heads to KV heads.
      shards: Degree of tensor parallelism: as many heads of a layer change level together.

    Raises:
      InputError: `full` outside [0, 1], or `recent` within the window.
    """
    if not 0 <= full <= 1:
        raise InputError(f"full {full} must be between 0 and 1")
    if recent < eviction.window:
        raise InputError(f"recent {recent} is smaller than the window {eviction.window}")
    reduced = reduce_groups(scores, kv_heads, reduction)
    low = min(eviction.sinks + recent - eviction.window, cap)
    # Ranks, not scores: a level is all or nothing, however much better a head is.
    ranks = np.argsort(np.argsort(reduced, axis=None, kind="stable")).reshape(reduced.shape)
    total = low * reduced.size + round(full * reduced.size) * (cap - low)
    table = round_to_ladder(ranks + 1e-3, total, tuple(sorted({low, cap})), shards)
    recent_first = dataclasses.replace(eviction, scorer=Recent())
    return plan_of("duo", table, ring, recent_first, shards)
