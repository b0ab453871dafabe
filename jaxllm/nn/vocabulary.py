"""Log-probabilities over a vocabulary without ever holding [B, T, V].

Shared by pre-training, code models, preference losses and verifiers: all of them need only the
log-probability of given tokens, so logits are formed for one chunk of tokens at a time and formed
again in the backward pass. A loss that is a weighted sum of them needs no second forming: its
gradient is known as soon as the logits are (`weighted_nll`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def vocabulary_logits(
    hidden: jax.Array, kernel: jax.Array, soft_cap: float | None = None
) -> jax.Array:
    """Returns logits float32 [..., V] of `hidden` [..., D] and `kernel` [D, V].

    The product runs in the dtype of `hidden` and is accumulated and kept in float32: rounding
    logits to bfloat16 would move a log-probability by up to 0.03 at a logit of 8. With `soft_cap` c
    they are c tanh(logits / c) (Gemma 2, arXiv:2408.00118).
    """
    logits = jnp.einsum(
        "...d,dv->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def token_log_probs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    bias: jax.Array | None = None,
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
      bias: [V] or None.
      soft_cap: As in `vocabulary_logits`.
      chunk: Tokens whose logits exist at the same time.
      with_accuracy: Also return whether each target is the most likely token, bool [...].
    """
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    tokens = flat.shape[0]

    @jax.checkpoint
    def one_chunk(part: jax.Array, part_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = vocabulary_logits(part, kernel, soft_cap)
        if bias is not None:
            logits = logits + bias
        log_probs, correct = _scored(logits, part_ids)[:2]
        return log_probs, jax.lax.stop_gradient(correct)

    if chunk >= tokens:
        log_probs, correct = one_chunk(flat, ids)
    else:
        parts = _split(flat, chunk), _split(ids, chunk)
        mapped = jax.lax.map(lambda args: one_chunk(*args), parts)
        log_probs, correct = (_joined(part, tokens) for part in mapped)
    log_probs = log_probs.reshape(targets.shape)
    if not with_accuracy:
        return log_probs
    return log_probs, correct.reshape(targets.shape)


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
    formed once, where `token_log_probs` forms them twice.

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
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, correct = _weighted_nll(
        flat, kernel, targets.reshape(-1), weights.reshape(-1), soft_cap, min(chunk, len(flat))
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
    tokens = len(hidden)
    cast = kernel.astype(hidden.dtype)

    def one_chunk(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        h, ids, share = part
        logits = vocabulary_logits(h, cast, soft_cap)
        log_probs, correct, lse = _scored(logits, ids)
        is_target = jnp.arange(logits.shape[-1]) == _inside(ids, logits)[:, None]
        by_logits = share[:, None] * (jnp.exp(logits - lse[:, None]) - is_target)
        if soft_cap is not None:
            by_logits *= 1.0 - (logits / soft_cap) ** 2
        by_logits = by_logits.astype(h.dtype)
        by_hidden = jnp.einsum("tv,dv->td", by_logits, cast)
        by_kernel = jnp.einsum("td,tv->dv", h, by_logits, preferred_element_type=jnp.float32)
        return total + by_kernel, (log_probs, correct, by_hidden)

    zeros = jnp.zeros(kernel.shape, jnp.float32)
    if chunk >= tokens:
        by_kernel, found = one_chunk(zeros, (hidden, targets, weights))
    else:
        parts = tuple(_split(x, chunk) for x in (hidden, targets, weights))
        by_kernel, mapped = jax.lax.scan(one_chunk, zeros, parts)
        found = tuple(_joined(part, tokens) for part in mapped)
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
    return picked - lse, most_likely(logits) == ids, lse


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """Pads [M, ...] and cuts it into [chunks, chunk, ...].

    Every chunks-th token makes a chunk: each then spans all devices, where a run of neighbours
    would lie on one of them and make the others wait or repeat its work.
    """
    chunks = -(-len(x) // chunk)
    padded = jnp.pad(x, ((0, chunks * chunk - len(x)), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(chunk, chunks, *x.shape[1:]).swapaxes(0, 1)


def _joined(parts: jax.Array, tokens: int) -> jax.Array:
    """Undoes `_split`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])[:tokens]
