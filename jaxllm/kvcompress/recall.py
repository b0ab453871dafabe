"""The job that trains a small decoder on one of the memory tasks, for experiments on caches.

Such a model has retrieval heads after a few minutes on a CPU, and sooner with a curriculum:
attention that matches a key with a query is found among few facts, and reasoning over two facts
(queries of ReasonNeedleTask that name two keys) once a model can look up one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.data.pipeline import Batches
from jaxllm.errors import InputError
from jaxllm.hub.hf_folder import load_decoder, save_decoder
from jaxllm.kvcompress.tasks import Batch, NeedleTask, ReasonNeedleTask, SetGetTask
from jaxllm.models.decoder import DECODER_RULES, Decoder, DecoderConfig, decoder
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.training.job import Job, LoopConfig
from jaxllm.training.language_model import language_model_loss
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import TrainState, new_state
from jaxllm.training.step import make_step

JOB = "recall"
HELD_OUT = 1_000_003
"""Seed of sequences that no training run sees."""
Task = NeedleTask | ReasonNeedleTask | SetGetTask
Tree = Any


@dataclass(frozen=True)
class Stage:
    """What the batches of some steps hold; its shapes are compiled once more."""

    task: Task
    until: int
    """The first step that is no longer of this stage."""
    single: float = 0.0
    """Share of batches in which a query of ReasonNeedleTask names one key twice."""

    def __post_init__(self) -> None:
        if self.until < 0 or not 0 <= self.single <= 1:
            raise InputError(
                f"until {self.until} must not be negative, single {self.single} between 0 and 1"
            )
        if self.single and not isinstance(self.task, ReasonNeedleTask):
            raise InputError(f"single is for ReasonNeedleTask, not {type(self.task).__name__}")

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Returns the batch of a step."""
        if not isinstance(self.task, ReasonNeedleTask):
            return self.task.batch(seed, step, size)
        draw = np.random.default_rng([seed, step]).random()
        return self.task.batch(seed, step, size, single=bool(draw < self.single))


@dataclass(frozen=True)
class RecallRun:
    """Trains a decoder on a memory task."""

    model: DecoderConfig
    task: Task
    batch_size: int = 32
    single: float = 0.0
    """Share of batches in which a query of ReasonNeedleTask names one key twice."""
    curriculum: tuple[Stage, ...] = ()
    """Comes before `task`, by ascending `until`."""
    embed_std: float = 1.0
    """Standard deviation of fresh embeddings. Beside what the first layers add at the beginning,
    an embedding must stand out: a head that compares keys finds them by it."""
    init_from: str | None = None
    """A Hugging Face folder, such as a run's `model`, whose parameters training starts from."""
    held_out: int = 256
    """Sequences of an evaluation."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for stage in self.stages:
            if self.model.vocab_size != stage.task.vocab:
                raise InputError(
                    f"model.vocab_size {self.model.vocab_size} is not the task's {stage.task.vocab}"
                )
        ends = [stage.until for stage in self.curriculum]
        if ends != sorted(ends):
            raise InputError(f"curriculum ends at steps {ends}, expected ascending ones")
        if self.batch_size < 1 or self.held_out < 1:
            raise InputError(
                f"batch_size {self.batch_size} and held_out {self.held_out} must be at least 1"
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The curriculum and, to the end, the task itself."""
        return (*self.curriculum, Stage(self.task, self.loop.steps, self.single))


def shifted(batch: Batch) -> Batch:
    """Returns what the language-model loss takes: tokens [B, T-1], their successors, weights."""
    return {
        "tokens": batch["tokens"][:, :-1],
        "targets": batch["tokens"][:, 1:],
        "weights": batch["weights"][:, 1:],
    }


class _Steps:
    """The batches of a run by step; a source for the input pipeline."""

    def __init__(self, run: RecallRun):
        self.run = run

    def __len__(self) -> int:
        return max(1, self.run.loop.steps)

    def __getitem__(self, step: int) -> Batch:
        run = self.run
        stage = next((s for s in run.curriculum if step < s.until), run.stages[-1])
        return shifted(stage.batch(run.loop.seed, step, run.batch_size))


