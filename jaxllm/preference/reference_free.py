"""Pair losses without a reference model: SimPO, AlphaPO, CPO, ORPO, SLiC-HF.

l is the summed log-prob, m = l/|y| its mean per token, P = exp(m). beta is no KL strength here, as
there is no reference, but the scale of the reward; rewards in the metrics are beta m or beta l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxllm.preference.options import Options, above, at_least
from jaxllm.preference.pairwise import MAX_EXPONENT
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import Loss, PairStats, masked_mean, pair_metrics


@dataclass(frozen=True)
class SimPO(Options):
    """Options of `simpo`: beta, the scale of the reward, and gamma, the margin asked for."""

    beta: float = above(0, 2.0)
    gamma: float = at_least(0, 1.0)


@register("simpo", SimPO, PairStats)
def simpo(stats: PairStats, config: SimPO) -> Loss:
    """Simple preference optimisation: -log sigma(beta (m_w - m_l) - gamma).

    beta 2 to 2.5 (up to 10) scales the mean log-prob; gamma/beta from 0 to 1, at first 0.5. Eq. 6
    of arXiv:2405.14734 and its README.
    """
    w, l = config.beta * stats.chosen.mean_logps, config.beta * stats.rejected.mean_logps  # noqa: E741
    return -log_sigmoid(w - l - config.gamma), pair_metrics(stats, w, l)


@dataclass(frozen=True)
class AlphaPO(Options):
    """Options of `alphapo`: as SimPO, and alpha, the shape of the reward."""

    beta: float = above(0, 2.5)
    gamma: float = at_least(0, 0.1)
    alpha: float = 0.25


@register("alphapo", AlphaPO, PairStats)
def alphapo(stats: PairStats, config: AlphaPO) -> Loss:
    """AlphaPO: SimPO with the reward beta (1 - P^-alpha)/alpha in the place of beta m.

    alpha -> 0 is SimPO (and 0 is taken as that); alpha 0.25, beta 2.5, gamma 0.1. The exponent is
    cut at 80, beyond which no gradient passes. arXiv:2501.03884.
    """

    def reward(mean_logps: jax.Array) -> jax.Array:
        if config.alpha == 0:
            return config.beta * mean_logps
        exponent = jnp.minimum(-config.alpha * mean_logps, MAX_EXPONENT)
        return -config.beta * jnp.expm1(exponent) / config.alpha

    w, l = reward(stats.chosen.mean_logps), reward(stats.rejected.mean_logps)  # noqa: E741
    return -log_sigmoid(w - l - config.gamma), pair_metrics(stats, w, l)


@dataclass(frozen=True)
class CPO(Options):
    """Options of `cpo`: beta, the scale of the margin, and the weight of the NLL per token."""

    beta: float = above(0, 0.1)
    nll_weight: float = at_least(0, 1.0)


@register("cpo", CPO, PairStats)
def cpo(stats: PairStats, config: CPO) -> Loss:
    """Contrastive preference optimisation: -log sigma(beta (l_w - l_l)) - alpha m_w.

    DPO with a uniform reference, and the likelihood of the chosen one. beta 0.1 scales the margin,
    alpha 1. arXiv:2401.08417.
    """
    w, l = config.beta * stats.chosen.logps, config.beta * stats.rejected.logps  # noqa: E741
    nll = -stats.chosen.mean_logps
    metrics = {"nll": masked_mean(nll, stats.kept()), **pair_metrics(stats, w, l)}
    return -log_sigmoid(w - l) + config.nll_weight * nll, metrics


@dataclass(frozen=True)
class ORPO(Options):
    """Options of `orpo`: the weight of the odds ratio, and the tokens that the NLL averages."""

    odds_weight: float = above(0, 0.1)
    nll_over: Literal["completion", "prompt_and_completion"] = "completion"


@register(
    "orpo",
    ORPO,
    PairStats,
    needs=lambda c: () if c.nll_over == "completion" else ("prompt_logps", "prompt_lengths"),
)
def orpo(stats: PairStats, config: ORPO) -> Loss:
    """Odds-ratio preference optimisation: NLL(chosen) - lambda log sigma(o).

    o = (m_w - m_l) - [log(1 - P_w) - log(1 - P_l)], the log odds ratio. The weight lambda 0.1 is
    what libraries call beta. Libraries differ on whether the NLL runs over the prompt too; the
    default is the completion alone. log(1 - P) is guarded at P -> 1. arXiv:2403.07691.
    """
    w, l = stats.chosen.mean_logps, stats.rejected.mean_logps  # noqa: E741
    odds = (w - l) - (log1mexp(w) - log1mexp(l))
    nll = -w
    if config.nll_over == "prompt_and_completion":
        chosen = stats.chosen
        tokens = chosen.lengths + chosen.prompt_lengths
        nll = -(chosen.logps + chosen.prompt_logps) / jnp.maximum(tokens, 1)
    odds_loss = -log_sigmoid(odds)
    keep = stats.kept()
    metrics = {
        "nll": masked_mean(nll, keep),
        "odds_ratio/log": masked_mean(odds, keep),
        "odds_ratio/loss": masked_mean(odds_loss, keep),
        **pair_metrics(stats, config.odds_weight * w, config.odds_weight * l),
    }
    return nll + config.odds_weight * odds_loss, metrics


def log1mexp(v: jax.Array) -> jax.Array:
    """log(1 - exp(v)) for v <= 0, with v held at most -1e-7; values and gradients are finite.

    log(-expm1(v)) is exact near 0 and log1p(-exp(v)) far from it. Both branches of the `where` see
    an argument that is safe for them, since a NaN gradient of the branch not taken would remain.
    """
    v = jnp.minimum(v, -1e-7)
    near = v > -math.log(2)
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, v, -0.5))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, v))),
    )


@dataclass(frozen=True)
class SLiC(Options):
    """Options of `slic_hf`: delta, the weight of the regulariser, and what it keeps likely."""

    margin: float = above(0, 1.0)
    nll_weight: float = at_least(0, 0.1)
    regulariser: Literal["chosen", "target"] = "chosen"


@register(
    "slic_hf",
    SLiC,
    PairStats,
    needs=lambda c: ("target",) if c.regulariser == "target" else (),
)
def slic_hf(stats: PairStats, config: SLiC) -> Loss:
    """Sequence likelihood calibration: max(0, delta - l_w + l_l) + lambda NLL.

    delta 1 is the margin in nats asked for, lambda 0.1 (HALOs). The NLL is summed over the chosen
    completion by default; the paper takes the target of supervised training. arXiv:2305.10425.
    """
    w, l = stats.chosen.logps, stats.rejected.logps  # noqa: E741
    kept_likely = stats.chosen if config.regulariser == "chosen" else stats.target
    loss = jax.nn.relu(config.margin - w + l) - config.nll_weight * kept_likely.logps
    return loss, pair_metrics(stats, w, l)
