"""The job that trains a reward model on pairs.

Rows of preference examples end before the last token of a completion, from which nothing has to be
predicted; here it must be read, so one more token is put behind each completion as a target that no
loss looks at.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.models.scalar_head import token_values
from jaxllm.preference.examples import offline_examples, open_feedback
from jaxllm.preference.log_probs import SlotShape, row_hidden, slot_lengths, slot_sums
from jaxllm.preference.offline import keep_tokenizer
from jaxllm.preference.policy import Policy
from jaxllm.preference.program import part_of
from jaxllm.preference.records import Examples
from jaxllm.preference.registry import preference_loss
from jaxllm.preference.reward_scorer import JOB, RewardRun, open_trunk
from jaxllm.preference.rows import PreferenceRows
from jaxllm.preference.statistics import RewardPairs, mean_over_rows
from jaxllm.preference.step import Evaluation, MicroBatches, init_of, preference_step
from jaxllm.training.job import Job
from jaxllm.training.optimizer import make_optimizer
from jaxllm.training.step import Batch, Metrics

Tree = Any


def slot_rewards(
    trunk: Policy, params: Tree, extra: Tree, batch: Batch, shape: SlotShape
) -> jax.Array:
    """The reward of every completion [P, S]."""
    model, adapters = trunk.build(params, extra)
    values = token_values(params["head"], row_hidden(model, batch, shape, adapters))
    lengths = slot_lengths(batch, shape).reshape(-1)
    last = batch["place"] == lengths[jnp.maximum(batch["owner"], 0)] - 1
    return slot_sums(batch, shape, jnp.where(last, values, 0.0))


def with_end(examples: Examples) -> Examples:
    """The same examples with one more token behind each completion; see the module's text."""
    longer = (
        replace(e, completion_ids=tuple((*ids, 0) for ids in e.completion_ids)) for e in examples
    )
    return Examples(longer, examples.skipped, examples.joined)


def reward_job(run: RewardRun, workdir: Path) -> Job:
    """Returns the job that trains a reward model.

    Raises:
      InputError: Bad records, several objectives, or margins that the records do not hold.
    """
    trunk, parts = open_trunk(run), run.optimizer.accumulate
    if run.algorithm.weights is not None:
        raise InputError("algorithm.weights is for several objectives; pairs of a file have one")
    rows, held_out = _open_rows(run, trunk)
    if run.use_margin and "margin" not in rows.batch([0]):
        raise InputError(f"{run.data.file}: use_margin needs a `margin` in every record")
    shape = SlotShape.of(rows)
    optimizer = make_optimizer(run.optimizer, run.loop.steps)

    def loss_of(params: Tree, extra: Tree, batch: Batch) -> tuple[jax.Array, Metrics]:
        rewards = slot_rewards(trunk, params, extra, batch, shape)
        margin = batch["margin"] if run.use_margin else None
        stats = RewardPairs(rewards[:, 0], rewards[:, 1], margin, batch["valid"])
        per_row, metrics = preference_loss(stats, run.algorithm)
        return mean_over_rows(per_row, stats), metrics

    keep_tokenizer(trunk, workdir)
    return Job(
        name=JOB,
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=init_of(trunk, optimizer, run.optimizer, head=True),
        load=trunk.load(),
        load_extra=trunk.load_extra(),
        step=preference_step(loss_of, trunk, optimizer, run.optimizer),
        batches=MicroBatches(
            rows,
            run.data.batch_size,
            run.loop.seed,
            parts=parts,
        ),
        rules=trunk.rules,
        extra_rules=trunk.rules,
        unit="examples",
        evaluate=None if held_out is None else Evaluation(loss_of, held_out),
        identity={"reward_model": trunk.identity},
    )


def _open_rows(run: RewardRun, trunk: Policy) -> tuple[PreferenceRows, PreferenceRows | None]:
    """Rows of the training file and of the validation file, a micro-batch at a time."""
    data, feedback = run.data, open_feedback(run.feedback)
    config = part_of(data.row_config(), run.optimizer.accumulate)
    # The token behind each completion takes a place in the row.
    reading = replace(data, row_length=data.row_length - 1)

    def read(path: str) -> PreferenceRows:
        found = offline_examples(path, reading, "pairs", feedback, trunk.tokenizer, trunk.config)
        return PreferenceRows(with_end(found), config)

    return read(data.file), None if data.validation_file is None else read(data.validation_file)
