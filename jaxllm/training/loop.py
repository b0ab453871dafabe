"""The training loop, told top to bottom.

mesh -> state -> compiled step -> steps (log, evaluate, sample, save) -> summary. The same call
starts, resumes and, when the run is complete, only reports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxllm.data.pipeline import Batch
from jaxllm.data.token_cache import cache_root
from jaxllm.errors import InputError
from jaxllm.parallel.mesh import make_mesh, target_platform
from jaxllm.parallel.sharding import batch_sharding, like_params, param_shardings, reader
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.job import Job, Program
from jaxllm.training.log import Clock, Profiler
from jaxllm.training.run import NonFiniteError, Run
from jaxllm.training.run_folder import open_run_folder, to_plain, versions
from jaxllm.training.state import TrainState, with_params
from jaxllm.training.step import StepFn, watched_names

__all__ = ["NonFiniteError", "Result", "train"]

# Left to itself, TPU's compiler turns a product with a sharded kernel into one small product a
# chip, adding each to the whole result in memory. Gathering the kernel moves less: see docs/tpu.md.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclasses.dataclass
class Result:
    """What `train` leaves behind."""

    state: TrainState
    summary: dict[str, Any]
    finished: bool
    """False when a signal stopped the run; the same command goes on from there."""


def train(job: Job, workdir: Path, *, devices: list[jax.Device] | None = None) -> Result:
    """Runs `job` in `workdir` until its last step, a signal, or a non-finite value.

    Args:
      job: What to train.
      workdir: The run folder; a run that it holds a part of is continued.
      devices: The devices to use; None for all.

    Raises:
      InputError: If the folder belongs to another run, all its checkpoints are damaged, or the data
        cannot be read.
      NonFiniteError: At a NaN or infinity, which is never saved.
    """
    clock, loop = Clock(), job.loop
    if loop.compile_cache:
        use_compile_cache()
    open_run_folder(workdir, job)
    mesh = make_mesh(job.mesh, devices)
    rows = rows_sharding(job, mesh)
    source = job.batches
    if jax.process_count() > 1:
        source = dataclasses.replace(source, hosts=reader(mesh))

    with jax.set_mesh(mesh):
        # -- the state: the newest good checkpoint, else what the seed or the job gives ---------
        abstract = abstract_state(job, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        metadata = {"identity": to_plain(job.identity), "versions": versions()}
        checkpoints = Checkpoints(workdir / "checkpoints", keep=loop.keep, metadata=metadata)
        state = checkpoints.restore(abstract)
        if state is None:
            state = jax.jit(job.init, out_shardings=shardings)(jax.random.key(loop.seed))
            if job.load is not None:
                loaded = replaced(state.params, job.load(mesh), shardings.params)
                state = with_params(state, loaded)
            if job.load_extra is not None:
                extra = replaced(state.extra, job.load_extra(mesh), shardings.extra)
                state = dataclasses.replace(state, extra=extra)
            if job.check_start is not None:
                job.check_start(state)
        step = start = int(state.step)

        # -- the compiled step ----------------------------------------------------------------
        step_fn = jit_step(job.step, shardings, rows)
        programs: dict[Any, Callable[..., Any]] = {}
        """By the shapes of a batch: a curriculum has several."""
        key = jax.random.key(loop.seed + 1)

        with Run(job, workdir, checkpoints, start, clock) as run:
            # -- steps ------------------------------------------------------------------------
            clock.enter("step")
            with (
                stop_on_signal() as stop,
                Profiler(loop.profile, workdir / "profile") as profiled,
                contextlib.closing(source.iterate(start)) as batches,
            ):
                while step < loop.steps and not stop.requested(step):
                    with clock.during("data"):
                        batch = next(batches)
                        if job.prepare is not None:
                            batch = job.prepare(state, batch)
                        arrays = to_devices(batch, rows)
                    if step == start:
                        run.watched = watched_names(batch, abstract)
                    shapes = tuple(x.shape for x in jax.tree.leaves(arrays))
                    if shapes not in programs:
                        with clock.during("compile"):
                            programs[shapes] = step_fn.lower(state, arrays, key).compile()
                    state, metrics = profiled(step + 1, programs[shapes], state, arrays, key)
                    step += 1
                    run.flush()  # The row of the step before, while the devices work on this one.
                    if due(step, loop.log_every) or step == loop.steps:
                        run.record(state, step, metrics)
                    if step == loop.steps:
                        break
                    if due(step, loop.eval_every):
                        run.evaluate(state, step)
                    if due(step, loop.sample_every):
                        run.sample(state, step)
                    if due(step, loop.save_every):
                        run.save(state, step)
                run.save(state, step, wait=True)

            # -- the end ----------------------------------------------------------------------
            finished = step >= loop.steps
            if run.main and start >= loop.steps:
                print(f"{job.name}: already at step {start} of {loop.steps} in {workdir}")
            elif run.main and not finished:
                print(f"{job.name}: stopped and saved at step {step}; the same command resumes")
            device = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
            summary = run.finish(state, step, device)
    return Result(state=state, summary=summary, finished=finished)


def rows_sharding(job: Job, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, whose size must divide over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for what, size in job.batches.sizes.items():
        if size % ways:
            raise InputError(f"{what} {size} does not divide over data x fsdp = {ways} devices")
    return batch_sharding(mesh)


def replaced(tree: dict[str, Any], loaded: dict[str, Any], places: Any) -> dict[str, Any]:
    """Returns `tree` with the entries of `loaded` in the place of its own, on the devices."""
    if unknown := sorted(loaded.keys() - tree.keys()):
        raise InputError(f"parameters of another model: {unknown[0]!r} is not one of this model's")
    put = jax.device_put(loaded, {name: places[name] for name in loaded})
    return {**tree, **put}


def jit_step(step: StepFn, state: Any, rows: NamedSharding) -> Any:
    """Returns the jitted step, which takes over the memory of the state it is given.

    Args:
      step: A job's.
      state: The shardings of its state.
      rows: The sharding of its batches.
    """
    return jax.jit(
        step,
        in_shardings=(state, rows, None),
        out_shardings=(state, None),
        donate_argnums=0,
        compiler_options=TPU_OPTIONS if target_platform() == "tpu" else None,
    )


def abstract_state(job: Job | Program, mesh: Mesh) -> TrainState:
    """Returns the shapes, types and places of a state: parameters by rule, their mirrors alike."""
    abstract = jax.eval_shape(lambda: job.init(jax.random.key(0)))
    params = param_shardings(abstract.params, job.rules, mesh)
    places = like_params(abstract, abstract.params, params, mesh)
    if job.extra_rules is not None:
        extra = param_shardings(abstract.extra, job.extra_rules, mesh)
        places = dataclasses.replace(places, extra=extra)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        places,
    )


def to_devices(batch: Batch, rows: NamedSharding) -> dict[str, jax.Array]:
    """Makes global arrays from this process's rows of a batch."""
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch
    )


def due(step: int, every: int) -> bool:
    """Returns whether something that happens every `every` steps (0 for never) is due."""
    return every > 0 and step % every == 0


class stop_on_signal:  # noqa: N801 - reads as a statement
    """Turns SIGTERM and Ctrl-C into a request to stop; a second Ctrl-C interrupts at once.

    With several processes JAX's own preemption service catches SIGTERM and names a step at which
    all of them stop, so that no process is left waiting for another; Ctrl-C becomes a SIGTERM.
    """

    def __enter__(self) -> stop_on_signal:
        self._signalled = False
        self._old: dict[signal.Signals, Any] = {}
        caught = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else [signal.SIGINT]
        with contextlib.suppress(ValueError):  # Only the main thread may set handlers.
            for number in caught:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def requested(self, step: int) -> bool:
        """Returns whether to stop before the step after `step`."""
        if jax.process_count() == 1:
            return self._signalled
        return multihost_utils.reached_preemption_sync_point(step)

    def _handle(self, number: int, frame: Any) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        self._signalled = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, in JAXLLM_CACHE or the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
