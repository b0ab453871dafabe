"""Jobs on completions of the policy itself: sampled at every step, or once before the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from jaxllm.data.pipeline import Batches
from jaxllm.data.records import write_jsonl
from jaxllm.decoding.language_model import load_language_model
from jaxllm.errors import InputError
from jaxllm.parallel.processes import agreed, first_process
from jaxllm.parallel.sharding import reader
from jaxllm.preference.config import JOB, OnPolicyData, PreferenceRun, Target, target_of
from jaxllm.preference.examples import open_feedback
from jaxllm.preference.log_probs import SlotShape, check_needs
from jaxllm.preference.offline import keep_tokenizer, make_job
from jaxllm.preference.policy import Policy, open_policy
from jaxllm.preference.program import KINDS
from jaxllm.preference.records import Example, Examples
from jaxllm.preference.registry import needs
from jaxllm.preference.rollout_step import RolloutLoss, rollout_step
from jaxllm.preference.rollouts import (
    Ids,
    Rollouts,
    Sampled,
    completions_per_example,
    examples_per_prompt,
    read_prompts,
    read_samples,
    sample_records,
    sampled_examples,
)
from jaxllm.preference.rows import PreferenceRows, RowConfig
from jaxllm.preference.step import PreferenceLoss, check_start, init_of, preference_step
from jaxllm.training.job import Job
from jaxllm.training.optimizer import make_optimizer
from jaxllm.training.run_folder import first_difference, read_json, to_plain, write_json
from jaxllm.training.state import TrainState

SAMPLES, SETTINGS = "samples.jsonl", "samples.json"
EVALUATION = 1 << 20
"""Draws of evaluations are those of steps from here on."""


@dataclass(frozen=True)
class _Parts:
    """What both kinds of jobs are made of."""

    policy: Policy
    rollouts: Rollouts
    target: Target
    prompts: list[Ids]
    held_out: list[Ids]
    rows: RowConfig


def _open(run: PreferenceRun, data: OnPolicyData) -> _Parts:
    policy, target, feedback = open_policy(run), target_of(run), open_feedback(run.feedback)
    if feedback is None:
        raise InputError(
            "sampled completions have no labels; set feedback to something that scores"
        )
    rollouts = Rollouts(policy, data, feedback, run.loop.seed)
    prompts = read_prompts(data, policy.language_model())
    order = np.random.default_rng(0).permutation(len(prompts))  # The same for every seed.
    held = {int(i) for i in order[: data.validation_prompts]}
    kept = [p for i, p in enumerate(prompts) if i not in held]
    if len(kept) < data.batch_size:
        raise InputError(f"{len(kept)} prompts are fewer than data.batch_size {data.batch_size}")
    return _Parts(
        policy, rollouts, target, kept, [prompts[i] for i in sorted(held)], row_config(data, target)
    )


def row_config(data: OnPolicyData, target: Target) -> RowConfig:
    """Returns rows that hold any prompt with any completions of a step."""
    completions = completions_per_example(data, target)
    branches = completions if data.layout == "shared_prompt" else 1
    return RowConfig(
        data.layout,
        data.batch_size * examples_per_prompt(data, target),
        data.max_prompt - 1 + branches * data.max_new_tokens,
    )


def slot_shape(data: OnPolicyData, target: Target, mismatched: bool) -> SlotShape:
    """Returns the shape of every step's batch."""
    completions = completions_per_example(data, target)
    return SlotShape(
        layout=data.layout,
        slots=completions + mismatched,
        completions=completions,
        completion_length=data.max_new_tokens,
        mismatched=mismatched,
    )


# -- sampled at every step -----------------------------------------------------------------------


