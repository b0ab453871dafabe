"""The pre-norm transformer block shared by the code models."""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.nn.attention import AttendFn, SelfAttention
from jaxllm.nn.dropout import dropout
from jaxllm.nn.mlp import SwiGLU
from jaxllm.nn.norm import RMSNorm
from jaxllm.nn.rope import RotaryTable


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)), LLaMA style."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        *,
        std: float = 0.02,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.attn_norm = RMSNorm(dim)
        self.attn = SelfAttention(dim, heads, kv_heads, dim // heads, std=std, rngs=rngs)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden, std=std, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x: jax.Array,
        rotary: RotaryTable | None,
        attention: AttendFn,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Maps activations [B, T, D] to [B, T, D]; `key` turns on dropout after both halves."""
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("attention"):
            mixed = self.attn(self.attn_norm(x), rotary, attention)
        x = x + dropout(mixed, self.dropout_rate, attn_key)
        with jax.named_scope("mlp"):
            transformed = self.mlp(self.mlp_norm(x))
        return x + dropout(transformed, self.dropout_rate, mlp_key)
