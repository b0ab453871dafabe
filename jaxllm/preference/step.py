"""The update step of preference training: rows to statistics to loss to update, compiled once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.data.pipeline import Batch as HostBatch
from jaxllm.data.pipeline import Batches
from jaxllm.errors import InputError
from jaxllm.models.scalar_head import new_head
from jaxllm.preference.config import MovingReference, NoReference, PrecomputedReference
from jaxllm.preference.log_probs import (
    Kind,
    Need,
    SlotScores,
    SlotShape,
    row_hidden,
    slot_lengths,
    slot_scores,
    statistics,
)
from jaxllm.preference.policy import Adapted, Policy
from jaxllm.preference.reference import given_scores, moved, start_error
from jaxllm.preference.registry import needs, preference_loss
from jaxllm.preference.rows import STEPS, PreferenceBatches, PreferenceRows
from jaxllm.preference.statistics import RunningMean, Stats, mean_over_rows
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.state import TrainState, new_state
from jaxllm.training.step import Batch, Metrics, StepFn, apply_gradients

Tree = Any
LossOf = Callable[[Tree, Tree, Batch], tuple[jax.Array, Metrics]]
"""(params, extra, batch) -> (mean loss, metrics)."""


class PreferenceLoss:
    """The loss of a batch of rows under one algorithm; a `LossOf`."""

    def __init__(self, algorithm: Any, policy: Policy, shape: SlotShape, kind: Kind):
        self.algorithm, self.policy, self.shape, self.kind = algorithm, policy, shape, kind
        self.need = needs(algorithm)

    def __call__(self, params: Tree, extra: Tree, batch: Batch) -> tuple[jax.Array, Metrics]:
        """See `LossOf`; the metrics are those of the algorithm."""
        stats = self.stats(params, extra, batch)
        per_row, metrics = preference_loss(stats, self.algorithm)
        return mean_over_rows(per_row, stats), metrics

    def stats(self, params: Tree, extra: Tree, batch: Batch) -> Stats:
        """What the algorithm reads of a batch, with the gradient of the policy."""
        policy, reference = self.scores(params, extra, batch)
        running = None
        if "running" in self.need:
            running = RunningMean(**extra["running"])
        return statistics(self.kind, policy, reference, batch, self.shape, running)

    def scores(
        self, params: Tree, extra: Tree, batch: Batch
    ) -> tuple[SlotScores, SlotScores | None]:
        """Scores of policy and reference, one forward pass each over all completions."""
        shape, need = self.shape, self.need
        model, adapters = self.policy.build(params, extra)
        hidden = row_hidden(model, batch, shape, adapters)
        kind = self.policy.reference
        if isinstance(kind, NoReference):
            return slot_scores(model, hidden, batch, shape, need), None
        if isinstance(kind, PrecomputedReference):
            return slot_scores(model, hidden, batch, shape, need), given_scores(batch)
        other, _ = self.policy.build_reference(params, extra)
        other_hidden = jax.lax.stop_gradient(row_hidden(other, batch, shape))
        policy = slot_scores(model, hidden, batch, shape, need, (other, other_hidden))
        tokens = [name for name in need if name == "ref_token_logps"]
        reference = slot_scores(other, other_hidden, batch, shape, tokens)
        return policy, jax.lax.stop_gradient(reference)


def check_start(policy: Policy, shape: SlotShape, state: TrainState, batch: HostBatch) -> None:
    """Refuses a first step at which policy and reference differ although they are the same model.

    Raises:
      InputError: With the difference per token.
    """

    @jax.jit
    def compare(params: Tree, extra: Tree, batch: Batch) -> tuple[SlotScores, SlotScores, Any]:
        def scores(adapted: Adapted) -> SlotScores:
            model, adapters = adapted
            return slot_scores(model, row_hidden(model, batch, shape, adapters), batch, shape)

        if isinstance(policy.reference, PrecomputedReference):
            reference = given_scores(batch)
        else:
            reference = scores(policy.build_reference(params, extra))
        return scores(policy.build(params, extra)), reference, slot_lengths(batch, shape)

    ours, theirs, lengths = compare(state.params, state.extra, batch)
    wrong = start_error(ours, theirs, lengths, policy.build(state.params, state.extra)[0].dtype)
    if wrong is not None:
        raise InputError(f"{policy.folder}: {wrong}")


def init_of(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    need: Need = (),
    *,
    head: bool = False,
) -> Callable[[jax.Array], TrainState]:
    """Returns key -> the state before the first step; `head` adds a scalar head to `params`."""

    def init(key: jax.Array) -> TrainState:
        params, extra = policy.init(key)
        if head:
            params["head"] = new_head(policy.config.dim)
        if "running" in need:
            extra["running"] = dataclasses.asdict(RunningMean.start())
        return new_state(params, optimizer, ema=config.ema_decay is not None, extra=extra)

    return init


def preference_step(
    loss_of: LossOf,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
) -> StepFn:
    """Returns the step: gradients over the micro-batches, one update, then a moving reference.

    Args:
      loss_of: The loss of a micro-batch.
      policy: Says whether the reference moves.
      optimizer: From `make_optimizer`.
      config: Accumulation and averaging are taken from here.
    """
    grad_fn = jax.value_and_grad(loss_of, has_aux=True)

    def one(state: TrainState, extra: Tree, batch: Batch) -> tuple[Tree, Tree, Metrics]:
        (loss, metrics), grads = grad_fn(state.params, extra, batch)
        return grads, carried(extra, metrics), {"loss": loss, **metrics}

    def accumulated(state: TrainState, batch: Batch) -> tuple[Tree, Tree, Metrics]:
        parts = jax.tree.map(
            lambda x: x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def body(carry: tuple[Tree, Tree], part: Batch) -> tuple[tuple[Tree, Tree], Metrics]:
            total, running = carry
            grads, extra, metrics = one(state, {**state.extra, **running}, part)
            running = {name: extra[name] for name in running}
            return (jax.tree.map(jnp.add, total, grads), running), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        running = {name: state.extra[name] for name in ("running",) if name in state.extra}
        (total, running), metrics = jax.lax.scan(body, (zeros, running), parts)
        mean = jax.tree.map(lambda g: g / config.accumulate, total)
        return mean, {**state.extra, **running}, jax.tree.map(lambda m: jnp.mean(m, 0), metrics)

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        del key  # Nothing is random: dropout is off.
        if config.accumulate == 1:
            grads, extra, metrics = one(state, state.extra, batch)
        else:
            grads, extra, metrics = accumulated(state, batch)
        new, metrics = apply_gradients(
            state, grads, metrics, batch, optimizer, config.ema_decay, extra
        )
        return move_reference(policy, new), metrics

    return step


def carried(extra: Tree, metrics: Metrics) -> Tree:
    """Returns `extra` with what a loss hands to the next step: BCO's running mean."""
    if "running" not in extra:
        return extra
    after = {"mean": metrics["bco/delta"], "count": metrics["bco/count"]}
    return {**extra, "running": after}


