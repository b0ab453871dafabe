"""What every quantizer has in common: the output, the state and the methods.

A quantizer is a frozen, hashable dataclass whose methods are pure functions. Its arrays live in two
dictionaries that the caller carries: `params`, which gradients train, and `state`, which
`quantize(..., train=True)` returns anew (EMA codebooks) or which never changes (frozen tables).

Shapes: `...` any leading axes, C code depth (1 unless residual), K codebook size, E code dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError

Params = dict[str, jax.Array]
State = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizeOutput:
    """Result of `quantize`.

    Attributes:
      quantized: `[..., E]` in the dtype of the input; the value is exactly `decode(codes)` under
        the codebook of this call, the gradient goes to the input through the estimator.
      codes: int32 `[..., C]`; -1 where quantizer dropout removed a level.
      losses: unweighted float32 scalars among `commitment`, `codebook`, `entropy`; only those that
        exist for the quantizer. `total_loss` of the quantizer weighs and adds them.
      state: the next state; the given one when `train=False`.
    """

    quantized: jax.Array
    codes: jax.Array
    losses: dict[str, jax.Array]
    state: State


class Quantizer(Protocol):
    """The methods that a tokenizer may call on any quantizer of this package."""

    @property
    def size(self) -> int:
        """K, the number of values that one code can take."""

    @property
    def depth(self) -> int:
        """C, the number of codes per vector."""

    @property
    def code_dim(self) -> int:
        """E, the length of the vectors that are quantized."""

    def init(self, key: jax.Array) -> tuple[Params, State]:
        """Returns fresh parameters and state."""

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
        """Quantizes `z [..., E]`; `mask [...]` is False at padding, which changes no statistic."""

    def decode(
        self, params: Params, state: State, codes: jax.Array, depth: int | None = None
    ) -> jax.Array:
        """Returns float32 vectors `[..., E]` of `codes [..., C]`, the first `depth` levels."""

    def total_loss(self, losses: dict[str, jax.Array]) -> jax.Array:
        """Returns the weighted sum of the losses of `quantize`, a float32 scalar."""


def check_input(name: str, code_dim: int, z: jax.Array, mask: jax.Array | None) -> None:
    """Raises `InputError` unless `z` is `[..., code_dim]` and `mask` has its leading shape."""
    if z.ndim < 1 or z.shape[-1] != code_dim:
        raise InputError(f"{name}: z has shape {z.shape}, expected a last axis of {code_dim}")
    if mask is not None and mask.shape != z.shape[:-1]:
        raise InputError(f"{name}: mask has shape {mask.shape}, expected {z.shape[:-1]}")


def check_codes(name: str, levels: int, codes: jax.Array, depth: int | None) -> int:
    """Returns the decode depth, all levels for None; raises `InputError` for wrong shapes."""
    if codes.ndim < 1 or codes.shape[-1] != levels:
        raise InputError(
            f"{name}: codes have shape {codes.shape}, expected a last axis of {levels}"
        )
    depth = levels if depth is None else depth
    if not 1 <= depth <= levels:
        raise InputError(f"{name}: decode depth is {depth}, expected 1 to {levels}")
    return depth


def masked_mean_square(differences: Sequence[jax.Array], valid: Sequence[jax.Array]) -> jax.Array:
    """Mean of the squares of arrays `[..., E]` over the entries where `valid [...]` is True.

    Zeros are put in before squaring, so that non-finite padding reaches neither value nor gradient.
    """
    total, entries = jnp.zeros(()), jnp.zeros(())
    for difference, counts in zip(differences, valid, strict=True):
        total += jnp.square(jnp.where(counts[..., None], difference, 0.0)).sum()
        entries += counts.sum() * difference.shape[-1]
    return total / jnp.maximum(entries, 1)


def entropy(probabilities: jax.Array) -> jax.Array:
    """Entropy in nats over the last axis; value and gradient are finite at probability 0."""
    tiny = jnp.finfo(jnp.float32).tiny
    return -(probabilities * jnp.log(jnp.maximum(probabilities, tiny))).sum(-1)
