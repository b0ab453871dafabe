"""The DnD-Transformer: codes of one grid cell are predicted along the depth of the network.

Section 3 of arXiv:2410.01912. A position t of the sequence is one cell of the code grid. After
layer p_i a head predicts the cell's i-th code, and the embedding of that code is added to the
residual stream before the layers that predict code i + 1:

    for layer l in 0 .. L-1:
        h = block_l(h)
        if l == p_i:
            logits_i = W_i RMSNorm_i(h)
            if i < d:  h = h + E[k_(t,i)]        (the `dnd` structure only)

Step 0 reads the class embedding, step t the sum of the embeddings of cell t - 1. The structures the
paper compares with are the same file: `vertical` (same heads, no addition), `parallel` (all heads
on the last layer) and `flat` (one code per step, a sequence d times as long).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.attention import AttentionConfig, attend
from jaxllm.nn.block import Block
from jaxllm.nn.dropout import dropout
from jaxllm.nn.lookup import look_up
from jaxllm.nn.mlp import MlpConfig, swiglu_hidden
from jaxllm.nn.norm import rms_norm
from jaxllm.nn.rope import RotaryTable, grid_coordinates, rotary_table
from jaxllm.nn.stack import Remat, scan_layers, slice_layers, stack_layers, take_layer
from jaxllm.nn.vocabulary import vocabulary_logits

Structure = Literal["dnd", "vertical", "parallel", "flat"]
ClassRotary = Literal["identity", "zero"]
Choose = Callable[[int, jax.Array], jax.Array]

# (layers, heads, dim) of the released registry; the paper trains XXL (1.4B) and XXXL (2.5B).
SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "XXXL": (48, 32, 2048),
}


@dataclass(frozen=True)
class DnDConfig:
    """Shape and structure of a code model; `DnDConfig.of_size("XXL", ...)` for the paper's."""

    codebook_size: int = 16384
    """Codes per depth, V."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the code grid."""
    depth: int = 2
    """Codes per cell, C."""
    num_classes: int = 1000
    """Classes; 1 for unconditional training."""
    layers: int = 12
    heads: int = 12
    dim: int = 768
    kv_heads: int | None = None
    """Key/value heads; None for as many as heads."""
    mlp_hidden: int | None = None
    """SwiGLU width; None for the LLaMA rule."""
    head_layers: tuple[int, ...] | None = None
    """0-indexed layer after which each depth is predicted; None spreads them over the last ones."""
    structure: Structure = "dnd"
    class_dropout: float = 0.1
    """Probability of training on the null class, which guidance needs; 0 leaves its row out."""
    dropout: float = 0.1
    """On the input embeddings and after both halves of each block."""
    per_depth_embedding: bool = False
    """One embedding table per depth (for separate codebooks) instead of one shared table."""
    share_heads: bool = False
    """One output projection for all depths; the norms stay separate."""
    class_rotary: ClassRotary = "identity"
    """`zero` reproduces the released code, where the class token's q and k are the zero vector."""
    rope_base: float = 10000.0
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for name in ("codebook_size", "depth", "num_classes", "layers", "heads", "dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        if min(self.grid) < 1:
            raise InputError(f"grid {self.grid} must have at least one row and one column")
        for name, kind in (("structure", Structure), ("class_rotary", ClassRotary)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {get_args(kind)}")
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise InputError(
                f"dim {self.dim} over {self.heads} heads must give a head size divisible by 4"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise InputError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        for name in ("class_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is outside [0, 1)")
        self.segment_ends()

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> DnDConfig:
        """Returns the released shape named `size` (B, L, XL, XXL, XXXL) with other fields set."""
        if size not in SIZES:
            raise InputError(f"size {size!r} is not one of {', '.join(SIZES)}")
        layers, heads, dim = SIZES[size]
        return cls(layers=layers, heads=heads, dim=dim, **changes)

    def segment_ends(self) -> tuple[int, ...]:
        """Returns the layer after which each depth is predicted, validated.

        Raises:
          InputError: If the list is not strictly increasing, has another length than `depth`, does
            not end at the last layer, or is given for a structure that does not use it.
        """
        last = self.layers - 1
        if self.structure in ("parallel", "flat"):
            if self.head_layers is not None:
                raise InputError(
                    f"head_layers {self.head_layers} has no meaning for structure "
                    f"{self.structure!r}, whose heads all follow the last layer"
                )
            return (last,) * self.depth
        ends = self.head_layers
        if ends is None:
            gap = max(1, self.layers // 16)
            ends = tuple(last - gap * (self.depth - 1 - i) for i in range(self.depth))
        increasing = all(a < b for a, b in zip(ends, ends[1:], strict=False))
        if len(ends) != self.depth or not increasing or ends[0] < 0 or ends[-1] != last:
            raise InputError(
                f"head_layers {ends} must be {self.depth} strictly increasing layers that end at "
                f"the last one, {last}"
            )
        return ends

    @property
    def cells(self) -> int:
        """Grid cells L = rows x columns, the number of sampling steps of all but `flat`."""
        return self.grid[0] * self.grid[1]

    @property
    def sequence_length(self) -> int:
        """Positions the transformer attends over."""
        return self.cells * (self.depth if self.structure == "flat" else 1)

    @property
    def null_class(self) -> int | None:
        """The id that stands for no class, or None when the model has no such row."""
        return self.num_classes if self.class_dropout > 0 else None


class DnDTransformer(nnx.Module):
    """Code model over grids of residual codes; see the file's first lines."""

    def __init__(self, config: DnDConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        dim, depth = config.dim, config.depth
        std = 0.02

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape))

        self.config = config
        self.dtype = dtype
        rows = config.num_classes + (config.class_dropout > 0)
        self.class_embed = normal(rows, dim)
        self.token_embed = normal(
            depth if config.per_depth_embedding else 1, config.codebook_size, dim
        )
        if config.structure == "flat" and depth > 1:
            self.depth_embed = normal(depth, dim)
        self.layers = stack_layers(
            lambda rngs: Block(
                dim,
                AttentionConfig(config.heads, config.kv_heads or config.heads, dim // config.heads),
                MlpConfig(config.mlp_hidden or swiglu_hidden(dim)),
                std=std,
                dropout_rate=config.dropout,
                rngs=rngs,
            ),
            config.layers,
            rngs,
        )
        self.head_norm = nnx.Param(jnp.ones((depth, dim)))
        heads = 1 if config.share_heads else depth
        self.head_out = nnx.Param(jnp.zeros((heads, dim, config.codebook_size)))

    # -- pieces shared by training and decoding ------------------------------------------------

    def head_kernel(self, depth_index: int) -> jax.Array:
        """Returns the output projection [D, V] of one depth."""
        kernels = self.head_out[...]
        return kernels[0 if self.config.share_heads else depth_index]

    def embed(self, depth_index: int, codes: jax.Array) -> jax.Array:
        """Returns the embeddings [..., D] of codes [...] at one depth, in the compute dtype."""
        tables = self.token_embed[...]
        table = tables[depth_index if self.config.per_depth_embedding else 0]
        return look_up(table, codes, self.dtype)

    def embed_cell(self, codes: jax.Array) -> jax.Array:
        """Returns the sum over depth of the embeddings of `codes` [..., C], [..., D]."""
        return sum(self.embed(i, codes[..., i]) for i in range(self.config.depth))  # type: ignore

    def rotary(self) -> RotaryTable:
        """Returns the table [T, H/2] of all positions: the class token, then cells 0, 1, ..."""
        config = self.config
        coordinates = grid_coordinates(*config.grid)
        if config.structure == "flat":
            coordinates = np.repeat(coordinates, config.depth, axis=0)
        # Position (0, 0) is no rotation; the class token shares it with the first cell.
        shifted = np.concatenate([np.zeros((1, 2), int), coordinates[:-1]])
        cos, sin = rotary_table(shifted, config.dim // config.heads, config.rope_base)
        if config.class_rotary == "zero":
            cos = cos.at[0].set(0.0)
        return cos, sin

    # -- training --------------------------------------------------------------------------------

    def hidden(
        self, codes: jax.Array, class_ids: jax.Array, *, key: jax.Array | None = None
    ) -> list[jax.Array]:
        """Teacher-forced pass over both directions at once.

        Args:
          codes: int [B, cells, C] the true codes.
          class_ids: int [B] classes, `config.null_class` for none.
          key: Turns dropout on.

        Returns:
          For each depth i the normalised activation [B, cells, D] that predicts codes[..., i].
        """
        config = self.config
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        x = dropout(self._inputs(codes, class_ids), config.dropout, embed_key)
        keys = None if layer_key is None else jax.random.split(layer_key, config.layers)
        table = self.rotary()
        attention = partial(attend, causal=True)

        def apply(block: Block, h: jax.Array, key: jax.Array | None) -> jax.Array:
            return block(h, table, attention, key)

        def run(h: jax.Array, start: int, stop: int) -> jax.Array:
            part = slice_layers((self.layers, keys), start, stop)
            return scan_layers(apply, part[0], h, part[1], remat=config.remat)

        if config.structure == "flat":
            h = run(x, 0, config.layers).reshape(*codes.shape, config.dim)
            return [self._norm(i, h[:, :, i]) for i in range(config.depth)]
        outputs: list[jax.Array] = []

        def teach(depth_index: int, h: jax.Array) -> jax.Array:
            outputs.append(self._norm(depth_index, h))
            return codes[..., depth_index]

        self._through_depth(x, run, teach)
        return outputs

    def _inputs(self, codes: jax.Array, class_ids: jax.Array) -> jax.Array:
        start = self.class_embed[...][class_ids][:, None].astype(self.dtype)
        if self.config.structure != "flat":
            return jnp.concatenate([start, self.embed_cell(codes[:, :-1])], axis=1)
        depth = self.config.depth
        tokens = jnp.stack([self.embed(i, codes[..., i]) for i in range(depth)], axis=2)
        tokens = tokens.reshape(codes.shape[0], -1, self.config.dim)
        x = jnp.concatenate([start, tokens[:, :-1]], axis=1)
        if depth > 1:  # Which depth comes next is not visible from a shared table.
            x = x + jnp.tile(self.depth_embed[...], (codes.shape[1], 1)).astype(self.dtype)
        return x

    def _norm(self, depth_index: int, h: jax.Array) -> jax.Array:
        return rms_norm(h, self.head_norm[...][depth_index])

    def _through_depth(
        self, h: jax.Array, run: Callable[[jax.Array, int, int], jax.Array], choose: Choose
    ) -> None:
        """The depth direction: `run` the layers up to each head, `choose` the code, inject it."""
        start = 0
        for i, end in enumerate(self.config.segment_ends()):
            if end + 1 > start:
                h = run(h, start, end + 1)
            start = end + 1
            code = choose(i, h)
            if self.config.structure == "dnd" and i + 1 < self.config.depth:
                h = h + self.embed(i, code)

    # -- decoding --------------------------------------------------------------------------------

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Layers, key/value heads, positions and head size a decode cache must hold."""
        config = self.config
        kv_heads = config.kv_heads or config.heads
        return config.layers, kv_heads, config.sequence_length, config.dim // config.heads

    def unstack(self) -> list[Block]:
        """Returns the layers one by one, which decoding wants; do it once, outside the loop."""
        return [take_layer(self.layers, i) for i in range(self.config.layers)]

    def step(
        self,
        layers: Sequence[Block],
        caches: Sequence[Any],
        previous: jax.Array,
        class_ids: jax.Array,
        position: jax.Array,
        choose: Choose,
    ) -> list[Any]:
        """Predicts the codes of cell `position`, one depth after the other.

        Args:
          layers: `unstack()`.
          caches: One per layer; `extend(q, k, v, position)` returns (output, new cache).
          previous: int [B, C] codes of cell `position - 1` (unused at 0).
          class_ids: int [B].
          position: int scalar, the cell.
          choose: Called as `choose(i, logits)` with float32 logits [B, V]; returns codes int [B].

        Returns:
          The caches with this cell's keys and values.
        """
        caches = list(caches)
        table = self.rotary()
        start = self.class_embed[...][class_ids].astype(self.dtype)

        def run_at(index: jax.Array, h: jax.Array, first: int, last: int) -> jax.Array:
            cos, sin = (jax.lax.dynamic_slice_in_dim(part, index, 1) for part in table)
            for number in range(first, last):

                def attention(
                    q: jax.Array, k: jax.Array, v: jax.Array, number: int = number
                ) -> jax.Array:
                    out, caches[number] = caches[number].extend(q, k, v, index)
                    return out

                h = layers[number](h, (cos, sin), attention)
            return h

        def pick(depth_index: int, h: jax.Array) -> jax.Array:
            normal = self._norm(depth_index, h[:, 0])
            logits = vocabulary_logits(normal, self.head_kernel(depth_index))
            return choose(depth_index, logits)[:, None]

        depth = self.config.depth
        if self.config.structure != "flat":
            x = jnp.where(position == 0, start, self.embed_cell(previous))
            self._through_depth(x[:, None], partial(run_at, position), pick)
            return caches
        code = previous[:, -1]
        for i in range(depth):
            x = self.embed((i - 1) % depth, code)
            if i == 0:
                x = jnp.where(position == 0, start, x)
            if depth > 1:
                x = x + self.depth_embed[...][i].astype(self.dtype)
            h = run_at(position * depth + i, x[:, None], 0, self.config.layers)
            code = pick(i, h)[:, 0]
        return caches
