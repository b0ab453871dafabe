"""The job that trains a policy on given examples: one compiled step for every algorithm.

    batch -> rows through policy and reference -> statistics -> loss of every row -> update

What couples the rows of a batch (KTO's KL, BCO's delta, AOT's order) is computed over the whole
batch on all devices, because the step is one program over the mesh. Dropout is off: log-ratios
would be those of two random models.
"""

from __future__ import annotations

from pathlib import Path

import jax

from jaxllm.data.text_tokenizers import save_tokenizer
from jaxllm.preference.config import (
    JOB,
    OfflineData,
    PrecomputedReference,
    PreferenceRun,
    target_of,
)
from jaxllm.preference.examples import offline_examples, open_feedback
from jaxllm.preference.policy import Policy, open_policy
from jaxllm.preference.program import loss_on, preference_program, rows_of
from jaxllm.preference.records import Examples
from jaxllm.preference.reference import reference_columns, with_columns
from jaxllm.preference.registry import needs
from jaxllm.preference.rows import PreferenceRows, RowConfig
from jaxllm.preference.step import Evaluation, MicroBatches, check_start
from jaxllm.training.job import Job
from jaxllm.training.run_folder import write_json
from jaxllm.training.state import TrainState


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
    rows = open_rows(run, policy, config, examples)
    loss = loss_on(run, policy, rows)
    program = preference_program(run, policy, rows, loss)
    batches = MicroBatches(
        rows,
        config.batch_size,
        run.loop.seed,
        parts=run.optimizer.accumulate,
    )

    evaluate = None
    if held_out is not None:
        evaluate = Evaluation(loss, open_rows(run, policy, config, held_out))

    check = None
    if run.model.check_start and policy.starts_equal:

        def check(state: TrainState) -> None:
            check_start(policy, loss.shape, state, next(rows.in_order()))

    keep_tokenizer(policy, workdir)  # Only now: a refused run leaves no folder.
    return Job(
        name=JOB,
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=program.init,
        load=policy.load(),
        load_extra=policy.load_extra(),
        step=program.step,
        batches=batches,
        rules=program.rules,
        extra_rules=program.extra_rules,
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
    made = rows_of(run, config, examples)
    if isinstance(policy.reference, PrecomputedReference):
        columns, cached = reference_columns(policy, made, needs(run.algorithm))
        if not cached and jax.process_index() == 0:
            print(f"computed the reference's log-probs of {len(made)} examples")
        made = with_columns(made, columns)
    return made


def keep_tokenizer(policy: Policy, workdir: Path) -> None:
    """Writes tokenizer and end marks into the run folder, which then is a model of its own."""
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    if policy.tokenizer is not None:
        save_tokenizer(policy.tokenizer, workdir)
    write_json(workdir / "generation_config.json", {"eos_token_id": list(policy.eos)})
