"""The update step of policy gradients: one sampling, one or several updates, one program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.preference.config import NoReference
from jaxllm.preference.log_probs import (
    SlotShape,
    row_hidden,
    slot_lengths,
    slot_scores,
    slot_tokens,
)
from jaxllm.preference.policy import Adapted, Policy
from jaxllm.preference.registry import needs, preference_loss
from jaxllm.preference.statistics import RolloutStats, masked_mean, mean_over_rows
from jaxllm.preference.step import move_reference
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.state import TrainState
from jaxllm.training.step import Batch, Metrics, StepFn, apply_gradients

Tree = Any
Fixed = dict[str, jax.Array]
"""What stays the same over the updates of a step: old and reference log-probs, old values."""


class RolloutLoss:
    """The loss of sampled completions under a policy gradient."""

    def __init__(self, algorithm: Any, policy: Policy, shape: SlotShape, updates: int):
        self.algorithm, self.policy, self.shape = algorithm, policy, shape
        self.need, self.updates = needs(algorithm), updates

    def token_logps(self, adapted: Adapted, batch: Batch) -> jax.Array:
        """Log p of each token of each completion, float32 [N, L]."""
        model, adapters = adapted
        hidden = row_hidden(model, batch, self.shape, adapters)
        scores = slot_scores(model, hidden, batch, self.shape, ("token_logps",))
        return scores.token_logps[:, 0]

    def values(self, params: Tree, batch: Batch) -> jax.Array:
        """The critic's value before each token [N, L]."""
        return slot_tokens(batch, self.shape, self.policy.values(params, batch, self.shape))[:, 0]

    def fixed(self, params: Tree, extra: Tree, batch: Batch) -> Fixed:
        """What is computed once, before the first update."""
        found: Fixed = {}
        if self.updates > 1 or "old_logps" in self.need:
            found["old_logps"] = self.token_logps(self.policy.build(params, extra), batch)
        if "old_values" in self.need:
            found["old_values"] = self.values(params, batch)
        if not isinstance(self.policy.reference, NoReference):
            other = self.policy.build_reference(params, extra)
            found["ref_logps"] = self.token_logps(other, batch)
        return jax.lax.stop_gradient(found)

    def __call__(
        self, params: Tree, extra: Tree, batch: Batch, fixed: Fixed
    ) -> tuple[jax.Array, Metrics]:
        """Returns mean loss and metrics of the policy as it is after some of the updates."""
        lengths = slot_lengths(batch, self.shape)[:, 0]
        stats = RolloutStats(
            logps=self.token_logps(self.policy.build(params, extra), batch),
            mask=jnp.arange(self.shape.completion_length) < lengths[:, None],
            rewards=batch["scores"][:, 0],
            values=self.values(params, batch) if "values" in self.need else None,
            baselines=batch.get("baselines"),
            valid=batch["valid"],
            **fixed,
        )
        per_row, metrics = preference_loss(stats, self.algorithm)
        kept = stats.kept()
        more = {"length": masked_mean(lengths, kept)}
        if "ref_logps" in fixed:
            drift = jnp.sum(jnp.where(stats.mask, stats.logps - stats.ref_logps, 0.0), -1)
            more["kl_to_reference"] = jax.lax.stop_gradient(masked_mean(drift, kept))
        return mean_over_rows(per_row, stats), {**more, **metrics}


def rollout_step(
    loss_of: RolloutLoss, optimizer: optax.GradientTransformation, config: OptimizerConfig
) -> StepFn:
    """Returns the step: what is fixed, then the updates on the whole batch, one after another."""
    grad_fn = jax.value_and_grad(loss_of, has_aux=True)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        del key  # Completions are sampled before, and dropout is off.
        fixed = loss_of.fixed(state.params, state.extra, batch)

        def update(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            (loss, metrics), grads = grad_fn(state.params, state.extra, batch, fixed)
            metrics = {"loss": loss, **metrics}
            return apply_gradients(state, grads, metrics, batch, optimizer, config.ema_decay)

        if loss_of.updates == 1:
            new, metrics = update(state, None)
        else:
            new, several = jax.lax.scan(update, state, None, length=loss_of.updates)
            metrics = jax.tree.map(lambda m: jnp.mean(m, 0), several)
            new = dataclasses.replace(new, step=state.step + 1)
        return move_reference(loss_of.policy, new), metrics

    return step
