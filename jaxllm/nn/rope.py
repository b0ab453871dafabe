"""Rotary position embedding in one and two dimensions (interleaved pairs).

A table is the pair (cos, sin), each float32 [T, H/2]. A grid table gives the first half of the
pairs to the row and the second half to the column (section 1.3 of the DnD-Transformer code,
inherited from LlamaGen; Su et al., arXiv:2104.09864, for one dimension). A language model computes
the rows of its tokens from their positions instead, [B, T, R/2], with R <= H rotated dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError

RotaryTable = tuple[jax.Array, jax.Array]
RopeScaling = Literal["none", "linear", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions of a language model."""

    base: float = 10000.0
    fraction: float = 1.0
    """Share of each head's dims that is rotated, from the first on."""
    scaling: RopeScaling = "none"
    """How a model is stretched beyond the context it was first trained for."""
    factor: float = 1.0
    """Stretch: angles are divided by it (`linear`), or the slow ones are (`llama3`)."""
    low_freq_factor: float = 1.0
    """`llama3`: full stretch for wavelengths above original_positions / low_freq_factor."""
    high_freq_factor: float = 4.0
    """`llama3`: no stretch for wavelengths below original_positions / high_freq_factor."""
    original_positions: int = 8192
    """`llama3`: the context before stretching."""

    def __post_init__(self) -> None:
        if self.scaling not in get_args(RopeScaling):
            raise InputError(f"rope scaling {self.scaling!r} is not one of {get_args(RopeScaling)}")
        if not 0 < self.fraction <= 1:
            raise InputError(f"rope fraction {self.fraction} is outside (0, 1]")
        if not self.base > 0 or not self.factor > 0:
            raise InputError(f"rope base {self.base} and factor {self.factor} must be positive")
        if self.scaling == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                f"rope low_freq_factor {self.low_freq_factor} must be below high_freq_factor "
                f"{self.high_freq_factor}"
            )

    def dims(self, head_dim: int) -> int:
        """Returns how many of a head's dims are rotated, R.

        Raises:
          InputError: If that is not a positive even number.
        """
        dims = int(head_dim * self.fraction)
        if dims < 2 or dims % 2:
            raise InputError(
                f"rope fraction {self.fraction} rotates {dims} of {head_dim} head dims, expected a "
                "positive even number"
            )
        return dims


def rotary_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Returns the angle per position of each pair, float64 [R/2].

    `llama3` keeps fast pairs, divides slow ones by `factor`, and between the two wavelengths mixes
    both linearly in the inverse wavelength (Llama 3.1, arXiv:2407.21783 and its released code).
    """
    dims = config.dims(head_dim)
    frequencies = config.base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if config.scaling == "none":
        return frequencies
    stretched = frequencies / config.factor
    if config.scaling == "linear":
        return stretched
    turns = config.original_positions * frequencies / (2 * np.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return share * frequencies + (1 - share) * stretched


def rotary_rows(positions: jax.Array, frequencies: np.ndarray) -> RotaryTable:
    """Returns (cos, sin) float32 [..., T, R/2] of integer `positions` [..., T], of any size."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


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
    """Rotates the interleaved pairs (2j, 2j+1) of `x` [B, T, N, H] by `table` rows.

    Computed in float32, returned in the dtype of `x`. The rows are [T, R/2], or [B, T, R/2] where
    each example has its own positions; dims from R on pass unchanged. A row with cos = sin = 0
    makes the vector zero, which is what the released code does to the class token.
    """
    cos, sin = (part[..., None, :] for part in table)
    # (a, b) becomes (a cos - b sin, b cos + a sin) = (a, b) * (cos, cos) + (b, a) * (-sin, sin).
    # One array, which the CPU's compiler keeps; cosines by themselves it computes at every use.
    factors = jnp.stack([cos, cos, -sin, sin], axis=-1)
    dims = 2 * cos.shape[-1]
    turning, rest = x[..., :dims], x[..., dims:]
    pairs = turning.astype(jnp.float32).reshape(*turning.shape[:-1], -1, 2)
    rotated = pairs * factors[..., :2] + pairs[..., ::-1] * factors[..., 2:]
    rotated = rotated.reshape(turning.shape).astype(x.dtype)
    return rotated if dims == x.shape[-1] else jnp.concatenate([rotated, rest], axis=-1)
