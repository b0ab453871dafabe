"""Checkpoints: asynchronous saves, restore onto any mesh, fall back past a damaged one.

A thin layer over Orbax (v1 API). Where a tensor goes on restore is decided by the abstract state
given to `restore`, built from the current mesh and rules, never by what the saving run used.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxllm.errors import InputError
from jaxllm.training.state import TrainState

_log = logging.getLogger(__name__)

# Orbax narrates every save at INFO; the run's own progress line is enough.
logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of one run, in `directory`, newest `keep` kept."""

    def __init__(self, directory: Path, *, keep: int = 2, metadata: dict[str, Any] | None = None):
        self.directory = directory.resolve()
        self.metadata = json.loads(json.dumps(metadata or {}, default=str))
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=_always(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        )

    def steps(self) -> list[int]:
        """Returns the finished steps, oldest first."""
        return sorted(found.step for found in self._orbax.checkpoints)

    def save(self, state: TrainState, step: int, *, wait: bool = False) -> None:
        """Starts saving `state`; blocks until it is on disk when `wait` is set."""
        if step in self.steps():
            self.wait()
            return
        self.wait()  # At most one save in flight, and its errors surface here.
        self._orbax.save_async(step, as_dict(state), custom_metadata=self.metadata)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in flight, if any, is finished."""
        self._orbax.wait()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """Loads the newest readable checkpoint, or returns None when there is none at all.

        Args:
          abstract: ShapeDtypeStructs with shardings; the restored state has exactly these.

        Raises:
          InputError: If checkpoints exist and none of them can be read, or the newest belongs to
            a model of other shapes.
        """
        steps = self.steps()
        failures = []
        for step in reversed(steps):
            try:
                tree = self._orbax.load(step, as_dict(abstract))
                jax.block_until_ready(tree)
                if failures:
                    _log.warning("resuming from the older checkpoint of step %d", step)
                return from_dict(tree)
            except Exception as error:  # Orbax raises many types for a damaged folder.
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
                failures.append(f"step {step}: {type(error).__name__} {reason}")
                _log.warning("checkpoint %s/%d cannot be read (%s)", self.directory, step, reason)
        if failures:
            raise InputError(f"no checkpoint in {self.directory} can be read: {failures[0]}")
        return None

    def discard_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step`, which are damaged when this is called."""
        for found in self.steps():
            if found > step:
                self._orbax.delete(found)

    def close(self) -> None:
        """Finishes the save in flight and releases the folder."""
        self._orbax.wait()
        self._orbax.close()


def _always() -> Any:
    policies = ocp.training.save_decision_policies
    return policies.FixedIntervalPolicy(1)


def as_dict(state: TrainState) -> dict[str, Any]:
    """Returns the state as a plain tree, without its absent parts."""
    tree = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return {name: part for name, part in tree.items() if jax.tree.leaves(part)}


def from_dict(tree: dict[str, Any]) -> TrainState:
    """The inverse of `as_dict`."""
    return TrainState(**{"ema": None, "extra": {}, "opt_state": {}, **tree})


def read_newest(directory: Path) -> dict[str, Any]:
    """Loads the newest checkpoint of a run as host arrays, whatever mesh it was saved from."""
    checkpoints = Checkpoints(directory, keep=10**6) if directory.is_dir() else None
    steps = checkpoints.steps() if checkpoints else []
    if checkpoints is None or not steps:
        raise InputError(f"{directory}: no checkpoint; has the run saved yet?")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    metadata = checkpoints._orbax.metadata(steps[-1]).metadata
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata
    )
    return checkpoints._orbax.load(steps[-1], abstract)
