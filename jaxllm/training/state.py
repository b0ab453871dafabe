"""What training carries from step to step, as one pytree.

`params` is what gradients train; `extra` is what the forward pass updates itself (codebooks that
follow an average, fixed tables); both are nested dicts of arrays, so every leaf has a path.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Tree = Any


@struct.dataclass
class TrainState:
    """Everything that a resumed run needs besides the seed and the data."""

    step: jax.Array
    """int32 scalar: updates done so far."""
    params: Tree
    opt_state: Tree
    ema: Tree | None
    """Exponential moving average of `params`, or None when it is off."""
    extra: Tree
    first_bad: jax.Array
    """int32 [2]: step and tensor number of the first non-finite value, (-1, -1) while healthy."""

    @property
    def best_params(self) -> Tree:
        """The averaged parameters where they are kept, else the trained ones."""
        return self.params if self.ema is None else self.ema


def new_state(
    params: Tree, optimizer: optax.GradientTransformation, *, ema: bool, extra: Tree | None = None
) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.array, params) if ema else None,
        extra={} if extra is None else extra,
        first_bad=jnp.full((2,), -1, jnp.int32),
    )


def with_params(state: TrainState, params: Tree) -> TrainState:
    """Returns a state before its first step with other parameters, and their average if kept."""
    ema = None if state.ema is None else jax.tree.map(jnp.array, params)
    return dataclasses.replace(state, params=params, ema=ema)
