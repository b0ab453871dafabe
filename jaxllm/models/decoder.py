"""Decoder-only language models: one architecture whose config spans the common families.

    x = E[token] (+ P[position])
    for each layer:  x = block(x)        pre-norm attention and MLP, see `nn/block.py`
    logits = norm(x) W                   W = E^T when embeddings are tied

Llama 2 and 3 (arXiv:2307.09288, 2407.21783), Mistral (2310.06825), Qwen2 and Qwen3 (2407.10671,
2505.09388), GPT-2, GPT-NeoX and Pythia (2204.06745, 2304.01373) and Gemma 2 (2408.00118) are
configs of it; `hub/hf_config.py` says which. Rotary pairs are interleaved here, whatever a
family's files do.

Positions are absolute. In `hidden` they count up by one within a segment; -1 marks padding. Without
them they are 0, 1, ... from the start of each segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.attention import AttendFn, AttentionConfig, attend
from jaxllm.nn.block import Block
from jaxllm.nn.dropout import dropout
from jaxllm.nn.linear import Kernels, outputs_first
from jaxllm.nn.lookup import look_up
from jaxllm.nn.lora import adapt_layer
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.module import Blueprint
from jaxllm.nn.norm import NormConfig, make_norm
from jaxllm.nn.rope import RopeConfig, RotaryTable, rotary_frequencies, rotary_rows
from jaxllm.nn.stack import Remat, scan_layers, slice_layers, stack_layers, take_layer
from jaxllm.nn.vocabulary import token_log_probs, vocabulary_logits, weighted_nll
from jaxllm.parallel.mesh import target_platform
from jaxllm.parallel.sharding import constrain

Windows = tuple[int | None, ...]
_OUTPUTS_FIRST_FROM = 512
"""Model width; 288 decodes up to 13% slower with outputs first, 768 17 to 35% faster (2 cores)."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and structure of a decoder language model."""

    vocab_size: int
    """Token ids, V."""
    dim: int
    """Model width, D."""
    layers: int
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = field(default_factory=NormConfig)
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    """Rotary positions; None for none."""
    max_positions: int = 2048
    """Context the model is trained for: rows of the learned table, a statement otherwise."""
    learned_positions: bool = False
    """Add a trained vector per position to the embeddings."""
    windows: Windows = (None,)
    """Keys that a query of each layer sees, itself included, cycled over the layers; None: all."""
    parallel_residual: bool = False
    """Attention and MLP of a layer read the same activations."""
    post_norms: bool = False
    """Also normalise what attention and MLP add."""
    tie_embeddings: bool = False
    """The output projection is the transposed embedding table."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(D)."""
    logit_soft_cap: float | None = None
    """Logits l become c tanh(l / c)."""
    dropout: float = 0.0
    """On the embeddings and after both halves of each block, when a key is given."""
    init_std: float = 0.02
    """Standard deviation of fresh weights."""
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "max_positions"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise InputError(f"windows {self.windows} must be one or more of None or at least 1")
        if len(self.windows) > self.layers:
            raise InputError(f"{len(self.windows)} windows are more than {self.layers} layers")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout {self.dropout} is outside [0, 1)")
        if self.logit_soft_cap is not None and not self.logit_soft_cap > 0:
            raise InputError(f"logit_soft_cap {self.logit_soft_cap} must be positive")
        if self.rope is not None:
            self.rope.dims(self.attention.head_dim)

    @property
    def layer_windows(self) -> Windows:
        """The window of each of the L layers, for whoever makes their caches."""
        return tuple(self.windows[i % len(self.windows)] for i in range(self.layers))


class DecodingLayers(NamedTuple):
    """What the decode loop reads at every token, stored as the platform reads it fastest.

    Attributes:
      blocks: The layers one by one.
      head: Output projection [V, D], or None for the model's own.
    """

    blocks: list[Block]
    head: jax.Array | None


