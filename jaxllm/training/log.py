"""What a run writes while it goes: metrics.jsonl, trackers, a bar or plain lines, a trace."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

from jaxllm.errors import InputError
from jaxllm.training.run_folder import write_text


class MetricsLog:
    """Appends one JSON object a line to `path` and mirrors it to the trackers asked for.

    Rows after `resume_step` are cut: a killed run may have logged past its last checkpoint, and
    those steps are about to be redone. Only the process with `enabled` touches the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int = 0,
        trackers: Iterable[str] = (),
        enabled: bool = True,
    ):
        self.path, self.enabled = path, enabled
        self.rows = [row for row in _rows(path) if row["step"] <= resume_step]
        """What the log holds so far, oldest first."""
        self._trackers = [_tracker(name)(path.parent) for name in trackers if enabled]
        if enabled:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of one step; a non-finite value is written as null."""
        clean = {k: float(f"{v:.7g}") if math.isfinite(v) else None for k, v in values.items()}
        self.rows.append({"step": step, **clean})
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        for tracker in self._trackers:
            tracker.write(step, values)

    def newest(self) -> dict[str, float | None]:
        """Returns the newest value of every metric."""
        return {k: v for row in self.rows for k, v in row.items() if k != "step"}

    def close(self) -> None:
        """Closes the trackers."""
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a torn last line (a killed run) is left out."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a run folder holds metrics.jsonl")
    return _rows(path)


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
                raise ValueError
        except ValueError:
            if number == len(lines):
                break
            found = line[:40].decode(errors="replace")
            raise InputError(
                f"{path}:{number}: expected a JSON object with a step, found {found!r}"
            ) from None
        rows.append(row)
    return rows


def _tracker(name: str) -> Any:
    if name not in _TRACKERS:
        near = difflib.get_close_matches(name, _TRACKERS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"tracker {name!r} is not one of {', '.join(_TRACKERS)}{hint}")
    return _TRACKERS[name]


class _TensorBoard:
    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise InputError("tracker 'tensorboard' needs: pip install jaxllm[logging]") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path):
        try:
            import wandb
        except ImportError:
            raise InputError("tracker 'wandb' needs: pip install jaxllm[logging]") from None
        self._run = wandb.init(project="jaxllm", dir=str(folder), name=folder.name, resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


class Progress:
    """A tqdm bar on a terminal or in a notebook, one dense line per log step elsewhere."""

    def __init__(self, name: str, total: int, start: int, unit: str, *, enabled: bool = True):
        self.name, self.total, self.unit, self.enabled = name, total, unit, enabled
        self._begin, self._first = time.perf_counter(), start
        self._bar = None
        if enabled and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            layout = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{remaining} left{postfix}]"
            self._bar = tqdm(total=total, initial=start, desc=name, bar_format=layout)

    def update(self, step: int, loss: float, units_per_second: float) -> None:
        """Shows the loss and speed at `step`."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {units_per_second:.0f} {self.unit}/s")
            self._bar.update(step - self._bar.n)
        elif self.enabled:
            elapsed = time.perf_counter() - self._begin
            left = int(elapsed / max(1, step - self._first) * (self.total - step))
            print(
                f"{self.name} {step}/{self.total} {100 * step // self.total}% loss {loss:.4f} "
                f"{units_per_second:.0f} {self.unit}/s {left // 60}:{left % 60:02d} left",
                flush=True,
            )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


class Clock:
    """Splits the wall time of one call of the training loop; every moment is in one bucket.

    * init: mesh, restoring or making the state, opening logs.
    * compile: the compilation of the step.
    * data: waiting for the next batch and handing it to the devices.
    * step: all other time between the steps, mostly waiting for the devices.
    * eval: evaluations and samples, with the compilation of theirs.
    * checkpoint: waiting for saves; what is written in the background costs nothing here.

    Devices work on while the host waits for data, so little in `data` does not cost steps.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds = dict.fromkeys(
            ("init", "compile", "data", "step", "eval", "checkpoint"), 0.0
        )
        self._bucket, self._since = "init", now()

    def enter(self, bucket: str) -> str:
        """Books the time since the last change and goes on in `bucket`; returns the old one."""
        now = self._now()
        self._seconds[self._bucket] += now - self._since
        previous, self._bucket, self._since = self._bucket, bucket, now
        return previous

    @contextlib.contextmanager
    def during(self, bucket: str) -> Iterator[None]:
        """Books the body of a `with` to `bucket`."""
        previous = self.enter(bucket)
        try:
            yield
        finally:
            self.enter(previous)

    def read(self) -> dict[str, float]:
        """Returns the seconds in every bucket until now; their sum is all time since the start."""
        self.enter(self._bucket)
        return dict(self._seconds)

    def total(self, *buckets: str) -> float:
        """Returns the seconds in `buckets` until now."""
        seconds = self.read()
        return sum(seconds[bucket] for bucket in buckets)


def goodput(seconds: dict[str, float]) -> dict[str, float]:
    """Returns the share of all time in five buckets: init, compile, data, step, checkpoint_eval.

    `step` is the goodput: the share of the time that went into training steps.
    """
    total = max(sum(seconds.values()), 1e-9)
    joined = {name: seconds[name] for name in ("init", "compile", "data", "step")}
    joined["checkpoint_eval"] = seconds["checkpoint"] + seconds["eval"]
    return {name: value / total for name, value in joined.items()}


class Profiler:
    """Writes a JAX profiler trace of steps `span[0]` to `span[1]`; a context manager."""

    def __init__(self, span: tuple[int, int] | None, folder: Path):
        self.span, self.folder, self._running = span, folder, False

    def __enter__(self) -> Profiler:
        return self

    def __call__(self, step: int, fn: Callable[..., Any], *args: Any) -> Any:
        """Returns `fn(*args)`, the work of `step`, traced if the step is in the span."""
        if self.span is not None and step == self.span[0]:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            out = fn(*args)
        if self.span is not None and self._running and step == self.span[1]:
            jax.block_until_ready(out)  # The trace must contain what the devices still do.
            self.__exit__()
        return out

    def __exit__(self, *exc: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
