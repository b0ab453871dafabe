"""Checkpoints: asynchronous saves with checksums, restore onto any mesh, fall back past damage.

A thin layer over Orbax (v1 API). A save is written to `STEP.tmp`, its SHA-256 sums are added, and
only then is it renamed to `STEP`, so a folder with a number for a name is complete. Orbax itself
does not notice a flipped byte in an array; the sums do. Where a tensor goes on restore is decided
by the abstract state given to `restore`, built from the current mesh and rules, never by what the
saving run used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxllm.errors import InputError
from jaxllm.parallel.processes import agreed, first_process, wait_for_all
from jaxllm.parallel.sharding import leaf_paths
from jaxllm.training.run_folder import read_json, write_json
from jaxllm.training.state import TrainState

SUMS = "sha256.json"

_log = logging.getLogger(__name__)

# Orbax narrates every save at INFO; the run's own progress line is enough.
logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of one training run, in `directory`, newest `keep` kept.

    Every process of a run calls the same methods; the first one alone renames and deletes. What an
    earlier run left half-saved is removed here, so readers use the functions below instead.
    """

    def __init__(self, directory: Path, *, keep: int = 2, metadata: dict[str, Any] | None = None):
        self.directory, self.keep = directory.resolve(), keep
        self.metadata = json.loads(json.dumps(metadata or {}, default=str))
        self.newest: int | None = None
        """The step last restored or saved by this run."""
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        if first_process():
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob("*.tmp*"):
                shutil.rmtree(leftover)

    def save(self, state: TrainState, step: int, *, wait: bool = False) -> None:
        """Starts saving `state`; blocks until it is on disk when `wait` is set.

        The arrays are copied before this returns, so they may be donated to the next step.
        """
        self.wait()  # At most one save in flight, and its errors surface here.
        if step != self.newest:
            self.newest = step
            response = ocp.save_async(
                self.directory / f"{step}.tmp", as_dict(state), custom_metadata=self.metadata
            )
            self._saving = self._worker.submit(self._publish, response, step)
        if wait:
            self.wait()
            wait_for_all(f"step {step} is published")

    def _publish(self, response: Any, step: int) -> None:
        response.result()
        if not first_process():
            return
        finished, unfinished = self.directory / str(step), self.directory / f"{step}.tmp"
        write_json(unfinished / SUMS, checksums(unfinished))
        if finished.exists():  # Left by a run that got further before it was killed.
            self._delete(step)
        unfinished.rename(finished)
        for old in finished_steps(self.directory)[: -self.keep]:
            self._delete(old)

    def _delete(self, step: int) -> None:
        # Renamed first: half of a checkpoint must not pass for one.
        going = self.directory / f"{step}.deleted.tmp"
        (self.directory / str(step)).rename(going)
        shutil.rmtree(going)

    def wait(self) -> None:
        """Blocks until the save in flight, if any, is finished."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """Loads the newest undamaged checkpoint, or returns None when there is none at all.

        Damaged ones newer than that are named in a warning and deleted.

        Args:
          abstract: ShapeDtypeStructs with shardings; the restored state has exactly these.

        Raises:
          InputError: If there are checkpoints and all are damaged, or the chosen one has other
            tensors than `abstract`.
        """
        chosen = self._choose()
        if chosen is None:
            return None
        difference = _difference(ocp.metadata(chosen).metadata, as_dict(abstract))
        if difference:
            raise InputError(f"checkpoint {chosen} does not fit this config: {difference}")
        tree = ocp.load(chosen, as_dict(abstract))
        self.newest = int(chosen.name)
        if first_process():
            for step in finished_steps(self.directory):
                if step > self.newest:
                    self._delete(step)
        return dataclasses.replace(abstract, **tree)

    def _choose(self) -> Path | None:
        """Lets the first process read all files and decide, so that all restore the same step."""
        step, reason = -1, f"the first process finds no checkpoint to use in {self.directory}"
        if first_process():
            try:
                chosen = newest_intact(self.directory)
                step = -1 if chosen is None else int(chosen.name)
            except InputError as error:
                step, reason = -2, str(error)
        step = agreed(step)
        if step == -2:
            raise InputError(reason)
        return None if step == -1 else self.directory / str(step)

    def close(self) -> None:
        """Finishes the save in flight."""
        self.wait()
        self._worker.shutdown()


def finished_steps(directory: Path) -> list[int]:
    """Returns the steps that have a complete checkpoint in `directory`, oldest first."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def newest_intact(directory: Path) -> Path | None:
    """Returns the newest undamaged checkpoint, warning of damaged newer ones; None for none.

    Raises:
      InputError: If there are checkpoints and all of them are damaged.
    """
    reasons: list[str] = []
    for step in reversed(finished_steps(directory)):
        folder = directory / str(step)
        reason = damage(folder)
        if reason is None:
            if reasons:
                _log.warning("using the older checkpoint %s", folder)
            return folder
        _log.warning("checkpoint %s is damaged: %s", folder, reason)
        reasons.append(f"{step}: {reason}")
    if reasons:
        raise InputError(f"every checkpoint in {directory} is damaged; {'; '.join(reasons)}")
    return None


def damage(folder: Path) -> str | None:
    """Returns what is wrong with the files of a finished checkpoint, or None."""
    try:
        expected = read_json(folder / SUMS)
    except InputError as error:
        return str(error)
    found = checksums(folder)
    for name, digest in expected.items() if isinstance(expected, dict) else [(SUMS, None)]:
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not what was written"
    return None


def checksums(folder: Path) -> dict[str, str]:
    """Returns {relative path: SHA-256 in hex} of the files under `folder`, SUMS excepted."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    with ThreadPoolExecutor(8) as pool:  # Hashing lets go of the interpreter lock.
        return dict(
            zip([str(p.relative_to(folder)) for p in files], pool.map(digest, files), strict=True)
        )


def as_dict(state: TrainState) -> dict[str, Any]:
    """Returns the state as a plain tree, without its absent parts."""
    tree = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return {name: part for name, part in tree.items() if jax.tree.leaves(part)}


def _difference(saved: Any, wanted: Any) -> str | None:
    """Describes the first tensor that is not the same in two trees."""
    old, new = (
        {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaf_paths(tree)}
        for tree in (saved, wanted)
    )
    for path in sorted(old.keys() | new.keys()):
        there, here = old.get(path, "absent"), new.get(path, "absent")
        if there != here:
            return f"{path} is {there} there and {here} here"
    return None


def read_newest(directory: Path) -> dict[str, Any]:
    """Loads the newest undamaged checkpoint as arrays on one device, whatever mesh saved it."""
    chosen = newest_intact(directory.resolve())
    if chosen is None:
        raise InputError(f"{directory}: no checkpoint; has the run saved yet?")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        ocp.metadata(chosen).metadata,
    )
    return ocp.load(chosen, abstract)
