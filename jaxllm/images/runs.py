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

# The job that trains each kind of config.
JOBS = {
    "ClassifierRun": "classifier",
    "TokenizerRun": "tokenizer",
    "CodeModelRun": "dnd",
    "RQTransformerRun": "rq_transformer",
}


def load_params(run_dir: Path, kind: type[Run]) -> tuple[Run, Any, Any]:
    """Returns (config, params, extra) of a run; averaged and best where the run keeps such.

    Raises:
      InputError: If the folder is not a run, is a run of another kind, or has no checkpoint.
    """
    saved = read_run(run_dir)
    if saved["job"] != JOBS[kind.__name__]:
        raise InputError(
            f"{run_dir}: a {saved['job']!r} run; expected a {JOBS[kind.__name__]!r} run"
        )
    run = from_plain(kind, saved["config"], str(run_dir / "config.json"))
    best = run_dir / "best"
    tree = read_newest(best if finished_steps(best) else run_dir / "checkpoints")
    params = tree.get("ema", tree["params"])
    return run, jax.tree.map(jax.numpy.asarray, params), tree.get("extra", {})


def read_run(run_dir: Path) -> dict[str, Any]:
    """Returns the contents of config.json: `job`, `config` and `identity`."""
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run folder")
    saved = read_json(run_dir / "config.json")
    if not isinstance(saved, dict) or not {"job", "config"} <= set(saved):
        raise InputError(f"{run_dir}/config.json: not a run's config, it lacks job or config")
    return saved


def run_kind(run_dir: Path) -> str:
    """Returns the name of the job that made the run."""
    return read_run(run_dir)["job"]


def replace_in(run: Run, **changes: Any) -> Run:
    """Returns a copy of a config with nested changes: loop__steps=10 sets loop.steps.

    Changes to one nested config are made together, so that only the result is validated.
    """
    direct = {name: value for name, value in changes.items() if "__" not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if "__" in name:
            head, rest = name.split("__", 1)
            nested.setdefault(head, {})[rest] = value
    for head, inner in nested.items():
        direct[head] = replace_in(direct.get(head, getattr(run, head)), **inner)
    return dataclasses.replace(run, **direct)  # type: ignore[type-var]