def on_policy_job(run: PreferenceRun, data: OnPolicyData, workdir: Path) -> Job:
    """Returns the job that samples from the policy at every step.

    Raises:
      InputError: A policy without a tokenizer, bad prompts, or more processes than divide them.
    """
    parts, need = _open(run, data), needs(run.algorithm)
    shape = slot_shape(data, parts.target, "mismatched" in need)
    optimizer = make_optimizer(run.optimizer, run.loop.steps * data.updates)
    policy = parts.policy
    if parts.target == "rollouts":
        loss = RolloutLoss(run.algorithm, policy, shape, data)
        step = rollout_step(loss, optimizer, run.optimizer)
    else:
        check_needs(need, shape, ("desirable", "scores", "margin"))
        plain = PreferenceLoss(run.algorithm, policy, shape, KINDS[parts.target])
        step = preference_step(plain, policy, optimizer, run.optimizer)

    prepare = _Prepare(parts, data, shape, baselines="baselines" in need)
    batches = PromptBatches(_Prompts(len(parts.prompts)), data.batch_size, run.loop.seed).with_rows(
        parts.rows, shape
    )
    check = None
    if run.model.check_start and policy.starts_equal:

        def check(state: TrainState) -> None:
            check_start(policy, shape, state, prepare.part(state, batches.batch(0), (0, 1)))

    keep_tokenizer(policy, workdir)
    return Job(
        name=JOB,
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=init_of(policy, optimizer, run.optimizer, need),
        load=policy.load(),
        load_extra=policy.load_extra(),
        step=step,
        batches=batches,
        rules=policy.rules,
        extra_rules=policy.rules,
        unit="prompts",
        prepare=prepare,
        evaluate=_score_of(parts),
        check_start=check,
        sample=_writer_of(parts),
        identity=policy.identity,
    )


@dataclass(frozen=True)
class _Prompts:
    """Numbers of prompts as a source of batches."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": np.int32(index)}


@dataclass(frozen=True)
class PromptBatches(Batches):
    """Numbers of the prompts of each step; the step itself sees the rows made of them.

    Every process reads all of them: it samples completions of its part, and makes rows of all.
    """

    rows: int = 0
    examples: int = 0

    def with_rows(self, config: RowConfig, shape: SlotShape) -> PromptBatches:
        """The same with the sizes of the rows."""
        per = 1 if config.layout == "shared_prompt" else shape.slots
        rows = config.batch_size * per
        return dataclasses.replace(self, rows=rows, examples=config.batch_size)

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of the first axes of a batch's arrays."""
        return {"examples of a batch": self.examples, "rows of a batch": self.rows}

    def dataset(self) -> grain.MapDataset:
        """Returns the numbers of all prompts as a dataset indexed by step."""
        return super(PromptBatches, dataclasses.replace(self, hosts=(0, 1))).dataset()


