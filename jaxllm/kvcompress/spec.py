"""The one-line form of a plan: `headkv:scores=F,budget=128,beta=1.01,window=8`.

A name, a colon, and `key=value` pairs with commas between them. `parse_plan` checks everything that
can be checked without the model; `PlanSpec.build` makes the plan of a model of a given shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxllm.errors import InputError
from jaxllm.kvcompress.compress import REDUCTIONS, Eviction
from jaxllm.kvcompress.plan import (
    Budget,
    Plan,
    duo_plan,
    full_plan,
    headkv_plan,
    layer_level_plan,
)
from jaxllm.kvcompress.scorers import SCORERS, Accumulated, Expected
from jaxllm.kvcompress.scores import read_duo_scores, read_scores


@dataclass(frozen=True)
class _Key:
    """One key: how its text is read, what is allowed, and the default (None: must be given)."""

    read: Callable[[str], Any]
    expected: str
    allowed: Callable[[Any], bool]
    default: Any = None


def _choice(*names: str) -> _Key:
    return _Key(str, f"one of {', '.join(names)}", lambda value: value in names, names[0])


_KEYS: Mapping[str, _Key] = {
    "budget": _Key(float, "a positive number", lambda x: 0 < x < math.inf),
    "scores": _Key(
        Path, "the path of a .json or .tsv file", lambda x: x.suffix in (".json", ".tsv")
    ),
    "window": _Key(int, "1 or more", lambda x: x >= 1, 8),
    "ring": _Key(int, "at least twice the window, 0 for four times", lambda x: x >= 0, 0),
    "sinks": _Key(int, "0 or more", lambda x: x >= 0, 0),
    "scorer": _choice(*SCORERS),
    "pool": _Key(int, "an odd number, 0 for the scorer's own", lambda x: x == 0 or x % 2 == 1, 0),
    "decay": _Key(float, "above 0 and at most 1", lambda x: 0 < x <= 1, 1.0),
    "group": _choice(*REDUCTIONS),
    "floor": _Key(int, "0 or more", lambda x: x >= 0, 0),
    "cap": _Key(int, "1 or more, 0 for the longest prompt", lambda x: x >= 0, 0),
    "rounding": _choice("auto", "ladder", "largest_remainder", "official"),
    "ratio": _Key(float, "above 1", lambda x: 1 < x < math.inf, 2.0),
    "tile": _Key(int, "1 or more", lambda x: x >= 1, 1),
    "shards": _Key(int, "1 or more", lambda x: x >= 1, 1),
    "beta": _Key(float, "1 or more", lambda x: x >= 1, 1.01),
    "temperature": _Key(float, "above 0", lambda x: 0 < x < math.inf, 1.0),
    "reduction": _choice("mean", "max", "sum"),
    "seed": _Key(int, "0 or more", lambda x: x >= 0, 0),
    "full": _Key(float, "between 0 and 1", lambda x: 0 <= x <= 1, 0.5),
    "recent": _Key(int, "at least the window", lambda x: x >= 1, 256),
}

_EVICTION = ("window", "ring", "sinks", "scorer", "pool", "decay", "group")
_BUDGET = ("budget", "floor", "cap", "rounding", "ratio", "tile", "shards")
_LAYER_LEVEL = (*_BUDGET, *_EVICTION)
_HEAD_LEVEL = (*_BUDGET, *_EVICTION, "beta", "temperature", "reduction")

PLANS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "full": (),
        "uniform": _LAYER_LEVEL,
        "pyramid": _LAYER_LEVEL,
        "inverse_pyramid": _LAYER_LEVEL,
        "streaming": tuple(
            k for k in _LAYER_LEVEL if k not in ("scorer", "decay", "pool", "group")
        ),
        "headkv": ("scores", *_HEAD_LEVEL),
        "layer_scores": ("scores", *_HEAD_LEVEL),
        "shuffled": ("scores", *_HEAD_LEVEL, "seed"),
        "inverted": ("scores", *_HEAD_LEVEL),
        "random": (*_HEAD_LEVEL, "seed"),
        "duo": (
            "scores",
            "window",
            "ring",
            "sinks",
            "cap",
            "full",
            "recent",
            "reduction",
            "shards",
        ),
    }
)
"""Names of plans and the keys each knows."""

_CONTROLS: Mapping[str, Any] = {
    "headkv": "none",
    "layer_scores": "layer_mean",
    "shuffled": "shuffled",
    "inverted": "inverted",
    "random": "random",
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "streaming": {"sinks": 4},
    "duo": {"sinks": 128},
}


@dataclass(frozen=True)
class PlanSpec:
    """A checked specification.

    Attributes:
      name: One of `PLANS`.
      values: Every key the plan knows with its value.
    """

    name: str
    values: Mapping[str, Any] = field(hash=False)

    def build(
        self,
        layers: int,
        query_heads: int,
        kv_heads: int,
        max_length: int,
        *,
        longest_prompt: int | None = None,
        frequencies: tuple[float, ...] = (),
        interleaved: bool = True,
    ) -> Plan:
        """Returns the plan for a model, reading the score file if there is one.

        Args:
          layers: L.
          query_heads: N, for score files of query heads.
          kv_heads: K.
          max_length: Prompt and new tokens together.
          longest_prompt: Cap of a head's entries, `max_length` if None.
          frequencies: Angular frequencies of the model's rotary embedding, for scorer `expected`.
          interleaved: Layout of its pairs.

        Raises:
          InputError: A score file that is unreadable or of another model, or a budget that does not
            fit.
        """
        if self.name == "full":
            return full_plan(layers, kv_heads, max_length)
        values = self.values
        cap = min(values["cap"] or max_length, longest_prompt or max_length)
        eviction = self._eviction(frequencies, interleaved)
        ring = values["ring"] or 4 * eviction.window
        if self.name == "duo":
            return duo_plan(
                self._scores(layers, query_heads, kv_heads),
                kv_heads,
                cap,
                eviction,
                ring,
                full=values["full"],
                recent=values["recent"],
                reduction=values["reduction"],
                shards=values["shards"],
            )
        head_level = self.name in _CONTROLS and self.name != "layer_scores"
        rounding = values["rounding"]
        if rounding == "auto":
            # Heads of a layer-level plan share a shape anyway; a ladder only loses entries.
            rounding = "ladder" if head_level else "largest_remainder"
        if rounding == "official" and self.name != "headkv":
            raise InputError(f"rounding=official is for headkv, not {self.name}")
        budget = Budget(
            values["budget"],
            cap,
            values["floor"],
            rounding,
            values["ratio"],
            values["tile"],
            values["shards"],
        )
        if self.name not in _CONTROLS:
            shape: Any = "uniform" if self.name == "streaming" else self.name
            return layer_level_plan(shape, layers, kv_heads, budget, eviction, ring, self.name)
        if self.name == "random":
            scores = np.ones((layers, kv_heads))
        else:
            scores = self._scores(layers, query_heads, kv_heads)
        return headkv_plan(
            scores,
            kv_heads,
            budget,
            eviction,
            ring,
            beta=values["beta"],
            temperature=values["temperature"],
            reduction=values["reduction"],
            control=_CONTROLS[self.name],
            seed=values.get("seed", 0),
        )

    def _eviction(self, frequencies: tuple[float, ...], interleaved: bool) -> Eviction:
        values = self.values
        kind = SCORERS[values.get("scorer", "recent")]
        options: dict[str, Any] = {"pool": values["pool"]} if values.get("pool") else {}
        if kind is Accumulated:
            options["decay"] = values["decay"]
        if kind is Expected:
            options |= {"frequencies": frequencies, "interleaved": interleaved}
        group = values.get("group", "mean")
        return Eviction(values["window"], values["sinks"], kind(**options), group)

    def _scores(self, layers: int, query_heads: int, kv_heads: int) -> np.ndarray:
        path = self.values["scores"]
        tsv = path.suffix == ".tsv"
        scores = read_duo_scores(path) if tsv else read_scores(path).mean(axis=-1)
        if scores.shape not in ((layers, query_heads), (layers, kv_heads)):
            raise InputError(
                f"{path}: scores of {scores.shape[0]} layers x {scores.shape[1]} heads, the model "
                f"has {layers} x {query_heads} query heads ({kv_heads} KV heads)"
            )
        return scores


def parse_plan(text: str) -> PlanSpec:
    """Reads `NAME` or `NAME:key=value,key=value`.

    Raises:
      InputError: An unknown name or key (with the known ones), a key given twice or missing, or a
        value of another kind than expected.
    """
    name, _, tail = text.partition(":")
    if name not in PLANS:
        raise InputError(f"plan {name!r} is not one of {', '.join(PLANS)}")
    known = PLANS[name]
    values: dict[str, Any] = {}
    for pair in filter(None, tail.split(",")):
        key, equals, value = pair.partition("=")
        if key not in known:
            keys = f"one of {', '.join(known)}" if known else "none"
            raise InputError(f"plan {name}: key {key!r} is unknown, expected {keys}")
        if not equals or not value:
            raise InputError(f"plan {name}: {pair!r}, expected {key}=VALUE")
        if key in values:
            raise InputError(f"plan {name}: key {key!r} is there twice")
        values[key] = _read(name, key, value)
    defaults = _DEFAULTS.get(name, {})
    for key in known:
        values.setdefault(key, defaults.get(key, _KEYS[key].default))
        if values[key] is None:
            raise InputError(f"plan {name}: {key}=... is missing, expected {_KEYS[key].expected}")
    return PlanSpec(name, MappingProxyType(values))


def _read(name: str, key: str, text: str) -> Any:
    rule = _KEYS[key]
    try:
        value = rule.read(text)
    except ValueError:
        value = None
    if value is None or not rule.allowed(value):
        raise InputError(f"plan {name}: {key}={text}, expected {rule.expected}")
    return value
