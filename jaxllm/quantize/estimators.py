"""Gradient estimators: how the gradient passes the discrete choice.

Both return exactly the quantized vector in the forward pass; the added term is a difference of
equal numbers, which is zero in floating point too. In a residual quantizer they are applied once,
to the sum over levels: applied per level, the encoder gradient would be multiplied by the depth.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Below this norm a direction is not defined in float32.
_MIN_NORM = 1e-6


def straight_through(z: jax.Array, quantized: jax.Array) -> jax.Array:
    """Returns `quantized` with the gradient of `z` (Bengio et al., arXiv:1308.3432); `[..., E]`."""
    return jax.lax.stop_gradient(quantized) + (z - jax.lax.stop_gradient(z))


def rotation(z: jax.Array, quantized: jax.Array) -> jax.Array:
    """Returns `quantized` with the gradient of the rotation and scaling that takes `z` there.

    With unit vectors `u` of z, `v` of quantized and `w` of `u + v` held constant, the map is
    `|q|/|z| (z - 2 (z.w) w + 2 (z.u) v)`: its Jacobian is `|q|/|z|` times an orthogonal matrix
    (rotation trick, arXiv:2410.06424, in the two-reflection form). Where z or quantized has no
    direction the straight-through gradient is used. Shapes `[..., E]`.
    """
    stop = jax.lax.stop_gradient
    z_norm = jnp.linalg.norm(stop(z), axis=-1, keepdims=True)
    q_norm = jnp.linalg.norm(stop(quantized), axis=-1, keepdims=True)
    u = stop(z) / jnp.maximum(z_norm, _MIN_NORM)
    v = stop(quantized) / jnp.maximum(q_norm, _MIN_NORM)
    middle_norm = jnp.linalg.norm(u + v, axis=-1, keepdims=True)
    w = (u + v) / jnp.maximum(middle_norm, _MIN_NORM)
    along_w = (z * w).sum(-1, keepdims=True)
    along_u = (z * u).sum(-1, keepdims=True)
    scale = q_norm / jnp.maximum(z_norm, _MIN_NORM)
    rotated = scale * (z - 2.0 * along_w * w + 2.0 * along_u * v)
    defined = (z_norm > _MIN_NORM) & (q_norm > _MIN_NORM)
    return straight_through(jnp.where(defined, rotated, z), quantized)
