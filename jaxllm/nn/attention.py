"""Attention: one function, with the implementation chosen by backend and by whether it fits.

`attend` never builds a dense mask: causality, windows and segments are comparisons that the
compiler fuses into the softmax, or arguments of the fused kernel (cuDNN on GPU, Pallas splash on
TPU).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.linear import project, some_outputs
from jaxllm.nn.norm import NormConfig, make_norm
from jaxllm.nn.rope import RotaryTable, apply_rotary
from jaxllm.parallel.mesh import target_platform
from jaxllm.parallel.sharding import activation_spec

Implementation = Literal["auto", "xla", "cudnn", "splash"]
AttendFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_SPLASH_BLOCK = 128
_XLA_BLOCK, _XLA_BLOCKS = 128, 4
"""Fewest queries of a block, and the most blocks, of causal attention without a fused kernel."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    key_length: jax.Array | int | None = None,
    segment_ids: jax.Array | None = None,
    branch_ids: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
      q: [B, T, N, H] queries.
      k: [B, S, K, H] keys, N a multiple of K; query head n reads key head n // (N/K).
      v: [B, S, K, H] values.
      causal: Query t sees keys up to t + S - T.
      key_length: Only the first `key_length` keys exist, a scalar or [B]; None means all.
      segment_ids: int [B, T] with T = S; a query sees only keys of its own segment.
      branch_ids: int [B, T] with T = S; a query sees only keys of branch 0 and of its own branch.
      window: Causal only: a query sees its own key and the `window - 1` keys before it.
      soft_cap: Scores s become c tanh(s / c) before the mask (Gemma 2, arXiv:2408.00118).
      implementation: `auto` takes cuDNN on a GPU in half precision, splash on a TPU when T = S is a
        multiple of 128, each where it can express the mask, XLA otherwise.

    Returns:
      [B, T, N, H] in the dtype of `q`; softmax in float32.

    Raises:
      InputError: A window without `causal`, segments of another length than the keys, or an
        implementation asked for by name that cannot compute this mask.
    """
    if window is not None and (window < 1 or not causal):
        raise InputError(f"attention window {window} must be at least 1 and causal, not {causal=}")
    for name, ids in (("segment_ids", segment_ids), ("branch_ids", branch_ids)):
        if ids is not None and not ids.shape == (*q.shape[:2],) == k.shape[:2]:
            raise InputError(
                f"{name} {ids.shape} must be [B, T] of {q.shape[1]} queries and as many keys, not "
                f"{k.shape[1]}"
            )
    if window is not None and window >= k.shape[1]:
        window = None
    mask = _Mask(causal, key_length, segment_ids, window, soft_cap, branch_ids)
    chosen = _choose(q, k, mask) if implementation == "auto" else implementation
    if not _can(chosen, q, k, mask):
        raise InputError(
            f"{chosen} attention cannot take {q.shape[1]} queries, {k.shape[1]} keys, {mask}"
        )
    if chosen == "splash":
        return _splash(
            q, k, v, causal=causal, segment_ids=segment_ids, window=window, soft_cap=soft_cap
        )
    if chosen == "cudnn":
        try:
            return _cudnn(q, k, v, causal=causal, key_length=key_length, window=window)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            if implementation == "cudnn":
                raise
            warnings.warn(f"cuDNN attention refused, using XLA: {error}", stacklevel=2)
    return _xla(q, k, v, mask)


class _Mask(NamedTuple):
    """What happens to the scores between the two products; the arguments of `attend`."""

    causal: bool
    key_length: jax.Array | int | None
    segment_ids: jax.Array | None
    window: int | None
    soft_cap: float | None
    branch_ids: jax.Array | None = None

    def __str__(self) -> str:
        arrays = (
            ("key_length", self.key_length),
            ("segment_ids", self.segment_ids),
            ("branch_ids", self.branch_ids),
        )
        given = ", ".join(f"{name} {'None' if x is None else 'given'}" for name, x in arrays)
        return f"causal={self.causal}, window={self.window}, soft_cap={self.soft_cap}, {given}"


def _choose(q: jax.Array, k: jax.Array, mask: _Mask) -> Implementation:
    """The fused kernel of the platform where the shapes and dtype fit it, else XLA."""
    platform = target_platform()
    if platform == "gpu":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        fits = half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
        return "cudnn" if fits and _can("cudnn", q, k, mask) else "xla"
    if platform == "tpu" and _can("splash", q, k, mask):
        return "splash"
    return "xla"


def _can(implementation: Implementation, q: jax.Array, k: jax.Array, mask: _Mask) -> bool:
    """Whether an implementation computes this mask at all."""
    if mask.branch_ids is not None:
        return implementation == "xla"
    square = q.shape[1] == k.shape[1]
    if implementation == "cudnn":
        if mask.segment_ids is not None or mask.soft_cap is not None:
            return False
        if mask.window is not None and mask.key_length is not None:
            return False
        return square or not mask.causal  # Its causal mask starts at the first key, not the last.
    if implementation == "splash":
        return square and q.shape[1] % _SPLASH_BLOCK == 0 and mask.key_length is None
    return True


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: _Mask) -> jax.Array:
    """Each query's scores at once, for one block of queries after the other.

    A causal block takes only keys that one of its queries sees: four blocks form 5/8 of the scores.
    """
    queries, keys = q.shape[1], k.shape[1]
    cuts = [(slice(0, queries), slice(0, keys))]
    if mask.causal:
        cuts = causal_blocks(queries, keys, mask.window)
    blocks = []
    parts = jax.lax.split(q, [mine.stop - mine.start for mine, _ in cuts], axis=1)
    for part, (mine, seen) in zip(parts, cuts, strict=True):
        block = _Block(part, k[:, seen], v[:, seen], mine.start, seen.start, keys - queries)
        blocks.append(_xla_block(block, mask))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def causal_blocks(queries: int, keys: int, window: int | None) -> list[tuple[slice, slice]]:
    """Cuts causal attention into at most four blocks: queries, and the keys that they may see.

    Args:
      queries: T; the last query stands with the last key.
      keys: S.
      window: Keys that a query sees, itself included; None for all before it.
    """
    ahead = keys - queries  # Query t and key t + ahead are at one position.
    size = max(_XLA_BLOCK, -(-queries // _XLA_BLOCKS))
    cuts = []
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        first = 0 if window is None else max(start + ahead - window + 1, 0)
        cuts.append((slice(start, stop), slice(first, max(stop + ahead, 1))))
    return cuts


class _Block(NamedTuple):
    """Neighbouring queries and keys, and the places of the first of each among all."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    first_query: int
    first_key: int
    ahead: int


