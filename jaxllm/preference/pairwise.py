"""Pair losses that read the margin only: DPO, its robust forms, IPO, hinge, EXO and others.

With l_w, l_l the summed log-probs of the chosen and the rejected completion, a = l_w - l_w^ref,
c = l_l - l_l^ref, Delta = a - c and u = beta Delta. Where nothing else is said, beta is the
strength of the KL penalty to the reference in the objective that the loss solves: a larger beta
keeps the policy closer, because a given preference then needs a smaller log-ratio. Rewards in
the metrics are beta a and beta c. At policy = reference DPO starts at ln 2 = 0.693; this is no
fault.

Every loss is a sum of log-sigmoids, never the logarithm of a computed probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid, softplus

from jaxllm.errors import InputError
from jaxllm.preference.options import Options, above, at_least
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import Loss, PairStats, ratio_metrics

MAX_EXPONENT = 80.0
"""exp of more than this is near the end of float32; beyond it the gradient is 0."""


@dataclass(frozen=True)
class DPO(Options):
    """Options of `dpo`: beta, the KL strength."""

    beta: float = above(0, 0.1)


@register("dpo", DPO, PairStats, aliases=("sigmoid",), needs=("ref_logps",))
def dpo(stats: PairStats, config: DPO) -> Loss:
    """Direct preference optimisation: -log sigma(u).

    beta 0.1 as in the experiments of the paper. Eq. 7 of arXiv:2305.18290. With one winner against
    one loser, pairwise InfoNCA with a hard label is this loss.
    """
    return -log_sigmoid(config.beta * stats.margin), ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class ConservativeDPO(Options):
    """Options of `cdpo`: beta, and epsilon, the share of labels that are wrong."""

    beta: float = above(0, 0.1)
    label_smoothing: float = at_least(0, 0.1, below=0.5)


@register("cdpo", ConservativeDPO, PairStats, needs=("ref_logps",))
def cdpo(stats: PairStats, config: ConservativeDPO) -> Loss:
    """Conservative DPO: -(1 - eps) log sigma(u) - eps log sigma(-u).

    The optimum is u = logit(1 - eps), so the margin stays bounded. beta as in DPO. Mitchell, "A
    note on DPO with noisy preferences and relationship to IPO", 2023. In the code released with
    arXiv:2412.20299 the name cdpo means something else: `belief_conditioned_dpo` here.
    """
    u, eps = config.beta * stats.margin, config.label_smoothing
    loss = -(1 - eps) * log_sigmoid(u) - eps * log_sigmoid(-u)
    return loss, ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class RobustDPO(Options):
    """Options of `robust_dpo`: beta, and epsilon, the known rate of flipped labels."""

    beta: float = above(0, 0.1)
    label_smoothing: float = at_least(0, 0.1, below=0.5)


@register("robust_dpo", RobustDPO, PairStats, aliases=("robust",), needs=("ref_logps",))
def robust_dpo(stats: PairStats, config: RobustDPO) -> Loss:
    """Robust DPO: [-(1 - eps) log sigma(u) + eps log sigma(-u)] / (1 - 2 eps).

    Its mean over labels flipped at rate eps is the DPO loss on clean labels; it may be negative.
    beta as in DPO. arXiv:2403.00409.
    """
    u, eps = config.beta * stats.margin, config.label_smoothing
    loss = (-(1 - eps) * log_sigmoid(u) + eps * log_sigmoid(-u)) / (1 - 2 * eps)
    return loss, ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class IPO(Options):
    """Options of `ipo`: tau, and whether log-ratios are means or sums over tokens."""

    tau: float = above(0, 0.1)
    average: Literal["mean", "sum"] = "mean"


@register("ipo", IPO, PairStats, needs=("ref_logps",))
def ipo(stats: PairStats, config: IPO) -> Loss:
    """Identity preference optimisation: (Delta - 1/(2 tau))^2.

    tau is the KL strength, in the place of beta: the margin aims at 1/(2 tau) and no further. The
    default takes a and c as means over tokens, as most libraries do; "sum" is the formula as
    printed, Eq. 17 of arXiv:2310.12036. Lengths come from the mask, never from counting tokens
    whose log-ratio is not 0, which is 0/0 at policy = reference.
    """
    if config.average == "mean":
        margin = stats.chosen.mean_log_ratio - stats.rejected.mean_log_ratio
    else:
        margin = stats.margin
    return jnp.square(margin - 1 / (2 * config.tau)), ratio_metrics(stats, config.tau)


@dataclass(frozen=True)
class Hinge(Options):
    """Options of `hinge`: beta."""

    beta: float = above(0, 0.05)


@register("hinge", Hinge, PairStats, aliases=("rso",), needs=("ref_logps",))
def hinge(stats: PairStats, config: Hinge) -> Loss:
    """Hinge on the margin (RSO, "hinge-norm"): max(0, 1 - u).

    1/beta is the margin Delta that is asked for; beta 0.05. arXiv:2309.06657.
    """
    return jax.nn.relu(1 - config.beta * stats.margin), ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class EXO(Options):
    """Options of `exo`: beta, and epsilon, the probability that the label gives the rejected."""

    beta: float = above(0, 0.1)
    label_smoothing: float = above(0, 1e-3, below=0.5)


@register("exo", EXO, PairStats, aliases=("exo_pair",), needs=("ref_logps",))
def exo(stats: PairStats, config: EXO) -> Loss:
    """Efficient exact optimisation on pairs: KL((q_w, q_l) || (1 - eps, eps)), q_w = sigma(u).

    Where DPO measures the forward KL from label to policy, this is the reverse. The fixed point is
    u = logit(1 - eps). beta as in DPO; the authors' code has a log label of -10, eps 4.5e-5.
    arXiv:2402.00856.
    """
    u, eps = config.beta * stats.margin, config.label_smoothing
    log_w, log_l = log_sigmoid(u), log_sigmoid(-u)
    loss = jnp.exp(log_w) * (log_w - math.log1p(-eps)) + jnp.exp(log_l) * (log_l - math.log(eps))
    return loss, ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class DiscoPOP(Options):
    """Options of `discopop`: beta, and the temperature that mixes the two losses."""

    beta: float = above(0, 0.05)
    temperature: float = above(0, 0.05)


@register("discopop", DiscoPOP, PairStats, needs=("ref_logps",))
def discopop(stats: PairStats, config: DiscoPOP) -> Loss:
    """DiscoPOP: (1 - m) (-log sigma(u)) + m exp(-u), m = sigma(u / temperature).

    beta as in DPO, with 0.05 and temperature 0.05. m exp(-u) is one exponential of
    log m - u, so that exp(-u) never overflows before m takes it to 0. arXiv:2406.08414.
    """
    u = config.beta * stats.margin
    scaled = u / config.temperature
    exponential = jnp.exp(jnp.minimum(log_sigmoid(scaled) - u, MAX_EXPONENT))
    loss = sigmoid(-scaled) * softplus(-u) + exponential
    return loss, ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class NormalisedDPO(Options):
    """Options of `dpo_norm`: beta."""

    beta: float = above(0, 5.0)


@register("dpo_norm", NormalisedDPO, PairStats, aliases=("sigmoid_norm",), needs=("ref_logps",))
def dpo_norm(stats: PairStats, config: NormalisedDPO) -> Loss:
    """Length-normalised DPO: -log sigma(beta (a/|w| - c/|l|)).

    beta multiplies a mean, so it is larger than DPO's, 2 to 10; Tulu 3 (arXiv:2411.15124) takes 5.
    """
    w, l = stats.chosen, stats.rejected  # noqa: E741
    loss = -log_sigmoid(config.beta * (w.mean_log_ratio - l.mean_log_ratio))
    return loss, ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class FDPO(Options):
    """Options of `f_dpo`: beta, the divergence, and alpha of the alpha-divergence."""

    beta: float = above(0, 0.1)
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    alpha: float = at_least(0, 0.5, below=1.0)


@register("f_dpo", FDPO, PairStats, needs=("ref_logps",))
def f_dpo(stats: PairStats, config: FDPO) -> Loss:
    """DPO under another divergence: -log sigma(beta [g(a) - g(c)]), g(log r) = f'(r).

    g is a for the reverse KL (then this is DPO), -exp(-a) for the forward KL, log sigma(a) for
    Jensen-Shannon, and exp((alpha - 1) a)/(alpha - 1) for the alpha-divergence, which is the
    forward KL at alpha 0 and, up to a constant, the reverse at alpha -> 1. beta is the strength of
    that divergence. Exponents are cut at 80, beyond which no gradient passes. arXiv:2309.16240.
    """

    def score(log_ratio: jax.Array) -> jax.Array:
        if config.divergence == "reverse_kl":
            return log_ratio
        if config.divergence == "js":
            return log_sigmoid(log_ratio)
        power = 1.0 if config.divergence == "forward_kl" else 1.0 - config.alpha
        return -jnp.exp(jnp.minimum(-power * log_ratio, MAX_EXPONENT)) / power

    margin = score(stats.chosen.log_ratio) - score(stats.rejected.log_ratio)
    return -log_sigmoid(config.beta * margin), ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class GPO(Options):
    """Options of `gpo`: beta, and the convex function of the margin."""

    beta: float = above(0, 0.1)
    function: Literal["logistic", "hinge", "squared", "exponential", "truncated_quadratic"] = (
        "logistic"
    )


@register("gpo", GPO, PairStats, needs=("ref_logps",))
def gpo(stats: PairStats, config: GPO) -> Loss:
    """Generalised preference optimisation: f(u) with f convex and f'(0) < 0.

    logistic log(1 + exp(-u)) is DPO, hinge max(0, 1 - u) is RSO, squared (1 - u)^2 is beta^2 times
    IPO (sum form) with tau = beta/2; exponential exp(-u), its exponent cut at 80, and truncated
    quadratic max(0, 1 - u)^2 have no other name. beta scales the margin as in DPO.
    arXiv:2402.05749.
    """
    u = config.beta * stats.margin
    loss = {
        "logistic": lambda: softplus(-u),
        "hinge": lambda: jax.nn.relu(1 - u),
        "squared": lambda: jnp.square(1 - u),
        "exponential": lambda: jnp.exp(jnp.minimum(-u, MAX_EXPONENT)),
        "truncated_quadratic": lambda: jnp.square(jax.nn.relu(1 - u)),
    }[config.function]()
    return loss, ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class LengthDPO(Options):
    """Options of `r_dpo`: beta, and alpha, the penalty per token of length."""

    beta: float = above(0, 0.1)
    alpha: float = at_least(0, 0.01)


@register("r_dpo", LengthDPO, PairStats, needs=("ref_logps",))
def r_dpo(stats: PairStats, config: LengthDPO) -> Loss:
    """Length-regularised DPO: -log sigma(u + alpha (|w| - |l|)).

    From max r - alpha |y| - beta KL follows r = beta log(policy/ref) + alpha |y| + const, hence the
    plus: a longer winner is partly explained by its length and pushed less. Some forks carry a
    minus. beta as in DPO; alpha between 0.005 and 0.5. arXiv:2403.19159.
    """
    longer = (stats.chosen.lengths - stats.rejected.lengths).astype(stats.margin.dtype)
    u = config.beta * stats.margin + config.alpha * longer
    return -log_sigmoid(u), ratio_metrics(stats, config.beta)


@dataclass(frozen=True)
class MODPO(Options):
    """Options of `modpo`: beta, and w_0 of this objective, then those of the others; sum 1."""

    beta: float = above(0, 0.1)
    weights: tuple[float, ...] = (0.5, 0.5)

    def __post_init__(self) -> None:
        """Refuses weights that are not on the simplex or leave this objective out."""
        super().__post_init__()
        if min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6 or self.weights[0] == 0:
            raise InputError(
                f"MODPO.weights are {self.weights}, expected numbers >= 0 that sum to 1, "
                "the first above 0"
            )


@register("modpo", MODPO, PairStats, needs=("ref_logps", "objective_margins"))
def modpo(stats: PairStats, config: MODPO) -> Loss:
    """Multi-objective DPO: -log sigma((1/w_0) [u - sum_k w_k (m_k^w - m_k^l)]).

    `objective_margins` [B, J] are m_k^w - m_k^l, the scores of the other objectives' reward models
    or implicit rewards. beta is the KL strength of the combined objective. arXiv:2310.03708.

    Raises:
      InputError: The margins are not one fewer than the weights.
    """
    margins = jax.lax.stop_gradient(stats.objective_margins)
    others = jnp.asarray(config.weights[1:], margins.dtype)
    if margins.shape[-1] != len(others):
        raise InputError(
            f"modpo has {len(config.weights)} weights and margins of {margins.shape[-1]} other "
            "objectives, expected one weight more than margins"
        )
    u = (config.beta * stats.margin - margins @ others) / config.weights[0]
    return -log_sigmoid(u), ratio_metrics(stats, config.beta)
