"""Proximal policy optimisation with a critic: token rewards, GAE, both clipped losses.

`batch_advantages` is for steps that train on parts of a batch, under any of the clipped losses.

arXiv:1707.06347 as used for language models (arXiv:2203.02155): the reward of a token is
-kl_coef times the KL estimate, plus the completion's reward at the last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.preference.options import Options, above, at_least, between
from jaxllm.preference.policy_gradient import (
    GRPO,
    RLOO,
    clipped_objective,
    grpo_advantages,
    k3,
    log_ratio_to_old,
    per_token_mean,
    reward_metrics,
    rloo_advantages,
)
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import Loss, RolloutStats, masked_mean


@dataclass(frozen=True)
class PPO(Options):
    """Options of `ppo`, with the defaults of TRL.

    Attributes:
      epsilon: Clip of the ratio.
      value_epsilon: How far the critic may move from its old value.
      value_coef: c_v, weight of the critic's loss.
      kl_coef: Weight of the KL to the reference in the reward; 0 needs no reference.
      kl_estimator: "k1", log(policy/ref), or "k3", which is never negative.
      gamma: Discount per token.
      lam: Lambda of generalised advantage estimation (arXiv:1506.02438).
      whiten: Normalise advantages over the tokens of the batch.
    """

    epsilon: float = above(0, 0.2)
    value_epsilon: float = above(0, 0.2)
    value_coef: float = at_least(0, 0.1)
    kl_coef: float = at_least(0, 0.05)
    kl_estimator: Literal["k1", "k3"] = "k1"
    gamma: float = between(0, 1, 1.0)
    lam: float = between(0, 1, 0.95)
    whiten: bool = True


@register(
    "ppo",
    PPO,
    RolloutStats,
    needs=lambda c: (
        "old_logps",
        "values",
        "old_values",
        *(("ref_logps",) if c.kl_coef > 0 else ()),
    ),
)
def ppo(stats: RolloutStats, config: PPO) -> Loss:
    """PPO: mean over tokens of -min(A rho, A clip(rho)) + c_v/2 max((V - R)^2, (V_clip - R)^2).

    Advantages and returns come from `ppo_advantages` unless the statistics hold them; compute them
    once per rollout when it is trained on in several parts, so that all are whitened together.
    """
    stop = jax.lax.stop_gradient
    advantages, returns = stats.advantages, stats.returns
    if advantages is None or returns is None:
        advantages, returns = ppo_advantages(stats, config)
    advantages, returns, old_values = stop(advantages), stop(returns), stop(stats.old_values)
    objective, outside = clipped_objective(
        log_ratio_to_old(stats), advantages, config.epsilon, config.epsilon
    )
    near = jnp.clip(
        stats.values, old_values - config.value_epsilon, old_values + config.value_epsilon
    )
    errors = jnp.maximum(jnp.square(stats.values - returns), jnp.square(near - returns)) / 2
    metrics = {
        "policy_loss": -masked_mean(objective, stats.mask),
        "value_loss": masked_mean(errors, stats.mask),
        "clip_fraction": masked_mean(outside & stats.mask, stats.mask),
        "returns": masked_mean(returns, stats.mask),
        **reward_metrics(stats, advantages),
    }
    return per_token_mean(-objective + config.value_coef * errors, stats), metrics


def ppo_advantages(stats: RolloutStats, config: PPO) -> tuple[jax.Array, jax.Array]:
    """Generalised advantages and returns [B, T], zero outside the mask.

    Tokens outside the mask, such as a tool's answer between two turns, are stepped over. Returns
    are the advantages before whitening plus the old values.
    """
    stats = stats.clean()
    mask, values = stats.mask, stats.old_values
    last = mask & (jnp.cumsum(mask[:, ::-1], 1)[:, ::-1] == 1)
    rewards = jnp.where(last, stats.rewards[:, None], 0.0)
    if config.kl_coef > 0:
        k1 = stats.old_logps - stats.ref_logps
        kl = k1 if config.kl_estimator == "k1" else k3(stats.ref_logps, stats.old_logps)
        rewards = rewards - config.kl_coef * jnp.where(mask, kl, 0.0)

    def back(
        after: tuple[jax.Array, jax.Array], token: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        next_value, next_advantage = after
        reward, value, here = token
        error = reward + config.gamma * next_value - value
        advantage = error + config.gamma * config.lam * next_advantage
        carry = (
            jnp.where(here, value, next_value),
            jnp.where(here, advantage, next_advantage),
        )
        return carry, jnp.where(here, advantage, 0.0)

    end = jnp.zeros_like(values[:, 0])
    columns = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(back, (end, end), columns, reverse=True)
    advantages = advantages.T
    returns = jnp.where(mask, advantages + values, 0.0)
    if config.whiten:
        mean = masked_mean(advantages, mask)
        variance = masked_mean(jnp.square(advantages - mean), mask)
        advantages = jnp.where(mask, (advantages - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)
    return jax.lax.stop_gradient((advantages, returns))


def batch_advantages(stats: RolloutStats, options: PPO | GRPO | RLOO) -> dict[str, jax.Array]:
    """The fields of `RolloutStats` that are normalised over a whole batch, for losses on its parts.

    Args:
      stats: The whole batch, with what the algorithm needs.
      options: The algorithm.

    Returns:
      `advantages`, and of PPO `returns`; no gradient passes.
    """
    stats = stats.clean()
    if isinstance(options, PPO):
        advantages, returns = ppo_advantages(stats, options)
        return {"advantages": advantages, "returns": returns}
    if isinstance(options, GRPO):
        advantages = grpo_advantages(stats, options)
    else:
        advantages = rloo_advantages(stats, options)
    return {"advantages": jax.lax.stop_gradient(advantages)}
