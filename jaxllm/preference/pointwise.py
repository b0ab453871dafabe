"""Losses of single completions: SFT, RAFT, rejection sampling, KTO, BCO.

a is the log-ratio to the reference of a desirable completion, c of an undesirable one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid, sigmoid

from jaxllm.errors import InputError
from jaxllm.preference.options import Options, above, at_least
from jaxllm.preference.pairwise_anchored import Shift, reward_shift
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import Loss, Metrics, PairStats, PointStats, masked_mean


@dataclass(frozen=True)
class SFT(Options):
    """Options of `sft`: whether every sequence or every token has the same weight."""

    average: Literal["sequence", "token"] = "sequence"


@register("sft", SFT, PointStats, PairStats, aliases=("nll",))
def sft(stats: PointStats | PairStats, config: SFT) -> Loss:
    """Supervised fine-tuning: the NLL per token of the completion, of pairs of the chosen one.

    "sequence" averages over the tokens of each completion, then over rows; "token" over all tokens
    of the batch, so that long completions weigh more. Has no beta.
    """
    sequences = stats.chosen if isinstance(stats, PairStats) else stats.completions
    keep = stats.kept()
    if config.average == "token":
        tokens = jnp.sum(jnp.where(keep, sequences.lengths, 0))
        # Scaled so that the mean over rows is the mean over tokens.
        nll = -sequences.logps * jnp.sum(keep) / jnp.maximum(tokens, 1)
    else:
        nll = -sequences.mean_logps
    return nll, {"nll": masked_mean(nll, keep)}


@dataclass(frozen=True)
class RAFT(Options):
    """Options of `raft`: completions per prompt, which are neighbouring rows."""

    group_size: int = at_least(2, 8)


@register("raft", RAFT, PointStats, aliases=("best_of_n_sft",), needs=("rewards",))
def raft(stats: PointStats, config: RAFT) -> Loss:
    """Reward-ranked fine-tuning: the NLL per token of the best of each prompt's samples.

    Rows that are not the best have loss 0 and still count in the mean, so the gradient is that of
    SFT over group_size. Of equal rewards the first is taken. Has no beta. arXiv:2304.06767.
    """
    keep = stats.kept()
    rewards = grouped(jnp.where(keep, stats.rewards, -jnp.inf), config.group_size)
    best = jax.nn.one_hot(jnp.argmax(rewards, -1), config.group_size, dtype=bool).reshape(-1)
    return _selected(stats, best & keep)


@dataclass(frozen=True)
class RFT(Options):
    """Options of `rft`: the reward from which a completion is kept."""

    threshold: float = 1.0


@register("rft", RFT, PointStats, aliases=("rejection_sampling",), needs=("rewards",))
def rft(stats: PointStats, config: RFT) -> Loss:
    """Rejection-sampling fine-tuning (also STaR): the NLL per token of every correct sample.

    Rows below the threshold have loss 0 and still count in the mean. `selection.distinct` removes
    equal completions beforehand. Has no beta. arXiv:2308.01825.
    """
    return _selected(stats, stats.kept() & (stats.rewards >= config.threshold))


def _selected(stats: PointStats, selected: jax.Array) -> Loss:
    nll = jnp.where(selected, -stats.completions.mean_logps, 0.0)
    metrics = {
        "selected": masked_mean(selected, stats.kept()),
        "nll": masked_mean(-stats.completions.mean_logps, selected),
    }
    return nll, metrics


def grouped(x: jax.Array, group_size: int) -> jax.Array:
    """[B, ...] as [B / group_size, group_size, ...].

    Raises:
      InputError: B is no multiple of the group size.
    """
    if len(x) % group_size:
        raise InputError(f"{len(x)} rows are no multiple of group_size {group_size}")
    return x.reshape(-1, group_size, *x.shape[1:])


@dataclass(frozen=True)
class KTO(Options):
    """Options of `kto`: beta, and the weights of desirable and undesirable rows."""

    beta: float = above(0, 0.1)
    desirable_weight: float = at_least(0, 1.0)
    undesirable_weight: float = at_least(0, 1.0)


@register("kto", KTO, PointStats, needs=("desirable", "ref_logps", "mismatched"))
def kto(stats: PointStats, config: KTO) -> Loss:
    """Kahneman-Tversky optimisation, of completions that are only good or bad.

    Desirable: lambda_D sigma(-beta (a - z)); undesirable: lambda_U sigma(-beta (z - c)). z
    estimates KL(policy || reference) as max(0, mean log-ratio) over completions of other prompts,
    over the whole batch and without gradient; see `mismatched_rows`. beta is the KL
    strength as in DPO, and how risk-averse the value function is; weights such that
    lambda_D n_D : lambda_U n_U lies in [1, 4/3]. Couples the rows of a batch. arXiv:2402.01306.
    """
    others = stats.mismatched
    keep = stats.kept()
    drift = jax.lax.stop_gradient(others.log_ratio)
    z = jnp.maximum(masked_mean(drift, keep & (others.lengths > 0)), 0.0)
    rewards = config.beta * stats.completions.log_ratio
    gap = jnp.where(stats.desirable, 1.0, -1.0) * (rewards - config.beta * z)
    weights = jnp.where(stats.desirable, config.desirable_weight, config.undesirable_weight)
    return weights * sigmoid(-gap), {"kl": z, **_label_metrics(stats, rewards)}


def mismatched_rows(batch: int) -> np.ndarray:
    """Row whose completion each prompt is paired with for KTO's KL: the next one, in a circle.

    Reversing the batch, as is also done, pairs the middle of an odd batch with itself.

    Raises:
      InputError: A batch of one has no other row.
    """
    if batch < 2:
        raise InputError(f"KTO estimates its KL from mismatched rows; batch is {batch}, expected 2")
    return np.roll(np.arange(batch), -1)


@dataclass(frozen=True)
class BCO(Options):
    """Options of `bco`: beta, which delta is subtracted, and bounds of the density ratio."""

    beta: float = above(0, 0.1)
    shift: Shift = "batch"
    density_weights: bool = False
    lowest_weight: float = at_least(0, 0.5)
    highest_weight: float = above(0, 10.0)


@register(
    "bco",
    BCO,
    PointStats,
    needs=lambda c: (
        "desirable",
        "ref_logps",
        *(("running",) if c.shift == "running" else ()),
        *(("density_ratio",) if c.density_weights else ()),
    ),
)
def bco(stats: PointStats, config: BCO) -> Loss:
    """Binary classifier optimisation: -log sigma(beta a - delta), -log sigma(delta - beta c).

    delta is a mean of all rewards, without gradient: see `reward_shift`. With `density_weights`
    undesirable rows are weighted by p(desirable)/p(undesirable) of their prompt, clipped. beta as
    in DPO. Couples the rows of a batch. arXiv:2404.04656.
    """
    keep, desirable = stats.kept(), stats.desirable
    rewards = config.beta * stats.completions.log_ratio
    delta, carried = reward_shift(config.shift, rewards, keep, stats.running)
    loss = -log_sigmoid(jnp.where(desirable, 1.0, -1.0) * (rewards - delta))
    if config.density_weights:
        weights = jnp.clip(stats.density_ratio, config.lowest_weight, config.highest_weight)
        loss = jnp.where(desirable, 1.0, jax.lax.stop_gradient(weights)) * loss
    return loss, {**carried, **_label_metrics(stats, rewards)}


def _label_metrics(stats: PointStats, rewards: jax.Array) -> Metrics:
    keep, desirable = stats.kept(), stats.desirable
    good, bad = keep & desirable, keep & ~desirable
    metrics = {
        "rewards/chosen": masked_mean(rewards, good),
        "rewards/rejected": masked_mean(rewards, bad),
        "logps/chosen": masked_mean(stats.completions.logps, good),
        "logps/rejected": masked_mean(stats.completions.logps, bad),
    }
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return {"rewards/margins": margin, **metrics}
