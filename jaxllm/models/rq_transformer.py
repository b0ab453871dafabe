"""The RQ-Transformer: a body over positions and a small depth transformer inside each position.

Lee et al., arXiv:2203.01941, section 3.2. With e the frozen codebook vectors of the tokenizer,

    u_1 = class embedding,   u_t = PE(t - 1) + W_in sum_i e(k_(t-1,i)),   h_t = body(u_<=t)
    v_(t,1) = h_t + PE_d(1), v_(t,i) = W_head sum_(j<i) e(k_(t,j)) + PE_d(i)
    p(k_(t,i)) = softmax(W_out norm(depth(v_(t,<=i))))

One output projection serves all depths. `hidden` and `step` are those of `DnDTransformer`, so the
same loss, sampler and scorer run both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.attention import AttentionConfig, attend
from jaxllm.nn.block import Block
from jaxllm.nn.dropout import dropout
from jaxllm.nn.mlp import MlpConfig, swiglu_hidden
from jaxllm.nn.module import Buffer
from jaxllm.nn.norm import RMSNorm
from jaxllm.nn.stack import Remat, scan_layers, stack_layers, take_layer
from jaxllm.nn.vocabulary import vocabulary_logits


@dataclass(frozen=True)
class RQTransformerConfig:
    """Shape of the model; the paper's 1.4B has 42 + 6 layers of width 1536 with 24 heads."""

    codebook_size: int = 16384
    grid: tuple[int, int] = (8, 8)
    depth: int = 4
    """Codes per cell, C."""
    code_dim: int = 256
    """Length of a codebook vector, E."""
    num_classes: int = 1000
    layers: int = 42
    """Layers of the body."""
    depth_layers: int = 6
    heads: int = 24
    dim: int = 1536
    mlp_hidden: int | None = None
    class_dropout: float = 0.1
    dropout: float = 0.1
    remat: Remat = "none"

    def __post_init__(self) -> None:
        names = ("codebook_size", "depth", "code_dim", "num_classes")
        for name in (*names, "layers", "depth_layers", "heads", "dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        if min(self.grid) < 1:
            raise InputError(f"grid {self.grid} must have at least one row and one column")
        if self.dim % self.heads:
            raise InputError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        for name in ("class_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is outside [0, 1)")

    @property
    def cells(self) -> int:
        """Grid cells, the number of body steps."""
        return self.grid[0] * self.grid[1]

    @property
    def null_class(self) -> int | None:
        """The id that stands for no class, or None when the model has no such row."""
        return self.num_classes if self.class_dropout > 0 else None


class RQTransformer(nnx.Module):
    """Body and depth transformer; see the file's first lines."""

    def __init__(self, config: RQTransformerConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        dim, depth, std = config.dim, config.depth, 0.02

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape))

        def stack(layers: int) -> Block:
            return stack_layers(
                lambda rngs: Block(
                    dim,
                    AttentionConfig(config.heads, config.heads, dim // config.heads),
                    MlpConfig(config.mlp_hidden or swiglu_hidden(dim)),
                    dropout_rate=config.dropout,
                    rngs=rngs,
                ),
                layers,
                rngs,
            )

        self.config, self.dtype = config, dtype
        self.class_embed = normal(config.num_classes + (config.class_dropout > 0), dim)
        self.position_embed = normal(config.cells, dim)
        self.depth_embed = normal(depth, dim)
        self.input_proj = normal(config.code_dim, dim)
        self.depth_proj = normal(config.code_dim, dim)
        self.layers = stack(config.layers)
        self.depth_layers = stack(config.depth_layers)
        self.norm = RMSNorm(dim)
        self.head_out = nnx.Param(jnp.zeros((1, dim, config.codebook_size)))
        # Filled with the tokenizer's vectors by `with_codebook`; never trained.
        self.codebook = Buffer(jnp.zeros((depth, config.codebook_size, config.code_dim)))

    def head_kernel(self, depth_index: int) -> jax.Array:
        """Returns the output projection [D, V], the same for every depth."""
        del depth_index
        return self.head_out[...][0]

    def _vectors(self, codes: jax.Array) -> jax.Array:
        # [..., C] -> [..., C, E]; level i has its own row of the codebook buffer.
        table = self.codebook[...]
        levels = [table[i][codes[..., i]] for i in range(codes.shape[-1])]
        return jnp.stack(levels, axis=-2)

    def hidden(
        self, codes: jax.Array, class_ids: jax.Array, *, key: jax.Array | None = None
    ) -> list[jax.Array]:
        """Teacher-forced pass; see `DnDTransformer.hidden` for arguments and result."""
        config = self.config
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        vectors = self._vectors(codes)
        start = self.class_embed[...][class_ids][:, None]
        body = jnp.sum(vectors[:, :-1], axis=2) @ self.input_proj[...]
        body = body + self.position_embed[...][: codes.shape[1] - 1]
        x = jnp.concatenate([start, body], axis=1).astype(self.dtype)
        h = self._run(self.layers, config.layers, dropout(x, config.dropout, keys[0]), keys[1])
        # Depth inputs: the body's output, then the running sums of the true codes.
        sums = jnp.cumsum(vectors[:, :, :-1], axis=2) @ self.depth_proj[...]
        v = jnp.concatenate([h[:, :, None], sums.astype(self.dtype)], axis=2)
        v = v + self.depth_embed[...].astype(self.dtype)
        flat = v.reshape(-1, config.depth, config.dim)
        out = self.norm(self._run(self.depth_layers, config.depth_layers, flat, keys[2]))
        out = out.reshape(*codes.shape, config.dim)
        return [out[:, :, i] for i in range(config.depth)]

    def _run(self, layers: Block, count: int, x: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = None if key is None else jax.random.split(key, count)
        attention = partial(attend, causal=True)
        return scan_layers(
            lambda block, h, k: block(h, None, attention, k),
            layers,
            x,
            keys,
            remat=self.config.remat,
        )

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Layers, heads, positions and head size of the body's decode cache."""
        config = self.config
        return config.layers, config.heads, config.cells, config.dim // config.heads

    def unstack(self) -> tuple[list[Block], list[Block]]:
        """Returns body and depth layers one by one."""
        body = [take_layer(self.layers, i) for i in range(self.config.layers)]
        return body, [take_layer(self.depth_layers, i) for i in range(self.config.depth_layers)]

    def step(
        self,
        layers: tuple[Sequence[Block], Sequence[Block]],
        caches: Sequence[Any],
        previous: jax.Array,
        class_ids: jax.Array,
        position: jax.Array,
        choose: Callable[[int, jax.Array], jax.Array],
    ) -> list[Any]:
        """Predicts the codes of one cell; see `DnDTransformer.step`.

        The depth transformer attends over at most C positions, so it keeps its keys and values in
        lists that grow while the C codes are chosen.
        """
        body, depth_layers = layers
        caches = list(caches)
        start = self.class_embed[...][class_ids]
        before = jnp.sum(self._vectors(previous), axis=-2) @ self.input_proj[...]
        before = before + self.position_embed[...][jnp.maximum(position - 1, 0)]
        x = jnp.where(position == 0, start, before).astype(self.dtype)[:, None]
        for number, layer in enumerate(body):

            def attention(
                q: jax.Array, k: jax.Array, v: jax.Array, number: int = number
            ) -> jax.Array:
                out, caches[number] = caches[number].extend(q, k, v, position)
                return out

            x = layer(x, None, attention)

        held: list[list[tuple[jax.Array, jax.Array]]] = [[] for _ in depth_layers]
        total = jnp.zeros((previous.shape[0], self.config.code_dim))
        for i in range(self.config.depth):
            v = x if i == 0 else (total @ self.depth_proj[...]).astype(self.dtype)[:, None]
            v = v + self.depth_embed[...][i].astype(self.dtype)
            for number, layer in enumerate(depth_layers):

                def within(
                    q: jax.Array, k: jax.Array, v: jax.Array, number: int = number
                ) -> jax.Array:
                    held[number].append((k, v))
                    keys, values = (
                        jnp.concatenate(p, axis=1) for p in zip(*held[number], strict=True)
                    )
                    return attend(q, keys, values)

                v = layer(v, None, within)
            code = choose(i, vocabulary_logits(self.norm(v[:, 0]), self.head_kernel(i)))
            total = total + self.codebook[...][i][code]
        return caches