@dataclass(frozen=True)
class StepBatches(Batches):
    """Batches that are made whole for each step, as a curriculum wants, instead of drawn."""

    def dataset(self) -> grain.MapDataset:
        """Returns this host's rows of every batch as a dataset indexed by step."""
        host, hosts = self.hosts
        size = self.batch_size // hosts
        rows = slice(host * size, (host + 1) * size)
        return grain.MapDataset.source(self.source).map(
            lambda batch: {name: value[rows] for name, value in batch.items()}
        )


def recall_job(run: RecallRun) -> Job:
    """Returns the job that trains `run.model` on `run.task`."""
    blueprint = decoder(run.model)
    optimizer = make_optimizer(run.optimizer, run.loop.steps)
    score = RecallScorer(blueprint.build)

    def init(key: jax.Array) -> TrainState:
        params, extra = blueprint.init(key)
        params = {**params, "embed": params["embed"] * (run.embed_std / run.model.init_std)}
        return new_state(params, optimizer, ema=run.optimizer.ema_decay is not None, extra=extra)

    def evaluate(state: TrainState) -> dict[str, float]:
        found = {"accuracy": score(state.best_params, run.task.batch(HELD_OUT, 0, run.held_out))}
        if isinstance(run.task, ReasonNeedleTask):
            single = run.task.batch(HELD_OUT, 1, run.held_out, single=True)
            found["single_accuracy"] = score(state.best_params, single)
        return found

    def load(mesh: Mesh) -> Tree:
        config, _, params = load_decoder(str(run.init_from), mesh=mesh)
        for name in ("vocab_size", "dim", "layers", "attention", "mlp", "rope"):
            if getattr(config, name) != getattr(run.model, name):
                raise InputError(
                    f"init_from {run.init_from}: {name} is {getattr(config, name)}, this model has "
                    f"{getattr(run.model, name)}"
                )
        return params

    return Job(
        name=JOB,
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=init,
        load=None if run.init_from is None else load,
        step=make_step(
            language_model_loss(packed=False, accumulate=run.optimizer.accumulate),
            blueprint.build,
            optimizer,
            run.optimizer,
        ),
        batches=StepBatches(_Steps(run), run.batch_size, run.loop.seed),
        rules=DECODER_RULES,
        unit="sequences",
        evaluate=evaluate,
        identity={"model": run.model, "task": run.task},
    )


class RecallScorer:
    """Share of queries whose answer tokens are all the model's first choice; compiles once."""

    def __init__(self, build: Callable[[Any, Any], Decoder]):
        def right(params: Tree, tokens: jax.Array, targets: jax.Array) -> jax.Array:
            model = build(params, {})
            return model.token_logprobs(model.hidden(tokens), targets, with_accuracy=True)[1]

        self._run = jax.jit(right)

    def __call__(self, params: Tree, batch: Batch) -> float:
        """Returns the accuracy on the queries of a batch of a task."""
        parts = shifted(batch)
        right = np.asarray(self._run(params, parts["tokens"], parts["targets"]))
        return float(np.mean(answers_right(right, batch)))


def answers_right(right: np.ndarray, batch: Batch) -> np.ndarray:
    """Returns for every query whether its whole answer is right, bool [number of queries].

    Args:
      right: bool [B, T-1], whether the token after each place is predicted.
      batch: Of a task.
    """
    rows, places = np.nonzero(batch["query"] > 0)
    first = batch["query"][rows, places]
    length = batch["span"][rows, places, 1] - batch["span"][rows, places, 0]
    whole = np.ones(len(rows), bool)
    for token in range(int(length.max())):
        there = token < length
        whole &= ~there | right[rows, np.where(there, first + token, 1) - 1]
    return whole


def export_recall(run: RecallRun, state: TrainState, folder: Path) -> None:
    """Writes the model as a Hugging Face folder in bfloat16; an existing export stays.

    Raises:
      InputError: `folder` holds something else.
    """
    if (folder / "config.json").is_file():
        return
    config = dataclasses.replace(run.model, dropout=0.0, remat="none")
    save_decoder(folder, config, state.best_params, dtype=jnp.bfloat16)
