"""The training loop, told top to bottom.

mesh -> state -> checkpoint -> compile -> steps (log, evaluate, sample, save) -> summary. The same
call starts, resumes and, when the run is complete, only reports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import batch_sharding, like_params, param_shardings
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.job import Job
from jaxllm.training.log import MetricsLog, Progress, read_metrics
from jaxllm.training.run_folder import (
    check_identity,
    to_plain,
    versions,
    write_config,
    write_json,
)
from jaxllm.training.state import TrainState
from jaxllm.training.step import watched_names

_log = logging.getLogger(__name__)


class NonFiniteError(InputError):
    """Training met a NaN or infinity; the message names the step and the first bad tensor."""


@dataclasses.dataclass
class Result:
    """What `train` leaves behind."""

    state: TrainState
    summary: dict[str, Any]
    finished: bool
    """False when a signal stopped the run; the same command goes on from there."""


def train(job: Job, workdir: Path) -> Result:
    """Runs `job` in `workdir` until its last step, a signal, or a non-finite value."""
    clock = Clock()
    loop = job.loop
    if loop.compile_cache:
        use_compile_cache()

    # -- the run folder ----------------------------------------------------------------------
    workdir.mkdir(parents=True, exist_ok=True)
    check_identity(workdir, job)
    write_config(workdir, job)
    main_process = jax.process_index() == 0

    # -- mesh, state and where each part of it lives ------------------------------------------
    mesh = make_mesh(job.mesh)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(job.init, jax.random.key(loop.seed))
        shardings = state_shardings(abstract, job, mesh)
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            shardings,
        )
        metadata = {"identity": to_plain(job.identity), "versions": versions()}
        checkpoints = Checkpoints(workdir / "checkpoints", keep=loop.keep, metadata=metadata)
        state = checkpoints.restore(abstract)
        if state is None:
            state = jax.jit(job.init, out_shardings=shardings)(jax.random.key(loop.seed))
        start = int(state.step)
        checkpoints.discard_after(start)
        if start >= loop.steps:
            print(f"{job.name}: already at step {start} of {loop.steps} in {workdir}")

        # -- the compiled step ----------------------------------------------------------------
        place = batch_sharding(mesh)
        step_fn = jax.jit(
            job.step,
            in_shardings=(shardings, place, None),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        key = jax.random.key(loop.seed + 1)
        batches = job.batches.iterate(start)
        log = MetricsLog(
            workdir / "metrics.jsonl",
            resume_step=start,
            trackers=loop.trackers if main_process else (),
        )
        best = Best(loop.keep_best, workdir, metadata) if loop.keep_best else None
        progress = Progress(job.name, loop.steps, start, job.unit)
        pending: Pending | None = None
        names: list[str] = []
        last_eval: dict[str, float] = {}
        step = start
        clock.enter("compile")

        # -- steps ----------------------------------------------------------------------------
        try:
            with stop_on_signal() as stop:
                while step < loop.steps and not stop.requested:
                    if not names:
                        batch = next(batches)
                        names = watched_names(batch, abstract.params)
                    else:
                        with clock.during("data"):
                            batch = next(batches)
                    device_batch = jax.tree.map(
                        lambda x: jax.make_array_from_process_local_data(place, np.asarray(x)),
                        batch,
                    )
                    with profiled(loop.profile, step, workdir):
                        state, metrics = step_fn(state, device_batch, key)
                    step += 1
                    if step == start + 1:
                        jax.block_until_ready(metrics)
                        clock.enter("step")
                    if due(step, loop.log_every, loop.steps):
                        if pending is not None:
                            pending.flush(log, progress, names)
                        pending = Pending(step, start, metrics, state.first_bad, job, clock)
                    if loop.eval_every and due(step, loop.eval_every, 0) and step < loop.steps:
                        with clock.during("eval"):
                            last_eval = evaluate(job, state, step, log, best)
                    if loop.sample_every and due(step, loop.sample_every, 0) and job.sample:
                        with clock.during("eval"):
                            job.sample(state, folder(workdir, "samples") / f"step{step:07d}")
                    if loop.save_every and due(step, loop.save_every, 0):
                        with clock.during("checkpoint"):
                            raise_if_bad(state.first_bad, names, workdir)
                            checkpoints.save(state, step)
            if pending is not None:
                pending.flush(log, progress, names)

            # -- the end: evaluation, checkpoint, summary -----------------------------------------
            if names:
                raise_if_bad(state.first_bad, names, workdir)
            finished = step >= loop.steps
            with clock.during("checkpoint"):
                checkpoints.save(state, step, wait=True)
            if finished and step > start:
                with clock.during("eval"):
                    last_eval = evaluate(job, state, step, log, best)
                    if job.sample:
                        job.sample(state, folder(workdir, "samples") / f"step{step:07d}")
        finally:
            progress.close()
            log.close()
            checkpoints.close()
    summary = summarise(job, workdir, step, last_eval, pending, clock)
    if main_process and (step > start or not (workdir / "summary.json").exists()):
        write_json(workdir / "summary.json", summary)
    if not finished:
        print(f"{job.name}: stopped by a signal and saved at step {step}; the same command resumes")
    return Result(state=state, summary=summary, finished=finished)


def state_shardings(abstract: TrainState, job: Job, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns where every leaf of a state lives: parameters by rule, their mirrors like them."""
    params = param_shardings(abstract.params, job.rules, mesh)

    def mirror(tree: Any) -> Any:
        return like_params(tree, abstract.params, params, mesh)

    return TrainState(
        step=mirror(abstract.step),
        params=params,
        opt_state=mirror(abstract.opt_state),
        ema=mirror(abstract.ema),
        extra=mirror(abstract.extra),
        first_bad=mirror(abstract.first_bad),
    )