def move_reference(policy: Policy, state: TrainState) -> TrainState:
    """Returns the state after an update with the reference where it then is."""
    kind = policy.reference
    if not isinstance(kind, MovingReference):
        return state
    reference = moved(kind, state.extra["reference"], state.params["policy"], state.step)
    return dataclasses.replace(state, extra={**state.extra, "reference": reference})


# -- batches and evaluation ----------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatches(Batches):
    """Steps of `parts` batches of rows each; the rows and examples of the parts alternate.

    Row r of part m is row r * parts + m, so that each part spans all devices.
    """

    source: PreferenceRows = dataclasses.field()
    parts: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of the first axes of a batch's arrays."""
        return {"batch size": self.batch_size, "rows of a batch": self.source.rows * self.parts}

    def dataset(self) -> grain.MapDataset:
        """Returns this host's batches as a dataset indexed by step."""
        inner = PreferenceBatches(
            self.source, self.batch_size // self.parts, self.seed, hosts=self.hosts
        ).dataset()
        return inner if self.parts == 1 else grain.MapDataset.source(_Parts(inner, self.parts))


class _Parts:
    """A dataset of batches as one of steps."""

    def __init__(self, inner: grain.MapDataset, parts: int):
        self._inner, self._parts = inner, parts

    def __len__(self) -> int:
        return STEPS // self._parts

    def __getitem__(self, step: int) -> HostBatch:
        parts = [self._inner[step * self._parts + i] for i in range(self._parts)]
        joined = {name: np.stack([part[name] for part in parts], 1) for name in parts[0]}
        return {name: x.reshape(-1, *x.shape[2:]) for name, x in joined.items()}


class Evaluation:
    """Loss and metrics over all of some rows, compiled once; means weighted by examples.

    A job's `evaluate`: it takes the averaged parameters where they are kept.
    """

    def __init__(self, loss_of: LossOf, rows: PreferenceRows):
        self._rows = rows

        def score(params: Tree, extra: Tree, batch: Batch) -> Metrics:
            loss, metrics = loss_of(params, extra, batch)
            return {"loss": loss, **metrics}

        self._run = jax.jit(score)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns the means of the metrics."""
        total: dict[str, float] = {}
        count = 0
        for batch in self._rows.in_order():
            weight = int(batch["valid"].sum())
            found = jax.device_get(self._run(state.best_params, state.extra, batch))
            count += weight
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + weight * float(value)
        return {name: value / count for name, value in total.items()} | {"examples": count}
