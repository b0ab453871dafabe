"""Policy gradients on sampled completions: REINFORCE, ReMax, RLOO, GRPO and its relatives.

r is the reward of a completion, A its advantage, rho = policy/old the ratio to the policy that
sampled, d = log(ref/policy) of a token, k3 = exp(d) - d - 1 the unbiased estimate of the KL to the
reference (Schulman, "Approximating KL divergence", 2020). `kl_coef` is what DPO calls beta.
Rewards, advantages and old log-probs get no gradient.

The loss of a row is scaled so that the mean over rows is the loss: where a method averages over all
tokens of the batch, its rows are scaled by rows/tokens. Logarithms of ratios are held within
+-20, beyond which no gradient passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.preference.options import Options, above, at_least
from jaxllm.preference.pointwise import grouped
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import Loss, Metrics, RolloutStats, masked_mean

MAX_LOG_RATIO = 20.0


# -- shared pieces -------------------------------------------------------------------------------


def k3(ref_logps: jax.Array, logps: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = ref - policy, at least 0."""
    d = jnp.clip(ref_logps - logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(d) - d


def log_ratio_to_old(stats: RolloutStats) -> jax.Array:
    """Log of rho per token [B, T]; 0, but with its gradient, on the policy's own samples."""
    old = stats.logps if stats.old_logps is None else stats.old_logps
    return stats.logps - jax.lax.stop_gradient(old)


def clipped_objective(
    log_ratio: jax.Array, advantages: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), and whether the clip took the gradient away."""
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    outside = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return objective, outside


def shaped_rewards(stats: RolloutStats, kl_coef: float) -> jax.Array:
    """Reward [B] minus kl_coef times sum_t log(policy/ref), without gradient."""
    if kl_coef == 0:
        return jax.lax.stop_gradient(stats.rewards)
    logps = stats.logps if stats.old_logps is None else stats.old_logps
    kl = jnp.sum(logps - stats.ref_logps, -1)
    return jax.lax.stop_gradient(stats.rewards - kl_coef * kl)


def leave_one_out(rewards: jax.Array, keep: jax.Array, group_size: int) -> jax.Array:
    """Reward minus the mean of the others of its group [B]; 0 without others."""
    r, k = grouped(jnp.where(keep, rewards, 0.0), group_size), grouped(keep, group_size)
    others = jnp.sum(k, -1, keepdims=True) - 1
    mean = (jnp.sum(r, -1, keepdims=True) - r) / jnp.maximum(others, 1)
    return jnp.where(k & (others > 0), r - mean, 0.0).reshape(-1)


def group_advantages(
    rewards: jax.Array,
    keep: jax.Array,
    group_size: int,
    scale: Literal["group", "batch", "none"] = "group",
) -> jax.Array:
    """(r - mean of its group) / (std + 1e-4) [B]; the std of n has n - 1 below (arXiv:2402.03300).

    Args:
      rewards: [B], a group being `group_size` neighbours.
      keep: bool [B].
      group_size: Samples per prompt.
      scale: Whose std: the group's, the whole batch's, or none (arXiv:2503.20783).
    """
    r, k = grouped(rewards, group_size), grouped(keep, group_size)
    centred = jnp.where(k, r - _mean(r, k), 0.0)
    if scale == "none":
        return centred.reshape(-1)
    if scale == "group":
        std = jnp.sqrt(_variance(r, k))
    else:
        std = jnp.sqrt(_variance(rewards[None], keep[None]))
    return (centred / (std + 1e-4)).reshape(-1)


def multi_objective_advantages(
    rewards: jax.Array,
    weights: tuple[float, ...],
    keep: jax.Array,
    group_size: int,
    order: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise",
) -> jax.Array:
    """Advantages [B] of several rewards [B, J].

    "normalise_then_sum" normalises each reward in its group, adds them with the weights and
    normalises over the batch (arXiv:2601.05242, which calls itself GDPO too): rewards of different
    spread then keep their weights. "sum_then_normalise" is GRPO on the weighted sum.

    Raises:
      InputError: Another number of weights than of rewards.
    """
    if rewards.shape[-1] != len(weights):
        raise InputError(f"{len(weights)} weights for {rewards.shape[-1]} rewards, expected equal")
    w = jnp.asarray(weights, rewards.dtype)
    if order == "sum_then_normalise":
        return group_advantages(rewards @ w, keep, group_size)
    each = jax.vmap(lambda r: group_advantages(r, keep, group_size), 1, 1)(rewards)
    total = each @ w
    mean = _mean(total[None], keep[None])[0]
    std = jnp.sqrt(_variance(total[None], keep[None]))[0]
    return jnp.where(keep, (total - mean) / (std + 1e-4), 0.0)


def per_token_mean(values: jax.Array, stats: RolloutStats) -> jax.Array:
    """Row sums [B] of token values, scaled so that their mean over rows is the mean over tokens."""
    rows, tokens = jnp.sum(stats.kept()), jnp.sum(stats.mask)
    return jnp.sum(jnp.where(stats.mask, values, 0.0), -1) * rows / jnp.maximum(tokens, 1)


def _mean(x: jax.Array, keep: jax.Array) -> jax.Array:
    count = jnp.maximum(jnp.sum(keep, -1, keepdims=True), 1)
    return jnp.sum(jnp.where(keep, x, 0.0), -1, keepdims=True) / count


def _variance(x: jax.Array, keep: jax.Array) -> jax.Array:
    squares = jnp.where(keep, jnp.square(x - _mean(x, keep)), 0.0)
    return jnp.sum(squares, -1, keepdims=True) / jnp.maximum(
        jnp.sum(keep, -1, keepdims=True) - 1, 1
    )


def reward_metrics(stats: RolloutStats, advantages: jax.Array) -> Metrics:
    """Mean reward and its spread, and mean advantage."""
    keep = stats.kept()
    rows = keep if advantages.ndim == 1 else stats.mask
    return {
        "reward": masked_mean(stats.rewards, keep),
        "reward_std": jnp.sqrt(_variance(stats.rewards[None], keep[None]))[0, 0],
        "advantages": masked_mean(advantages, rows),
    }


# -- algorithms ----------------------------------------------------------------------------------


def _kl_needs(config: REINFORCE | ReMax | RLOO | GRPO) -> tuple[str, ...]:
    return ("ref_logps",) if config.kl_coef > 0 else ()


@dataclass(frozen=True)
class REINFORCE(Options):
    """Options of `reinforce`: the baseline b, and the weight of the KL in the reward."""

    baseline: Literal["none", "batch_mean", "given"] = "batch_mean"
    kl_coef: float = at_least(0, 0.0)


@register(
    "reinforce",
    REINFORCE,
    RolloutStats,
    needs=lambda c: _kl_needs(c) + (("baselines",) if c.baseline == "given" else ()),
)
def reinforce(stats: RolloutStats, config: REINFORCE) -> Loss:
    """REINFORCE: -(r - b) l. kl_coef 0 has no KL. Williams, 1992."""
    rewards = shaped_rewards(stats, config.kl_coef)
    baseline: jax.Array | float = 0.0
    if config.baseline == "batch_mean":
        baseline = masked_mean(rewards, stats.kept())
    elif config.baseline == "given":
        baseline = stats.baselines
    return _score_function(stats, rewards - baseline)


@dataclass(frozen=True)
class ReMax(Options):
    """Options of `remax`: the weight of the KL in the reward."""

    kl_coef: float = at_least(0, 0.0)


@register("remax", ReMax, RolloutStats, needs=lambda c: (*_kl_needs(c), "baselines"))
def remax(stats: RolloutStats, config: ReMax) -> Loss:
    """ReMax: -(r - r_greedy) l, the baseline being the reward of the greedy completion.

    `baselines` holds r_greedy. kl_coef 0 has no KL. arXiv:2310.10505.
    """
    return _score_function(stats, shaped_rewards(stats, config.kl_coef) - stats.baselines)


def _score_function(stats: RolloutStats, advantages: jax.Array) -> Loss:
    advantages = jax.lax.stop_gradient(advantages)
    return -advantages * jnp.sum(stats.logps, -1), reward_metrics(stats, advantages)


@dataclass(frozen=True)
class RLOO(Options):
    """Options of `rloo`: samples per prompt, clip of the ratio (None: -A l), KL in the reward."""

    group_size: int = at_least(2, 2)
    epsilon: float | None = above(0, 0.2)
    kl_coef: float = at_least(0, 0.05)


@register("rloo", RLOO, RolloutStats, needs=_kl_needs)
def rloo(stats: RolloutStats, config: RLOO) -> Loss:
    """REINFORCE leave-one-out: A = R - mean of the others, R = r - kl_coef log(policy/ref).

    The loss is -min(rho A, clip(rho) A) with the ratio of the whole completion, whose gradient on
    fresh samples is that of -A l; with epsilon None it is -A l. Defaults of TRL: group 2, epsilon
    0.2, kl_coef 0.05, no normalisation. arXiv:2402.14740.
    """
    advantages = stats.advantages
    if advantages is None:
        advantages = rloo_advantages(stats, config)
    if config.epsilon is None:
        return _score_function(stats, advantages)
    ratio = jnp.sum(log_ratio_to_old(stats), -1)
    advantages = jax.lax.stop_gradient(advantages)
    objective, outside = clipped_objective(ratio, advantages, config.epsilon, config.epsilon)
    metrics = {"clip_fraction": masked_mean(outside, stats.kept())}
    return -objective, {**metrics, **reward_metrics(stats, advantages)}


def rloo_advantages(stats: RolloutStats, config: RLOO) -> jax.Array:
    """Shaped rewards minus the mean of the group's others [B]."""
    rewards = shaped_rewards(stats, config.kl_coef)
    return leave_one_out(rewards, stats.kept(), config.group_size)


@dataclass(frozen=True)
class GRPO(Options):
    """Options of `grpo`; presets `grpo_paper`, `dapo`, `dr_grpo`, `gspo`.

    Attributes:
      group_size: Samples per prompt, neighbouring rows.
      epsilon: Clip of the ratio, below 1.
      epsilon_high: Clip above 1; None is `epsilon` (DAPO takes 0.28).
      kl_coef: Weight of k3, 0 without a reference.
      loss_type: How tokens are averaged: "grpo" in each sequence, then over sequences; "dapo" over
        all tokens of the batch; "dr_grpo" by a constant, rows times `max_length`.
      max_length: The constant of "dr_grpo", the longest completion that may be sampled.
      importance: "token"; "sequence", exp of the mean log-ratio of the sequence (GSPO);
        "sequence_token", the same value with the gradient of each token (GSPO-token).
      scale_rewards: See `group_advantages`.
    """

    group_size: int = at_least(2, 8)
    epsilon: float = above(0, 0.2)
    epsilon_high: float | None = above(0, None)
    kl_coef: float = at_least(0, 0.0)
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    max_length: int | None = above(0, None)
    importance: Literal["token", "sequence", "sequence_token"] = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"

    def __post_init__(self) -> None:
        """Refuses "dr_grpo" without the constant that it divides by."""
        super().__post_init__()
        if (self.loss_type == "dr_grpo") != (self.max_length is not None):
            raise InputError(
                f"GRPO.max_length is {self.max_length} with loss_type {self.loss_type!r}; "
                "dr_grpo needs it and the others do not use it"
            )


@register("grpo", GRPO, RolloutStats, needs=_kl_needs)
def grpo(stats: RolloutStats, config: GRPO) -> Loss:
    """Group-relative policy optimisation: per token -min(rho A, clip(rho) A) + kl_coef k3.

    A is the reward normalised in the group, one for all tokens of a completion. Defaults of TRL:
    group 8, epsilon 0.2, kl_coef 0, token mean. arXiv:2402.03300 (kl_coef 0.04, sequence mean);
    DAPO arXiv:2503.14476; Dr. GRPO arXiv:2503.20783; GSPO arXiv:2507.18071.
    """
    advantages, mask = stats.advantages, stats.mask
    if advantages is None:
        advantages = grpo_advantages(stats, config)
    advantages = jax.lax.stop_gradient(advantages)
    log_ratio = _importance(log_ratio_to_old(stats), stats, config.importance)
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    wide = advantages[:, None] if advantages.ndim == 1 else advantages
    objective, outside = clipped_objective(log_ratio, wide, config.epsilon, high)
    losses = -objective
    metrics = {"clip_fraction": masked_mean(outside & mask, mask)}
    if config.kl_coef > 0:
        kl = k3(jax.lax.stop_gradient(stats.ref_logps), stats.logps)
        losses = losses + config.kl_coef * kl
        metrics["kl"] = masked_mean(kl, mask)
    if config.loss_type == "dapo":
        per_row = per_token_mean(losses, stats)
    else:
        per_row = jnp.sum(jnp.where(mask, losses, 0.0), -1)
        own = jnp.maximum(jnp.sum(mask, -1), 1)
        constant = config.max_length if config.loss_type == "dr_grpo" else None
        per_row = per_row / (own if constant is None else constant)
    return per_row, {**metrics, **reward_metrics(stats, advantages)}


def grpo_advantages(stats: RolloutStats, config: GRPO) -> jax.Array:
    """Rewards normalised in their groups [B]."""
    return group_advantages(stats.rewards, stats.kept(), config.group_size, config.scale_rewards)


def _importance(log_ratio: jax.Array, stats: RolloutStats, level: str) -> jax.Array:
    if level == "token":
        return log_ratio
    tokens = jnp.maximum(jnp.sum(stats.mask, -1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(stats.mask, log_ratio, 0.0), -1, keepdims=True) / tokens
    if level == "sequence":
        return jnp.broadcast_to(mean, log_ratio.shape)
    return jax.lax.stop_gradient(mean) + stats.logps - jax.lax.stop_gradient(stats.logps)
