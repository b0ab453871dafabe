"""The pre-norm transformer block shared by the code models and the decoder language models."""

from __future__ import annotations

import jax
from flax import nnx

from jaxllm.nn.attention import AttendFn, AttentionConfig, SelfAttention
from jaxllm.nn.dropout import dropout
from jaxllm.nn.mlp import Mlp, MlpConfig
from jaxllm.nn.norm import NormConfig, make_norm
from jaxllm.nn.rope import RotaryTable


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)), LLaMA style by default.

    `parallel` feeds both halves from the same x (GPT-NeoX, arXiv:2204.06745); `post_norms` also
    normalises what each half adds (Gemma 2, arXiv:2408.00118).
    """

    def __init__(
        self,
        dim: int,
        attention: AttentionConfig,
        mlp: MlpConfig,
        norm: NormConfig | None = None,
        *,
        parallel: bool = False,
        post_norms: bool = False,
        std: float = 0.02,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        norm = norm or NormConfig()
        self.attn_norm = make_norm(dim, norm)
        self.attn = SelfAttention(dim, attention, norm, std=std, rngs=rngs)
        self.mlp_norm = make_norm(dim, norm)
        self.mlp = Mlp(dim, mlp, std=std, rngs=rngs)
        if post_norms:
            self.attn_post_norm, self.mlp_post_norm = make_norm(dim, norm), make_norm(dim, norm)
        self.parallel, self.post_norms, self.dropout_rate = parallel, post_norms, dropout_rate

    def __call__(
        self,
        x: jax.Array,
        rotary: RotaryTable | None,
        attention: AttendFn,
        key: jax.Array | None = None,
        *,
        last: int | None = None,
    ) -> jax.Array:
        """Maps activations [B, T, D] to [B, T, D], or to [B, last, D] of the `last` positions.

        Args:
          x: Activations [B, T, D].
          rotary: See `SelfAttention`.
          attention: See `SelfAttention`.
          key: Turns on dropout after both halves.
          last: Nothing but keys and values is computed before these positions; None for all.
        """
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("attention"):
            mixed = self.attn(self.attn_norm(x), rotary, attention, last=last)
            if self.post_norms:
                mixed = self.attn_post_norm(mixed)
        x = x[:, -mixed.shape[1] :]
        after = x + dropout(mixed, self.dropout_rate, attn_key)
        with jax.named_scope("mlp"):
            transformed = self.mlp(self.mlp_norm(x if self.parallel else after))
            if self.post_norms:
                transformed = self.mlp_post_norm(transformed)
        return after + dropout(transformed, self.dropout_rate, mlp_key)
