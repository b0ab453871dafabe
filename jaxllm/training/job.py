"""What a system gives to the training loop (and to the planner): a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm.data.pipeline import Batches
from jaxllm.errors import InputError
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.parallel.sharding import Rules
from jaxllm.training.state import TrainState
from jaxllm.training.step import StepFn


@dataclass(frozen=True)
class LoopConfig:
    """How long a run is and what it does on the way."""

    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    """Steps between rows of metrics; 0 for only the last step."""
    eval_every: int = 0
    """Steps between evaluations; 0 for only at the end."""
    sample_every: int = 0
    """Steps between sample pictures; 0 for only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0 for only at the end."""
    keep: int = 2
    """Checkpoints kept."""
    keep_best: str | None = None
    """Name of the evaluation metric whose lowest value so far keeps its checkpoint in `best/`."""
    trackers: tuple[str, ...] = ()
    """Besides metrics.jsonl: tensorboard, wandb."""
    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace written to the run folder."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "sample_every", "save_every"):
            if getattr(self, name) < 0:
                raise InputError(f"loop.{name} {getattr(self, name)} must not be negative")
        if self.keep < 1:
            raise InputError(f"loop.keep {self.keep} must be at least 1")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise InputError(f"loop.profile {self.profile} must be a first and a last step")


@dataclass(frozen=True)
class Program:
    """The part of a job that is compiled; it takes shapes and no data.

    A system makes its job from its program, so that what is planned is what runs.
    """

    init: Callable[[jax.Array], TrainState]
    step: StepFn
    rules: Rules
    batch: dict[str, jax.ShapeDtypeStruct]
    """Shapes and types of one step's examples over all hosts."""
    extra_rules: Rules | None = None
    """As in `Job`."""


@dataclass(frozen=True)
class Job:
    """One training stage, ready to run.

    The loop knows no system: everything it needs is here.
    """

    name: str
    config: Any
    """The frozen dataclass that made this job; written to config.json."""
    loop: LoopConfig
    mesh: MeshConfig
    init: Callable[[jax.Array], TrainState]
    """key -> the state before the first step; traceable."""
    step: StepFn
    batches: Batches
    rules: Rules
    """Path regex -> logical axes of each parameter."""
    load: Callable[[Mesh], dict[str, Any]] | None = None
    """mesh -> entries of `params` that take the place of those of `init`, as for fine-tuning."""
    load_extra: Callable[[Mesh], dict[str, Any]] | None = None
    """mesh -> entries of `extra` that take the place of those of `init`, as frozen models."""
    extra_rules: Rules | None = None
    """As `rules`, of `extra`; None places what mirrors a parameter like it, and replicates the
    rest."""
    check_start: Callable[[TrainState], None] | None = None
    """Called with the state before the first step; raises InputError to refuse it."""
    prepare: Callable[[TrainState, dict[str, Any]], dict[str, Any]] | None = None
    """(state, batch) -> the batch that the step sees, on the host: samples of the current model."""
    unit: str = "images"
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    sample: Callable[[TrainState, Path], None] | None = None
    """Writes pictures of the current model to a path without its ending."""
    identity: Any = None
    """The part of the config that a checkpoint must share to be resumed, usually the model's."""
