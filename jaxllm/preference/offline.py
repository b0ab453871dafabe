"""The job that trains a policy on given examples: one compiled step for every algorithm.

    batch -> rows through policy and reference -> statistics -> loss of every row -> update

What couples the rows of a batch (KTO's KL, BCO's delta, AOT's order) is computed over the whole
batch on all devices, because the step is one program over the mesh. Dropout is off: log-ratios
would be those of two random models.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax

from jaxllm.data.text_tokenizers import save_tokenizer
from jaxllm.errors import InputError
from jaxllm.preference.config import (
    JOB,
    OfflineData,
    PrecomputedReference,
    PreferenceRun,
    Target,
    target_of,
)
from jaxllm.preference.examples import offline_examples, open_feedback
from jaxllm.preference.log_probs import Kind, SlotShape, check_needs
from jaxllm.preference.policy import Policy, open_policy
from jaxllm.preference.records import Examples
from jaxllm.preference.reference import reference_columns, with_columns
from jaxllm.preference.registry import needs
from jaxllm.preference.rows import PreferenceRows, RowConfig
from jaxllm.preference.step import (
    Evaluation,
    MicroBatches,
    PreferenceLoss,
    check_start,
    init_of,
    preference_step,
)
from jaxllm.training.job import Job
from jaxllm.training.optimizer import make_optimizer
from jaxllm.training.run_folder import write_json
from jaxllm.training.state import TrainState

KINDS: dict[Target, Kind] = {
    "pairs": "pairs",
    "labels": "labels",
    "rewards": "labels",
    "completions": "labels",
    "lists": "lists",
}
"""Target -> which statistics its examples become."""


def offline_job(run: PreferenceRun, data: OfflineData, workdir: Path) -> Job:
    """Returns the job of a run on records of a file.

    Args:
      run: The config, checked.
      data: Its data.
      workdir: The run folder, where the tokenizer is kept.

    Raises:
      InputError: Bad records, or a folder without a model.
    """
    policy = open_policy(run)
    return make_job(run, workdir, policy, data.row_config(), *open_files(run, data, policy))


def open_files(
    run: PreferenceRun, data: OfflineData, policy: Policy
) -> tuple[Examples, Examples | None]:
    """Returns the examples of the training file and of the validation file, if there is one."""
    target, feedback = target_of(run), open_feedback(run.feedback)

    def read(path: str) -> Examples:
        return offline_examples(path, data, target, feedback, policy.tokenizer, policy.config)

    held_out = None if data.validation_file is None else read(data.validation_file)
    return read(data.file), held_out


def make_job(
    run: PreferenceRun,
    workdir: Path,
    policy: Policy,
    config: RowConfig,
    examples: Examples,
    held_out: Examples | None,
) -> Job:
    """Returns the job that trains on given examples, `config` being the shapes of a step."""
    parts = run.optimizer.accumulate
    rows = open_rows(run, policy, config, examples)
    shape, need = SlotShape.of(rows), needs(run.algorithm)
    check_needs(need, shape, rows.batch([0]).keys())
    loss_of = PreferenceLoss(run.algorithm, policy, shape, KINDS[target_of(run)])
    optimizer = make_optimizer(run.optimizer, run.loop.steps)
    batches = MicroBatches(
        rows,
        config.batch_size,
        run.loop.seed,
        parts=parts,
    )

    evaluate = None
    if held_out is not None:
        evaluate = Evaluation(loss_of, open_rows(run, policy, config, held_out))

    check = None
    if run.model.check_start and policy.starts_equal:

        def check(state: TrainState) -> None:
            check_start(policy, shape, state, next(rows.in_order()))

    keep_tokenizer(policy, workdir)  # Only now: a refused run leaves no folder.
    return Job(
        name=JOB,
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=init_of(policy, optimizer, run.optimizer, need),
        load=policy.load(),
        load_extra=policy.load_extra(),
        step=preference_step(loss_of, policy, optimizer, run.optimizer),
        batches=batches,
        rules=policy.rules,
        extra_rules=policy.rules,
        unit="examples",
        evaluate=evaluate,
        check_start=check,
        identity=policy.identity,
    )


def open_rows(
    run: PreferenceRun, policy: Policy, config: RowConfig, examples: Examples
) -> PreferenceRows:
    """Returns the rows of examples, a micro-batch at a time, with precomputed log-probs.

    Raises:
      InputError: A step that does not divide into its micro-batches.
    """
    need = needs(run.algorithm)
    config = part_of(config, run.optimizer.accumulate)
    made = PreferenceRows(
        examples, config, mismatched="mismatched" in need, supervised="target" in need
    )
    if isinstance(policy.reference, PrecomputedReference):
        columns, cached = reference_columns(policy, made, need)
        if not cached and jax.process_index() == 0:
            print(f"computed the reference's log-probs of {len(made)} examples")
        made = with_columns(made, columns)
    return made


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


def keep_tokenizer(policy: Policy, workdir: Path) -> None:
    """Writes tokenizer and end marks into the run folder, which then is a model of its own."""
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    if policy.tokenizer is not None:
        save_tokenizer(policy.tokenizer, workdir)
    write_json(workdir / "generation_config.json", {"eos_token_id": list(policy.eos)})
