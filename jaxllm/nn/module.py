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

from jaxllm.errors import InputError

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
        """Returns the model that holds these arrays.

        Raises:
          InputError: If the trees do not have the model's names.
        """
        params = _by_name(self.abstract_params, params)  # type: ignore[attr-defined]
        extra = _by_name(self.abstract_extra, extra)  # type: ignore[attr-defined]
        return nnx.merge(self._graphdef, params, extra)  # type: ignore[attr-defined]

    @property
    def parameter_count(self) -> int:
        """Numbers that gradients train."""
        leaves = jax.tree.leaves(self.abstract_params)  # type: ignore[attr-defined]
        return sum(leaf.size for leaf in leaves)


def _by_name(like: Tree, tree: Tree) -> Tree:
    """Returns `tree` with the keys of `like`, in its order, since NNX merges leaves by position.

    A checkpoint returns the numbers of a list as strings, and "10" sorts before "2".
    """
    if not isinstance(like, dict):
        return tree
    named = {str(key): part for key, part in tree.items()}
    if different := sorted(named.keys() ^ {str(key) for key in like}):
        raise InputError(f"parameters of another model: {different[0]!r} is only in one of them")
    return {key: _by_name(part, named[str(key)]) for key, part in like.items()}
