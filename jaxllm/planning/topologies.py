"""Topologies by name: chips, memory, peak rates and links, each figure with its source.

Names are `GENERATION:SHAPE` (`v5e:4x4`, `v5p:4x4x8`) or Cloud TPU's accelerator types, which count
chips for v5e and v6e (`v5litepod-16`, `v6e-64`) and TensorCores, two a chip, for v4 and v5p
(`v5p-64` is 32 chips). `2xv5e:16x16` are two slices of that shape with the data centre's network
between them. `cpu:N` is N CPU devices, for trying things out.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxllm.errors import InputError

GIB = 1024**3


@dataclass(frozen=True)
class Chip:
    """One generation; bandwidths in bytes per second.

    A link is between two neighbours of the torus and is as fast in each direction; the figure is of
    one direction. The sources give it for all links of a chip together.
    """

    name: str
    accelerator: str
    """Prefix of Cloud TPU's accelerator types."""
    hbm_bytes: int
    peak_flops: float
    """bfloat16 matrix products, FLOP/s."""
    hbm_bandwidth: float
    link_bandwidth: float
    dims: int
    """Dimensions of the torus."""
    wraps_from: int
    """Chips along a dimension from which on its ends are joined (multiples of it)."""
    chips_per_host: int
    """Most chips of a single machine."""
    cores: int
    """Units that the accelerator type counts per chip."""
    source: str
    network_bandwidth: float | None = None
    """Of the data centre's network, one chip's share; None where it is not published."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "v4", 32 * GIB, 275e12, 1228e9, 50e9, 3, 4, 4, 2,
            "cloud.google.com/tpu/docs/v4: 275 TFLOPS, 32 GiB at 1228 GB/s; 6 links of 50 GB/s "
            "each way as in arXiv:2304.01433, Table 4",
        ),
        Chip(
            "v5e", "v5litepod", 16 * GIB, 197e12, 819e9, 50e9, 2, 16, 8, 1,
            "cloud.google.com/tpu/docs/v5e: 197 TFLOPS, 16 GB at 819 GB/s, 400 GB/s over 4 links "
            "both ways together, 6.4 Tbit/s of network for 256 chips",
            6.4e12 / 8 / 256,
        ),
        Chip(
            "v5p", "v5p", 95 * GIB, 459e12, 2765e9, 100e9, 3, 4, 4, 2,
            "cloud.google.com/tpu/docs/v5p: 459 TFLOPS, 95 GB at 2765 GB/s, 4800 Gbit/s one way "
            "over 6 links",
        ),
        Chip(
            "v6e", "v6e", 32 * GIB, 918e12, 1638e9, 100e9, 2, 16, 8, 1,
            "cloud.google.com/tpu/docs/v6e: 918 TFLOPS, 32 GB at 1638 GB/s, 800 GB/s over 4 links "
            "both ways together",
        ),
    )
}  # fmt: skip
SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: (
        (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8),
        (8, 8, 16), (8, 16, 16), (16, 16, 16),
    ),
}  # fmt: skip


_SEVERAL = re.compile(r"([2-9]|[1-9]\d+)x(v.+)")


@dataclass(frozen=True)
class Topology:
    """Chips and how they are joined."""

    name: str
    shape: tuple[int, ...]
    chip: Chip | None
    """None for CPU devices, of which no rates are known."""
    slices: int = 1
    """Of this shape each, with only the data centre's network between them."""

    @property
    def slice_chips(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        """Chips, which are the devices of a mesh."""
        return self.slice_chips * self.slices

    @property
    def hosts(self) -> int:
        """Machines, each of which runs one process: 4 chips each once a slice has several."""
        if self.chip is None or self.slice_chips <= self.chip.chips_per_host:
            return self.slices
        return self.chips // 4

    @property
    def accelerator_type(self) -> str | None:
        """Cloud TPU's name for a slice, None for CPU devices."""
        if self.chip is None:
            return None
        return f"{self.chip.accelerator}-{self.slice_chips * self.chip.cores}"

    def ring_bandwidth(self, members: int) -> float:
        """Returns the bytes per second that one chip sends in a collective over `members` chips.

        A group is taken to lie along as few dimensions of the torus as hold it, each of which moves
        data both ways round where its ends are joined, one way where they are not.
        """
        if self.chip is None:
            return math.inf
        total, held = 0.0, 1
        for size in sorted(self.shape, reverse=True):
            if held >= members:
                break
            held *= size
            joined = size % self.chip.wraps_from == 0
            total += self.chip.link_bandwidth * (2 if joined else 1)
        return total or self.chip.link_bandwidth

    def devices(self) -> list[jax.Device]:
        """Returns the devices; those of a TPU can only be compiled for.

        Raises:
          InputError: libtpu is not installed, or fewer CPU devices exist than are asked for.
        """
        if self.chip is None:
            found = jax.devices("cpu")
            if len(found) < self.chips:
                raise InputError(f"{self.name}: this process has {len(found)} CPU devices")
            return found[: self.chips]
        from jax.experimental import topologies

        # One device a chip: cores of a v4 chip otherwise count one by one.
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        if math.prod(self.shape) < self.chip.chips_per_host:
            options["chips_per_host_bounds"] = (*self.shape, 1, 1)[:3]
        if self.slices > 1:
            options["num_slices"] = self.slices
        shape = "x".join(map(str, self.shape))
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{self.chip.name}:{shape}", **options
        )
        return list(topology.devices)


def names() -> list[str]:
    """Returns every TPU topology's name."""
    return [
        f"{chip.name}:{'x'.join(map(str, shape))}"
        for chip in CHIPS.values()
        for shape in SHAPES[chip.dims]
    ]


def find_topology(name: str) -> Topology:
    """Returns the topology of a name.

    Raises:
      InputError: No such topology; the message has the nearest names.
    """
    kind, _, rest = name.lower().partition(":")
    if kind == "cpu" and rest.isdigit() and int(rest) >= 1:
        return Topology(name.lower(), (int(rest),), None)
    if several := _SEVERAL.fullmatch(name.lower()):
        one = find_topology(several[2])
        if one.chip is None or one.chip.network_bandwidth is None:
            raise InputError(
                f"topology {name!r}: of {several[2]} no network between slices is published"
            )
        return replace(one, name=f"{several[1]}x{one.name}", slices=int(several[1]))
    known = {one: _of_name(one) for one in names()}
    aliases = {topology.accelerator_type: topology for topology in known.values()}
    aliases |= {
        f"v5e-{topology.chips}": topology
        for topology in known.values()
        if topology.chip is CHIPS["v5e"]
    }
    found = known.get(name.lower()) or aliases.get(name.lower())
    if found is None:
        every = [*known, *(str(alias) for alias in aliases), "cpu:8"]
        near = difflib.get_close_matches(name.lower(), every, n=4, cutoff=0.4)
        raise InputError(f"topology {name!r} is unknown; near it: {', '.join(near or every[:4])}")
    return found


def _of_name(name: str) -> Topology:
    kind, _, shape = name.partition(":")
    return Topology(name, tuple(int(size) for size in shape.split("x")), CHIPS[kind])
