"""Algorithms around another pair loss: WPO weights its rows, TR-DPO moves its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.preference.options import Options, above, between
from jaxllm.preference.pairwise import (
    DPO,
    EXO,
    FDPO,
    GPO,
    IPO,
    MODPO,
    ConservativeDPO,
    DiscoPOP,
    Hinge,
    LengthDPO,
    NormalisedDPO,
    RobustDPO,
)
from jaxllm.preference.pairwise_anchored import (
    AOT,
    RPO,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    DPOPositive,
    NCAPair,
)
from jaxllm.preference.pairwise_tokens import TDPO1, TDPO2, LengthDesensitisedDPO
from jaxllm.preference.reference_free import CPO, ORPO, AlphaPO, SimPO, SLiC
from jaxllm.preference.registry import needs, preference_loss, register
from jaxllm.preference.statistics import Loss, PairStats, Sequences, masked_mean

ReferencePairLoss = (
    DPO
    | ConservativeDPO
    | RobustDPO
    | IPO
    | Hinge
    | EXO
    | DiscoPOP
    | NormalisedDPO
    | FDPO
    | GPO
    | LengthDPO
    | MODPO
    | BCOPair
    | NCAPair
    | SPPO
    | APOZero
    | APODown
    | DPOPositive
    | RPO
    | AOT
    | AOTUnpaired
    | LengthDesensitisedDPO
    | TDPO1
    | TDPO2
)
PairLoss = ReferencePairLoss | SimPO | AlphaPO | CPO | ORPO | SLiC
"""Every pair loss that stands on its own; config fields of this type take any of them."""


@dataclass(frozen=True)
class WPO(Options):
    """Options of `wpo`: the pair loss, and the largest product of weights.

    None leaves it free, up to e^60, so that a row's loss stays a finite float32.
    """

    base: PairLoss = DPO()
    largest_weight: float | None = above(0, 1.0)


@register("wpo", WPO, PairStats, needs=lambda c: (*needs(c.base), "collision"))
def wpo(stats: PairStats, config: WPO) -> Loss:
    """Weighted preference optimisation: w(y_w) w(y_l) times any pair loss.

    w(y) = exp(mean_t [log p(y_t) - log sum_v p_t(v)^2]), without gradient: how probable the
    completion is under the policy, set against what sampling from it gives on average. The authors
    bound the product by 1, the default; TRL does not. beta is that of the base loss.
    arXiv:2406.11827.
    """

    def log_weight(sequences: Sequences) -> jax.Array:
        return (sequences.logps - sequences.collision) / sequences.safe_lengths

    log_product = jax.lax.stop_gradient(log_weight(stats.chosen) + log_weight(stats.rejected))
    largest = config.largest_weight
    log_product = jnp.minimum(log_product, 60.0 if largest is None else jnp.log(largest))
    weights = jnp.exp(log_product)
    loss, metrics = preference_loss(stats, config.base)
    return weights * loss, {**metrics, "weights": masked_mean(weights, stats.kept())}


@dataclass(frozen=True)
class TRDPO(Options):
    """Options of `tr_dpo`: the pair loss, share of the policy, and steps between two moves."""

    base: ReferencePairLoss = DPO()
    alpha: float = between(0, 1, 0.6)
    every: int = above(0, 512)


@register("tr_dpo", TRDPO, PairStats, needs=lambda c: needs(c.base))
def tr_dpo(stats: PairStats, config: TRDPO) -> Loss:
    """Trust-region DPO: any pair loss whose reference follows the policy; see `moved_reference`.

    alpha 0.6 every 512 steps (TRL). beta is that of the base loss, now against a moving reference,
    so reference log-probs cannot be computed beforehand. arXiv:2404.09656.
    """
    return preference_loss(stats, config.base)


def moved_reference(config: TRDPO, reference: Any, policy: Any, step: jax.Array) -> Any:
    """Mixes alpha of the policy into the reference every `every` steps; any pytree.

    Args:
      config: alpha and every.
      reference: Parameters of the reference.
      policy: Parameters of the policy after `step` updates.
      step: Updates done so far; at 0 nothing moves.
    """
    move = (step > 0) & (step % config.every == 0)
    share = jnp.where(move, config.alpha, 0.0)

    def one(ref: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(move, share * new + (1 - share) * ref, ref).astype(ref.dtype)

    return jax.tree.map(one, reference, policy)
