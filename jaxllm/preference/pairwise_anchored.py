"""Pair losses that hold each log-ratio, not only the margin: BCO, NCA, SPPO, APO, DPOP, RPO, AOT.

Notation of `pairwise`: a and c are the log-ratios, Delta = a - c, u = beta Delta. Losses of the
margin alone let both log-probs fall together; these anchor one or both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from jaxllm.preference.options import Options, above, at_least
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import (
    Loss,
    Metrics,
    PairStats,
    RunningMean,
    masked_mean,
    ratio_metrics,
)

Shift = Literal["zero", "batch", "running"]


def reward_shift(
    shift: Shift, rewards: jax.Array, keep: jax.Array, running: RunningMean | None
) -> tuple[jax.Array, Metrics]:
    """BCO's delta, without gradient, and what the trainer carries to the next step.

    Args:
      shift: 0 (TRL's pair loss), the mean of this batch, or the mean of all rewards so far with
        this batch (the paper).
      rewards: beta times the log-ratios, any shape.
      keep: Which of them count.
      running: State for "running": the next one is `bco/delta` and `bco/count` of the metrics.
    """
    if shift == "zero":
        delta, count = jnp.zeros((), rewards.dtype), jnp.zeros((), rewards.dtype)
    else:
        start = running if shift == "running" and running is not None else RunningMean.start()
        after = start.update(rewards, keep)
        delta, count = after.mean, after.count
    return delta, {"bco/delta": delta, "bco/count": count}


@dataclass(frozen=True)
class BCOPair(Options):
    """Options of `bco_pair`: beta, and which delta is subtracted."""

    beta: float = above(0, 0.1)
    shift: Shift = "batch"


@register(
    "bco_pair",
    BCOPair,
    PairStats,
    needs=lambda c: ("ref_logps", *(("running",) if c.shift == "running" else ())),
)
def bco_pair(stats: PairStats, config: BCOPair) -> Loss:
    """Binary classifier optimisation: -log sigma(beta a - delta) - log sigma(delta - beta c).

    beta as in DPO. delta is a mean of beta a and beta c: libraries take 0, the mean of the batch or
    a running mean; here it never has a gradient. Couples the rows of a batch. arXiv:2404.04656.
    """
    rewards = config.beta * jnp.stack([stats.chosen.log_ratio, stats.rejected.log_ratio])
    both = jnp.broadcast_to(stats.kept(), rewards.shape)
    delta, carried = reward_shift(config.shift, rewards, both, stats.running)
    loss = -log_sigmoid(rewards[0] - delta) - log_sigmoid(delta - rewards[1])
    return loss, {**ratio_metrics(stats, config.beta), **carried}


@dataclass(frozen=True)
class NCAPair(Options):
    """Options of `nca`: beta."""

    beta: float = above(0, 0.01)


@register("nca", NCAPair, PairStats, aliases=("nca_pair",), needs=("ref_logps",))
def nca(stats: PairStats, config: NCAPair) -> Loss:
    """Noise contrastive alignment on pairs: -log s(beta a) - (log s(-beta a) + log s(-beta c))/2.

    The first term raises the chosen one, the rest keeps either from growing without end: the
    fixed point of a is ln 2 / beta. beta as in DPO, 0.01 in the paper. arXiv:2402.05369.
    """
    a, c = config.beta * stats.chosen.log_ratio, config.beta * stats.rejected.log_ratio
    loss = -log_sigmoid(a) - 0.5 * log_sigmoid(-a) - 0.5 * log_sigmoid(-c)
    return loss, ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class SPPO(Options):
    """Options of `sppo`: beta."""

    beta: float = above(0, 1e-3)


@register("sppo", SPPO, PairStats, aliases=("sppo_hard",), needs=("ref_logps",))
def sppo(stats: PairStats, config: SPPO) -> Loss:
    """Self-play preference optimisation, hard labels: (a - 1/(2 beta))^2 + (c + 1/(2 beta))^2.

    beta is the inverse of the step size of the game: the targets of the log-ratios are
    +-1/(2 beta), +-500 at the default 1e-3. arXiv:2405.00675.
    """
    target = 1 / (2 * config.beta)
    a, c = stats.chosen.log_ratio, stats.rejected.log_ratio
    return jnp.square(a - target) + jnp.square(c + target), ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class APOZero(Options):
    """Options of `apo_zero`: beta."""

    beta: float = above(0, 0.1)


@register("apo_zero", APOZero, PairStats, needs=("ref_logps",))
def apo_zero(stats: PairStats, config: APOZero) -> Loss:
    """Anchored preference optimisation, zero: sigma(-beta a) + sigma(beta c).

    Raises the chosen and lowers the rejected, each against the reference; for a model that is worse
    than the chosen answers. beta as in DPO. arXiv:2408.06266.
    """
    a, c = config.beta * stats.chosen.log_ratio, config.beta * stats.rejected.log_ratio
    return sigmoid(-a) + sigmoid(c), ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class APODown(Options):
    """Options of `apo_down`: beta."""

    beta: float = above(0, 0.1)


@register("apo_down", APODown, PairStats, needs=("ref_logps",))
def apo_down(stats: PairStats, config: APODown) -> Loss:
    """Anchored preference optimisation, down: sigma(beta a) + sigma(-u).

    Lowers the chosen one and the rejected one more; for a model that is better than the chosen
    answers. At policy = reference the chosen one is not moved. beta as in DPO. arXiv:2408.06266.
    """
    a = config.beta * stats.chosen.log_ratio
    loss = sigmoid(a) + sigmoid(-config.beta * stats.margin)
    return loss, ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class DPOPositive(Options):
    """Options of `dpop`: beta, and lambda, the weight of the penalty."""

    beta: float = above(0, 0.3)
    penalty: float = at_least(0, 50.0)


@register("dpop", DPOPositive, PairStats, needs=("ref_logps",))
def dpop(stats: PairStats, config: DPOPositive) -> Loss:
    """DPO-Positive: -log sigma(beta (Delta - lambda max(0, -a))).

    The penalty for a chosen completion below its reference stands inside the sigmoid, as in the
    paper; elsewhere it is found outside, and even subtracted, which rewards the fall. beta 0.3 and
    lambda 50. arXiv:2402.13228.
    """
    penalty = config.penalty * jax.nn.relu(-stats.chosen.log_ratio)
    return -log_sigmoid(config.beta * (stats.margin - penalty)), ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class RPO(Options):
    """Options of `rpo`: beta, eta, the weight of the NLL, and whether that is a mean or a sum."""

    beta: float = above(0, 0.1)
    nll_weight: float = at_least(0, 1.0)
    nll: Literal["mean", "sum"] = "mean"


@register("rpo", RPO, PairStats, needs=("ref_logps",))
def rpo(stats: PairStats, config: RPO) -> Loss:
    """DPO with the chosen completion's likelihood: -log sigma(u) + eta NLL(chosen).

    Iterative RPO (arXiv:2404.19733): eta 1 with the NLL per token. RPO as a remedy of
    overoptimisation (arXiv:2405.16436): eta 0.005 with beta 0.01. beta as in DPO.
    """
    chosen = stats.chosen
    nll = -(chosen.mean_logps if config.nll == "mean" else chosen.logps)
    loss = -log_sigmoid(config.beta * stats.margin) + config.nll_weight * nll
    metrics = {"nll": masked_mean(nll, stats.kept()), **ratio_metrics(stats, config.beta)}
    return loss, metrics


@dataclass(frozen=True)
class AOT(Options):
    """Options of `aot`: beta, and label smoothing as in cDPO."""

    beta: float = above(0, 0.01)
    label_smoothing: float = at_least(0, 0.0, below=0.5)


@dataclass(frozen=True)
class AOTUnpaired(Options):
    """Options of `aot_unpaired`: beta, and label smoothing as in cDPO."""

    beta: float = above(0, 0.01)
    label_smoothing: float = at_least(0, 0.0, below=0.5)


@register("aot", AOT, PairStats, aliases=("aot_pair",), needs=("ref_logps",))
def aot(stats: PairStats, config: AOT) -> Loss:
    """Alignment via optimal transport, paired: sort(l_w - l_l) - sort(l_w^ref - l_l^ref).

    The batch's distribution of margins is to dominate the reference's: the i-th smallest margin is
    compared with the i-th smallest, by -log sigma(beta x), smoothed as in cDPO. beta scales the
    margin as in DPO, 0.01. Couples the rows of a batch. arXiv:2406.05882.
    """
    ours = stats.chosen.logps - stats.rejected.logps
    refs = stats.chosen.ref_logps - stats.rejected.ref_logps
    return _transport(stats, ours, jax.lax.stop_gradient(refs), config)


@register("aot_unpaired", AOTUnpaired, PairStats, needs=("ref_logps",))
def aot_unpaired(stats: PairStats, config: AOTUnpaired) -> Loss:
    """Alignment via optimal transport, unpaired: sort(a) - sort(c).

    As `aot`, but the chosen ones' log-ratios are to dominate the rejected ones', whichever pairs
    they belong to. arXiv:2406.05882.
    """
    return _transport(stats, stats.chosen.log_ratio, stats.rejected.log_ratio, config)


def _transport(
    stats: PairStats, upper: jax.Array, lower: jax.Array, config: AOT | AOTUnpaired
) -> Loss:
    """Loss of the sorted differences, each at the row that `upper` took it from."""
    keep = stats.kept()
    # Rows that do not count come last in both orders and meet each other there.
    upper_order = jnp.argsort(jnp.where(keep, upper, jnp.inf))
    lower_order = jnp.argsort(jnp.where(keep, lower, jnp.inf))
    x = config.beta * (upper[upper_order] - lower[lower_order])
    eps = config.label_smoothing
    by_rank = -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x)
    return by_rank[jnp.argsort(upper_order)], ratio_metrics(stats, config.beta)
