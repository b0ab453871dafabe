"""The process in which programs are compiled, so that its platform is not this process's.

The parent sends one JSON object and gets one back; what the child prints besides goes to stderr.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from jaxllm.errors import InputError
from jaxllm.planning.topologies import Topology

_MARK = "planned: "
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def ask(module: str, request: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Runs `python -m module`, which calls `serve`, and returns its answer.

    Args:
      module: What to run.
      request: JSON values.
      topology: Which platform the process is for.

    Raises:
      InputError: libtpu is missing, or the process refused the request.
      RuntimeError: It failed; with the end of what it printed.
    """
    if topology.chip is not None and not has_libtpu():
        raise InputError(
            f"topology {topology.name} needs libtpu, the TPU compiler: pip install 'jaxllm[tpu]'"
        )
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        env=environment(topology),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"planning failed with code {done.returncode}:\n{done.stderr[-4000:]}")
    answer = json.loads(lines[-1].removeprefix(_MARK))
    if "error" in answer:
        raise InputError(answer["error"])
    return answer


def has_libtpu() -> bool:
    """Returns whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def environment(topology: Topology) -> dict[str, str]:
    """Returns the environment of the process: a CPU on which to trace, and no chip to look for."""
    found = {**os.environ, "JAX_PLATFORMS": "cpu"}
    found["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    flags = os.environ.get("XLA_FLAGS", "").split()
    if topology.chip is None:
        name = "--xla_force_host_platform_device_count"
        flags = [flag for flag in flags if name not in flag]
        flags.append(f"{name}={topology.chips}")
    else:
        # It compiles and drives no chip: it asks no metadata server and needs no lock. Flags of
        # other compilers it may not know, and would end.
        flags = [flag for flag in flags if not flag.startswith(("--xla_cpu_", "--xla_gpu_"))]
        found |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    found["XLA_FLAGS"] = " ".join(flags)
    return found


def serve(answer: Answer) -> None:
    """Answers one request from stdin; an `InputError` is an answer too."""
    request = json.load(sys.stdin)
    try:
        result = answer(request)
    except InputError as error:
        result = {"error": str(error)}
    print(_MARK + json.dumps(result))
