"""From logits to a token: temperature, top-k, top-p, and one uniform number per row.

The order is temperature, then top-k, then top-p with the first token that crosses p kept. A row's
draw depends on its own number and logits only, never on the rest of the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.nn.vocabulary import most_likely


def check_filters(temperature: float, top_k: int, top_p: float) -> None:
    """Raises InputError unless temperature >= 0, top_k >= 0 (0 is off) and 0 < top_p <= 1."""
    if not temperature >= 0:
        raise InputError(f"temperature {temperature} must be 0 (greedy) or more")
    if top_k < 0:
        raise InputError(f"top_k {top_k} must be 0 (off) or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p} must be above 0 and at most 1 (1 is off)")


def check_range(what: str, values: np.ndarray, limit: int) -> None:
    """Raises InputError naming the first of `values` outside [0, limit)."""
    bad = np.flatnonzero((values.reshape(-1) < 0) | (values.reshape(-1) >= limit))
    if len(bad):
        value = values.reshape(-1)[bad[0]]
        raise InputError(f"{what} {value} is outside 0 .. {limit - 1}")


def filter_logits(
    logits: jax.Array, *, top_k: int = 0, top_p: jax.Array | float = 1.0
) -> jax.Array:
    """Sets logits [..., V] outside the top-k and the nucleus of mass `top_p` to -inf.

    Exactly `top_k` tokens stay, and exactly as many as it takes to reach `top_p`: of equal logits
    the lower ids. `top_k` is static, 0 turns it off; `top_p` may be traced.
    """
    size = logits.shape[-1]
    if 0 < top_k < size:
        kth = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(_highest(logits, kth, top_k), logits, -jnp.inf)
    if isinstance(top_p, float) and top_p >= 1.0:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(descending, kept - 1, axis=-1)
    # A top_p of 1 must keep everything even where the cumulative sum rounds to 1 early.
    inside = _highest(logits, threshold, kept) | (top_p >= 1.0)
    return jnp.where(inside, logits, -jnp.inf)


def _highest(logits: jax.Array, lowest: jax.Array, count: jax.Array | int) -> jax.Array:
    """Marks the `count` highest logits, the last of which is `lowest`; ties go to lower ids."""
    above, tied = logits > lowest, logits == lowest
    places = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= places))


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Makes tokens that were `seen` (bool [B, V]) less likely: section 4.1 of arXiv:1909.05858.

    Positive logits are divided by `penalty` and negative ones multiplied by it.
    """
    weaker = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, weaker, logits)


def sample_token(
    uniforms: jax.Array,
    logits: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    top_k: int = 0,
    top_p: jax.Array | float = 1.0,
    min_p: jax.Array | float = 0.0,
) -> jax.Array:
    """Draws one token per row.

    Args:
      uniforms: float32 [B] in [0, 1), the only randomness; a loop draws those of all its steps
        beforehand.
      logits: float32 [B, V].
      temperature: Scalar, traced or not; 0 takes the most likely token, of equal ones the lowest.
      top_k: Static, 0 is off.
      top_p: Scalar in (0, 1].
      min_p: Scalar in [0, 1]: of what is left, tokens less than this times as likely as the most
        likely one are dropped (arXiv:2407.01082).

    Returns:
      int32 [B].
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)

    def draw() -> jax.Array:
        scaled = (logits - highest) / jnp.maximum(temperature, 1e-30)
        masses = jnp.exp(filter_logits(scaled, top_k=top_k, top_p=top_p))  # The largest is 1.
        return _pick(uniforms, jnp.where(masses >= min_p, masses, 0.0))

    return jax.lax.cond(jnp.asarray(temperature) <= 0, lambda: most_likely(logits), draw)


def _pick(uniforms: jax.Array, masses: jax.Array) -> jax.Array:
    """Inverts the cumulative distribution of unnormalised `masses` [B, V] at `uniforms` [B].

    First the block of tokens, then the token within it: two sums of about sqrt(V) terms cost far
    less than one of V, and than the V random numbers of the Gumbel trick.
    """
    size = masses.shape[-1]
    width = 1 << (size.bit_length() // 2)
    blocks = jnp.pad(masses, ((0, 0), (0, -size % width))).reshape(len(masses), -1, width)
    totals = jnp.sum(blocks, axis=-1)
    ends = _ends(totals)
    target = uniforms * jnp.max(ends, axis=-1)
    block = _first_above(ends, target)
    row = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(ends - totals, block[:, None], axis=1)[:, 0]
    within = _ends(row)
    # The two levels round differently; what is left to find must lie inside the block.
    inside = jnp.clip(target - before, 0.0, jnp.max(within, axis=-1) * (1 - 2**-20))
    return block * width + _first_above(within, inside)


def _ends(masses: jax.Array) -> jax.Array:
    """Cumulative sums, 0 where the mass is 0: such a token is never picked, however sums round."""
    return jnp.where(masses > 0, jnp.cumsum(masses, axis=-1), 0.0)


def _first_above(ends: jax.Array, target: jax.Array) -> jax.Array:
    """Index of the first of `ends` [B, n] above `target` [B], int32 [B]."""
    return jnp.argmax(ends > target[:, None], axis=-1).astype(jnp.int32)
