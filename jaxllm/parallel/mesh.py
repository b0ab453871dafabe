"""The device mesh.

Three axes everywhere: `data` (replicated parameters), `fsdp` (parameters sharded, gathered where
used) and `tensor` (heads, hidden units and vocabulary split). Slices, groups of devices with a slow
network between them, divide the `data` axis: between slices only gradients travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxllm.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 for "all devices that are left"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 0
    """Slices that share the `data` axis equally; 0 for as many as the devices say (1 off TPU)."""
    distributed: Literal["auto", "on", "off"] = "auto"
    """Start `jax.distributed`; auto does so when a pod, Slurm or Kubernetes names >1 worker."""
    lost_after: int = 20
    """Seconds without a sign of life after which a process is lost and the others end."""

    def __post_init__(self) -> None:
        if self.slices < 0:
            raise InputError(f"mesh.slices {self.slices} must not be negative")
        if self.lost_after < 2:
            raise InputError(f"mesh.lost_after {self.lost_after} must be at least 2 seconds")


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
    """Returns the mesh of `config` over `devices` (default: all of them).

    With several slices, each holds a contiguous part of the `data` axis. Off TPU, where devices say
    nothing of slices, they are equal groups in the order of the processes.

    Raises:
      InputError: If the sizes do not fit the devices, or their slices.
    """
    config = config or MeshConfig()
    devices = jax.devices() if devices is None else devices
    shape = resolve_shape(config, len(devices))
    on_tpu = devices[0].platform == "tpu"
    found = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    slices = config.slices or found
    if on_tpu and slices != found:
        raise InputError(f"mesh.slices {slices}, but the devices are of {found}")
    if shape[0] % slices:
        raise InputError(f"mesh data={shape[0]} does not divide over {slices} slices")
    if slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    if on_tpu:
        inner = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices)
    else:
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        grid = np.array(ordered, dtype=object).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def target_platform() -> str:
    """Returns what the code being traced will run on: `cpu`, `gpu` or `tpu`.

    The mesh in context decides, so that compiling for a TPU that is not attached gives the TPU's
    program; without one it is JAX's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
