"""A plan as a picture: what fills a chip's memory, and what takes the time of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxllm.planning.topologies import GIB, Topology


def draw(figures: dict[str, Any], topology: Topology, path: Path) -> None:
    """Writes a PNG (or what the ending says) of a program that fits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held, bounds = figures["memory"], figures["roofline"]
    parts = dict(figures["parts"])
    if held["fits"]:
        parts |= {name: held[name] for name in ("temporaries", "outputs", "code")}
    figure, axes = plt.subplots(1, 1 if bounds is None else 2, figsize=(9, 3.2), squeeze=False)
    left = 0.0
    for name, size in parts.items():
        axes[0][0].barh([0], [size / GIB], left=[left], label=f"{name} {size / GIB:.2f}")
        left += size / GIB
    if topology.chip is not None:
        axes[0][0].axvline(topology.chip.hbm_bytes / GIB, color="black", linestyle="--")
    mesh = " x ".join(str(size) for size in figures["mesh"].values())
    axes[0][0].set(xlabel="GiB per chip", yticks=[], title=f"{topology.name}, mesh {mesh}")
    axes[0][0].legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    if bounds is not None:
        names = ("compute", "memory", "links")
        axes[0][1].barh(names, [1e3 * bounds[name] for name in names])
        axes[0][1].set(xlabel="ms at peak rates", title=figures["program"])
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
