"""Programs compiled for TPU chips in a process of their own, on a machine without one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxllm.planning import worker
from jaxllm.planning.topologies import find_topology

FOUR_CHIPS = ("v5e:2x2", "v5p:2x2x1")

PRELUDE = """
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import batch_sharding, param_shardings

topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
mesh = make_mesh(MeshConfig(data=2, tensor=2), list(topology.devices))


def placed(tree, places):
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def params_of(blueprint, rules):
    abstract = blueprint.abstract_params
    return placed(abstract, param_shardings(abstract, rules, mesh))
"""


def kernel_calls(program: str, topology: str) -> list[str]:
    """Runs a program that prints what it compiled; returns the lines that call a kernel.

    Args:
      program: Source text that follows `PRELUDE`.
      topology: One of `FOUR_CHIPS`.
    """
    pytest.importorskip("libtpu")
    environment = worker.environment(find_topology(topology))
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, topology],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if "tpu_custom_call" in line]
