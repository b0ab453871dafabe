"""An open run: its checkpoints and logs, and what happens to them at each kind of step.

Everything that waits for the devices is here: a logged row is fetched while they work on the step
after it; evaluations, pictures and checkpoints first write what is pending and refuse a state that
has met a non-finite value. So a checkpoint of step k implies that all rows up to k are in the log.
"""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.parallel.processes import agreed, first_process
from jaxllm.training.checkpoint import Checkpoints, finished_steps
from jaxllm.training.job import Job
from jaxllm.training.log import Clock, MetricsLog, Progress, goodput
from jaxllm.training.run_folder import read_json, versions, write_json
from jaxllm.training.state import TrainState


class NonFiniteError(InputError):
    """Training met a NaN or infinity; the message names the step and the first bad tensor."""


class Run:
    """One call of the training loop, from step `start` on; a context manager."""

    def __init__(self, job: Job, workdir: Path, checkpoints: Checkpoints, start: int, clock: Clock):
        loop = job.loop
        self.job, self.workdir, self.checkpoints = job, workdir, checkpoints
        self.start, self.clock = start, clock
        self.main = first_process()
        self.watched: list[str] = []
        """Names of the tensors that `TrainState.first_bad` numbers."""
        self._pending: tuple[int, dict[str, jax.Array], jax.Array] | None = None
        self.log = MetricsLog(
            workdir / "metrics.jsonl",
            resume_step=start,
            trackers=loop.trackers,
            enabled=self.main,
        )
        self.best = Best(loop.keep_best, self) if loop.keep_best else None
        self.progress = Progress(job.name, loop.steps, start, job.unit, enabled=self.main)
        if self.main and start < loop.steps:
            (workdir / "summary.json").unlink(missing_ok=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.close()
        self.log.close()
        self.checkpoints.close()
        if self.best is not None:
            self.best.checkpoints.close()

    def record(self, state: TrainState, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics of a step, to be fetched by `flush` when they are ready."""
        # The state is donated to the next step, so its health is copied out now.
        self._pending = step, metrics, jnp.array(state.first_bad)

    def flush(self) -> None:
        """Writes and shows what `record` keeps, and stops the run if it is not finite."""
        if self._pending is None:
            return
        (step, metrics, first_bad), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        examples = (step - self.start) * self.job.batches.batch_size
        speed = examples / max(self.clock.total("data", "step"), 1e-9)
        values[f"{self.job.unit}_per_second"] = speed
        self.log.write(step, {f"train/{name}": value for name, value in values.items()})
        self.progress.update(step, values["loss"], speed)
        self._raise_if_bad(first_bad)

    def check(self, state: TrainState) -> None:
        """Raises NonFiniteError when some step up to now met a non-finite value."""
        self.flush()
        self._raise_if_bad(state.first_bad)

    def _raise_if_bad(self, first_bad: jax.Array) -> None:
        step, tensor = (int(value) for value in jax.device_get(first_bad))
        if step >= 0:
            kept = self.checkpoints.newest
            before = "nothing was saved before it" if kept is None else f"step {kept} is saved"
            raise NonFiniteError(
                f"{self.workdir}: non-finite value at step {step}, first in "
                f"{self.watched[tensor]}; {before}"
            )

    def save(self, state: TrainState, step: int, *, wait: bool = False) -> None:
        """Saves a healthy state, in the background unless `wait` is set."""
        self.check(state)
        with self.clock.during("checkpoint"):
            self.checkpoints.save(state, step, wait=wait)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Runs the job's evaluation, logs it under `eval/` and keeps the best checkpoint."""
        if self.job.evaluate is None:
            return
        self.check(state)
        with self.clock.during("eval"):
            values = {f"eval/{k}": float(v) for k, v in self.job.evaluate(state).items()}
        self.log.write(step, values)
        if self.best is not None:
            self.best.offer(values, state, step)

    def sample(self, state: TrainState, step: int) -> None:
        """Lets the job draw its pictures."""
        if self.job.sample is None:
            return
        self.check(state)
        with self.clock.during("eval"):
            name = f"step{step:07d}"
            if self.main:
                folder = self.workdir / "samples"
                folder.mkdir(exist_ok=True)
                self.job.sample(state, folder / name)
                return
            # The others take part in what is computed, and what they write and say is dropped.
            with TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
                self.job.sample(state, Path(scratch) / name)

    def finish(self, state: TrainState, step: int, device: str) -> dict[str, Any]:
        """Evaluates and samples a run that is complete, and returns and writes summary.json.

        What was done before an interruption is not done again.
        """
        path = self.workdir / "summary.json"
        if agreed(path.exists()):
            return read_json(path)
        if step >= self.job.loop.steps:
            last = [row for row in self.log.rows if row["step"] == step]
            if agreed(not any(name.startswith("eval/") for row in last for name in row)):
                self.evaluate(state, step)
            self.sample(state, step)
        seconds = self.clock.read()
        summary = {
            "job": self.job.name,
            "step": step,
            "steps": self.job.loop.steps,
            "metrics": self.log.newest(),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "goodput": {name: round(value, 4) for name, value in goodput(seconds).items()},
            "device": device,
            "versions": versions(),
        }
        if self.main:
            write_json(path, summary)
        return summary


class Best:
    """The checkpoint with the lowest value of one evaluation metric, in the folder `best`."""

    def __init__(self, metric: str, run: Run):
        self.metric, self.clock = f"eval/{metric}", run.clock
        folder = run.workdir / "best"
        saved = finished_steps(folder)[-1:]
        values = [row.get(self.metric) for row in run.log.rows if row["step"] in saved]
        # Without a row, the checkpoint is of a step that is about to be redone.
        self.lowest = min((value for value in values if value is not None), default=math.inf)
        self.checkpoints = Checkpoints(folder, keep=1, metadata=run.checkpoints.metadata)

    def offer(self, values: dict[str, float], state: TrainState, step: int) -> None:
        """Saves `state` when its value is the lowest so far."""
        if self.metric not in values:
            raise InputError(f"loop.keep_best {self.metric!r} is not one of {sorted(values)}")
        if agreed(values[self.metric] < self.lowest):
            self.lowest = values[self.metric]
            with self.clock.during("checkpoint"):
                self.checkpoints.save(state, step, wait=True)
