"""What the option classes of all algorithms share: frozen, and every value checked when made.

An algorithm's class holds exactly the options that it uses, so that the config system refuses any
other key. Bounds stand beside the defaults: `beta: float = above(0, 0.1)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from jaxllm.errors import InputError


@dataclass(frozen=True)
class Options:
    """Parent of all option classes; the subclass declares the fields."""

    def __post_init__(self) -> None:
        """Raises InputError naming the first option outside its bounds."""
        for option in fields(self):
            value, allowed = getattr(self, option.name), option.metadata.get("allowed")
            # Comparisons with NaN are false, so it is refused too.
            if allowed is None or value is None or allowed[0](value):
                continue
            name = type(self).__name__
            raise InputError(f"{name}.{option.name} is {value}, expected {allowed[1]}")


def above(low: float, default: float | None, below: float = math.inf) -> Any:
    """An option with low < value < below."""
    text = f"above {low}" + ("" if below == math.inf else f" and below {below}")
    return field(default=default, metadata={"allowed": (lambda x: low < x < below, text)})


def at_least(low: float, default: float | None, below: float = math.inf) -> Any:
    """An option with low <= value < below."""
    text = f"at least {low}" + ("" if below == math.inf else f" and below {below}")
    return field(default=default, metadata={"allowed": (lambda x: low <= x < below, text)})


def between(low: float, high: float, default: float) -> Any:
    """An option with low <= value <= high."""
    text = f"between {low} and {high}"
    return field(default=default, metadata={"allowed": (lambda x: low <= x <= high, text)})
