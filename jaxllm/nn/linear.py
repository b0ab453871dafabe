"""Matrix products over flattened token axes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def project(x: jax.Array, kernel: jax.Array, *, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` axes of `x` with the first `inputs` axes of `kernel`.

    All other axes of `x` are merged into one for the product. The weight gradient then contracts a
    single axis; over two of them (batch and time) the CPU backend is about three times slower.

    Args:
      x: [..., *I].
      kernel: [*I, *O]; cast to the dtype of `x`.
      inputs: Number of axes in I.

    Returns:
      [..., *O] in the dtype of `x`.
    """
    leading, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    width = math.prod(kernel.shape[:inputs])
    flat = jnp.dot(x.reshape(-1, width), kernel.astype(x.dtype).reshape(width, -1))
    return flat.reshape(*leading, *outputs)
