"""Quantizers without a codebook: LFQ (arXiv:2310.05737) and BSQ (arXiv:2406.07548).

LFQ takes the sign of every coordinate, BSQ the sign on the unit sphere; the code is the number
whose bits are the signs. With squared distances and inverse temperature t the soft choice is
`p(c|z) ~ exp(2 t z.c)`. It factorises over bits, `p_j = sigmoid(4 t s z_j)` for values -s and s, so
the entropy of a single choice is an exact sum over bits. The entropy of the mean choice does not
factorise: it is exact up to `entropy_bits` bits and a sum over groups of bits, an upper bound,
above. Bit probabilities enter through log-sigmoid, so extreme inputs stay finite.

Shapes: N vectors, K = 2^E codes, E code dim; `...` any leading axes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.quantize.codebook import normalise
from jaxllm.quantize.estimators import straight_through
from jaxllm.quantize.interface import (
    Params,
    QuantizeOutput,
    State,
    check_codes,
    check_input,
    entropy,
    masked_mean_square,
)


def bit_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of bits with `p = sigmoid(logits)`, elementwise; 0 at large logits."""
    on, off = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    return -(on * jax.nn.log_sigmoid(logits) + off * jax.nn.log_sigmoid(-logits))


def code_probabilities(logits: jax.Array) -> jax.Array:
    """Probabilities `[N, 2^E]` of all sign patterns of independent bits with logits `[N, E]`.

    The first bit is the most significant of the index, as in the codes.
    """
    joint = jnp.ones((logits.shape[0], 1))
    for j in range(logits.shape[1]):
        bit = jax.nn.sigmoid(jnp.stack([-logits[:, j], logits[:, j]], -1))
        joint = (joint[:, :, None] * bit[:, None, :]).reshape(logits.shape[0], -1)
    return joint


