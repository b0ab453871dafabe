"""The gated feed-forward layer of LLaMA-style blocks."""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.nn.linear import project


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) without biases (Shazeer, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int, *, std: float, rngs: nnx.Rngs):
        self.gate = nnx.Param(std * jax.random.normal(rngs.params(), (dim, hidden)))
        self.up = nnx.Param(std * jax.random.normal(rngs.params(), (dim, hidden)))
        self.down = nnx.Param(std * jax.random.normal(rngs.params(), (hidden, dim)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [..., D] to [..., D]."""
        gated = jax.nn.silu(project(x, self.gate[...])) * project(x, self.up[...])
        return project(gated, self.down[...])


def swiglu_hidden(dim: int, multiple: int = 256) -> int:
    """Returns the LLaMA hidden size: two thirds of 4 D, rounded up to `multiple`."""
    return -(-int(2 * 4 * dim / 3) // multiple) * multiple
