"""Which collectives a compiled program runs: kind, bytes, mesh axes, how often, and their time.

Bytes are of the whole array: what an all-gather leaves, what a reduce-scatter starts from. In a
ring over n chips each of them sends (n - 1)/n of it, twice that in an all-reduce, a quarter of it
in an all-to-all both ways round; a permute sends all of it over one link.

The program of several slices is that of one of them. What crosses to the others is handed to the
host, array by array, and shared out among the slices' chips beforehand; here it has the axis
`slices` and goes as a ring of slices at each chip's share of the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxllm.parallel.mesh import MESH_AXES
from jaxllm.planning.hlo import Array, Instruction, Module
from jaxllm.planning.topologies import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)? \{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")


_SHARES: dict[str, Callable[[int], float]] = {
    "all-gather": lambda members: (members - 1) / members,
    "reduce-scatter": lambda members: (members - 1) / members,
    "all-reduce": lambda members: 2 * (members - 1) / members,
    "all-to-all": lambda members: 0.25,
    "collective-permute": lambda members: 1.0,
}


@dataclass(frozen=True)
class Collective:
    """One collective of the program, or the sum of several of one kind and axes."""

    kind: str
    axes: str
    """Mesh axes that it crosses, joined by `+`; `?` for groups that are no axes of the mesh."""
    members: int
    """Chips of a group."""
    nbytes: float
    """Bytes of the largest one."""
    times: float
    """How often it runs in a step, loops counted."""
    seconds: float
    """Of all runs together, alone on the links."""
    name: str = ""
    """The operation that it came from, of the largest one."""

    def plain(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def find_collectives(
    module: Module, topology: Topology, mesh_shape: Sequence[int]
) -> list[Collective]:
    """Returns every collective once; parts of an asynchronous one share their channel.

    Args:
      module: The compiled program.
      topology: What it was compiled for.
      mesh_shape: Sizes of the axes data, fsdp and tensor in one slice, devices in row-major order.
    """
    found: list[Collective] = []
    channels: dict[str, int] = {}
    for computation, line, times in module.instructions():
        if line.opcode == "send" and times and (between := _BETWEEN.search(line.attributes)):
            found.append(_between_slices(between[1], line, times, topology))
            continue
        kind = line.opcode.removesuffix("-start")
        if kind not in KINDS or times == 0:
            continue
        groups = replica_groups(line)
        members = len(groups[0]) if groups else 1
        if members < 2:
            continue
        if kind == "all-reduce" and _is_scattered(module, computation):
            kind = "reduce-scatter"
        nbytes = _whole_bytes(line, kind, members)
        one = Collective(
            kind,
            axes_of(groups, mesh_shape),
            members,
            nbytes,
            times,
            times * ring_seconds(kind, nbytes, members, topology),
            line.attribute(r'op_name="([^"]*)"') or line.name,
        )
        channel = line.attribute(r"channel_id=(\d+)")
        if channel is None or channel not in channels:
            if channel is not None:
                channels[channel] = len(found)
            found.append(one)
        elif times > found[channels[channel]].times:
            found[channels[channel]] = one
    return found


def _between_slices(
    transfer: str, line: Instruction, times: float, topology: Topology
) -> Collective:
    """What one chip hands to its host for the chips at its place in the other slices."""
    kind, nbytes = transfer.lower().replace("_", "-"), line.results[0].nbytes
    chip, slices = topology.chip, topology.slices
    rate = math.inf if chip is None or chip.network_bandwidth is None else chip.network_bandwidth
    share = _SHARES.get(kind, lambda members: 1.0)(slices)
    name = line.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"') or line.name
    return Collective(kind, "slices", slices, nbytes, times, times * share * nbytes / rate, name)


def summed(collectives: Sequence[Collective]) -> list[Collective]:
    """Returns one entry per kind and axes, the longest first."""
    groups: dict[tuple[str, str], list[Collective]] = {}
    for one in collectives:
        groups.setdefault((one.kind, one.axes), []).append(one)
    total = []
    for (kind, axes), parts in groups.items():
        largest = max(parts, key=lambda part: part.nbytes)
        total.append(
            Collective(
                kind,
                axes,
                largest.members,
                largest.nbytes,
                sum(part.times for part in parts),
                sum(part.seconds for part in parts),
                largest.name,
            )
        )
    return sorted(total, key=lambda one: -one.seconds)


def replica_groups(line: Instruction) -> list[list[int]]:
    """Returns the groups of device numbers; for a permute the chains that its pairs make."""
    if found := _IOTA.search(line.attributes):
        shape, source = (tuple(int(n) for n in part.split(",")) for part in found.groups()[:2])
        order = [int(n) for n in found[3].split(",")] if found[3] else range(len(source))
        numbers = np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape)
        return numbers.reshape(-1, shape[-1]).tolist()
    if found := _MESH.search(line.attributes):
        return _mesh_groups(found[1], found[2])
    if found := _LISTED.search(line.attributes):
        return _listed(found[1])
    if found := _PAIRS.search(line.attributes):
        return _chains(_listed(found[1]))
    return []


def _mesh_groups(mesh: str, axes: str) -> list[list[int]]:
    """Returns groups written as axes of a mesh: `'a'=2,'b'=8` and `'b'`, or `'b':(2)4`.

    An axis followed by (m)k is its part of size k that has m places of the axis before it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    shape: list[int] = []
    moving: list[int] = []
    wanted = {name: (before, size) for name, before, size in _AXIS.findall(axes)}
    for name, size in sizes.items():
        before, part = wanted.get(name, ("", ""))
        cut = [size] if not part else [int(before), int(part), size // int(before) // int(part)]
        if name in wanted:
            moving.append(len(shape) + (1 if part else 0))
        shape += cut
    still = [axis for axis in range(len(shape)) if axis not in moving]
    members = math.prod(shape[axis] for axis in moving)
    numbers = np.arange(math.prod(shape)).reshape(shape).transpose(still + moving)
    return numbers.reshape(-1, members).tolist()


def _listed(text: str) -> list[list[int]]:
    return [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d, ]+)\}", text)]


