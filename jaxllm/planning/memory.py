"""Bytes per chip: by arithmetic on the shapes, and as the compiler laid them out."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import jax

_USED = re.compile(
    r"(?:[Uu]sed|for HLO temporaries) \(?([\d.]+)([KMGT]?)\)? "
    r"(?:of|exceeds available HBM) \(?([\d.]+)([KMGT]?)\)?"
)
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


@dataclass(frozen=True)
class Memory:
    """What one chip must hold while the program runs, in bytes."""

    arguments: float
    """Parameters, optimiser, batch, cache: what comes in."""
    outputs: float
    """What goes out and takes no argument's place."""
    temporaries: float
    """Activations, gathered parameters, gradients."""
    code: float

    @property
    def peak(self) -> float:
        """Everything at the same time."""
        return self.arguments + self.outputs + self.temporaries + self.code

    def plain(self) -> dict[str, float]:
        """Returns the fields and the peak as JSON values."""
        return {**asdict(self), "peak": self.peak}


def of_compiled(compiled: Any) -> Memory:
    """Returns the compiler's figures."""
    found = compiled.memory_analysis()
    return Memory(
        float(found.argument_size_in_bytes),
        float(found.output_size_in_bytes - found.alias_size_in_bytes),
        float(found.temp_size_in_bytes),
        float(found.generated_code_size_in_bytes),
    )


def per_chip(tree: Any) -> float:
    """Returns the bytes of a tree of placed abstract arrays on one chip, without padding."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def refused(message: str) -> tuple[float, float] | None:
    """Returns the bytes needed and available when a compiler's error says that they do not fit."""
    found = _USED.search(message)
    if found is None:
        return None
    needed, unit, limit, limit_unit = found.groups()
    return float(needed) * _UNITS[unit], float(limit) * _UNITS[limit_unit]
