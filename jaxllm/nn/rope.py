"""Rotary position embedding in one and two dimensions (interleaved pairs).

A table is the pair (cos, sin), each float32 [T, H/2]. A grid table gives the first half of the
pairs to the row and the second half to the column (section 1.3 of the DnD-Transformer code,
inherited from LlamaGen; Su et al., arXiv:2104.09864, for one dimension).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

RotaryTable = tuple[jax.Array, jax.Array]


def rotary_table(positions: np.ndarray, head_dim: int, base: float = 10000.0) -> RotaryTable:
    """Returns (cos, sin) [T, H/2] for 1-D `positions` [T] or grid coordinates [T, 2].

    Frequencies are `base^(-2j/n)` for the n = H dims of a 1-D table, n = H/2 of each grid half.
    Angles are computed in float64 on the host: bfloat16 cannot tell position 257 from 256.
    """
    axes = positions[:, None] if positions.ndim == 1 else positions
    dims = head_dim // axes.shape[1]
    if head_dim % (2 * axes.shape[1]):
        raise ValueError(f"head_dim {head_dim} does not split into {axes.shape[1]} rotary axes")
    frequencies = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    angles = (axes[:, :, None] * frequencies).reshape(len(axes), -1)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def grid_coordinates(height: int, width: int) -> np.ndarray:
    """Returns the (row, column) of each cell in raster order, [height * width, 2]."""
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.stack([rows, columns], axis=-1)


def apply_rotary(x: jax.Array, table: RotaryTable) -> jax.Array:
    """Rotates the interleaved pairs (2j, 2j+1) of `x` [..., T, N, H] by `table` rows [T, H/2].

    Computed in float32, returned in the dtype of `x`. A row with cos = sin = 0 makes the vector
    zero, which is what the released code does to the class token.
    """
    cos, sin = (part[:, None, :] for part in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
