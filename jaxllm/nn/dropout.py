"""Dropout as a function of an explicit key."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries of `x` [..., D] and rescales the rest to keep the mean.

    Args:
      x: Activations.
      rate: Probability of a zero, used as the nearest multiple of 2^-16.
      key: No key, no dropout.
    """
    zeroed = round(rate * 2**16)
    if zeroed == 0 or key is None:
        return x
    # Random bits are what dropout costs: one draw of 32 serves two entries.
    *leading, width = x.shape
    pairs = jax.random.bits(key, (*leading, -(-width // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(*leading, -1)[..., :width]
    scale = 2**16 / (2**16 - zeroed)
    return jnp.where(bits >= zeroed, x * scale, jnp.zeros_like(x))
