"""A module as three plain parts: what it is, what trains, and what it keeps besides.

Flax NNX is used for construction only. `Blueprint` splits a module class into a static graph
definition and two nested dicts of arrays, so that everything outside the class body is plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
from flax import nnx

Model = TypeVar("Model")
Tree = Any


class Buffer(nnx.Variable):
    """An array that a module keeps but no gradient trains (a moving average, a fixed table)."""


@dataclass(frozen=True)
class Blueprint(Generic[Model]):
    """How to make one model, abstractly and with arrays."""

    make: Callable[[nnx.Rngs], Model]

    def __post_init__(self) -> None:
        model = nnx.eval_shape(lambda: self.make(nnx.Rngs(params=jax.random.key(0))))
        graphdef, *(params, extra) = nnx.split(model, nnx.Param, ...)
        object.__setattr__(self, "_graphdef", graphdef)
        object.__setattr__(self, "abstract_params", nnx.to_pure_dict(params))
        object.__setattr__(self, "abstract_extra", nnx.to_pure_dict(extra))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Returns fresh (params, extra) as nested dicts of arrays; traceable."""
        _, *(params, extra) = nnx.split(self.make(nnx.Rngs(params=key)), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(extra)

    def build(self, params: Tree, extra: Tree) -> Model:
        """Returns the model that holds these arrays."""
        return nnx.merge(self._graphdef, params, extra)  # type: ignore[attr-defined]

    @property
    def parameter_count(self) -> int:
        """Numbers that gradients train."""
        leaves = jax.tree.leaves(self.abstract_params)  # type: ignore[attr-defined]
        return sum(leaf.size for leaf in leaves)
