"""The Bradley-Terry loss of reward models, with margins, centring and several objectives."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxllm.errors import InputError
from jaxllm.preference.options import Options, at_least
from jaxllm.preference.registry import register
from jaxllm.preference.statistics import Loss, RewardPairs, masked_mean


@dataclass(frozen=True)
class BradleyTerry(Options):
    """Options of `bradley_terry`.

    Attributes:
      centre: Weight of (r_w + r_l)^2, which fixes the constant that pairs leave free; often 0.01.
      weights: Weight of each objective of rewards [B, J]; None for rewards [B].
    """

    centre: float = at_least(0, 0.0)
    weights: tuple[float, ...] | None = None


@register("bradley_terry", BradleyTerry, RewardPairs, aliases=("reward_model",))
def bradley_terry(stats: RewardPairs, config: BradleyTerry) -> Loss:
    """Bradley-Terry: -log sigma(r_w - r_l - margin) + centre (r_w + r_l)^2.

    `margin` is how much better the chosen one was judged (arXiv:2307.09288), 0 without one. With
    several objectives the losses of the heads are added with `weights`, and the rewards in the
    metrics are the weighted sums. Has no beta. Eq. 2 of arXiv:2203.02155; centring after
    arXiv:2312.09244.

    Raises:
      InputError: The weights do not fit the rewards.
    """
    chosen, rejected = stats.chosen, stats.rejected
    margin = jnp.zeros_like(chosen) if stats.margin is None else stats.margin
    heads = None if chosen.ndim == 1 else chosen.shape[-1]
    given = None if config.weights is None else len(config.weights)
    if heads != given:
        raise InputError(
            f"bradley_terry has {given} weights for {heads} objectives, expected equal numbers"
        )
    losses = -log_sigmoid(chosen - rejected - margin) + config.centre * jnp.square(
        chosen + rejected
    )

    def combined(x: jax.Array) -> jax.Array:
        return x if config.weights is None else x @ jnp.asarray(config.weights, x.dtype)

    w, l, keep = combined(chosen), combined(rejected), stats.kept()  # noqa: E741
    return combined(losses), {
        "rewards/chosen": masked_mean(w, keep),
        "rewards/rejected": masked_mean(l, keep),
        "rewards/accuracies": masked_mean(w > l, keep),
        "rewards/margins": masked_mean(w - l, keep),
    }
