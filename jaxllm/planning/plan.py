"""From a request to a verdict: measure, bound the time and, where it does not fit, find what would.

What is tried is compiled like the request itself: nothing here is extrapolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from jaxllm.errors import InputError
from jaxllm.parallel.mesh import MeshConfig, resolve_shape
from jaxllm.planning.roofline import roofline
from jaxllm.planning.topologies import GIB, Topology, find_topology, names
from jaxllm.planning.worker import ask


@dataclass(frozen=True)
class Request:
    """What to plan."""

    module: str
    """The process that knows configs; see `worker.ask`."""
    config: str
    overrides: tuple[str, ...]
    decode: dict[str, Any] | None = None
    """rows, context and kv of a decode step, None for the training step."""

    def ask(self, topology: Topology, changes: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the measured figures and the bounds, with `changes` to the config."""
        request = {
            "config": self.config,
            "overrides": [*self.overrides, *changes],
            "topology": topology.name,
            "decode": self.decode,
        }
        figures = ask(self.module, request, topology)
        bounds = roofline(figures, topology)
        figures["roofline"] = None if bounds is None else bounds.plain()
        return figures


@dataclass(frozen=True)
class Knobs:
    """What of a config can be turned to save memory, and where it stands."""

    batch: int
    mesh: MeshConfig
    accumulate: int | None
    """None where there is no accumulation."""
    remat: str | None
    """None where a model knows no such option."""


def candidates(knobs: Knobs, topology: Topology) -> Iterator[tuple[str, ...]]:
    """Yields overrides to try, the ones that cost least time first.

    Parameters over all chips, then layers computed again, then micro-batches, then heads split too.
    """
    chips = topology.chips
    data, fsdp, tensor = resolve_shape(knobs.mesh, chips)
    sharded: tuple[str, ...] = ()
    if fsdp * tensor < chips and knobs.batch % chips == 0:
        sharded = ("--mesh.data", "1", "--mesh.fsdp", str(chips // tensor))
        data, fsdp = 1, chips // tensor
        yield sharded
    remat: tuple[str, ...] = ()
    if knobs.remat is not None and knobs.remat != "full":
        remat = ("--model.remat", "full")
        yield sharded + remat
    micro = knobs.accumulate or 1
    parts: tuple[str, ...] = ()
    while knobs.accumulate is not None and knobs.batch % (2 * micro * data * fsdp) == 0:
        micro *= 2
        parts = ("--optimizer.accumulate", str(micro))
        yield sharded + remat + parts
        if micro >= 16:
            break
    for ways in (2, 4, 8):
        if fsdp % ways == 0 and knobs.batch % (data * fsdp // ways) == 0:
            yield ("--mesh.data", str(data), "--mesh.fsdp", str(fsdp // ways),
                   "--mesh.tensor", str(tensor * ways), *remat, *parts)  # fmt: skip


def what_fits(
    request: Request,
    topology: Topology,
    knobs: Knobs,
    refused: dict[str, Any],
    *,
    limit: int = 6,
) -> tuple[tuple[str, ...], dict[str, Any]] | None:
    """Returns the first candidate that fits with its figures; None when `limit` of them do not.

    Candidates that cannot fit, going by what did not, are left out.

    Args:
      request: What does not fit.
      topology: What it does not fit on.
      knobs: Of its config.
      refused: Its figures.
      limit: Programs to compile, minutes each.
    """
    failed: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), refused)]
    for changes in _shown(list(candidates(knobs, topology))):
        if len(failed) > limit:
            break
        if any(_hopeless(changes, knobs, *one) for one in failed):
            continue
        figures = request.ask(topology, changes)
        if figures["memory"]["fits"]:
            return changes, figures
        failed.append((changes, figures))
    return None


def _hopeless(
    changes: tuple[str, ...], knobs: Knobs, before: tuple[str, ...], figures: dict[str, Any]
) -> bool:
    """Whether changes that only add micro-batches to `before`, or nothing, are too large as well.

    What a step holds besides its state and batch is a constant and a share that shrinks with the
    rows, so it falls at most as 1/micro-batches.
    """
    held, peak = sum(figures["parts"].values()), figures["memory"]["peak"]
    (mesh, remat, micro), (old_mesh, old_remat, old_micro) = (
        _apart(one, knobs) for one in (changes, before)
    )
    if mesh != old_mesh:
        return False
    if held > figures["memory"]["limit"]:
        return True  # Only another mesh divides the state further.
    smallest = held + (peak - held) * old_micro / micro
    return remat == old_remat and smallest > figures["memory"]["limit"]


def _apart(changes: tuple[str, ...], knobs: Knobs) -> tuple[tuple[str, ...], bool, int]:
    """Returns the words of the mesh, whether layers are computed again, and the micro-batches."""
    words = dict(zip(changes[::2], changes[1::2], strict=True))
    mesh = tuple(f"{name} {size}" for name, size in words.items() if name.startswith("--mesh."))
    micro = int(words.get("--optimizer.accumulate", knobs.accumulate or 1))
    return mesh, "--model.remat" in words, micro


def _shown(every: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yields candidates with a bar on a terminal: each takes minutes."""
    with tqdm(every, unit=" plans", disable=None) as bar:
        for changes in bar:
            bar.set_description(" ".join(changes))
            yield changes


def smallest_that_holds(figures: dict[str, Any], topology: Topology) -> str | None:
    """Returns the smallest slice whose chips hold the state of a program divided over all of them.

    None where the state is not what is too large, or no slice of these chips holds it.
    """
    if topology.chip is None:
        return None
    batch = figures["parts"].get("batch", 0.0)
    held, limit = sum(figures["parts"].values()) - batch, topology.chip.hbm_bytes
    ways = figures["mesh"]["fsdp"] * figures["mesh"]["tensor"]
    if held * ways <= limit * topology.chips:
        return None
    sizes = [find_topology(name) for name in names() if name.startswith(f"{topology.chip.name}:")]
    enough = [one for one in sizes if held * ways <= limit * one.chips]
    return enough[0].name if enough else None


def search(
    request: Request, topology: Topology, knobs: Knobs, first: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the effect of every knob as rows of a table, the config itself first."""
    rows = [row("as given", first, topology)]
    for changes in _shown(list(candidates(knobs, topology))):
        try:
            figures = request.ask(topology, changes)
        except InputError as error:
            rows.append({"change": " ".join(changes), "fits": f"refused: {error}"})
            continue
        rows.append(row(" ".join(changes), figures, topology))
    return rows


def row(name: str, figures: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Returns one line of the table of knobs."""
    bounds, held = figures["roofline"], figures["memory"]
    return {
        "change": name,
        "fits": "yes" if held["fits"] else "no",
        "GiB per chip": round(held["peak"] / GIB, 2),
        "step at best (s)": None if bounds is None else bounds["best"],
        "bound by": None if bounds is None else bounds["bound"],
        "MFU at best": None if bounds is None else bounds["mfu"],
    }


def too_large(figures: dict[str, Any], topology: Topology) -> str:
    """Says in one line how much is missing, and what takes most of what was counted."""
    held = figures["memory"]
    over = (held["peak"] - held["limit"]) / GIB
    parts = sorted(figures["parts"].items(), key=lambda item: -item[1])
    largest = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts[:3])
    mesh = " ".join(f"{name}={size}" for name, size in figures["mesh"].items())
    return (
        f"{figures['program']} on {topology.name} with {mesh} needs {held['peak'] / GIB:.2f} GiB "
        f"a chip of {held['limit'] / GIB:.2f}, {over:.2f} too much ({largest})"
    )