def due(step: int, every: int, last: int) -> bool:
    """Returns whether something that happens every `every` steps, and at `last`, is due."""
    return (every > 0 and step % every == 0) or step == last


def evaluate(
    job: Job, state: TrainState, step: int, log: MetricsLog, best: Best | None
) -> dict[str, float]:
    """Runs the job's evaluation, logs it under `eval/` and keeps the best checkpoint."""
    if job.evaluate is None:
        return {}
    values = {f"eval/{name}": float(value) for name, value in job.evaluate(state).items()}
    log.write(step, values)
    if best is not None:
        best.offer(values, state, step)
    return values


class Best:
    """The checkpoint with the lowest value of one evaluation metric, in the folder `best`."""

    def __init__(self, metric: str, workdir: Path, metadata: dict[str, Any]):
        self.metric = f"eval/{metric}"
        rows = read_metrics(workdir / "metrics.jsonl")
        seen = [row[self.metric] for row in rows if row.get(self.metric) is not None]
        self.lowest = min(seen, default=float("inf"))
        self.checkpoints = Checkpoints(workdir / "best", keep=1, metadata=metadata)

    def offer(self, values: dict[str, float], state: TrainState, step: int) -> None:
        """Saves `state` when its value is the lowest so far."""
        if self.metric not in values:
            raise InputError(f"loop.keep_best {self.metric!r} is not one of {sorted(values)}")
        if values[self.metric] < self.lowest:
            self.lowest = values[self.metric]
            self.checkpoints.save(state, step, wait=True)


def raise_if_bad(first_bad: jax.Array, names: list[str], workdir: Path) -> None:
    """Raises NonFiniteError when some step up to now met a non-finite value."""
    step, tensor = (int(value) for value in np.asarray(first_bad))
    if step >= 0:
        raise NonFiniteError(
            f"non-finite value at step {step}, first in {names[tensor]}; the checkpoints in "
            f"{workdir / 'checkpoints'} are from before it"
        )


