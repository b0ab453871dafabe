"""Log-probabilities over a vocabulary without ever holding [B, T, V].

Shared by pre-training, code models, preference losses and verifiers: all of them need only the
log-probability of given tokens, so logits are formed for one chunk of tokens at a time and formed
again in the backward pass.
"""

from __future__ import annotations

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
    dim = hidden.shape[-1]
    flat, ids = hidden.reshape(-1, dim), targets.reshape(-1)
    tokens = flat.shape[0]
    chunk = min(chunk, tokens)
    chunks = -(-tokens // chunk)
    padding = chunks * chunk - tokens

    @jax.checkpoint
    def one_chunk(part: jax.Array, part_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = vocabulary_logits(part, kernel, soft_cap)
        if bias is not None:
            logits = logits + bias
        inside = jnp.clip(part_ids, 0, logits.shape[-1] - 1)  # A negative index would wrap.
        picked = jnp.take_along_axis(logits, inside[:, None], axis=-1)[:, 0]
        log_probs = picked - jax.nn.logsumexp(logits, axis=-1)
        return log_probs, jax.lax.stop_gradient(jnp.argmax(logits, axis=-1) == part_ids)

    if chunks == 1:
        log_probs, correct = one_chunk(flat, ids)
    else:
        # Every chunks-th token makes a chunk: each then spans all devices, where a run of
        # neighbours would lie on one of them and make the others wait or repeat its work.
        flat = jnp.pad(flat, ((0, padding), (0, 0))).reshape(chunk, chunks, dim).swapaxes(0, 1)
        ids = jnp.pad(ids, (0, padding)).reshape(chunk, chunks).swapaxes(0, 1)
        mapped = jax.lax.map(lambda args: one_chunk(*args), (flat, ids))
        log_probs, correct = (part.swapaxes(0, 1).reshape(-1)[:tokens] for part in mapped)
    log_probs = log_probs.reshape(targets.shape)
    if not with_accuracy:
        return log_probs
    return log_probs, correct.reshape(targets.shape)
