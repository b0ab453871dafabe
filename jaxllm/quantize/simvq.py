"""SimVQ (arXiv:2411.02038): a frozen random table seen through a learned linear map.

The codebook is `E = F W` with F frozen and W trained, so every code moves with every step and
unused codes stay near the data. Search, losses and decoding all use `F W`; decoding through F alone
would give other vectors than those quantized.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.quantize.interface import Params, QuantizeOutput, State
from jaxllm.quantize.residual import ResidualVQ


@dataclasses.dataclass(frozen=True)
class SimVQ:
    """Configuration and pure functions of SimVQ.

    `params` holds `projection [F, E]` (W) and `state` the frozen `table [K, F]`.

    Attributes:
      codebook_size: K.
      code_dim: E.
      table_dim: F, E by default (None).
      estimator: `'straight_through'` or `'rotation'`.
      cosine: l2-normalise vectors and projected codes.
      beta: weight of the commitment loss in `total_loss`; the codebook loss has weight 1.
      legacy_beta: swaps the two weights (the authors' default).
      chunk_size: as in `ResidualVQ`.
    """

    codebook_size: int
    code_dim: int
    table_dim: int | None = None
    estimator: Literal["straight_through", "rotation"] = "straight_through"
    cosine: bool = False
    beta: float = 0.25
    legacy_beta: bool = False
    chunk_size: int = 8192

    @property
    def size(self) -> int:
        """K, the number of codes."""
        return self.codebook_size

    @property
    def depth(self) -> int:
        """1: a vector has one code."""
        return 1

    def init(self, key: jax.Array) -> tuple[Params, State]:
        """Returns F and W, both normal with standard deviation `F^-1/2` (F the table's width)."""
        width = self.table_dim or self.code_dim
        table_key, projection_key = jax.random.split(key)
        table = jax.random.normal(table_key, (self.codebook_size, width)) * width**-0.5
        projection = jax.random.normal(projection_key, (width, self.code_dim)) * width**-0.5
        return {"projection": projection}, {"table": table}

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
        """As `ResidualVQ.quantize` at depth 1 and codebook `F W`; the state stays as it is."""
        output = self._vq.quantize(
            self._codebook(params, state), {}, z, train=train, key=key, mask=mask
        )
        return dataclasses.replace(output, state=state)

    def decode(
        self, params: Params, state: State, codes: jax.Array, depth: int | None = None
    ) -> jax.Array:
        """Returns the rows of `F W`, float32 `[..., E]`, of codes `[..., 1]`."""
        return self._vq.decode(self._codebook(params, state), {}, codes, depth)

    def codebook(self, params: Params, state: State) -> jax.Array:
        """Returns `F W`, float32 `[1, K, E]`."""
        return self._vq.codebook(self._codebook(params, state), {})

    def total_loss(self, losses: dict[str, jax.Array]) -> jax.Array:
        """Returns `beta * commitment + codebook` (see `legacy_beta`)."""
        return self._vq.total_loss(losses)

    @property
    def _vq(self) -> ResidualVQ:
        return ResidualVQ(
            self.codebook_size,
            self.code_dim,
            update="gradient",
            estimator=self.estimator,
            cosine=self.cosine,
            beta=self.beta,
            legacy_beta=self.legacy_beta,
            chunk_size=self.chunk_size,
        )

    def _codebook(self, params: Params, state: State) -> Params:
        product = jnp.matmul(
            jax.lax.stop_gradient(state["table"]),
            params["projection"],
            precision=jax.lax.Precision.HIGHEST,
        )
        return {"codebook": product[None]}