def _chains(pairs: list[list[int]]) -> list[list[int]]:
    """Joins devices that send to each other, whichever way, into groups."""
    group: dict[int, set[int]] = {}
    for a, b in pairs:
        joined = group.get(a, {a}) | group.get(b, {b})
        for member in joined:
            group[member] = joined
    unique = {tuple(sorted(members)) for members in group.values()}
    return [list(members) for members in sorted(unique)]


def axes_of(groups: list[list[int]], mesh_shape: Sequence[int]) -> str:
    """Names the mesh axes along which the members of the groups differ.

    Groups that are not whole axes (half a ring, say) are given the axes that they lie in.
    """
    if not groups:
        return "?"
    moving: set[int] = set()
    for group in groups:
        if max(group) >= math.prod(mesh_shape):
            return "?"
        places = np.array(np.unravel_index(group, tuple(mesh_shape)))
        moving |= {axis for axis in range(len(places)) if len(set(places[axis].tolist())) > 1}
    return "+".join(MESH_AXES[axis] for axis in sorted(moving)) or "?"


def _is_scattered(module: Module, computation: str) -> bool:
    """Whether a fusion that keeps a slice of an all-reduce holds it: a reduce-scatter on TPU."""
    lines = module.computations[computation]
    return "all-reduce-scatter" in computation or (
        len(lines) < 40 and bool(lines) and lines[-1].opcode == "dynamic-slice"
    )


def _whole_bytes(line: Instruction, kind: str, members: int) -> float:
    arrays = list(line.results)
    if line.opcode.endswith("-start") and len(arrays) > 1:
        # A start returns what went in and what comes out, the latter last.
        arrays = _outputs(arrays)
    total = sum(array.nbytes for array in arrays)
    return total * members if kind == "reduce-scatter" and line.opcode == kind else total


def _outputs(arrays: list[Array]) -> list[Array]:
    real = [array for array in arrays if math.prod(array.shape) > 1 or len(arrays) < 3]
    return real[len(real) // 2 :] or arrays


def ring_seconds(kind: str, nbytes: float, members: int, topology: Topology) -> float:
    """Returns how long one collective takes when nothing else is on the links."""
    width = 1 if kind == "collective-permute" else members
    return _SHARES[kind](members) * nbytes / topology.ring_bandwidth(width)