def _xla_block(block: _Block, mask: _Mask) -> jax.Array:
    q, k, v = block[:3]
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    # Heads before time: both products are then plain batched matrix products.
    q_BKRH = q.reshape(batch, queries, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    q_BKRH = q_BKRH.reshape(batch, kv_heads, -1, dim)
    k_BKSH, v_BKSH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, -1, queries, keys) * (dim**-0.5)
    if mask.soft_cap is not None:
        scores = mask.soft_cap * jnp.tanh(scores / mask.soft_cap)
    scores = _masked(scores, block, mask)
    # Divided by their sum after the product, where they are fewer; the largest is 1 before.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, -1, keys)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, v_BKSH, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, -1, queries, dim) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim).astype(q.dtype)


def _masked(scores: jax.Array, block: _Block, mask: _Mask) -> jax.Array:
    """Returns scores [B, K, G, T, S], minus infinity where a query does not see a key."""
    queries, keys = scores.shape[-2:]
    key_position = block.first_key + jnp.arange(keys)

    def pair(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The ids of the block's queries [B, T, 1] and keys [B, 1, S]."""
        of_queries = ids[:, block.first_query : block.first_query + queries]
        return of_queries[:, :, None], ids[:, None, block.first_key : block.first_key + keys]

    if mask.causal:
        query_position = block.first_query + block.ahead + jnp.arange(queries)[:, None]
        seen = key_position <= query_position
        if mask.window is not None:
            seen &= query_position - key_position < mask.window
        scores = jnp.where(seen, scores, -jnp.inf)
    if mask.key_length is not None:
        lengths = jnp.broadcast_to(jnp.asarray(mask.key_length), (len(scores),))
        exists = key_position < lengths[:, None]
        scores = jnp.where(exists[:, None, None, None, :], scores, -jnp.inf)
    if mask.segment_ids is not None:
        of_queries, of_keys = pair(mask.segment_ids)
        scores = jnp.where((of_queries == of_keys)[:, None, None], scores, -jnp.inf)
    if mask.branch_ids is not None:
        of_queries, of_keys = pair(mask.branch_ids)
        visible = (of_keys == 0) | (of_keys == of_queries)
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    return scores


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    key_length: jax.Array | int | None,
    window: int | None,
) -> jax.Array:
    lengths = None
    if key_length is not None:
        lengths = jnp.broadcast_to(jnp.asarray(key_length, jnp.int32), (q.shape[0],))
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    local = functools.partial(
        _splash_local, causal=causal, window=window, soft_cap=soft_cap, interpret=interpret
    )
    args = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*args)
    # The compiler cannot partition a kernel: each device runs it on its own examples and heads.
    spec = activation_spec(mesh, k.shape, ("batch", None, "heads", None))
    specs = (spec,) * 3 + (jax.sharding.PartitionSpec(spec[0]),) * (len(args) - 3)
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(*args)


