"""A scalar at every position of a decoder: the head of reward models and of critics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def new_head(dim: int) -> Tree:
    """Returns a head over activations of width `dim` that gives 0, so that it prefers nothing."""
    return {"kernel": jnp.zeros((dim,)), "bias": jnp.zeros(())}


def token_values(head: Tree, hidden: jax.Array) -> jax.Array:
    """Returns w . h + b at every position, float32 [..., T], of activations [..., T, D]."""
    wide = hidden.astype(jnp.float32)
    return jnp.einsum("...d,d->...", wide, head["kernel"].astype(jnp.float32)) + head["bias"]


# Path regex -> logical axes.
HEAD_RULES = ((r"(^|/)head/kernel$", (None,)), (r"(^|/)head/bias$", ()))
