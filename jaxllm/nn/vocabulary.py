"""Log-probabilities over a vocabulary without ever holding [B, T, V].

Shared by pre-training, code models, preference losses and verifiers: all of them need only the
log-probability of given tokens, so logits are formed for one chunk of tokens at a time and formed
again in the backward pass. A loss that is a weighted sum of them needs no second forming: its
gradient is known as soon as the logits are (`weighted_nll`).

On a mesh each device goes through its own tokens. The output projection is gathered once for all
chunks, its gradient is added up in place and leaves the device once; left to itself the compiler
moves both over the links in every chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxllm.nn.linear import rows_times
from jaxllm.parallel.mesh import target_platform
from jaxllm.parallel.sharding import AXES, constrain

Tree = Any


def vocabulary_logits(
    hidden: jax.Array,
    kernel: jax.Array,
    soft_cap: float | None = None,
    *,
    outputs_first: bool = False,
) -> jax.Array:
    """Returns logits float32 [..., V] of `hidden` [..., D] and `kernel` [D, V].

    The product runs in the dtype of `hidden` and is accumulated and kept in float32: rounding
    logits to bfloat16 would move a log-probability by up to 0.03 at a logit of 8. With `soft_cap` c
    they are c tanh(logits / c) (Gemma 2, arXiv:2408.00118). With `outputs_first` the kernel is
    [V, D].
    """
    kernel = kernel.astype(hidden.dtype)
    if outputs_first:
        flat = rows_times(hidden.reshape(-1, hidden.shape[-1]), kernel, jnp.float32)
        logits = flat.reshape(*hidden.shape[:-1], -1)
    else:
        logits = jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def token_log_probs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    soft_cap: float | None = None,
    chunk: int = 1024,
    with_accuracy: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Returns log p(target) of each token, float32 with the shape of `targets`.

    Args:
      hidden: [..., D] final activations, any compute dtype.
      kernel: [D, V] output projection.
      targets: int [...] token ids; ids outside [0, V) give the log-probability of a clamped id,
        so callers mask them.
      soft_cap: As in `vocabulary_logits`.
      chunk: Tokens whose logits exist at the same time, on each device where the mesh splits rows.
      with_accuracy: Also return whether each target is the most likely token, bool [...].
    """
    axes = _row_axes(targets)
    split = _splits_inputs(kernel, axes)
    scored = partial(_log_probs, soft_cap, chunk, axes, split)
    if axes:
        rows = P(axes)
        scored = jax.shard_map(
            scored,
            in_specs=(rows, P("fsdp" if split else None), rows),
            out_specs=(rows, rows),
            axis_names=set(axes),
            check_vma=False,
        )
    log_probs, correct = scored(hidden, kernel, targets)
    return (log_probs, jax.lax.stop_gradient(correct)) if with_accuracy else log_probs


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _log_probs(
    soft_cap: float | None,
    chunk: int,
    axes: tuple[str, ...],
    split: bool,
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and accuracy of one device's rows; its part of `kernel` [D / fsdp, V].

    Without `axes`, of all rows.
    """
    return _log_probs_fwd(soft_cap, chunk, axes, split, hidden, kernel, targets)[0]


def _log_probs_fwd(
    soft_cap: float | None,
    chunk: int,
    axes: tuple[str, ...],
    split: bool,
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    whole = _gathered(kernel, hidden.dtype, split)

    def one_chunk(h: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        return _scored(vocabulary_logits(h, whole, soft_cap), ids)

    flat = hidden.reshape(-1, hidden.shape[-1])
    log_probs, correct, lse = _by_chunks(one_chunk, chunk, flat, targets.reshape(-1))
    out = log_probs.reshape(targets.shape), correct.reshape(targets.shape)
    return out, (hidden, kernel, targets, lse)


def _log_probs_bwd(
    soft_cap: float | None,
    chunk: int,
    axes: tuple[str, ...],
    split: bool,
    kept: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
    hidden, kernel, targets, lse = kept
    whole = _gathered(kernel, hidden.dtype, split)

    def one_chunk(
        total: jax.Array, h: jax.Array, ids: jax.Array, by_log_prob: jax.Array, lse: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits = vocabulary_logits(h, whole, soft_cap)
        by_hidden, by_kernel = _gradients(logits, h, whole, ids, by_log_prob, lse, soft_cap)
        return constrain(total + by_kernel, None, "vocab"), by_hidden

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), cotangents[0].reshape(-1), lse
    nothing = constrain(jnp.zeros(whole.shape, jnp.float32), None, "vocab")
    total, by_hidden = _through_chunks(one_chunk, nothing, chunk, *flat)
    if split:
        total = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=0, tiled=True)
    # Over axes along which the projection is not split, `shard_map` adds up its gradient itself.
    return by_hidden.reshape(hidden.shape), total.astype(kernel.dtype), None


_log_probs.defvjp(_log_probs_fwd, _log_probs_bwd)


def _gradients(
    logits: jax.Array,
    hidden: jax.Array,
    kernel: jax.Array,
    ids: jax.Array,
    by_log_prob: jax.Array,
    lse: jax.Array,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of sum_i by_log_prob_i log p(id_i) by hidden [t, D] and kernel [D, V].

    By logits it is by_log_prob_i (onehot(id_i) - p).
    """
    is_target = jnp.arange(logits.shape[-1]) == _inside(ids, logits)[:, None]
    by_logits = by_log_prob[:, None] * (is_target - jnp.exp(logits - lse[:, None]))
    if soft_cap is not None:
        by_logits *= 1.0 - (logits / soft_cap) ** 2
    by_logits = by_logits.astype(hidden.dtype)
    by_hidden = jnp.einsum("tv,dv->td", by_logits, kernel)
    turned = hidden.T
    if target_platform() == "cpu":
        # The backend's library of products, its fastest, takes [D, t] [t, V] only. Without the
        # barrier the compiler makes the transposition a part of the product.
        turned = jax.lax.optimization_barrier(turned)
    return by_hidden, jnp.dot(turned, by_logits, preferred_element_type=jnp.float32)


def most_likely(logits: jax.Array) -> jax.Array:
    """Returns the first of the largest of `logits` [..., V], int32 [...].

    Two plain reductions, which the CPU backend vectorises; it does not for `argmax`.
    """
    size = logits.shape[-1]
    ids = jnp.arange(size, dtype=jnp.int32)
    highest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(highest, ids, size - 1), axis=-1)


