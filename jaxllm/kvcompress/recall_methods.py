"""The methods that the evidence compares, each as a choice of entries at one budget.

All methods get the same number of entries, `budget` per KV head on average without the window, by
the functions that make real plans (`plan.py`); `duo` may fall short of it by less than one head's.
Only `adaptive` (Ada-KV) decides by the input: it exists as a simulation alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.masked_cache import Choice
from jaxllm.kvcompress.plan import (
    Budget,
    Plan,
    controlled,
    full_plan,
    headkv_plan,
    layer_level_plan,
    plan_of,
)
from jaxllm.kvcompress.scorers import Recent
from jaxllm.kvcompress.scores import reduce_groups

SCORED = ("layer_mean", "r", "er", "r2")
"""Budgets in proportion to head scores, beta chosen on validation sequences."""
CONTROLS = ("random", "shuffled", "inverted")
"""The same with spoilt scores and the beta of the real ones."""
SHAPES = ("uniform", "pyramid", "inverse_pyramid")
METHODS = ("full", "streaming", *SHAPES, "adaptive", "duo", *SCORED, *CONTROLS)
_ADAPTIVE_FLOOR = 0.2  # As released: this share of a head's even part is its own.


@dataclass(frozen=True)
class Space:
    """What a choice is made for.

    Attributes:
      layers: L.
      kv_heads: K.
      cap: Entries that the longest prompt has besides the window.
      ring: Slots for new entries of the real cache.
      eviction: Window, scorer and reduction over a group.
    """

    layers: int
    kv_heads: int
    cap: int
    ring: int
    eviction: Eviction

    @property
    def heads(self) -> int:
        """KV heads of all layers."""
        return self.layers * self.kv_heads


@dataclass(frozen=True)
class Method:
    """One way to keep entries at one budget.

    Attributes:
      name: Of METHODS.
      option: What was tuned: beta, or the number of whole heads of `duo`; None without such.
      capacities: int [L, K], entries of each head besides the window.
      recent: bool [L, K], heads that keep the newest entries.
      adaptive: Whether the heads of a layer compete for their capacities.
      sinks: First positions that are kept before all others.
    """

    name: str
    option: float | None
    capacities: np.ndarray
    recent: np.ndarray
    adaptive: bool = False
    sinks: int = 0

    def choice(self) -> Choice:
        """The method as the masked cache takes it, leading axis L."""
        layers = len(self.capacities)
        floor = int(_ADAPTIVE_FLOOR * self.capacities.mean()) if self.adaptive else 0
        return Choice(
            jnp.asarray(self.capacities, jnp.int32),
            jnp.asarray(self.recent),
            jnp.full(layers, self.adaptive),
            jnp.full(layers, floor, jnp.int32),
            jnp.full(layers, self.sinks, jnp.int32),
        )

    def plan(self, space: Space) -> Plan:
        """The real cache of the same capacities: its bytes, and its speed.

        The scorer of a plan is one for all heads; those of `duo` that keep everything need none.
        """
        if self.name == "full":
            return full_plan(space.layers, space.kv_heads, space.cap + space.ring)
        eviction = dataclasses.replace(space.eviction, sinks=self.sinks)
        if self.recent.any():
            eviction = dataclasses.replace(eviction, scorer=Recent())
        return plan_of(self.name, self.capacities, space.ring, eviction)


def candidates(
    name: str,
    space: Space,
    budget: int,
    scores: Mapping[str, np.ndarray],
    betas: tuple[float, ...],
    seed: int = 0,
) -> list[Method]:
    """Returns a method once for every value of what is tuned on validation sequences.

    Args:
      name: Of METHODS; not `full` of controls when `betas` has several values.
      space: The model's heads.
      budget: Mean entries of a KV head besides the window.
      scores: float [L, N] by estimator; `r2` or, without reasoning examples, `er` is the one that
        `layer_mean`, `duo` and the controls use.
      betas: What is tried for methods in proportion to scores.
      seed: Of the controls.
    """
    shape, window = (space.layers, space.kv_heads), space.eviction.window
    scored = np.zeros(shape, bool)
    if name == "full":
        return [Method(name, None, np.full(shape, space.cap), scored)]
    room = Budget(budget + window, space.cap, rounding="largest_remainder")
    if name in ("streaming", "adaptive", *SHAPES):
        form = name if name in SHAPES else "uniform"
        plan = layer_level_plan(form, *shape, room, space.eviction, space.ring)  # type: ignore[arg-type]
        if name == "streaming":
            return [Method(name, None, plan.capacities, ~scored, sinks=min(4, budget // 2))]
        return [Method(name, None, plan.capacities, scored, adaptive=name == "adaptive")]
    main = scores[main_estimator(scores)]
    if name == "duo":
        return _duo(space, budget, reduce_groups(main, space.kv_heads))
    found = scores[name] if name in scores else main
    reduced = reduce_groups(found, space.kv_heads)
    if name in ("layer_mean", *CONTROLS):
        reduced = controlled(reduced, name, seed)  # type: ignore[arg-type]
    methods = []
    for beta in betas:
        plan = headkv_plan(
            reduced + 1e-9, space.kv_heads, room, space.eviction, space.ring, beta=beta
        )
        methods.append(Method(name, beta, plan.capacities, scored))
    return methods


def main_estimator(scores: Mapping[str, np.ndarray]) -> str:
    """The estimator that stands for HeadKV: R2, or ER where no example needs reasoning."""
    return "r2" if "r2" in scores else "er"


def _duo(space: Space, budget: int, scores: np.ndarray) -> list[Method]:
    """DuoAttention's two levels: the n best heads keep everything, the rest sinks and newest."""
    total, methods = budget * space.heads, []
    best = np.argsort(-scores, axis=None, kind="stable")
    for whole in range(min(total // space.cap, space.heads - 1) + 1):
        low = min((total - whole * space.cap) // (space.heads - whole), space.cap)
        capacities = np.full(space.heads, low)
        capacities[best[:whole]] = space.cap
        recent = np.ones(space.heads, bool)
        recent[best[:whole]] = False
        shape = (space.layers, space.kv_heads)
        methods.append(
            Method(
                "duo",
                whole,
                capacities.reshape(shape),
                recent.reshape(shape),
                sinks=min(4, low // 2),
            )
        )
    return methods
