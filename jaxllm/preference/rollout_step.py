"""The update step of policy gradients: one sampling, one or several updates, one program.

A step passes over its completions `epochs` times and cuts each pass, in an order drawn anew, into
`minibatches` parts of one update each (Algorithm 1 of arXiv:1707.06347). What belongs to the
sampling is computed before the first update, over all completions: log-probs of the policy that
sampled and of the reference, old values, advantages.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.parallel.sharding import constrain
from jaxllm.preference.config import NoReference, OnPolicyData
from jaxllm.preference.log_probs import (
    SlotShape,
    row_hidden,
    slot_lengths,
    slot_scores,
    slot_tokens,
)
from jaxllm.preference.policy import Adapted, Policy
from jaxllm.preference.ppo import batch_advantages
from jaxllm.preference.registry import needs, preference_loss
from jaxllm.preference.statistics import RolloutStats, masked_mean, mean_over_rows
from jaxllm.preference.step import move_reference
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.state import TrainState
from jaxllm.training.step import Batch, Metrics, StepFn, apply_gradients

Tree = Any
Fixed = dict[str, jax.Array]
"""What stays the same over the updates of a step, by the names of `RolloutStats`."""


class RolloutLoss:
    """The loss of sampled completions under a policy gradient.

    Args:
      algorithm: Its options.
      policy: The policy.
      shape: Of the batches.
      data: Says how often a step passes over its completions, and in how many parts.
    """

    def __init__(self, algorithm: Any, policy: Policy, shape: SlotShape, data: OnPolicyData):
        self.algorithm, self.policy, self.shape = algorithm, policy, shape
        self.need = needs(algorithm)
        self.epochs, self.minibatches = data.epochs, data.minibatches

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
        if self.epochs * self.minibatches > 1 or "old_logps" in self.need:
            found["old_logps"] = self.token_logps(self.policy.build(params, extra), batch)
        if "old_values" in self.need:
            found["old_values"] = self.values(params, batch)
        if not isinstance(self.policy.reference, NoReference):
            other = self.policy.build_reference(params, extra)
            found["ref_logps"] = self.token_logps(other, batch)
        if self.minibatches > 1:
            stats = self._stats(found["old_logps"], batch, found)
            found |= batch_advantages(stats, self.algorithm)
        return jax.lax.stop_gradient(found)

    def _stats(self, logps: jax.Array, batch: Batch, others: dict[str, Any]) -> RolloutStats:
        lengths = slot_lengths(batch, self.shape)[:, 0]
        return RolloutStats(
            logps=logps,
            mask=jnp.arange(self.shape.completion_length) < lengths[:, None],
            rewards=batch["scores"][:, 0],
            baselines=batch.get("baselines"),
            valid=batch["valid"],
            **others,
        )

    def __call__(
        self, params: Tree, extra: Tree, batch: Batch, fixed: Fixed
    ) -> tuple[jax.Array, Metrics]:
        """Returns mean loss and metrics of the policy as it is after some of the updates."""
        logps = self.token_logps(self.policy.build(params, extra), batch)
        values = self.values(params, batch) if "values" in self.need else None
        stats = self._stats(logps, batch, {**fixed, "values": values})
        per_row, metrics = preference_loss(stats, self.algorithm)
        kept = stats.kept()
        more = {"length": masked_mean(jnp.sum(stats.mask, -1), kept)}
        if "old_logps" in fixed:
            change = jnp.abs(jnp.expm1(stats.logps - stats.old_logps))
            mask = stats.mask & kept[:, None]
            more["ratio_change"] = jax.lax.stop_gradient(masked_mean(change, mask))
        if "ref_logps" in fixed:
            drift = jnp.sum(jnp.where(stats.mask, stats.logps - stats.ref_logps, 0.0), -1)
            more["kl_to_reference"] = jax.lax.stop_gradient(masked_mean(drift, kept))
        return mean_over_rows(per_row, stats), {**more, **metrics}


def rollout_step(
    loss_of: RolloutLoss, optimizer: optax.GradientTransformation, config: OptimizerConfig
) -> StepFn:
    """Returns the step: `rollout_updates`, metrics averaged over them, then a moving reference."""
    updates = rollout_updates(loss_of, optimizer, config)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        new, several = updates(state, batch, key)
        metrics = jax.tree.map(lambda m: jnp.mean(m, 0), several)
        # Updates count themselves; a step is one, also where a number that is not finite is named.
        bad = new.first_bad.at[0].min(state.step + 1)
        new = dataclasses.replace(new, step=state.step + 1, first_bad=bad)
        return move_reference(loss_of.policy, new), metrics

    return step


def rollout_updates(
    loss_of: RolloutLoss, optimizer: optax.GradientTransformation, config: OptimizerConfig
) -> StepFn:
    """Returns (state, batch, key) -> (state after all updates, metrics [updates] in their order).

    The key, folded with the step, draws the order of each pass.
    """
    grad_fn = jax.value_and_grad(loss_of, has_aux=True)
    epochs, parts = loss_of.epochs, loss_of.minibatches

    def update(
        batch: Batch, fixed: Fixed, state: TrainState, rows: jax.Array | None
    ) -> tuple[TrainState, Metrics]:
        if rows is not None:
            batch, fixed = part_of(batch, rows), jax.tree.map(partial(_rows, rows), fixed)
        (loss, metrics), grads = grad_fn(state.params, state.extra, batch, fixed)
        metrics = {"loss": loss, **metrics}
        return apply_gradients(state, grads, metrics, batch, optimizer, config.ema_decay)

    def updates(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        fixed = loss_of.fixed(state.params, state.extra, batch)
        one = partial(update, batch, fixed)
        if epochs * parts == 1:
            new, metrics = one(state, None)
            return new, jax.tree.map(lambda m: m[None], metrics)
        if parts == 1:  # Every pass is the whole batch, so its order is as it was.
            return jax.lax.scan(one, state, None, length=epochs)
        count = len(batch["valid"])
        keys = jax.random.split(jax.random.fold_in(key, state.step), epochs)
        orders = jax.vmap(lambda k: jax.random.permutation(k, count))(keys)
        return jax.lax.scan(one, state, orders.reshape(epochs * parts, -1))

    return updates


def part_of(batch: Batch, rows: jax.Array) -> Batch:
    """Returns the batch of some of a batch's examples, each of one completion and one row.

    Args:
      batch: Of `PreferenceRows` with one slot, so that row r is example r.
      rows: int [n], which.
    """
    part = jax.tree.map(partial(_rows, rows), batch)
    here = jnp.arange(len(rows))[:, None]  # Owners are counted within the part.
    owners = {name: jnp.where(part[name] >= 0, here, -1) for name in ("owner", "prompt_owner")}
    return {**part, **owners}


def _rows(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Some rows of an array, spread over the devices as those of a batch are."""
    return constrain(x[rows], "batch", *(None,) * (x.ndim - 1))