def weighted_nll(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    soft_cap: float | None = None,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Returns sum_i weights_i (-log p(target_i)), and whether each target is the most likely token.

    The gradient by logits, w_i (p - onehot(target_i)), depends on nothing that comes later. When it
    is asked for, each chunk's is formed and multiplied out while its logits exist, so that they are
    formed once, where `token_log_probs` forms them twice. Where a mesh splits the rows it is
    `token_log_probs` that runs.

    Args:
      hidden: [..., D] final activations, any compute dtype.
      kernel: [D, V] output projection.
      targets: int [...] token ids, as in `token_log_probs`.
      weights: float32 [...].
      soft_cap: As in `vocabulary_logits`.
      chunk: Tokens whose logits exist at the same time.

    Returns:
      float32 scalar in nats times weight, and bool [...].
    """
    if _row_axes(targets):
        log_probs, correct = token_log_probs(
            hidden, kernel, targets, soft_cap=soft_cap, chunk=chunk, with_accuracy=True
        )
        return -jnp.sum(weights * log_probs), correct
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, correct = _weighted_nll(
        flat, kernel, targets.reshape(-1), weights.reshape(-1), soft_cap, chunk
    )
    return loss, correct.reshape(targets.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted_nll(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    soft_cap: float | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    log_probs, correct = token_log_probs(
        hidden, kernel, targets, soft_cap=soft_cap, chunk=chunk, with_accuracy=True
    )
    return -jnp.sum(weights * log_probs), correct


def _weighted_nll_fwd(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    soft_cap: float | None,
    chunk: int,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    cast = kernel.astype(hidden.dtype)

    def one_chunk(
        total: jax.Array, h: jax.Array, ids: jax.Array, share: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        logits = vocabulary_logits(h, cast, soft_cap)
        log_probs, correct, lse = _scored(logits, ids)
        by_hidden, by_kernel = _gradients(logits, h, cast, ids, -share, lse, soft_cap)
        return total + by_kernel, (log_probs, correct, by_hidden)

    zeros = jnp.zeros(kernel.shape, jnp.float32)
    by_kernel, found = _through_chunks(one_chunk, zeros, chunk, hidden, targets, weights)
    log_probs, correct, by_hidden = found
    loss = -jnp.sum(weights * log_probs)
    return (loss, correct), (by_hidden, by_kernel.astype(kernel.dtype), log_probs)


def _weighted_nll_bwd(
    soft_cap: float | None, chunk: int, kept: tuple[jax.Array, ...], cotangents: Any
) -> tuple[jax.Array | None, ...]:
    del soft_cap, chunk
    by_hidden, by_kernel, log_probs = kept
    scale = cotangents[0]
    return (
        scale.astype(by_hidden.dtype) * by_hidden,
        scale.astype(by_kernel.dtype) * by_kernel,
        None,
        -scale * log_probs,
    )


_weighted_nll.defvjp(_weighted_nll_fwd, _weighted_nll_bwd)


def _inside(ids: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.clip(ids, 0, logits.shape[-1] - 1)  # A negative index would wrap.


def _scored(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns log p(id), whether the id is the most likely one, and log sum exp; [t] each."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, _inside(ids, logits)[:, None], axis=-1)[:, 0]
    return picked - lse, _leads(logits, ids, picked), lse


def _leads(logits: jax.Array, ids: jax.Array, picked: jax.Array) -> jax.Array:
    """Whether id t is the first of the largest of logits [t, V], in one pass over them."""
    others = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    best = picked[:, None]
    before = (logits > best) | ((logits == best) & (others < ids[:, None]))
    return ~jnp.any(before, axis=-1) & (ids >= 0) & (ids < logits.shape[-1])


def _through_chunks(
    one_chunk: Callable[..., tuple[Tree, Tree]], carry: Tree, chunk: int, *arrays: jax.Array
) -> tuple[Tree, Tree]:
    """Scans `one_chunk(carry, *parts) -> (carry, found)` over `chunk` rows of [M, ...] at a time.

    Returns the last carry and what was found, [M, ...].
    """
    tokens = len(arrays[0])
    if chunk >= tokens:
        return one_chunk(carry, *arrays)
    parts = tuple(split_chunks(x, chunk) for x in arrays)
    carry, found = jax.lax.scan(lambda carry, part: one_chunk(carry, *part), carry, parts)
    return carry, jax.tree.map(lambda x: join_chunks(x, tokens), found)


def _by_chunks(one_chunk: Callable[..., Tree], chunk: int, *arrays: jax.Array) -> Tree:
    return _through_chunks(lambda _, *parts: (None, one_chunk(*parts)), None, chunk, *arrays)[1]


def split_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Pads [M, ...] and cuts it into [chunks, chunk, ...].

    Every chunks-th token makes a chunk: each then spans all devices, where a run of neighbours
    would lie on one of them and make the others wait or repeat its work.
    """
    chunks = -(-len(x) // chunk)
    padded = jnp.pad(x, ((0, chunks * chunk - len(x)), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(chunk, chunks, *x.shape[1:]).swapaxes(0, 1)


def join_chunks(parts: jax.Array, tokens: int) -> jax.Array:
    """Undoes `split_chunks`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])[:tokens]


# -- on a mesh -----------------------------------------------------------------------------------


def _row_axes(targets: jax.Array) -> tuple[str, ...]:
    """Returns the mesh axes that split the rows of `targets` [B, ...]; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or targets.ndim < 2:
        return ()
    axes = tuple(axis for axis in AXES["batch"] or () if mesh.shape[axis] > 1)
    return axes if targets.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def _splits_inputs(kernel: jax.Array, axes: tuple[str, ...]) -> bool:
    """Whether each device of `fsdp` holds some of the projection's input rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return "fsdp" in axes and kernel.shape[0] % mesh.shape["fsdp"] == 0


def _gathered(kernel: jax.Array, dtype: jnp.dtype, split: bool) -> jax.Array:
    kernel = kernel.astype(dtype)  # First: half the bytes over the links.
    if split:
        kernel = jax.lax.all_gather(kernel, "fsdp", axis=0, tiled=True)
    return constrain(kernel, None, "vocab")  # What splits the vocabulary goes on doing so.
