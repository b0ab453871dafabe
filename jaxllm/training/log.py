"""What a run writes while it goes: metrics.jsonl, optional trackers, a bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jaxllm.errors import InputError


class MetricsLog:
    """Appends one JSON object a line to `path` and mirrors it to the trackers asked for."""

    def __init__(self, path: Path, *, resume_step: int, trackers: Iterable[str] = ()):
        self.path = path
        _cut_after(path, resume_step)
        self._file = path.open("a")
        self._trackers = [_TRACKERS[name](path.parent) for name in _known(trackers)]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of one step; a non-finite value is written as null."""
        clean = {k: float(f"{v:.7g}") if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self) -> None:
        """Closes the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a torn last line (a killed run) is left out."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; a run folder holds metrics.jsonl")
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise InputError(f"{path}:{number}: not a JSON object: {error.msg}") from None
    return rows


def _cut_after(path: Path, step: int) -> None:
    # A killed run may have logged past its last checkpoint; those steps are about to be redone.
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)


def _known(names: Iterable[str]) -> list[str]:
    names = list(names)
    for name in names:
        if name not in _TRACKERS:
            raise InputError(f"tracker {name!r} is not one of {', '.join(_TRACKERS)}")
    return names


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

    def __init__(self, name: str, total: int, start: int, unit: str):
        self.name, self.total, self.unit = name, total, unit
        self._begin, self._first = time.perf_counter(), start
        notebook = "ipykernel" in sys.modules
        self._bar = None
        if sys.stderr.isatty() or notebook:
            layout = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{remaining} left{postfix}]"
            self._bar = tqdm(total=total, initial=start, desc=name, bar_format=layout)

    def update(self, step: int, loss: float, units_per_second: float) -> None:
        """Shows the loss and speed at `step`."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {units_per_second:.0f} {self.unit}/s")
            self._bar.update(step - self._bar.n)
            return
        elapsed = time.perf_counter() - self._begin
        left = elapsed / max(1, step - self._first) * (self.total - step)
        print(
            f"{self.name} {step}/{self.total} {100 * step // self.total}% loss {loss:.4f} "
            f"{units_per_second:.0f} {self.unit}/s {int(left) // 60}:{int(left) % 60:02d} left",
            flush=True,
        )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
