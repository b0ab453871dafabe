"""Run folders of models that were trained elsewhere, which everything here then reads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.run_folder import to_plain, versions, write_json
from jaxllm.training.state import TrainState, Tree


def check_new_folder(to: Path) -> None:
    """Raises InputError unless `to` is an empty folder or nothing at all."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to}: exists and is not an empty folder; choose another target")


def write_finished_run(
    to: Path,
    *,
    job: str,
    config: Any,
    identity: Any,
    params: Tree,
    extra: Tree,
    step: int = 0,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a run folder with one checkpoint and no optimiser; it appears when it is complete.

    Args:
      to: The folder to make.
      job: Name of the job that would have trained it.
      config: The job's config.
      identity: What a checkpoint must agree with to be read by that job.
      params: The parameters.
      extra: What is no parameter.
      step: The number of steps it was trained.
      files: Contents of other files by name, such as the tokenizer's.

    Raises:
      InputError: `to` is not an empty folder.
    """
    check_new_folder(to)
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state={},
        ema=None,
        extra=extra,
        first_bad=jnp.full((2,), -1, jnp.int32),
    )
    plain = to_plain(identity)
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".tmp", dir=to.parent))
    try:
        write_json(
            temporary / "config.json", {"job": job, "config": to_plain(config), "identity": plain}
        )
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        checkpoints = Checkpoints(
            temporary / "checkpoints", metadata={"identity": plain, "versions": versions()}
        )
        checkpoints.save(state, step, wait=True)
        checkpoints.close()
        temporary.chmod(0o755)  # A folder of mkdtemp is private.
        temporary.replace(to)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
