"""Finite scalar quantization (FSQ, arXiv:2309.15505): round every coordinate to a few values.

With levels `L_j`, bound `f(z) = tanh(z + s) h - o`, `h = (L - 1)(1 - eps)/2`, `o = 1/2` for even L
and 0 otherwise, `s = atanh(o / h)` so that `f(0) = 0`; the code is `round(f(z)) / (L // 2)` and the
index is the mixed-radix number of the rounded values. The codebook is implicit, nothing is trained
and there is no loss.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.quantize.estimators import straight_through
from jaxllm.quantize.interface import (
    Params,
    QuantizeOutput,
    State,
    check_codes,
    check_input,
)


@dataclasses.dataclass(frozen=True)
class FSQ:
    """Configuration and pure functions of a finite scalar quantizer.

    `params` and `state` are empty. `levels` of about 2^8: (8, 6, 5); 2^10: (8, 5, 5, 5);
    2^12: (7, 5, 5, 5, 5).

    Attributes:
      levels: L_1..L_E, each at least 2; the product is K.
      symmetric: values `2 i / (L - 1) - 1`, i = 0..L-1, instead of a grid that contains 0; needed
        when a level is 2.
      eps: margin of the bound, so that the outermost values can be rounded to.
    """

    levels: tuple[int, ...]
    symmetric: bool = False
    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Refuses level sets that cannot be coded in int32 or have no grid."""
        lowest = 2 if self.symmetric else 3
        if not self.levels or min(self.levels) < lowest:
            raise InputError(
                f"FSQ: levels are {self.levels}, expected each at least {lowest}"
                + ("" if self.symmetric else " (2 needs symmetric=True)")
            )
        if self.size >= 2**31:
            raise InputError(f"FSQ: levels {self.levels} make {self.size} codes, more than int32")

    @property
    def size(self) -> int:
        """K, the product of the levels."""
        return math.prod(self.levels)

    @property
    def depth(self) -> int:
        """1: a vector has one code."""
        return 1

    @property
    def code_dim(self) -> int:
        """E, the number of levels."""
        return len(self.levels)

    def init(self, key: jax.Array) -> tuple[Params, State]:
        """Returns empty parameters and state."""
        del key
        return {}, {}

    def quantize(
        self,
        params: Params,
        state: State,
        z: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> QuantizeOutput:
        """Quantizes `z [..., E]`; nothing depends on `train`, `key` or `mask`. No losses.

        Raises:
          InputError: wrong shapes.
        """
        del params, train, key
        check_input("FSQ", self.code_dim, z, mask)
        bounded = self._bound(z.astype(jnp.float32))
        # In 0..L-1; the gradient of the grid value is that of the bounded value.
        steps = jnp.floor(jax.lax.stop_gradient(bounded) + 0.5).astype(jnp.int32)
        quantized = straight_through(self._scale(bounded), self._scale(steps))
        return QuantizeOutput(quantized.astype(z.dtype), self._pack(steps), {}, state)

    def decode(
        self, params: Params, state: State, codes: jax.Array, depth: int | None = None
    ) -> jax.Array:
        """Returns the grid vectors, float32 `[..., E]`, of codes `[..., 1]`; NaN outside 0..K-1."""
        del params, state
        check_codes("FSQ", 1, codes, depth)
        known = (codes >= 0) & (codes < self.size)
        return jnp.where(known, self._scale(self.digits(codes)), jnp.nan)

    def digits(self, codes: jax.Array) -> jax.Array:
        """Splits codes `[..., 1]` into level indices int32 `[..., E]` (for factored embeddings)."""
        return (codes // self._basis) % jnp.asarray(self.levels, jnp.int32)

    def codes(self, vectors: jax.Array) -> jax.Array:
        """Returns the codes int32 `[..., 1]` of grid vectors `[..., E]`; inverts `decode`."""
        scale, shift = self._grid
        return self._pack(jnp.round(vectors.astype(jnp.float32) / scale + shift).astype(jnp.int32))

    def codebook(self, params: Params, state: State) -> jax.Array:
        """Returns all grid vectors, float32 `[1, K, E]`."""
        return self.decode(params, state, jnp.arange(self.size)[:, None])[None]

    def total_loss(self, losses: dict[str, jax.Array]) -> jax.Array:
        """Returns 0: FSQ has no loss."""
        del losses
        return jnp.zeros(())

    @property
    def _basis(self) -> np.ndarray:
        return np.cumprod((1, *self.levels[:-1])).astype(np.int32)

    @property
    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift of the grid: value = scale * (step - shift), step in 0..L-1."""
        levels = np.asarray(self.levels, np.float32)
        if self.symmetric:
            return 2.0 / (levels - 1.0), (levels - 1.0) / 2.0
        return 1.0 / (levels // 2), levels // 2

    def _scale(self, steps: jax.Array) -> jax.Array:
        scale, shift = self._grid
        return (steps - shift) * scale

    def _bound(self, z: jax.Array) -> jax.Array:
        """Maps real numbers into the open interval (-1/2, L - 1/2) of steps."""
        levels = np.asarray(self.levels, np.float32)
        half = (levels - 1.0) * (1.0 - self.eps) / 2.0
        if self.symmetric:
            return jnp.tanh(z) * half + (levels - 1.0) / 2.0
        offset = np.where(np.asarray(self.levels) % 2 == 0, 0.5, 0.0).astype(np.float32)
        return jnp.tanh(z + np.arctanh(offset / half)) * half - offset + levels // 2

    def _pack(self, steps: jax.Array) -> jax.Array:
        """Integer arithmetic: a float sum of `step * basis` is not exact above 2^24."""
        return (steps * self._basis).sum(-1, keepdims=True, dtype=jnp.int32)