def _splash_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length, heads, dim = q.shape[1:]
    shape = (length, length)
    mask: splash_attention_mask.Mask = splash_attention_mask.FullMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    elif causal:
        mask = splash_attention_mask.CausalMask(shape)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask=splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=_splash_blocks(length),
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
    groups = heads // k.shape[2]
    expand = functools.partial(jnp.repeat, repeats=groups, axis=2)
    k, v = (expand(x).transpose(0, 2, 1, 3) for x in (k, v))
    scaled = (q * dim**-0.5).transpose(0, 2, 1, 3)
    if segment_ids is None:
        out = jax.vmap(kernel)(scaled, k, v)
    else:
        both = splash_attention_kernel.SegmentIds(q=segment_ids, kv=segment_ids)
        out = jax.vmap(kernel)(scaled, k, v, both)
    return out.transpose(0, 2, 1, 3).astype(q.dtype)


def _splash_blocks(length: int) -> Any:
    """Blocks of 512 queries and keys, fewer where they do not divide the length.

    The kernel's default is 128; 512 is MaxText's (from memory). Which is faster was not measured.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    block = next(size for size in (512, 256, _SPLASH_BLOCK) if length % size == 0)
    names = (
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
        "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
    )  # fmt: skip
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    return splash_attention_kernel.BlockSizes(**sizes)


@dataclass(frozen=True)
class AttentionConfig:
    """Heads of an attention layer and what its projections carry."""

    heads: int
    """Query heads, N."""
    kv_heads: int
    """Key/value heads, K."""
    head_dim: int
    """Dims of one head, H."""
    bias: bool = False
    """Biases of queries, keys and values."""
    out_bias: bool = False
    """Bias of the output projection."""
    qk_norm: bool = False
    """Normalise each query and key over H before the rotation, as Qwen3 does."""
    scale: float | None = None
    """Factor of the scores; None for 1/sqrt(H)."""
    soft_cap: float | None = None
    """`attend`'s; the layer leaves it to the function that it is given."""

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        for name in ("scale", "soft_cap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"attention {name} {getattr(self, name)} must be positive")


class SelfAttention(nnx.Module):
    """Projections around attention: one fused qkv kernel and an output kernel.

    `qkv` is [D, K, G + 2, H]: for each key/value head its G query heads, its key and its value, so
    that splitting the heads over devices keeps what belongs together on one of them.
    """

    def __init__(
        self,
        dim: int,
        config: AttentionConfig,
        norm: NormConfig | None = None,
        *,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.config = config
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
        shape = (dim, kv_heads, heads // kv_heads + 2, head_dim)
        self.qkv = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.out = nnx.Param(std * jax.random.normal(rngs.params(), (heads, head_dim, dim)))
        if config.bias:
            self.qkv_bias = nnx.Param(jnp.zeros(shape[1:]))
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros((dim,)))
        if config.qk_norm:
            self.q_norm, self.k_norm = (make_norm(head_dim, norm or NormConfig()) for _ in "qk")

    def __call__(
        self,
        x: jax.Array,
        rotary: RotaryTable | None,
        attention: AttendFn,
        *,
        last: int | None = None,
    ) -> jax.Array:
        """Returns the attention output [B, T, D] of `x` [B, T, D], or its `last` [B, last, D].

        Args:
          x: Normalised activations.
          rotary: Table rows of the T positions, or None for no rotation.
          attention: What to do with q [B, T, N, H] and k, v [B, T, K, H], scaling by 1/sqrt(H); a
            decode step passes a function that appends to a cache, training passes `attend` with
            `causal=True`.
          last: Queries, and so outputs, are those of the last positions only; None for all.
        """
        config = self.config
        q, k, v = self._projected(x, last)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            cos, sin = (part[..., -q.shape[1] :, :] for part in rotary)
            q, k = apply_rotary(q, (cos, sin)), apply_rotary(k, rotary)
        if config.scale is not None:
            q = q * (config.scale * config.head_dim**0.5)
        y = project(attention(q, k, v), self.out, inputs=2)
        return y + self.out_bias[...].astype(x.dtype) if config.out_bias else y

    def _projected(self, x: jax.Array, last: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns q [B, last or T, N, H] and k, v [B, T, K, H] before norms and rotation."""
        config = self.config
        groups = config.heads // config.kv_heads

        def columns(x: jax.Array, first: int, count: int) -> jax.Array:
            y = project(x, some_outputs(self.qkv, 1, first, count))
            if config.bias:
                y = y + self.qkv_bias[...][:, first : first + count].astype(x.dtype)
            return y

        if last is None or last == x.shape[1]:
            q, k, v = jax.lax.split(columns(x, 0, groups + 2), (groups, 1, 1), axis=3)
        else:
            q = columns(x[:, -last:], 0, groups)
            k, v = jax.lax.split(columns(x, groups, 2), (1, 1), axis=3)
        return q.reshape(*q.shape[:2], config.heads, -1), k[..., 0, :], v[..., 0, :]
