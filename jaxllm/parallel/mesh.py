"""The device mesh and the start of multi-process runs.

Three axes everywhere: `data` (replicated parameters), `fsdp` (parameters sharded, gathered where
used) and `tensor` (heads, hidden units and vocabulary split).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import jax
from jax.sharding import AxisType, Mesh

from jaxllm.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 for "all devices that are left"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    distributed: Literal["auto", "on", "off"] = "auto"
    """Start `jax.distributed`; auto does so when a pod, Slurm or Kubernetes names >1 worker."""


def resolve_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Returns the axis sizes for `devices` devices, with -1 filled in.

    Raises:
      InputError: If the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh sizes {sizes} must be positive, with at most one -1")
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    elif known != devices or -1 in sizes:
        raise InputError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not fit "
            f"{devices} devices"
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `config` over `devices` (default: all of them)."""
    devices = jax.devices() if devices is None else devices
    shape = resolve_shape(config or MeshConfig(), len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def target_platform() -> str:
    """Returns what the code being traced will run on: `cpu`, `gpu` or `tpu`.

    The mesh in context decides, so that compiling for a TPU that is not attached gives the TPU's
    program; without one it is JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def start_distributed(mode: Literal["auto", "on", "off"] = "auto") -> None:
    """Connects the processes of a multi-host run; must come before anything asks for devices."""
    if mode == "off" or (mode == "auto" and not _many_workers()):
        return
    if not jax.distributed.is_initialized():
        jax.distributed.initialize()


def _many_workers() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    sizes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "JAX_NUM_PROCESSES"))
    return "," in hosts or any(size.isdigit() and int(size) > 1 for size in sizes)
