"""Experiments on rows of tokens: the library's own step scanned over stacked batches.

One program for each algorithm, shared by all seeds; nothing goes to the host between steps. Letters
as in `log_probs.py`: P examples, S slots of an example.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.models.decoder import Decoder
from jaxllm.nn.module import Blueprint
from jaxllm.preference.config import ModelConfig, OfflineData, PreferenceRun, resolved_reference
from jaxllm.preference.log_probs import (
    Kind,
    SlotScores,
    SlotShape,
    row_hidden,
    slot_scores,
    slot_sums,
    vocabulary_sums,
)
from jaxllm.preference.options import Options
from jaxllm.preference.policy import policy_of
from jaxllm.preference.registry import algorithm_of, needs
from jaxllm.preference.rows import PreferenceRows
from jaxllm.preference.statistics import RunningMean
from jaxllm.preference.step import PreferenceLoss, preference_step
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import TrainState, new_state

Tree = Any
Batch = dict[str, Any]


class RowTrainer:
    """Trains copies of a model on rows of one shape under one algorithm.

    Args:
      folder: The model, as `ModelConfig.policy`.
      options: Of the algorithm.
      shape: Of the batches.
      kind: Of the examples.
      optimizer: Its learning rate is constant.
    """

    def __init__(
        self,
        folder: str,
        options: Options,
        shape: SlotShape,
        kind: Kind,
        optimizer: OptimizerConfig,
    ):
        model = ModelConfig(folder)
        run = PreferenceRun(model, OfflineData(), algorithm=options)  # type: ignore[arg-type]
        self.policy = policy_of(model, resolved_reference(run), "float32")
        self.options = options
        self._optimizer = make_optimizer(optimizer, 1)
        loss_of = PreferenceLoss(options, self.policy, shape, kind)
        step = preference_step(loss_of, self.policy, self._optimizer, optimizer)

        def steps(state: TrainState, batches: Batch) -> tuple[TrainState, Any]:
            key = jax.random.key(0)  # Nothing is random.
            return jax.lax.scan(lambda state, batch: step(state, batch, key), state, batches)

        self._steps = jax.jit(steps, donate_argnums=0)

    def start(self, params: Tree) -> TrainState:
        """Returns the state before the first step, the parameters being the reference too."""
        extra: dict[str, Any] = {}
        if self.policy.keeps_reference:
            extra["reference"] = jax.tree.map(jnp.copy, params)
        if "running" in needs(self.options):
            extra["running"] = dataclasses.asdict(RunningMean.start())
        # Copies, since steps give their arrays away.
        policy = {"policy": jax.tree.map(jnp.copy, params)}
        return new_state(policy, self._optimizer, ema=False, extra=extra)

    def __call__(self, state: TrainState, batches: Batch) -> TrainState:
        """Takes one step for each of the stacked batches; `state` is used up.

        Raises:
          InputError: A step whose values are not finite.
        """
        state, _ = self._steps(state, batches)
        bad = int(state.first_bad[0])
        if bad >= 0:
            name = algorithm_of(self.options).name
            raise InputError(f"{name}: the values of step {bad} are not finite")
        return state


def stacked(rows: PreferenceRows, picked: np.ndarray) -> Batch:
    """Returns batches of the picked examples int [steps, P], stacked on a first axis."""
    made = [rows.batch(row.tolist()) for row in picked]
    return {name: np.stack([batch[name] for batch in made]) for name in made[0]}


class RowScorer:
    """Compiled scores of rows of one shape."""

    def __init__(self, blueprint: Blueprint[Decoder], shape: SlotShape):
        self._blueprint, self.shape = blueprint, shape
        self._scores = jax.jit(self._score, static_argnames="beliefs")
        self._divergence = jax.jit(self._kl)

    def logps(self, params: Tree, rows: PreferenceRows) -> np.ndarray:
        """Returns the summed log p of every slot, float32 [n, S]."""
        return self._all(rows, lambda batch: self._scores(params, batch, beliefs=False).logps)

    def beliefs(self, params: Tree, rows: PreferenceRows) -> np.ndarray:
        """Returns log p of each belief after the prompt of every example, float32 [n, M]."""
        return self._all(rows, lambda batch: self._scores(params, batch, beliefs=True).beliefs)

    def divergence(self, params: Tree, reference: Tree, rows: PreferenceRows) -> np.ndarray:
        """Returns KL(policy || reference) summed over the tokens of every slot, float32 [n, S].

        Over the whole vocabulary at each token; on the policy's own samples its mean is the KL of
        the two models' distributions of completions.
        """
        return self._all(rows, lambda batch: self._divergence(params, reference, batch))

    def _all(self, rows: PreferenceRows, score: Any) -> np.ndarray:
        found = [np.asarray(score(batch))[batch["valid"]] for batch in rows.in_order()]
        return np.concatenate(found)

    def _score(self, params: Tree, batch: Batch, beliefs: bool) -> SlotScores:
        model = self._blueprint.build(params, {})
        need = ("beliefs",) if beliefs else ()
        return slot_scores(model, row_hidden(model, batch, self.shape), batch, self.shape, need)

    def _kl(self, params: Tree, reference: Tree, batch: Batch) -> jax.Array:
        policy, other = (self._blueprint.build(x, {}) for x in (params, reference))
        hidden, other_hidden = (row_hidden(x, batch, self.shape) for x in (policy, other))
        found = vocabulary_sums(other, other_hidden, (policy, hidden))[1]
        return slot_sums(batch, self.shape, found)  # type: ignore[arg-type]
