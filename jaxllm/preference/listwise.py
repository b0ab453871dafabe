"""Losses of K scored candidates: Plackett-Luce DPO, InfoNCA, NCA, EXO, RRHF, PRO, LiPO-lambda.

s_i = beta (l_i - l_i^ref) are the implicit rewards, r_i the given scores. Candidates that are
absent or empty take no part; in softmaxes they stand at -1e30. Of equal scores the lower index
ranks first where a ranking is needed, and pairs of equal scores are not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, log_softmax, logsumexp, softmax, softplus

from jaxllm.preference.options import Options, above, at_least
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import ListStats, Loss, Metrics, masked_mean

_ABSENT = -1e30


def _masked(x: jax.Array, stats: ListStats) -> jax.Array:
    return jnp.where(stats.present, x, _ABSENT)


def _metrics(stats: ListStats, rewards: jax.Array) -> Metrics:
    """Rewards of the best and of the other candidates, and how many pairs are ordered right."""
    present, scores = stats.present, stats.scores
    best = jax.nn.one_hot(jnp.argmax(_masked(scores, stats), -1), scores.shape[-1], dtype=bool)
    better = _better(stats)
    ordered = rewards[:, :, None] > rewards[:, None, :]
    chosen = masked_mean(rewards, best & present)
    rejected = masked_mean(rewards, ~best & present)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": masked_mean(ordered, better),
        "rewards/margins": chosen - rejected,
        "logps/chosen": masked_mean(stats.candidates.logps, best & present),
        "logps/rejected": masked_mean(stats.candidates.logps, ~best & present),
    }


def _better(stats: ListStats) -> jax.Array:
    """Bool [B, K, K]: candidate i has a higher score than j, both present."""
    both = stats.present[:, :, None] & stats.present[:, None, :]
    return both & (stats.scores[:, :, None] > stats.scores[:, None, :])


def _by_rank(stats: ListStats, *arrays: jax.Array) -> list[jax.Array]:
    """Arrays [B, K] with the best candidate first and absent ones last."""
    order = jnp.argsort(-_masked(stats.scores, stats), -1, stable=True)
    return [jnp.take_along_axis(x, order, -1) for x in arrays]


@dataclass(frozen=True)
class PlackettLuceDPO(Options):
    """Options of `pl_dpo`: beta."""

    beta: float = above(0, 0.1)


@register("pl_dpo", PlackettLuceDPO, ListStats, aliases=("plackett_luce",), needs=("ref_logps",))
def pl_dpo(stats: ListStats, config: PlackettLuceDPO) -> Loss:
    """DPO on a ranking: -sum_k [s_k - logsumexp(s_k .. s_K)], best first.

    With two candidates this is DPO; beta as there. Appendix A.3 of arXiv:2305.18290.
    """
    s = config.beta * stats.candidates.log_ratio
    ranked, present = _by_rank(stats, _masked(s, stats), stats.present)
    # K is small; a [K, K] mask keeps every tail's logsumexp exact.
    tail = jnp.triu(jnp.ones((s.shape[-1],) * 2, bool))
    tails = logsumexp(jnp.where(tail, ranked[:, None, :], _ABSENT), -1)
    return jnp.sum(jnp.where(present, tails - ranked, 0.0), -1), _metrics(stats, s)


@dataclass(frozen=True)
class InfoNCA(Options):
    """Options of `infonca`: beta, the temperature of the scores, and a bonus for the best one."""

    beta: float = above(0, 0.01)
    temperature: float = above(0, 1e-3)
    tie_bonus: float = at_least(0, 0.01)


@dataclass(frozen=True)
class NCA(Options):
    """Options of `nca_k`: beta, the temperature of the scores, and a bonus for the best one."""

    beta: float = above(0, 0.01)
    temperature: float = above(0, 1e-3)
    tie_bonus: float = at_least(0, 0.01)


def _targets(stats: ListStats, config: InfoNCA | NCA) -> jax.Array:
    """softmax(r / temperature) [B, K]; `tie_bonus` is added to the first of the best scores."""
    scores = _masked(stats.scores, stats)
    first = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=scores.dtype)
    return softmax((scores + config.tie_bonus * first) / config.temperature, -1)


@register("infonca", InfoNCA, ListStats, needs=("ref_logps",))
def infonca(stats: ListStats, config: InfoNCA) -> Loss:
    """InfoNCA: -sum_i softmax(r/alpha)_i log_softmax(s)_i.

    Only the differences of s matter; with two candidates and a hard label it is DPO. beta as
    in DPO. Authors: beta 0.01, alpha 1e-4 to 1e-3, which is nearly a hard label, and 0.01 for the
    best candidate to break ties. arXiv:2402.05369.
    """
    s = config.beta * stats.candidates.log_ratio
    log_q = log_softmax(_masked(s, stats), -1)
    return -jnp.sum(_targets(stats, config) * log_q, -1, where=stats.present), _metrics(stats, s)


@register("nca_k", NCA, ListStats, needs=("ref_logps",))
def nca_k(stats: ListStats, config: NCA) -> Loss:
    """NCA: -sum_i softmax(r/alpha)_i log sigma(s_i) - (1/K) sum_i log sigma(-s_i).

    Holds each s_i and not only their differences. beta and the rest as in InfoNCA.
    arXiv:2402.05369.
    """
    s = config.beta * stats.candidates.log_ratio
    count = jnp.sum(stats.present, -1, keepdims=True)
    terms = _targets(stats, config) * log_sigmoid(s) + log_sigmoid(-s) / jnp.maximum(count, 1)
    return -jnp.sum(terms, -1, where=stats.present), _metrics(stats, s)


@dataclass(frozen=True)
class EXOList(Options):
    """Options of `exo_k`: beta, and beta_r, the temperature of the scores."""

    beta: float = above(0, 0.1)
    score_beta: float = above(0, 1.0)


@register("exo_k", EXOList, ListStats, needs=("ref_logps",))
def exo_k(stats: ListStats, config: EXOList) -> Loss:
    """EXO on K candidates: KL(softmax(s) || softmax(r/beta_r)).

    InfoNCA with the divergence the other way round. beta as in DPO; beta_r divides the scores.
    arXiv:2402.00856.
    """
    s = config.beta * stats.candidates.log_ratio
    log_q = log_softmax(_masked(s, stats), -1)
    log_p = log_softmax(_masked(stats.scores / config.score_beta, stats), -1)
    gap = jnp.where(stats.present, log_q - log_p, 0.0)
    return jnp.sum(jnp.exp(log_q) * gap, -1), _metrics(stats, s)


@dataclass(frozen=True)
class RRHF(Options):
    """Options of `rrhf`: the weight of the ranking, the length exponent, mean or sum of the NLL."""

    rank_weight: float = at_least(0, 1.0)
    length_exponent: float = at_least(0, 1.0)
    nll: Literal["sum", "mean"] = "sum"


@register("rrhf", RRHF, ListStats)
def rrhf(stats: ListStats, config: RRHF) -> Loss:
    """Rank responses: sum over r_i > r_j of max(0, p_j - p_i), plus the NLL of the best candidate.

    p_i = l_i / |y_i|^kappa, kappa 1; no beta and no reference. The NLL is a sum as in the paper
    (its code averages over the padded length); rank weight 1. arXiv:2304.05302.
    """
    candidates = stats.candidates
    p = candidates.logps / candidates.safe_lengths**config.length_exponent
    gaps = jax.nn.relu(p[:, None, :] - p[:, :, None])
    rank = jnp.sum(gaps, (1, 2), where=_better(stats))
    kept_likely = candidates.logps if config.nll == "sum" else candidates.mean_logps
    nll = -_by_rank(stats, kept_likely)[0][:, 0]
    keep = stats.kept()
    metrics = {"rank": masked_mean(rank, keep), "nll": masked_mean(nll, keep)}
    return config.rank_weight * rank + nll, {**metrics, **_metrics(stats, p)}


@dataclass(frozen=True)
class PRO(Options):
    """Options of `pro`: the weight of the NLL, multiplied by (K - 1)^2."""

    nll_weight: float = at_least(0, 0.05)


@register("pro", PRO, ListStats)
def pro(stats: ListStats, config: PRO) -> Loss:
    """Preference ranking optimisation: each candidate against all that rank below it.

    With p the mean log-probs, best first: T_kj = r_k - r_j, T_k = max_j T_kj, and
    sum_{k<K} logsumexp(p_k T_k, {p_j T_kj}_{j>k}) - p_k T_k, plus 0.05 (K - 1)^2 times the summed
    NLL of the best. The score differences act as inverse temperatures; no beta and no reference.
    The log of a sum with an added constant in the authors' code is a logsumexp here.
    arXiv:2306.17492.
    """
    means, sums = stats.candidates.mean_logps, stats.candidates.logps
    arrays = _by_rank(stats, means, sums, stats.scores, stats.present)
    p, l, r, present = arrays  # noqa: E741
    size = p.shape[-1]
    below = jnp.triu(jnp.ones((size, size), bool), 1) & present[:, None, :] & present[:, :, None]
    differences = jnp.where(below, r[:, :, None] - r[:, None, :], 0.0)  # [B, k, j]
    own = p * jnp.max(differences, -1)
    others = jnp.where(below, p[:, None, :] * differences, _ABSENT)
    everyone = logsumexp(jnp.concatenate([own[:, :, None], others], -1), -1)
    rank = jnp.sum(everyone - own, -1, where=below.any(-1))
    count = jnp.sum(present, -1)
    nll = -l[:, 0]
    keep = stats.kept()
    metrics = {"rank": masked_mean(rank, keep), "nll": masked_mean(nll, keep)}
    loss = rank + config.nll_weight * jnp.square(count - 1) * nll
    return loss, {**metrics, **_metrics(stats, means)}


@dataclass(frozen=True)
class LiPO(Options):
    """Options of `lipo`: beta."""

    beta: float = above(0, 0.1)


@register("lipo", LiPO, ListStats, aliases=("lipo_lambda",), needs=("ref_logps",))
def lipo(stats: ListStats, config: LiPO) -> Loss:
    """LiPO-lambda: pairs weighted by what swapping them would change in the discounted gain.

    Sum over psi_i > psi_j of |G_i - G_j| |1/D(tau_i) - 1/D(tau_j)| softplus(-(s_i - s_j)), with
    G = 2^psi - 1, D(tau) = log(1 + tau) and tau the rank by the current s, from 1, without
    gradient. psi are the scores, best scaled to [0, 1]. beta as in DPO. arXiv:2402.01878.
    """
    s = config.beta * stats.candidates.log_ratio
    order = jnp.argsort(-jax.lax.stop_gradient(_masked(s, stats)), -1, stable=True)
    ranks = jnp.argsort(order, -1) + 1
    discount = 1 / jnp.log1p(ranks.astype(s.dtype))
    gain = jnp.exp2(stats.scores) - 1
    weights = jnp.abs(gain[:, :, None] - gain[:, None, :])
    weights = weights * jnp.abs(discount[:, :, None] - discount[:, None, :])
    losses = softplus(s[:, None, :] - s[:, :, None])
    return jnp.sum(weights * losses, (1, 2), where=_better(stats)), _metrics(stats, s)
