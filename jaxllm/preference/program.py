"""What of a preference run is compiled, made of its rows; for plans, of rows made up to its config.

The compiled step depends on the rows only through their shapes. Those of a plan hold one example
whose completions are as long as the config lets them be; a file of shorter ones makes the arrays
[P, S, L] of single tokens smaller and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxllm.errors import InputError
from jaxllm.preference.config import (
    GivenFeedback,
    OfflineData,
    PrecomputedReference,
    PreferenceRun,
    Target,
    check_run,
    target_of,
)
from jaxllm.preference.log_probs import PER_TOKEN, Kind, SlotShape, check_needs
from jaxllm.preference.policy import Policy, planned_policy
from jaxllm.preference.records import Belief, Example
from jaxllm.preference.registry import needs
from jaxllm.preference.rows import PreferenceRows, RowConfig
from jaxllm.preference.step import PreferenceLoss, init_of, preference_step
from jaxllm.training.job import Program
from jaxllm.training.optimizer import make_optimizer

KINDS: dict[Target, Kind] = {
    "pairs": "pairs",
    "labels": "labels",
    "rewards": "labels",
    "completions": "labels",
    "lists": "lists",
}
"""Target -> which statistics its examples become."""


def loss_on(run: PreferenceRun, policy: Policy, rows: PreferenceRows) -> PreferenceLoss:
    """Returns the loss of batches of these rows.

    Raises:
      InputError: The algorithm reads what they do not have.
    """
    shape = SlotShape.of(rows)
    check_needs(needs(run.algorithm), shape, rows.batch([0]).keys())
    return PreferenceLoss(run.algorithm, policy, shape, KINDS[target_of(run)])


def preference_program(
    run: PreferenceRun, policy: Policy, rows: PreferenceRows, loss: PreferenceLoss
) -> Program:
    """Returns what a job on given examples compiles.

    Args:
      run: The config.
      policy: Its policy.
      rows: Those of a micro-batch, which need hold only one example.
      loss: Of `loss_on` these rows.
    """
    optimizer = make_optimizer(run.optimizer, run.loop.steps)
    parts = run.optimizer.accumulate
    batch = {
        name: jax.ShapeDtypeStruct((len(array) * parts, *array.shape[1:]), array.dtype)
        for name, array in rows.batch([0]).items()
    }
    return Program(
        init=init_of(policy, optimizer, run.optimizer, loss.need),
        step=preference_step(loss, policy, optimizer, run.optimizer),
        rules=policy.rules,
        batch=batch,
        extra_rules=policy.rules,
    )


def part_of(config: RowConfig, parts: int) -> RowConfig:
    """Returns the shapes of one of the equal parts of a step.

    Raises:
      InputError: A step that does not divide into them.
    """
    if config.batch_size % parts or (config.rows or 0) % parts:
        raise InputError(
            f"data.batch_size {config.batch_size} and data.rows {config.rows} must be multiples of "
            f"optimizer.accumulate {parts}"
        )
    rows = None if config.rows is None else config.rows // parts
    return replace(config, batch_size=config.batch_size // parts, rows=rows)


def rows_of(
    run: PreferenceRun,
    config: RowConfig,
    examples: Any,
    columns: Mapping[str, np.ndarray] | None = None,
) -> PreferenceRows:
    """Returns the rows of examples, a micro-batch at a time; see `PreferenceRows`."""
    config = part_of(config, run.optimizer.accumulate)
    need = needs(run.algorithm)
    return PreferenceRows(
        examples,
        config,
        mismatched="mismatched" in need,
        supervised="target" in need,
        columns=columns,
    )


# -- plans ---------------------------------------------------------------------------------------


def planned_program(run: PreferenceRun) -> tuple[Program, Policy]:
    """Returns what a run on records of a file compiles, without the file, and its policy.

    Raises:
      InputError: Parts that do not go together, sampled data, or a config that leaves a shape to
        the records.
    """
    check_run(run)
    if not isinstance(run.data, OfflineData):
        raise InputError("data sampled from the policy is not planned, only records of a file")
    policy = planned_policy(run)
    rows = made_up_rows(run, run.data, policy)
    return preference_program(run, policy, rows, loss_on(run, policy, rows)), policy


def made_up_rows(run: PreferenceRun, data: OfflineData, policy: Policy) -> PreferenceRows:
    """Returns rows of the shapes that the config allows, of two prompts without meaning."""
    config, need = data.row_config(), needs(run.algorithm)
    examples = [_made_up(run, data, prompt) for prompt in range(2)]
    rows = rows_of(run, config, examples)
    if not isinstance(policy.reference, PrecomputedReference):
        return rows
    shape = (len(rows), rows.slots)
    columns = {"ref_logps": np.zeros(shape, np.float32)}
    if PER_TOKEN & set(need):
        columns["ref_token_logps"] = np.zeros((*shape, rows.completion_length), np.float32)
    return rows_of(run, config, examples, columns)


def _made_up(run: PreferenceRun, data: OfflineData, prompt: int) -> Example:
    target, need = target_of(run), needs(run.algorithm)
    lists = _count(data.max_list, "data.max_list", "lists") if target == "lists" else 1
    completions = 2 if target == "pairs" else lists
    beliefs = 0
    if "beliefs" in need or "belief_span" in need:
        beliefs = _count(data.max_beliefs, "data.max_beliefs", "beliefs")
    # With a shared prompt all branches are in one row; elsewhere each completion has its own.
    shared = completions + len({"mismatched", "target"} & set(need))
    branches = shared if data.layout == "shared_prompt" else 1
    length = data.row_length // branches
    if data.max_completion is not None:
        length = min(length, data.max_completion)
    if length < (2 if beliefs else 1):
        raise InputError(f"data.row_length {data.row_length} has no room for {branches} branches")
    margin = target == "pairs" and (
        "objective_margins" in need or not isinstance(run.feedback, GivenFeedback)
    )
    scored = target in ("lists", "rewards")
    return Example(
        prompt_ids=(prompt,),
        completion_ids=((0,) * length,) * completions,
        desirable=True if target == "labels" else None,
        scores=(0.0,) * completions if scored else None,
        margin=0.0 if margin else None,
        belief=_belief(beliefs) if beliefs else None,
        target_ids=(0,) * length if "target" in need else None,
        density_ratio=1.0 if "density_ratio" in need else None,
        identity="planned",
    )


def _belief(count: int) -> Belief:
    """One of `count` beliefs of a token each, as digits are."""
    return Belief((0, 1), (1.0 / count,) * count, tuple((i,) for i in range(count)))


def _count(given: int | None, key: str, what: str) -> int:
    if given is None:
        raise InputError(f"{key} is None, expected the most {what} of a record to plan with")
    return given