def mean_code_entropy(logits: jax.Array, weights: jax.Array, bits: int) -> jax.Array:
    """Entropy in nats of the weighted mean over N of the distribution over `2^E` codes.

    Exact for E of at most `bits`; otherwise the sum over equal groups of at most `bits`
    neighbouring bits, which is an upper bound. The mean of a group of g bits is one matrix product
    of two `[N, 2^(g/2)]` factors, so nothing of shape `[N, 2^g]` is made.

    Args:
      logits: `[N, E]`, of the bits.
      weights: `[N]`, adding up to 1.
      bits: largest number of bits treated jointly.

    Returns:
      Scalar float32.
    """
    total = jnp.zeros(())
    dim = logits.shape[-1]
    for group in np.array_split(np.arange(dim), -(-dim // bits)):
        first, second = np.array_split(group, 2)
        high = code_probabilities(logits[:, first]) * weights[:, None]
        low = code_probabilities(logits[:, second])
        mean = jnp.matmul(high.T, low, precision=jax.lax.Precision.HIGHEST)
        total += entropy(mean.reshape(-1))
    return total


@dataclasses.dataclass(frozen=True)
class LFQ:
    """Configuration and pure functions of a lookup-free quantizer; `params` and `state` are empty.

    Losses: `commitment`, `mean((z - sg(q))^2)`, and `entropy`, in nats: the mean entropy of single
    choices minus `diversity` times the entropy of the mean choice.

    Attributes:
      code_dim: E, the number of bits, at most 30.
      scale: s, the code values are -s and s.
      inverse_temperature: t of the soft choice.
      diversity: weight of the second entropy.
      entropy_bits: see `mean_code_entropy`.
      entropy_weight: of the entropy loss in `total_loss`.
      beta: of the commitment loss in `total_loss`.
    """

    code_dim: int
    scale: float = 1.0
    inverse_temperature: float = 100.0
    diversity: float = 1.0
    entropy_bits: int = 12
    entropy_weight: float = 0.1
    beta: float = 0.0

    def __post_init__(self) -> None:
        """Refuses widths that cannot be coded in int32 or enumerated."""
        if not 1 <= self.code_dim <= 30:
            raise InputError(f"{self._name}: code_dim is {self.code_dim}, expected 1 to 30 bits")
        if not 1 <= self.entropy_bits <= 20:
            raise InputError(f"{self._name}: entropy_bits is {self.entropy_bits}, expected 1 to 20")

    @property
    def size(self) -> int:
        """K = 2^E."""
        return 2**self.code_dim

    @property
    def depth(self) -> int:
        """1: a vector has one code."""
        return 1

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
        """Quantizes `z [..., E]` (0 counts as negative); `train` and `key` change nothing.

        Args:
          params: empty.
          state: empty.
          z: `[..., E]`.
          train: unused.
          key: unused.
          mask: bool `[...]`, False at padding, which is left out of the losses.

        Returns:
          `QuantizeOutput` with losses `commitment` and `entropy`.

        Raises:
          InputError: wrong shapes.
        """
        del params, train, key
        check_input(self._name, self.code_dim, z, mask)
        vectors = self._project(z.reshape(-1, self.code_dim).astype(jnp.float32))
        valid = jnp.ones(vectors.shape[:1], bool) if mask is None else mask.reshape(-1)
        bits = vectors > 0
        signs = jnp.where(bits, self.scale, -self.scale)
        losses = {
            "commitment": masked_mean_square([vectors - signs], [valid]),
            "entropy": self._entropy(vectors, valid),
        }
        quantized = straight_through(vectors, signs).reshape(z.shape).astype(z.dtype)
        codes = (bits * self._powers).sum(-1, dtype=jnp.int32).reshape(*z.shape[:-1], 1)
        return QuantizeOutput(quantized, codes, losses, state)

    def decode(
        self, params: Params, state: State, codes: jax.Array, depth: int | None = None
    ) -> jax.Array:
        """Returns the sign vectors, float32 `[..., E]`, of codes `[..., 1]`; NaN outside 0..K-1."""
        del params, state
        check_codes(self._name, 1, codes, depth)
        known = (codes >= 0) & (codes < self.size)
        signs = jnp.where(self.bits(codes), self.scale, -self.scale)
        return jnp.where(known, signs, jnp.nan).astype(jnp.float32)

    def bits(self, codes: jax.Array) -> jax.Array:
        """Returns the bits of codes `[..., 1]`, bool `[..., E]`, the most significant first."""
        return (codes & self._powers) > 0

    def codebook(self, params: Params, state: State) -> jax.Array:
        """Returns all sign vectors, float32 `[1, K, E]`."""
        return self.decode(params, state, jnp.arange(self.size)[:, None])[None]

    def total_loss(self, losses: dict[str, jax.Array]) -> jax.Array:
        """Returns `beta * commitment + entropy_weight * entropy`."""
        return self.beta * losses["commitment"] + self.entropy_weight * losses["entropy"]

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _powers(self) -> np.ndarray:
        return 2 ** np.arange(self.code_dim - 1, -1, -1, dtype=np.int32)

    def _project(self, vectors: jax.Array) -> jax.Array:
        return vectors

    def _entropy(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
        logits = 4.0 * self.inverse_temperature * self.scale * vectors
        logits = jnp.where(valid[:, None], logits, 0.0)
        weights = valid / jnp.maximum(valid.sum(), 1)
        single = (weights * bit_entropy(logits).sum(-1)).sum()
        return single - self.diversity * mean_code_entropy(logits, weights, self.entropy_bits)


@dataclasses.dataclass(frozen=True)
class BSQ(LFQ):
    """Binary spherical quantization: LFQ of `z / |z|` with code values `+-1/sqrt(E)`.

    Codes lie on the unit sphere; gradients pass the normalisation. The entropy loss is divided by
    the inverse temperature, as in the authors' code, whose defaults these are.
    """

    scale: float = dataclasses.field(init=False)
    inverse_temperature: float = 1.0

    def __post_init__(self) -> None:
        """Derives the scale from the code dim."""
        super().__post_init__()
        object.__setattr__(self, "scale", self.code_dim**-0.5)

    def _project(self, vectors: jax.Array) -> jax.Array:
        return normalise(vectors)

    def _entropy(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
        return super()._entropy(vectors, valid) / self.inverse_temperature
