"""Log-probabilities over a vocabulary without ever holding [B, T, V].

Shared by pre-training, code models, preference losses and verifiers: all of them need only the
log-probability of given tokens, so logits are formed for one chunk of tokens at a time and formed
again in the backward pass.

On a mesh each device goes through its own tokens. The output projection is gathered once for all
chunks, its gradient is added up in place and leaves the device once; left to itself the compiler
moves both over the links in every chunk.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxllm.parallel.sharding import AXES, constrain


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
      chunk: Tokens whose logits exist at the same time, on each device where the mesh splits rows.
      with_accuracy: Also return whether each target is the most likely token, bool [...].
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [] if mesh.empty else [axis for axis in AXES["batch"] or () if mesh.shape[axis] > 1]
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if bias is None and ways > 1 and targets.ndim > 1 and targets.shape[0] % ways == 0:
        log_probs, correct = _on_mesh(hidden, kernel, targets, soft_cap, chunk, tuple(axes))
    else:
        log_probs, correct = _in_chunks(hidden, kernel, targets, bias, soft_cap, chunk)
    if not with_accuracy:
        return log_probs
    return log_probs, jax.lax.stop_gradient(correct)


def _one_chunk(
    part: jax.Array,
    kernel: jax.Array,
    ids: jax.Array,
    bias: jax.Array | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities float32 [n] of ids [n] and their being the most likely, bool [n]."""
    logits = vocabulary_logits(part, kernel, soft_cap)
    if bias is not None:
        logits = logits + bias
    inside = jnp.clip(ids, 0, logits.shape[-1] - 1)  # A negative index would wrap.
    picked = jnp.take_along_axis(logits, inside[:, None], axis=-1)[:, 0]
    log_probs = picked - jax.nn.logsumexp(logits, axis=-1)
    return log_probs, jax.lax.stop_gradient(jnp.argmax(logits, axis=-1) == ids)


def _in_chunks(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None,
    soft_cap: float | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    dim, tokens = hidden.shape[-1], targets.size
    flat, ids = hidden.reshape(-1, dim), targets.reshape(-1)
    chunk = min(chunk, tokens)
    chunks = -(-tokens // chunk)
    padding = chunks * chunk - tokens

    @jax.checkpoint
    def one_chunk(part: jax.Array, part_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _one_chunk(part, kernel, part_ids, bias, soft_cap)

    if chunks == 1:
        log_probs, correct = one_chunk(flat, ids)
    else:
        # Every chunks-th token makes a chunk: each then spans all devices, where a run of
        # neighbours would lie on one of them and make the others wait or repeat its work.
        flat = jnp.pad(flat, ((0, padding), (0, 0))).reshape(chunk, chunks, dim).swapaxes(0, 1)
        ids = jnp.pad(ids, (0, padding)).reshape(chunk, chunks).swapaxes(0, 1)
        mapped = jax.lax.map(lambda args: one_chunk(*args), (flat, ids))
        log_probs, correct = (part.swapaxes(0, 1).reshape(-1)[:tokens] for part in mapped)
    return log_probs.reshape(targets.shape), correct.reshape(targets.shape)


# -- on a mesh -----------------------------------------------------------------------------------


def _on_mesh(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    soft_cap: float | None,
    chunk: int,
    axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """`_in_chunks` over the mesh axes that split rows; the vocabulary may be split by others."""
    mesh = jax.sharding.get_abstract_mesh()
    split = "fsdp" in axes and kernel.shape[0] % mesh.shape["fsdp"] == 0
    rows = P(axes)
    return jax.shard_map(
        partial(_local, soft_cap, chunk, axes, split),
        in_specs=(rows, P("fsdp" if split else None), rows),
        out_specs=(rows, rows),
        axis_names=set(axes),
        check_vma=False,
    )(hidden, kernel, targets)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _local(
    soft_cap: float | None,
    chunk: int,
    axes: tuple[str, ...],
    split: bool,
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One device's rows, and its part of the projection [D or D / fsdp, V]."""
    whole = _gathered(kernel, hidden.dtype, split)
    parts = _cut(chunk, targets.size, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    mapped = jax.lax.map(lambda part: _one_chunk(part[0], whole, part[1], None, soft_cap), parts)
    log_probs, correct = (x.reshape(-1)[: targets.size].reshape(targets.shape) for x in mapped)
    return log_probs, correct


def _forward(
    soft_cap: float | None,
    chunk: int,
    axes: tuple[str, ...],
    split: bool,
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    out = _local(soft_cap, chunk, axes, split, hidden, kernel, targets)
    return out, (hidden, kernel, targets)


def _backward(
    soft_cap: float | None,
    chunk: int,
    axes: tuple[str, ...],
    split: bool,
    kept: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
    hidden, kernel, targets = kept
    whole = _gathered(kernel, hidden.dtype, split)

    def body(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        def log_probs(h: jax.Array, k: jax.Array) -> jax.Array:
            return _one_chunk(h, k, part[1], None, soft_cap)[0]

        d_hidden, d_kernel = jax.vjp(log_probs, part[0], whole)[1](part[2])
        return constrain(total + d_kernel.astype(jnp.float32), None, "vocab"), d_hidden

    flat = hidden.reshape(-1, hidden.shape[-1])
    parts = _cut(chunk, targets.size, flat, targets.reshape(-1), cotangents[0].reshape(-1))
    nothing = constrain(jnp.zeros(whole.shape, jnp.float32), None, "vocab")
    total, d_hidden = jax.lax.scan(body, nothing, parts)
    if split:
        total = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=0, tiled=True)
    # Over axes along which the projection is not split, `shard_map` adds up its gradient itself.
    d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
    return d_hidden, total.astype(kernel.dtype), None


_local.defvjp(_forward, _backward)


def _gathered(kernel: jax.Array, dtype: jnp.dtype, split: bool) -> jax.Array:
    kernel = kernel.astype(dtype)  # First: half the bytes over the links.
    if split:
        kernel = jax.lax.all_gather(kernel, "fsdp", axis=0, tiled=True)
    return constrain(kernel, None, "vocab")  # What splits the vocabulary goes on doing so.


def _cut(chunk: int, tokens: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns arrays [tokens, ...] as [chunks, chunk, ...], padded with zeros."""
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    return tuple(
        jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))).reshape(-1, chunk, *x.shape[1:])
        for x in arrays
    )
