"""A third side of `jaxllm bench decode`: a greedy loop for one model, as one would write it in JAX.

Unrolled layers, fused projections (qkv; gate and up), one cache per layer, and nothing else: no
padding, sampling, stop tokens, log-probabilities or other families. It shows what `TextSampler`
costs or saves against the least that decoding needs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.evals.timing import Phases, seconds_of
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.nn.module import Blueprint
from jaxllm.nn.rope import apply_rotary, rotary_frequencies, rotary_rows

Tree = Any


class PlainSide:
    """Greedy decoding of a Llama with as many key/value heads as query heads."""

    def __init__(
        self,
        config: DecoderConfig,
        blueprint: Blueprint[Decoder],
        params: Tree,
        ids: np.ndarray,
        new_tokens: int,
    ):
        self.config, self.ids, self.new_tokens = config, jnp.asarray(ids), new_tokens
        self.slots = ids.shape[1] + new_tokens
        self.weights = jax.jit(lambda params: _weights(blueprint.build(params, {})))(params)
        self.tokens = jnp.zeros(())
        self._prompt = jax.jit(self._run_prompt)
        self._loop = jax.jit(self._decode, donate_argnums=1)

    def __call__(self) -> Phases:
        """Runs both phases and returns their seconds."""
        state: Any = None

        def prefill() -> None:
            nonlocal state
            state = jax.block_until_ready(self._prompt(self.weights, self.ids))

        def decode() -> None:
            nonlocal state
            *state, self.tokens = jax.block_until_ready(self._loop(self.weights, tuple(state)))

        return {"prefill": seconds_of(prefill), "decode": seconds_of(decode)}

    def _run_prompt(self, weights: Tree, ids: jax.Array) -> tuple[jax.Array, list[Any]]:
        config, batch = self.config.attention, len(ids)
        shape = (batch, config.heads, self.slots, config.head_dim)
        caches = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in weights["layers"]]
        return self._forward(weights, ids, caches, jnp.int32(0))

    def _decode(
        self, weights: Tree, state: tuple[jax.Array, list[Any]]
    ) -> tuple[jax.Array, list[Any], jax.Array]:
        """Returns logits and caches, which take the donated ones' place, and the tokens."""
        logits, caches = state
        drawn = jnp.zeros((len(logits), self.new_tokens), jnp.int32)

        def one(i: jax.Array, carry: Any) -> Any:
            logits, caches, drawn = carry
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            drawn = drawn.at[:, i].set(token)
            start = self.ids.shape[1] + i
            return *self._forward(weights, token[:, None], caches, start), drawn

        return jax.lax.fori_loop(0, self.new_tokens, one, (logits, caches, drawn))

    def _forward(
        self, weights: Tree, ids: jax.Array, caches: list[Any], start: jax.Array
    ) -> tuple[jax.Array, list[Any]]:
        """Returns the last position's logits [B, V] and the caches with the new entries."""
        config, (batch, count) = self.config.attention, ids.shape
        heads, dim = config.heads, config.head_dim
        at = start + jnp.arange(count)
        assert self.config.rope is not None
        table = rotary_rows(at, rotary_frequencies(self.config.rope, dim))
        seen = jnp.arange(self.slots) <= at[:, None]
        x, new = weights["embed"][ids], []

        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            mean = jnp.mean(x * x, axis=-1, keepdims=True)
            return x * jax.lax.rsqrt(mean + self.config.norm.eps) * scale

        for layer, (keys, values) in zip(weights["layers"], caches, strict=True):
            qkv = (norm(x, layer["attn_norm"]) @ layer["qkv"]).reshape(batch, count, heads, 3, dim)
            q, k = (apply_rotary(qkv[..., i, :], table).swapaxes(1, 2) for i in range(2))
            v = qkv[..., 2, :].swapaxes(1, 2)
            keys = jax.lax.dynamic_update_slice(keys, k, (0, 0, start, 0))
            values = jax.lax.dynamic_update_slice(values, v, (0, 0, start, 0))
            new.append((keys, values))
            scores = jnp.einsum("bnth,bnsh->bnts", q, keys) * dim**-0.5
            attended = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1) @ values
            x = x + attended.swapaxes(1, 2).reshape(batch, count, -1) @ layer["out"]
            gate, up = jnp.split(norm(x, layer["mlp_norm"]) @ layer["gate_up"], 2, axis=-1)
            x = x + (jax.nn.silu(gate) * up) @ layer["down"]
        return norm(x[:, -1], weights["norm"]) @ weights["head"], new


def _weights(model: Decoder) -> Tree:
    layers = []
    for block in model.unstack():
        attn, width = block.attn, model.config.dim
        mlp: Any = block.mlp
        layers.append(
            {
                "attn_norm": block.attn_norm.scale[...],
                "qkv": attn.qkv[...].reshape(width, -1),
                "out": attn.out[...].reshape(-1, width),
                "mlp_norm": block.mlp_norm.scale[...],
                "gate_up": jnp.concatenate([mlp.gate[...], mlp.up[...]], axis=1),
                "down": mlp.down[...],
            }
        )
    return {
        "embed": model.embed[...],
        "layers": layers,
        "norm": model.norm.scale[...],
        "head": model.head[...],
    }