class Decoder(nnx.Module):
    """Decoder language model; see the file's first lines."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        std = config.init_std

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape))

        self.config, self.dtype = config, dtype
        self.embed = normal(config.vocab_size, config.dim)
        if config.learned_positions:
            self.position_embed = normal(config.max_positions, config.dim)
        self.layers = stack_layers(
            lambda rngs: Block(
                config.dim,
                config.attention,
                config.mlp,
                config.norm,
                parallel=config.parallel_residual,
                post_norms=config.post_norms,
                std=std,
                dropout_rate=config.dropout,
                rngs=rngs,
            ),
            config.layers,
            rngs,
        )
        self.norm = make_norm(config.dim, config.norm)
        if not config.tie_embeddings:
            self.head = normal(config.dim, config.vocab_size)

    # -- training --------------------------------------------------------------------------------

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        branch_ids: jax.Array | None = None,
        adapters: tuple[Any, float] | None = None,
    ) -> jax.Array:
        """Final normalised activations of whole sequences; the one at t predicts token t + 1.

        Args:
          tokens: int [B, T]; any id where there is padding.
          positions: int [B, T], -1 for padding. Needed for left padding only: padding on the right
            is never seen by what comes before it, and without `positions` the fused kernels apply.
          segment_ids: int [B, T], packed sequences; a token sees only its own segment, which is
            one run of equal ids.
          key: Turns dropout on.
          branch_ids: int [B, T], continuations of one prompt in one segment: a token sees the
            branch 0 of its segment and its own branch. Needs `positions`.
          adapters: Low-rank changes of kernels under `layers`, and their scale; see `nn/lora.py`.

        Returns:
          [B, T, D] in the compute dtype; meaningless at padding.

        Raises:
          InputError: More tokens than learned positions, or branches with a window that is shorter
            than the rows.
        """
        config = self.config
        length = tokens.shape[1]
        if config.learned_positions and length > config.max_positions:
            raise InputError(f"{length} tokens are more than max_positions {config.max_positions}")
        if branch_ids is not None:
            _check_branches(config, length, positions)
        if positions is None:
            positions = _positions(length, segment_ids)
        else:
            padding = positions < 0
            segment_ids = jnp.where(padding, -1, 0 if segment_ids is None else segment_ids)
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        x = dropout(self._embed(tokens, positions), config.dropout, embed_key)
        keys = None if layer_key is None else jax.random.split(layer_key, config.layers)
        table = self._rotary(positions)

        def attention(window: int | None) -> AttendFn:
            return partial(
                attend,
                causal=True,
                segment_ids=segment_ids,
                branch_ids=branch_ids,
                window=window,
                soft_cap=config.attention.soft_cap,
            )

        small, scale = (None, 1.0) if adapters is None else (adapters[0]["layers"], adapters[1])
        for start, stop, windows in _groups(config.layer_windows):
            period = len(windows)

            def apply(
                blocks: Block, h: jax.Array, others: Any, windows: Windows = windows
            ) -> jax.Array:
                for i, window in enumerate(windows):
                    block, (key, change) = take_layer((blocks, others), i)
                    block = block if change is None else adapt_layer(block, change, scale)
                    h = block(h, table, attention(window), key)
                return h

            part = slice_layers((self.layers, (keys, small)), start, stop)
            folded = jax.tree.map(
                lambda leaf, period=period: leaf.reshape(-1, period, *leaf.shape[1:]), part
            )
            x = scan_layers(apply, folded[0], x, folded[1], remat=config.remat)
        return self.norm(x)

    def head_kernel(self) -> jax.Array:
        """Returns the output projection [D, V]."""
        return self.embed[...].T if self.config.tie_embeddings else self.head[...]

    def logits(self, hidden: jax.Array, head: jax.Array | None = None) -> jax.Array:
        """Returns float32 logits [..., V] of activations [..., D]; for few tokens at a time.

        Args:
          hidden: From `hidden` or `step`.
          head: That of `decoding_layers()`, if there is one.
        """
        soft_cap = self.config.logit_soft_cap
        if head is None and self.config.tie_embeddings:
            head = self.embed[...]
        if head is not None:
            return vocabulary_logits(hidden, head, soft_cap, outputs_first=True)
        return vocabulary_logits(hidden, self.head[...], soft_cap)

    def token_logprobs(
        self,
        hidden: jax.Array,
        targets: jax.Array,
        *,
        chunk: int = 1024,
        with_accuracy: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Returns log p(target), float32 [B, T], without ever holding [B, T, V].

        Args:
          hidden: [B, T, D] from `hidden` or `step`.
          targets: int [B, T], the token after each position; see `nn.vocabulary.token_log_probs`
            for ids out of range, `chunk` and `with_accuracy`.
          chunk: Tokens whose logits exist at the same time.
          with_accuracy: Also return whether each target is the most likely token, bool [B, T].
        """
        return token_log_probs(
            hidden,
            self.head_kernel(),
            targets,
            soft_cap=self.config.logit_soft_cap,
            chunk=chunk,
            with_accuracy=with_accuracy,
        )

    def weighted_nll(
        self, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *, chunk: int = 1024
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the sum of weights times negative log-likelihoods, and which targets lead.

        Args:
          hidden: [B, T, D] from `hidden`.
          targets: int [B, T].
          weights: float32 [B, T].
          chunk: Tokens whose logits exist at the same time; see `nn.vocabulary.weighted_nll`.
        """
        return weighted_nll(
            hidden,
            self.head_kernel(),
            targets,
            weights,
            soft_cap=self.config.logit_soft_cap,
            chunk=chunk,
        )

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        # With learned positions the sum is what is rounded.
        rounded = None if self.config.learned_positions else self.dtype
        x = look_up(self.embed[...], tokens, rounded)
        if self.config.scale_embeddings:
            # Rounded to the compute dtype first, as the released model was trained.
            x = x.astype(self.dtype) * jnp.asarray(self.config.dim**0.5, self.dtype)
        if self.config.learned_positions:
            x = x + self.position_embed[...][jnp.maximum(positions, 0)]
        x = x.astype(self.dtype)
        return constrain(x, "batch", None, None)

    def _rotary(self, positions: jax.Array) -> RotaryTable | None:
        config = self.config
        if config.rope is None:
            return None
        frequencies = rotary_frequencies(config.rope, config.attention.head_dim)
        return rotary_rows(positions, frequencies)

    # -- decoding --------------------------------------------------------------------------------

    def unstack(self) -> list[Block]:
        """Returns the layers one by one."""
        return [take_layer(self.layers, i) for i in range(self.config.layers)]

    def decoding_layers(self) -> DecodingLayers:
        """Returns the layers for a decode loop; made once, outside it.

        On a CPU the kernels of a wide model are copied with their outputs first; see
        `nn/linear.py`.
        """
        blocks = self.unstack()
        if target_platform() != "cpu" or self.config.dim < _OUTPUTS_FIRST_FROM:
            return DecodingLayers(blocks, None)
        turned = [outputs_first(block, DECODER_KERNELS, "layers") for block in blocks]
        return DecodingLayers(turned, None if self.config.tie_embeddings else self.head[...].T)

    def step(
        self,
        layers: Sequence[Block],
        caches: Sequence[Any],
        tokens: jax.Array,
        positions: jax.Array,
        *,
        outputs: int | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """Appends tokens to caches: the prompt at once (prefill), then one after the other.

        Args:
          layers: `unstack()`, or the blocks of `decoding_layers()`.
          caches: One per layer, made for its window (`config.layer_windows`) and soft cap
            (`config.attention.soft_cap`). `extend(q, k, v, positions)` takes q [B, T, N, H] and
            k, v [B, T, K, H], already rotated and scaled but for 1/sqrt(H), and returns the
            attention output [B, T, N, H] and the new cache. With `outputs` the last layer's takes
            fewer queries, and `least_queries(T)` says how many it wants; see
            `decoding/text_cache.py`.
          tokens: int [B, T].
          positions: int32 [B, T] absolute positions, -1 for padding on the left.
          outputs: Only these last positions are wanted, so that the last layer computes nothing
            but keys and values before them; None for all.

        Returns:
          The final normalised activations [B, T or outputs, D] and the new caches.
        """
        caches = list(caches)
        x, table = self._embed(tokens, positions), self._rotary(positions)
        for number, layer in enumerate(layers):

            def attention(
                q: jax.Array, k: jax.Array, v: jax.Array, number: int = number
            ) -> jax.Array:
                out, caches[number] = caches[number].extend(q, k, v, positions)
                return out

            last = None
            if outputs is not None and number == len(layers) - 1:
                count = tokens.shape[1]
                last = min(max(outputs, caches[number].least_queries(count)), count)
            x = layer(x, table, attention, last=last)
        return self.norm(x if outputs is None else x[:, -outputs:]), caches


def decoder(config: DecoderConfig, dtype: Any = jnp.float32) -> Blueprint[Decoder]:
    """Returns the blueprint of the model that `config` describes, computing in `dtype`."""
    return Blueprint(lambda rngs: Decoder(config, rngs=rngs, dtype=dtype))


def _positions(length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Returns 0, 1, ... from the start of each segment: int32 [T], or [B, T] with segments."""
    index = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        return index
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _check_branches(config: DecoderConfig, length: int, positions: jax.Array | None) -> None:
    if positions is None:
        raise InputError("branches of a prompt need positions")
    # A window counts keys of the row, of which some belong to other branches.
    short = [w for w in config.layer_windows if w is not None and w < length]
    if short:
        raise InputError(
            f"branches of a prompt in rows of {length} tokens: the model's window of {short[0]} is "
            "shorter; use another layout of rows"
        )


def _groups(windows: Windows) -> list[tuple[int, int, Windows]]:
    """Splits the layers into (start, stop, windows of one period), each scanned by itself.

    Kernels want their window when they are compiled, so a scan runs over whole periods: all layers
    if their windows repeat, else one scan for each run of equal windows.
    """
    layers = len(windows)
    for period in range(1, layers // 2 + 1):
        if layers % period == 0 and windows == windows[:period] * (layers // period):
            return [(0, layers, windows[:period])]
    groups: list[tuple[int, int, Windows]] = []
    start = 0
    for window, run in groupby(windows):
        stop = start + len(list(run))
        groups.append((start, stop, (window,)))
        start = stop
    return groups


# Path regex -> logical axes. Everything under `layers` is stacked.
DECODER_RULES = (
    (r"^layers/attn/qkv$", ("layers", "embed", "heads", None, None)),
    (r"^layers/attn/qkv_bias$", ("layers", "heads", None, None)),
    (r"^layers/attn/out$", ("layers", "heads", None, "embed")),
    (r"^layers/mlp/(gate|up)$", ("layers", "embed", "mlp")),
    (r"^layers/mlp/(gate|up)_bias$", ("layers", "mlp")),
    (r"^layers/mlp/down$", ("layers", "mlp", "embed")),
    (r"^layers/(attn/out|mlp/down)_bias$", ("layers", None)),
    (r"^layers/(attn|mlp)(_post)?_norm/(scale|bias)$", ("layers", None)),
    (r"^layers/attn/(q|k)_norm/scale$", ("layers", None)),
    (r"^embed$", ("vocab", "embed")),
    (r"^position_embed$", (None, "embed")),
    (r"^norm/(scale|bias)$", (None,)),
    (r"^head$", ("embed", "vocab")),
)

# Path regex -> (stack axes, input axes) of the kernels that adapters can change.
DECODER_KERNELS: Kernels = (
    (r"^layers/attn/out$", 1, 2),
    (r"^layers/attn/qkv$", 1, 1),
    (r"^layers/mlp/(gate|up|down)$", 1, 1),
)
