"""The feed-forward layer of a transformer block, gated or plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.linear import project

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class MlpConfig:
    """Shape of a feed-forward layer."""

    hidden: int
    """Width F."""
    activation: Activation = "silu"
    """`gelu` is exact, `gelu_tanh` its tanh approximation."""
    gated: bool = True
    """down(act(gate(x)) * up(x)), SwiGLU with `silu`, instead of down(act(up(x)))."""
    bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise InputError(f"hidden {self.hidden} must be at least 1")
        if self.activation not in get_args(Activation):
            raise InputError(f"activation {self.activation!r} is not one of {get_args(Activation)}")


class Mlp(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202), or down(act(up(x)))."""

    def __init__(self, dim: int, config: MlpConfig, *, std: float, rngs: nnx.Rngs):
        self.config = config
        ends = {"up": (dim, config.hidden), "down": (config.hidden, dim)}
        if config.gated:
            ends = {"gate": (dim, config.hidden)} | ends
        for name, shape in ends.items():
            setattr(self, name, nnx.Param(std * jax.random.normal(rngs.params(), shape)))
            if config.bias:
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros(shape[1:])))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [..., D] to [..., D]."""
        activate = _FUNCTIONS[self.config.activation]
        if self.config.gated:
            return self._linear("down", activate(self._linear("gate", x)) * self._linear("up", x))
        return self._linear("down", activate(self._linear("up", x)))

    def _linear(self, name: str, x: jax.Array) -> jax.Array:
        y = project(x, getattr(self, name))
        return y + getattr(self, f"{name}_bias")[...].astype(x.dtype) if self.config.bias else y


def swiglu_hidden(dim: int, multiple: int = 256) -> int:
    """Returns the LLaMA hidden size: two thirds of 4 D, rounded up to `multiple`."""
    return -(-int(2 * 4 * dim / 3) // multiple) * multiple
