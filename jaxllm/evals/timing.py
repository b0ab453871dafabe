"""Side-by-side timings: sides take turns, medians are compared.

On a shared machine the clock of one side drifts with whatever else runs. Taking turns spreads that
over all sides, and a ratio of medians forgives a few slow repeats.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Phases = dict[str, float]
"""Seconds of each phase of one run."""


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the wall-clock seconds of one call; the call waits for its own results."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_runs(sides: dict[str, Any], optional: Sequence[str] = ()) -> dict[str, float]:
    """Runs every side once, which compiles it, and returns the seconds of each.

    An `optional` side that fails is removed from `sides` with a warning: not every machine has the
    tools that a compiler wants.
    """
    found = {}
    for name, run in list(sides.items()):
        try:
            found[name] = sum(run().values())
        except Exception as error:
            if name not in optional:
                raise
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"{name} does not run here and is left out: {reason}", stacklevel=2)
            del sides[name]
    return found


def take_turns(sides: Mapping[str, Callable[[], Phases]], repeats: int) -> dict[str, list[Phases]]:
    """Runs every side `repeats` times, one after the other in each round.

    Args:
      sides: Name -> one run, already compiled and warm, which returns the seconds of its phases.
      repeats: Rounds.

    Returns:
      Name -> the phases of each of its runs.
    """
    found: dict[str, list[Phases]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            found[name].append(run())
    return found


def medians(runs: list[Phases]) -> Phases:
    """Returns the median seconds of each phase."""
    return {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}


def machine() -> dict[str, Any]:
    """Returns what a timing depends on besides the versions: processor, cores and load."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load average": os.getloadavg()[0],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
