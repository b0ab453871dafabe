"""Classifier-free guidance: conditional and unconditional rows side by side in one batch.

Rows 2i and 2i + 1 belong to the same image, so a batch sharded over devices keeps both on one
device and guidance needs no communication. Eq. 4 of arXiv:2410.01912 (Ho and Salimans,
arXiv:2207.12598).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError

Schedule = Literal["constant", "ramp", "interval"]


def pair(class_ids: jax.Array, null_class: int) -> jax.Array:
    """Interleaves classes [B] with the null class: [2B]."""
    null = jnp.full_like(class_ids, null_class)
    return jnp.stack([class_ids, null], axis=1).reshape(-1)


def guide(logits: jax.Array, scale: jax.Array) -> jax.Array:
    """Combines paired logits [2B, V] to [B, V]: l_u + s (l_c - l_u); s = 1 is the conditional."""
    conditional, unconditional = logits[0::2], logits[1::2]
    return unconditional + scale * (conditional - unconditional)


def guidance_scales(
    scale: np.ndarray,
    positions: int,
    schedule: Schedule = "constant",
    interval: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Returns the scale of every position and depth, float32 [positions, C].

    Args:
      scale: [C], the full scale of each depth.
      positions: Number of grid cells.
      schedule: `constant`; `ramp` from 1 at the first position to `scale` at the last (VAR); or
        `interval`, where only positions inside `interval` are guided (LlamaGen).
      interval: Fractions of the sequence, start included and end excluded.
    """
    where = np.arange(positions)
    full = np.asarray(scale, np.float32)[None]
    if schedule == "constant":
        return np.repeat(full, positions, axis=0)
    if schedule == "ramp":
        return 1.0 + (full - 1.0) * (where / max(1, positions - 1))[:, None].astype(np.float32)
    low, high = interval
    if not 0 <= low < high <= 1:
        raise InputError(f"guidance interval {interval} must satisfy 0 <= start < end <= 1")
    inside = (where >= low * positions) & (where < high * positions)
    return np.where(inside[:, None], full, np.float32(1.0))
