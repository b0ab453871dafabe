"""From a parameter's path to its place on the mesh.

A model has an ordered table of (path regex, logical axes); one table maps logical axes to mesh
axes. `spec_for` joins the two and refuses what is ambiguous: no rule, a rule of another rank, one
mesh axis used twice. A dimension that its mesh axes do not divide is replicated, and said once.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.errors import InputError
from jaxllm.parallel.mesh import make_mesh

MeshAxes = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, tuple[str | None, ...]]]

AXES: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "lookup_rows": "data",
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "channels_in": "fsdp",
    "channels_out": "tensor",
}

_log = logging.getLogger(__name__)
_said: set[str] = set()


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
    """Returns ("a/b/c", leaf) for every leaf, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def spec_for(
    path: str,
    shape: tuple[int, ...],
    rules: Rules,
    mesh: Mesh,
    axes: Mapping[str, MeshAxes] = AXES,
) -> P:
    """Returns the PartitionSpec of the parameter at `path`.

    Raises:
      ValueError: If no rule matches, the matching rule has another rank than `shape` or names an
        unknown axis, or two dimensions would use the same mesh axis.
    """
    found = next((rule for rule in rules if re.search(rule[0], path)), None)
    if found is None:
        raise ValueError(f"no sharding rule matches parameter {path!r} {shape}")
    pattern, names = found
    if len(names) != len(shape):
        raise ValueError(f"rule {pattern!r} {names} has another rank than {path!r} {shape}")
    spec: list[MeshAxes] = []
    used: set[str] = set()
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in axes:
            raise ValueError(f"rule {pattern!r} names {name!r}, not one of {', '.join(axes)}")
        target = None if name is None else axes[name]
        parts = (target,) if isinstance(target, str) else (target or ())
        for part in parts:
            if part in used:
                raise ValueError(f"rule {pattern!r} uses mesh axis {part!r} twice for {path!r}")
            used.add(part)
        ways = math.prod(mesh.shape[part] for part in parts)
        if ways > 1 and size % ways:
            message = f"{path}: dimension {size} ({name}) does not divide by {ways}; replicated"
            if message not in _said:
                _said.add(message)
                _log.warning(message)
            target = None
        spec.append(target if ways > 1 else None)
    return P(*spec)


def param_shardings(params: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns a tree of NamedSharding with the structure of `params` (arrays or abstract ones)."""
    specs = [spec_for(path, leaf.shape, rules, mesh) for path, leaf in leaf_paths(params)]
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, [NamedSharding(mesh, spec) for spec in specs])


def like_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns shardings for `tree` (optimiser state, say) whose leaves mirror parameters.

    A leaf whose path ends in a parameter's path and has its shape gets that parameter's sharding;
    everything else (counts, scalars) is replicated.
    """
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            leaf_paths(params), jax.tree.leaves(shardings), strict=True
        )
    }
    replicated = NamedSharding(mesh, P())
    placed = []
    for path, leaf in leaf_paths(tree):
        parts = path.split("/")
        suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
        found = next((by_path[s] for s in suffixes if s in by_path), None)
        matches = found is not None and found[0] == leaf.shape
        placed.append(found[1] if found is not None and matches else replicated)
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, P(AXES["batch"]))


def own_copy(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays on `mesh` to each of this process's devices, which form a mesh of their own.

    What is computed from the copy waits for no other process. All processes must call it at the
    same place, and each of their devices must have room for all of `tree`.
    """
    whole = _replicate(mesh)(tree)
    place = NamedSharding(make_mesh(devices=list(mesh.local_devices)), P())
    return jax.tree.map(
        lambda x: jax.make_array_from_single_device_arrays(
            x.shape, place, [shard.data for shard in x.addressable_shards]
        ),
        whole,
    )


@functools.lru_cache(maxsize=8)
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))


def reader(mesh: Mesh) -> tuple[int, int]:
    """Returns (this process's number, number) among the readers of a batch.

    Processes whose devices hold the same rows, as when `tensor` spans them, read the same.

    Raises:
      InputError: If rows are divided otherwise between two processes, so that part of what one
        holds is also on the other.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    places: Any = batch_sharding(mesh).devices_indices_map((ways,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(ways)))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != ways or len({len(part) for part in parts}) > 1:
        raise InputError(
            f"mesh {dict(mesh.shape)} gives processes overlapping parts of a batch; choose sizes "
            "that divide by the devices of a process"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def activation_spec(
    mesh: Mesh | AbstractMesh, shape: tuple[int, ...], names: Sequence[str | None]
) -> P:
    """Returns the PartitionSpec of an activation; what does not divide is replicated."""
    spec: list[MeshAxes] = []
    for name, size in zip(names, shape, strict=True):
        target = None if name is None else AXES[name]
        parts = (target,) if isinstance(target, str) else (target or ())
        ways = math.prod(mesh.shape[part] for part in parts if part in mesh.shape)
        spec.append(target if ways > 1 and size % ways == 0 else None)
    return P(*spec)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation to logical axes; without a mesh in context it is `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, names))
