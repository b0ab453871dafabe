"""The step time that a chip's peak rates allow, and the model FLOPs utilisation at that time.

    compute = FLOPs of the compiled program per chip / peak
    memory  = bytes moved per chip / HBM bandwidth
    links   = time of all collectives one after the other
    at best = max(compute, memory, links)      everything overlaps
    at most = compute + memory + links         nothing does
    MFU     = FLOPs by formula / (chips x peak x time)

These are bounds by peak rates: products reach less than the peak, so a run is slower than
`at best`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jaxllm.planning.topologies import Topology


@dataclass(frozen=True)
class Roofline:
    """Seconds of one call of a program."""

    compute: float
    memory: float
    links: float
    mfu: float | None
    """At best, by formula; None where there is no formula."""
    compute_share: float | None
    """FLOPs by formula over those that the chips execute."""

    @property
    def best(self) -> float:
        """Everything overlaps."""
        return max(self.compute, self.memory, self.links)

    @property
    def worst(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.memory + self.links

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(times, key=lambda name: times[name])

    def plain(self) -> dict[str, Any]:
        """Returns fields and bounds as JSON values."""
        return {**asdict(self), "best": self.best, "worst": self.worst, "bound": self.bound}


def roofline(figures: dict[str, Any], topology: Topology) -> Roofline | None:
    """Returns the bounds of a measured program, None where rates or figures are not known."""
    chip = topology.chip
    if chip is None or not figures["memory"]["fits"] or "unread" in figures:
        return None
    executed = figures["flops"]["products"] + figures["flops"]["kernels"]
    links = sum(one["seconds"] for one in figures["collectives"])
    bounds = Roofline(
        executed / chip.peak_flops, figures["memory_bytes"] / chip.hbm_bandwidth, links, None, None
    )
    formula = figures["model_flops"]
    if formula is None:
        return bounds
    share = formula / topology.chips
    return Roofline(
        bounds.compute,
        bounds.memory,
        bounds.links,
        share / chip.peak_flops / bounds.best,
        share / executed if executed else None,
    )
