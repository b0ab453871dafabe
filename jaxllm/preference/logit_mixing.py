"""Training-free change of logits while decoding: proxy tuning, EFT, DeRa, ARGS and reward guidance.

Pure functions between the model's logits and `decoding.sampling.sample_token`. Each model keeps its
own cache and sees the same tokens. Logits are float32 [B, V].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError


def proxy_tuned_logits(
    base: jax.Array, expert: jax.Array, anti_expert: jax.Array, alpha: jax.Array | float = 1.0
) -> jax.Array:
    """Logits base + alpha (expert - anti-expert): a small tuned model steers a large one.

    With alpha 1 and log-probabilities in the place of logits this is emulated fine-tuning (EFT,
    arXiv:2310.12962), whose distribution is the same because softmax ignores constants. The small
    models' vocabularies may be padded beyond the base's; what is beyond is cut. alpha scales the
    tuning; 0 is the base. arXiv:2401.08565, after DExperts (arXiv:2105.03023).

    Raises:
      InputError: A small model's vocabulary is smaller than the base's.
    """
    size = base.shape[-1]
    for name, other in (("expert", expert), ("anti-expert", anti_expert)):
        if other.shape[-1] < size:
            raise InputError(f"{name} has {other.shape[-1]} tokens, the base {size}: too few")
    return base + alpha * (expert[..., :size] - anti_expert[..., :size])


def realigned_logits(
    aligned: jax.Array, reference: jax.Array, strength: jax.Array | float
) -> jax.Array:
    """Decoding-time realignment (DeRa): strength aligned + (1 - strength) reference.

    Per token the policy that a KL strength beta/strength would have given, beta being that of the
    aligned model's training; 0 is the reference, 1 the aligned model, and more goes beyond it.
    arXiv:2402.02992.
    """
    return reference + strength * (aligned - reference)


def reward_guided_logits(
    logits: jax.Array, token_ids: jax.Array, rewards: jax.Array, weight: jax.Array | float
) -> jax.Array:
    """Logits plus weight r(prefix + token) for some tokens, and -inf for all others [B, V].

    ARGS (arXiv:2402.01694) takes the argmax, or samples at a temperature; reward-augmented decoding
    (RAD, arXiv:2310.09520) and token-wise controlled decoding (arXiv:2310.17022) sample, the latter
    with a value function of prefixes as the reward.

    Args:
      logits: [B, V].
      token_ids: int [B, k] from `candidate_tokens`, different in a row.
      rewards: [B, k], of the prefix with that token.
      weight: How much a unit of reward counts in nats.
    """
    rows = jnp.arange(len(logits))[:, None]
    own = jnp.take_along_axis(logits, token_ids, -1)
    return jnp.full_like(logits, -jnp.inf).at[rows, token_ids].set(own + weight * rewards)


def candidate_tokens(logits: jax.Array, k: int) -> jax.Array:
    """The k most likely tokens of each row, int [B, k], which a reward model is to score.

    Raises:
      InputError: k is not between 1 and V.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise InputError(f"k is {k}, expected between 1 and {logits.shape[-1]}")
    return jax.lax.top_k(logits, k)[1]


def best_block(values: jax.Array) -> jax.Array:
    """Block-wise controlled decoding: which of K sampled blocks to keep, int [B].

    After every block of tokens the best of K continuations by the value of the prefix goes on.
    `values` is [B, K]. arXiv:2310.17022.
    """
    return jnp.argmax(values, -1)