class _Prepare:
    """Samples, judges, and lays out the examples of a step, or this process's part of them."""

    def __init__(self, parts: _Parts, data: OnPolicyData, shape: SlotShape, *, baselines: bool):
        self._parts, self._data, self._shape, self._baselines = parts, data, shape, baselines

    def __call__(self, state: TrainState, batch: dict[str, Any]) -> dict[str, Any]:
        hosts = (0, 1) if jax.process_count() == 1 else reader(jax.sharding.get_mesh())
        return self.part(state, batch, hosts)

    def part(
        self, state: TrainState, batch: dict[str, Any], hosts: tuple[int, int]
    ) -> dict[str, Any]:
        """The examples of one of several readers, all of whom must call this."""
        parts, data = self._parts, self._data
        step = int(state.step)
        params = parts.rollouts.parameters(state.params, state.extra)
        prompts = [parts.prompts[i] for i in batch["prompt"].tolist()]
        sampled = parts.rollouts(params, prompts, step)
        examples = sampled_examples(sampled, data, parts.target, step)
        columns = {}
        if self._baselines:
            greedy = parts.rollouts(params, prompts, step, greedy=True).scores[:, 0]
            columns["baselines"] = np.repeat(greedy, data.samples).astype(np.float32)
        if not examples:  # All scores of all prompts are equal: a step without a gradient.
            nothing = ((0,), (1,))
            rows = PreferenceRows([Example(prompts[0], nothing, margin=0.0)], parts.rows)
            return rows.batch([0], hosts) | {
                "valid": np.zeros(parts.rows.batch_size // hosts[1], bool)
            }
        rows = PreferenceRows(
            examples, parts.rows, mismatched=self._shape.mismatched, columns=columns
        )
        return rows.batch(range(len(examples)), hosts)


# -- sampled once --------------------------------------------------------------------------------


def sampled_once_job(run: PreferenceRun, data: OnPolicyData, workdir: Path) -> Job:
    """Returns the job that samples from the policy before its first step, then trains on that.

    What was sampled is kept in the run folder as records, and read from there by a resumed run.

    Raises:
      InputError: As `on_policy_job`; samples of other settings in the folder; or nothing to train
        on, because all completions of every prompt score alike.
    """
    parts = _open(run, data)
    sampled = _kept_samples(run, data, parts, workdir)
    examples = sampled_examples(sampled, data, parts.target, run.loop.seed)
    if not examples:
        raise InputError(f"{workdir / SAMPLES}: no two completions of a prompt score differently")
    job = make_job(run, workdir, parts.policy, parts.rows, Examples(examples), None)
    return dataclasses.replace(job, evaluate=_score_of(parts), sample=_writer_of(parts))


def _kept_samples(run: PreferenceRun, data: OnPolicyData, parts: _Parts, workdir: Path) -> Sampled:
    settings = {
        "data": to_plain(data),
        "feedback": to_plain(run.feedback),
        "policy": run.model.policy,
        "seed": run.loop.seed,
    }
    path = workdir / SAMPLES
    if agreed(path.is_file()):
        difference = first_difference(read_json(workdir / SETTINGS), settings, "samples")
        if difference:
            key, old, new = difference
            raise InputError(
                f"{path} was sampled with {key} {old!r}, this config has {new!r}; choose another "
                "--workdir"
            )
        return read_samples(path)
    params = load_language_model(parts.policy.folder).params
    if first_process():
        print(f"sampling {data.samples} completions of {len(parts.prompts)} prompts")
    sampled = parts.rollouts.many(params, parts.prompts)
    if not first_process():
        return sampled
    print(f"their mean score is {sampled.scores.mean():.3f}")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / SETTINGS, settings)
    write_jsonl(path, sample_records(sampled, parts.rollouts.tokenizer.decode))
    return sampled


# -- evaluation ----------------------------------------------------------------------------------


def _score_of(parts: _Parts) -> Callable[[TrainState], dict[str, float]] | None:
    """Mean score and length of sampled completions of the prompts that are held out."""
    if not parts.held_out:
        return None

    def evaluate(state: TrainState) -> dict[str, float]:
        sampled = _evaluated(parts, state)
        rows = [c for row in sampled.completions for c in row]
        return {
            "score": float(sampled.scores.mean()),
            "score_best_of_n": float(sampled.scores.max(1).mean()),
            "length": float(np.mean([len(c.ids) for c in rows])),
            "stopped": float(np.mean([c.finish_reason == "stop" for c in rows])),
        }

    return evaluate


def _evaluated(parts: _Parts, state: TrainState, count: int | None = None) -> Sampled:
    params = parts.rollouts.parameters(state.best_params, state.extra)
    return parts.rollouts.many(params, parts.held_out[:count], EVALUATION)


def _writer_of(parts: _Parts) -> Callable[[TrainState, Path], None] | None:
    """Writes completions of some prompts that are held out, with their scores."""
    if not parts.held_out:
        return None

    def write(state: TrainState, path: Path) -> None:
        sampled = _evaluated(parts, state, parts.rows.batch_size)
        write_jsonl(Path(f"{path}.jsonl"), sample_records(sampled, parts.rollouts.tokenizer.decode))

    return write
