"""Optimiser and learning-rate schedule from a small config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from jaxllm.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam or AdamW with warm-up, a schedule, clipping, accumulation and weight averaging.

    RMSprop, as of the DPO paper's code (arXiv:2305.18290), is g / (sqrt(v) + eps) with v an average
    of g^2 of decay beta2, uncorrected for its start; it keeps one moment.
    """

    name: Literal["adamw", "adam", "rmsprop", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    """Learning rate at the end of a cosine or linear schedule, as a fraction of the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to tensors with two or more dimensions (stacked scales and biases excepted)."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; None for no clipping."""
    accumulate: int = 1
    """Micro-batches a step is cut into; their gradients are averaged."""
    ema_decay: float | None = None
    """Decay of the parameter average used for evaluation and sampling; None for no average."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate {self.learning_rate} must be positive")
        if self.accumulate < 1:
            raise InputError(f"accumulate {self.accumulate} must be at least 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay {self.ema_decay} is outside [0, 1)")
        if self.name != "adamw" and self.weight_decay:
            raise InputError(f"weight_decay {self.weight_decay} is only used by adamw")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule over `steps` updates.

    Update t < W of the warm-up has rate (t + 1) / (W + 1) of the peak, update W the peak itself.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(1, steps - config.warmup_steps)
    after: optax.Schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return after
    rise = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def decay_mask(params: Any) -> Any:
    """Returns True for the tensors that weight decay touches: kernels and embeddings.

    These have two or more dimensions. So do scales and biases of stacked layers, which are told by
    their names.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and not name.endswith(("scale", "bias", "norm"))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns clipping followed by the optimiser at its scheduled learning rate."""
    rate = learning_rate(config, steps)
    moments = dict(b1=config.beta1, b2=config.beta2, eps=config.eps)
    if config.name == "adamw":
        base = optax.adamw(rate, weight_decay=config.weight_decay, mask=decay_mask, **moments)
    elif config.name == "adam":
        base = optax.adam(rate, **moments)
    elif config.name == "rmsprop":
        scale = optax.scale_by_rms(decay=config.beta2, eps=config.eps, eps_in_sqrt=False)
        base = optax.chain(scale, optax.scale_by_learning_rate(rate))
    else:
        base = optax.sgd(rate)
    if config.clip_norm is None:
        return base
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), base)
