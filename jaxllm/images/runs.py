"""Reads the model of a run folder back: its config, parameters and buffers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxllm.errors import InputError
from jaxllm.training.checkpoint import finished_steps, read_newest
from jaxllm.training.run_folder import from_plain, read_json

Run = TypeVar("Run")


def load_params(run_dir: Path, kind: type[Run]) -> tuple[Run, Any, Any]:
    """Returns (config, params, extra) of a run; averaged and best where the run keeps such.

    Raises:
      InputError: If the folder is not a run, is a run of another kind, or has no checkpoint.
    """
    saved = read_run(run_dir)
    try:
        run = from_plain(kind, saved["config"], str(run_dir / "config.json"))
    except (TypeError, KeyError) as error:
        raise InputError(f"{run_dir}: a {saved.get('job')!r} run, not {kind.__name__}") from error
    best = run_dir / "best"
    tree = read_newest(best if finished_steps(best) else run_dir / "checkpoints")
    params = tree.get("ema", tree["params"])
    return run, jax.tree.map(jax.numpy.asarray, params), tree.get("extra", {})


def read_run(run_dir: Path) -> dict[str, Any]:
    """Returns the contents of config.json."""
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run folder")
    return read_json(run_dir / "config.json")


def run_kind(run_dir: Path) -> str:
    """Returns the name of the job that made the run."""
    return read_run(run_dir)["job"]


def replace_in(run: Run, **changes: Any) -> Run:
    """Returns a copy of a config with dotted changes: {"loop.steps": 10} as loop__steps=10."""
    for name, value in changes.items():
        head, *rest = name.split("__")
        inner = value if not rest else replace_in(getattr(run, head), **{"__".join(rest): value})
        run = dataclasses.replace(run, **{head: inner})  # type: ignore[type-var]
    return run
