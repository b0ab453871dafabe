"""Weighted sums of algorithms, the union of all option classes, and named presets."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.preference.distributional import GroupDistributionalPO
from jaxllm.preference.listwise import (
    NCA,
    PRO,
    RRHF,
    EXOList,
    InfoNCA,
    LiPO,
    PlackettLuceDPO,
)
from jaxllm.preference.options import Options, above
from jaxllm.preference.pairwise import DPO, IPO
from jaxllm.preference.pairwise_anchored import RPO, BCOPair
from jaxllm.preference.pointwise import BCO, KTO, RAFT, RFT, SFT
from jaxllm.preference.policy_gradient import GRPO, REINFORCE, RLOO, ReMax
from jaxllm.preference.ppo import PPO
from jaxllm.preference.reference_free import SimPO
from jaxllm.preference.registry import algorithm, algorithm_of, needs, preference_loss, register
from jaxllm.preference.reward_model import BradleyTerry
from jaxllm.preference.statistics import (
    ListStats,
    Loss,
    Metrics,
    PairStats,
    PointStats,
    RewardPairs,
    RolloutStats,
    Stats,
    masked_mean,
)
from jaxllm.preference.wrappers import TRDPO, WPO, PairLoss

PointLoss = SFT | RAFT | RFT | KTO | BCO
RolloutLoss = REINFORCE | ReMax | RLOO | GRPO | PPO
ListLoss = PlackettLuceDPO | InfoNCA | NCA | EXOList | RRHF | PRO | LiPO
SingleLoss = (
    PairLoss
    | WPO
    | TRDPO
    | GroupDistributionalPO
    | PointLoss
    | RolloutLoss
    | ListLoss
    | BradleyTerry
)


@dataclass(frozen=True)
class Part(Options):
    """One term of a weighted sum."""

    algorithm: SingleLoss
    weight: float = above(0, 1.0)


@dataclass(frozen=True)
class WeightedSum(Options):
    """Options of `weighted_sum`: its terms, all on the same kind of statistics."""

    parts: tuple[Part, ...] = (Part(DPO()), Part(SFT()))

    def __post_init__(self) -> None:
        """Refuses a sum of nothing."""
        if not self.parts:
            raise InputError("WeightedSum.parts is empty, expected at least one term")


AlgorithmConfig = SingleLoss | WeightedSum
"""Options of any algorithm: the type of a config field that names one."""


def _sum_needs(config: WeightedSum) -> tuple[str, ...]:
    names = [name for part in config.parts for name in needs(part.algorithm)]
    return tuple(dict.fromkeys(names))


@register(
    "weighted_sum",
    WeightedSum,
    PairStats,
    PointStats,
    ListStats,
    RolloutStats,
    RewardPairs,
    needs=_sum_needs,
)
def weighted_sum(stats: Stats, config: WeightedSum) -> Loss:
    """sum_i w_i L_i: any algorithms that take these statistics, from one forward pass.

    Metrics are those of the terms, of equal names those of the first, and `loss/NAME` of each, with
    a number from its second appearance on. Each term has its own beta.
    """
    total, keep = jnp.zeros(()), stats.kept()
    metrics: Metrics = {}
    losses: Metrics = {}
    for number, part in enumerate(config.parts):
        per_row, found = preference_loss(stats, part.algorithm)
        total = total + part.weight * per_row
        metrics = {**found, **metrics}
        name = f"loss/{algorithm_of(part.algorithm).name}"
        losses[name if name not in losses else f"{name}_{number}"] = masked_mean(per_row, keep)
    return jnp.broadcast_to(total, keep.shape), {**metrics, **losses}


PRESETS: dict[str, AlgorithmConfig] = {
    # arXiv:2412.20299 and its ablations; released names mpo, cdpo, mft, kto.
    "gdpo_paper": GroupDistributionalPO(),
    "belief_conditioned_dpo": GroupDistributionalPO(kl_weight=0.0, nll_weight=0.0),
    "belief_only": GroupDistributionalPO(preference_weight=0.0),
    "gdpo_kto": GroupDistributionalPO(preference=KTO()),
    "gdpo_kto_released": GroupDistributionalPO(preference=KTO(), score_belief=True),
    "ipo_sum": IPO(average="sum"),
    # TRL's paper index.
    "simpo_paper": SimPO(beta=2.5, gamma=1.375),
    "iterative_rpo": RPO(nll_weight=1.0),
    # arXiv:2405.16436: the NLL weight that goes with beta 0.01.
    "rpo_overoptimisation": RPO(beta=0.01, nll_weight=0.005),
    # arXiv:2411.10442, mixed preference optimisation of multimodal models.
    "mpo": WeightedSum(
        (Part(DPO(), 0.8), Part(BCOPair(), 0.2), Part(SFT(), 1.0)),
    ),
    "grpo_paper": GRPO(kl_coef=0.04, loss_type="grpo"),
    "dapo": GRPO(epsilon_high=0.28, loss_type="dapo"),
    "dr_grpo": GRPO(loss_type="dr_grpo", max_length=1024, scale_rewards="none"),
    "gspo": GRPO(epsilon=3e-4, epsilon_high=4e-4, loss_type="grpo", importance="sequence"),
}
"""Options under a name: settings of papers that differ from the defaults."""


def preset(name: str) -> Options:
    """Options of a preset, or the defaults of the algorithm of that name.

    Raises:
      InputError: Neither is known.
    """
    return PRESETS[name] if name in PRESETS else algorithm(name).config()
