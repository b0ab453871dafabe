"""Attention: one function, with the implementation chosen by backend and by whether it fits.

`attend` never builds a dense mask: causality is a comparison of positions that the compiler
fuses into the softmax, or a flag of the fused kernel (cuDNN on GPU, Pallas splash on TPU).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.linear import project
from jaxllm.nn.rope import RotaryTable, apply_rotary
from jaxllm.parallel.mesh import target_platform
from jaxllm.parallel.sharding import activation_spec

Implementation = Literal["auto", "xla", "cudnn", "splash"]
AttendFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_SPLASH_BLOCK = 128


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    key_length: jax.Array | int | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
      q: [B, T, N, H] queries.
      k: [B, S, K, H] keys, N a multiple of K; query head n reads key head n // (N/K).
      v: [B, S, K, H] values.
      causal: Query t sees keys up to t + S - T.
      key_length: Only the first `key_length` keys exist, a scalar or [B]; None means all.
      implementation: `auto` takes cuDNN on a GPU in half precision, splash on a TPU when T = S is a
        multiple of 128, XLA otherwise.

    Returns:
      [B, T, N, H] in the dtype of `q`; softmax in float32.

    Raises:
      InputError: If an implementation is asked for by name that cannot compute this mask.
    """
    given = key_length is not None
    chosen = _choose(q, k, causal, given) if implementation == "auto" else implementation
    if not _can(chosen, q, k, causal, given):
        raise InputError(
            f"{chosen} attention cannot take {q.shape[1]} queries, {k.shape[1]} keys, "
            f"causal={causal}, key_length {'given' if given else 'None'}"
        )
    if chosen == "splash":
        return _splash(q, k, v, causal=causal)
    if chosen == "cudnn":
        try:
            return _cudnn(q, k, v, causal=causal, key_length=key_length)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            if implementation == "cudnn":
                raise
            warnings.warn(f"cuDNN attention refused, using XLA: {error}", stacklevel=2)
    return _xla(q, k, v, causal=causal, key_length=key_length)


def _choose(q: jax.Array, k: jax.Array, causal: bool, lengths: bool) -> Implementation:
    """The fused kernel of the platform where the shapes and dtype fit it, else XLA."""
    platform = target_platform()
    if platform == "gpu":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        fits = half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
        return "cudnn" if fits and _can("cudnn", q, k, causal, lengths) else "xla"
    if platform == "tpu" and _can("splash", q, k, causal, lengths):
        return "splash"
    return "xla"


def _can(
    implementation: Implementation, q: jax.Array, k: jax.Array, causal: bool, lengths: bool
) -> bool:
    """Whether an implementation computes this mask at all."""
    square = q.shape[1] == k.shape[1]
    if implementation == "cudnn":  # Its causal mask starts at the first key, not at the last.
        return square or not causal
    if implementation == "splash":
        return square and q.shape[1] % _SPLASH_BLOCK == 0 and not lengths
    return True


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    key_length: jax.Array | int | None,
) -> jax.Array:
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    # Heads before time: both products are then plain batched matrix products.
    q_BKGTH = q.reshape(batch, queries, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum(
        "bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
    ) * (dim**-0.5)
    key_position = jnp.arange(keys)
    if causal:
        query_position = jnp.arange(queries)[:, None] + (keys - queries)
        scores = jnp.where(key_position <= query_position, scores, -jnp.inf)
    if key_length is not None:
        lengths = jnp.broadcast_to(jnp.asarray(key_length), (batch,))
        exists = key_position < lengths[:, None]
        scores = jnp.where(exists[:, None, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    key_length: jax.Array | int | None,
) -> jax.Array:
    lengths = None
    if key_length is not None:
        lengths = jnp.broadcast_to(jnp.asarray(key_length, jnp.int32), (q.shape[0],))
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, interpret: bool = False
) -> jax.Array:
    local = functools.partial(_splash_local, causal=causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v)
    # The compiler cannot partition a kernel: each device runs it on its own examples and heads.
    spec = activation_spec(mesh, k.shape, ("batch", None, "heads", None))
    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _splash_local(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length, heads, dim = q.shape[1:]
    shape = (length, length)
    mask = (
        splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
    )
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask=splash_attention_mask.MultiHeadMask([mask] * heads), interpret=interpret
    )
    groups = heads // k.shape[2]
    expand = functools.partial(jnp.repeat, repeats=groups, axis=2)
    k, v = (expand(x).transpose(0, 2, 1, 3) for x in (k, v))
    scaled = (q * dim**-0.5).transpose(0, 2, 1, 3)
    return jax.vmap(kernel)(scaled, k, v).transpose(0, 2, 1, 3).astype(q.dtype)


class SelfAttention(nnx.Module):
    """Projections around attention: one fused bias-free qkv kernel and an output kernel.

    `qkv` is [D, K, G + 2, H]: for each key/value head its G query heads, its key and its value, so
    that splitting the heads over devices keeps what belongs together on one of them.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *, std: float, rngs: nnx.Rngs
    ):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        shape = (dim, kv_heads, heads // kv_heads + 2, head_dim)
        self.qkv = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.out = nnx.Param(std * jax.random.normal(rngs.params(), (heads, head_dim, dim)))

    def __call__(self, x: jax.Array, rotary: RotaryTable | None, attention: AttendFn) -> jax.Array:
        """Returns the attention output [B, T, D] of `x` [B, T, D].

        Args:
          x: Normalised activations.
          rotary: Table rows of the T positions, or None for no rotation.
          attention: What to do with q [B, T, N, H] and k, v [B, T, K, H]; a decode step passes a
            function that appends to a cache, training passes `attend` with `causal=True`.
        """
        qkv = project(x, self.qkv[...])
        q = qkv[..., :-2, :].reshape(*x.shape[:2], self.heads, self.head_dim)
        k, v = qkv[..., -2, :], qkv[..., -1, :]
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        mixed = attention(q, k, v)
        return project(mixed, self.out[...], inputs=2)
