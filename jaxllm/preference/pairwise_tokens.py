"""Pair losses that read tokens or whole-vocabulary sums: LD-DPO and TDPO.

Notation of `pairwise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxllm.preference.options import Options, above, at_least, between
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import (
    Loss,
    PairStats,
    Sequences,
    masked_mean,
    pair_metrics,
    ratio_metrics,
)


@dataclass(frozen=True)
class LengthDesensitisedDPO(Options):
    """Options of `ld_dpo`: beta, alpha, and whether the reference is discounted too."""

    beta: float = above(0, 0.1)
    alpha: float = between(0, 1, 0.5)
    reference: Literal["discounted", "full"] = "discounted"


@register(
    "ld_dpo",
    LengthDesensitisedDPO,
    PairStats,
    needs=("token_logps", "ref_token_logps", "mask", "ref_logps"),
)
def ld_dpo(stats: PairStats, config: LengthDesensitisedDPO) -> Loss:
    """Length-desensitised DPO: DPO on l' = sum_{t<=m} log p + alpha sum_{t>m} log p.

    m = min(|w|, |l|): tokens beyond the shorter one's length count alpha. alpha 1 is DPO. The
    default discounts policy and reference, so that at policy = reference the margin is 0; "full"
    leaves the reference as it is, as one library does. beta as in DPO; rewards in the metrics
    are those of the discounted log-ratios. arXiv:2409.06411.
    """
    shared = jnp.minimum(stats.chosen.lengths, stats.rejected.lengths)[:, None]

    def log_ratio(sequences: Sequences) -> jax.Array:
        mask = sequences.mask
        number = jnp.cumsum(mask, -1)  # 1 at the first token of the completion.
        weights = jnp.where(mask, jnp.where(number <= shared, 1.0, config.alpha), 0.0)
        policy = jnp.where(mask, sequences.token_logps, 0.0)
        ref = jax.lax.stop_gradient(jnp.where(mask, sequences.ref_token_logps, 0.0))
        ref_weights = weights if config.reference == "discounted" else 1.0
        return jnp.sum(weights * policy - ref_weights * ref, -1)

    w, l = (config.beta * log_ratio(side) for side in (stats.chosen, stats.rejected))  # noqa: E741
    return -log_sigmoid(w - l), pair_metrics(stats, w, l)


@dataclass(frozen=True)
class TDPO1(Options):
    """Options of `tdpo1`: beta."""

    beta: float = above(0, 0.1)


@dataclass(frozen=True)
class TDPO2(Options):
    """Options of `tdpo2`: beta, and alpha, the weight of the difference of divergences."""

    beta: float = above(0, 0.1)
    alpha: float = at_least(0, 0.5)


@register("tdpo1", TDPO1, PairStats, needs=("ref_logps", "kl"))
def tdpo1(stats: PairStats, config: TDPO1) -> Loss:
    """Token-level DPO, first form: -log sigma(beta (Delta - (K_l - K_w))).

    K = sum over tokens of KL(reference || policy) over the whole vocabulary, with gradient. beta is
    the KL strength per token. arXiv:2404.11999.
    """
    difference = stats.rejected.kl - stats.chosen.kl
    return _token_level(stats, config.beta, difference)


@register("tdpo2", TDPO2, PairStats, needs=("ref_logps", "kl"))
def tdpo2(stats: PairStats, config: TDPO2) -> Loss:
    """Token-level DPO, second form: -log sigma(beta (Delta - alpha (K_l - sg[K_w]))).

    As `tdpo1`; the divergence on the chosen one gets no gradient, so that only the rejected one's
    is held down. alpha 0.5. arXiv:2404.11999.
    """
    chosen = jax.lax.stop_gradient(stats.chosen.kl)
    difference = stats.rejected.kl - chosen
    return _token_level(stats, config.beta, config.alpha * difference)


def _token_level(stats: PairStats, beta: float, difference: jax.Array) -> Loss:
    keep = stats.kept()
    metrics = {
        "kl/chosen": masked_mean(stats.chosen.kl, keep),
        "kl/rejected": masked_mean(stats.rejected.kl, keep),
        **ratio_metrics(stats, beta),
    }
    return -log_sigmoid(beta * (stats.margin - difference)), metrics