class Pending:
    """Metrics of a logged step, fetched only when the next one is logged, so nothing waits."""

    def __init__(
        self,
        step: int,
        start: int,
        metrics: dict[str, jax.Array],
        first_bad: jax.Array,
        job: Job,
        clock: Clock,
    ):
        self.step, self.metrics, self.job = step, metrics, job
        # The state is donated to the next step, so its health is copied out now.
        self.first_bad = jnp.array(first_bad)
        self.since_start = step - start - 1
        self.clock = clock
        self.values: dict[str, float] = {}

    def flush(self, log: MetricsLog, progress: Progress, names: list[str]) -> None:
        """Writes the values, shows them, and stops the run if they are not finite."""
        if self.values:
            return
        values = {name: float(value) for name, value in jax.device_get(self.metrics).items()}
        busy = self.clock.seconds["step"] + self.clock.running("step")
        speed = self.since_start * self.job.batches.batch_size / max(busy, 1e-9)
        self.values = {**values, f"{self.job.unit}_per_second": speed}
        log.write(self.step, {f"train/{name}": value for name, value in self.values.items()})
        progress.update(self.step, values["loss"], speed)
        raise_if_bad(self.first_bad, names, log.path.parent)


class Clock:
    """Splits wall time into init, compile, data, step, eval and checkpoint seconds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("init", "compile", "data", "step", "eval", "checkpoint"), 0.0)
        self._bucket, self._since = "init", time.perf_counter()

    def enter(self, bucket: str) -> str:
        """Books the time since the last change and goes on in `bucket`; returns the old one."""
        now = time.perf_counter()
        self.seconds[self._bucket] += now - self._since
        previous, self._bucket, self._since = self._bucket, bucket, now
        return previous

    def running(self, bucket: str) -> float:
        """Returns the seconds not yet booked, if they belong to `bucket`."""
        return time.perf_counter() - self._since if self._bucket == bucket else 0.0

    @contextlib.contextmanager
    def during(self, bucket: str) -> Iterator[None]:
        """Books the body of a `with` to `bucket`."""
        previous = self.enter(bucket)
        try:
            yield
        finally:
            self.enter(previous)


class stop_on_signal:  # noqa: N801 - reads as a statement
    """Turns SIGTERM and Ctrl-C into a flag; a second Ctrl-C interrupts at once."""

    def __enter__(self) -> stop_on_signal:
        self.requested = False
        self._old: dict[signal.Signals, Any] = {}
        with contextlib.suppress(ValueError):  # Only the main thread may set handlers.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def profiled(span: tuple[int, int] | None, step: int, workdir: Path) -> Iterator[None]:
    """Traces steps `span[0]` to `span[1]` with the JAX profiler."""
    if span is not None and step + 1 == span[0]:
        jax.profiler.start_trace(str(workdir / "profile"))
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        yield
    if span is not None and step + 1 == span[1]:
        jax.profiler.stop_trace()


def folder(workdir: Path, name: str) -> Path:
    """Returns a sub-folder of the run, made if needed."""
    path = workdir / name
    path.mkdir(exist_ok=True)
    return path


def summarise(
    job: Job,
    workdir: Path,
    step: int,
    last_eval: dict[str, float],
    pending: Pending | None,
    clock: Clock,
) -> dict[str, Any]:
    """Returns the contents of summary.json."""
    clock.enter("init")
    train_values = pending.values if pending is not None else {}
    device = jax.devices()[0]
    return {
        "job": job.name,
        "step": step,
        "steps": job.loop.steps,
        "metrics": {**{f"train/{k}": v for k, v in train_values.items()}, **last_eval},
        "seconds": {name: round(value, 3) for name, value in clock.seconds.items()},
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "versions": versions(),
    }


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, in JAXLLM_CACHE or the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:
        default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxllm"
        path = Path(os.environ.get("JAXLLM_CACHE", default)) / "xla"
        jax.config.update("jax_compilation_cache_dir", str(path))
