"""Programs compiled for TPU chips in a process of their own, on a machine without one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxllm.planning import worker
from jaxllm.planning.topologies import find_topology

FOUR_CHIPS = ("v5e:2x2", "v5p:2x2x1")


def kernel_calls(program: str, topology: str) -> list[str]:
    """Runs a program that prints what it compiled; returns the lines that call a kernel.

    Args:
      program: Source text; the topology is its first argument.
      topology: One of `FOUR_CHIPS`.
    """
    pytest.importorskip("libtpu")
    environment = worker.environment(find_topology(topology))
    done = subprocess.run(
        [sys.executable, "-c", program, topology],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if "tpu_custom_call" in line]
