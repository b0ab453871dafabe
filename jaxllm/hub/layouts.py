"""A table of torch tensors and the leaves they fill here, read in both directions.

A `Rule` names a leaf's path, its torch name and how its axes lie in torch. `model_slots` applies a
table to one model; `load_tensors` then consumes every tensor once and fills every leaf, and
`save_tensors` is its exact inverse. `read_block` fills a part of one leaf, reading no more of the
tensors than lies in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxllm.errors import InputError
from jaxllm.nn.module import Blueprint

Shape = tuple[int, ...]
Tree = Any
Tensors = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """How one tensor lies here and in torch."""

    shape: Callable[[Shape], Shape]
    """Shape here -> shape in torch."""
    load: Callable[[np.ndarray, Shape], np.ndarray]
    """Tensor of torch, shape here -> array here."""
    save: Callable[[np.ndarray], np.ndarray]
    """Array here -> tensor of torch."""
    axes: tuple[int | None, ...] = ()
    """For each axis here the torch axis of which a range of it is a range; None or absent if of
    none."""


def _load_qkv(x: np.ndarray, shape: Shape) -> np.ndarray:
    """Rows q, k, v of torch, each by head, to [D, K, G + 2, H]: a kv head beside its queries."""
    dim, kv_heads, parts, head_dim = shape
    ends = [kv_heads * (parts - 2) * head_dim, kv_heads * (parts - 1) * head_dim]
    rows = [part.reshape(kv_heads, -1, head_dim, dim) for part in np.split(x, ends)]
    return np.concatenate(rows, axis=1).transpose(3, 0, 1, 2)


def _save_qkv(x: np.ndarray) -> np.ndarray:
    rows = x.transpose(1, 2, 3, 0)
    parts = (rows[:, :-2], rows[:, -2], rows[:, -1])
    return np.concatenate([part.reshape(-1, len(x)) for part in parts])


PLAIN = Layout(lambda s: s, lambda x, s: x, lambda x: x, (0, 1, 2, 3))
LINEAR = Layout(lambda s: s[::-1], lambda x, s: x.T, lambda x: x.T, (1, 0))
CONV = Layout(
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda x, s: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
    (2, 3, 1, 0),
)
QKV = Layout(lambda s: (s[1] * s[2] * s[3], s[0]), _load_qkv, _save_qkv, (1,))
# The same leaf where torch keeps for each head its query, key and value, or a part of the leaf.
HEADS_IN = Layout(
    lambda s: (math.prod(s[1:]), s[0]),
    lambda x, s: x.T.reshape(s),
    lambda x: x.reshape(len(x), -1).T,
    (1, 0),
)
HEADS_OUT = Layout(
    lambda s: (s[2], s[0] * s[1]),
    lambda x, s: x.T.reshape(s),
    lambda x: x.reshape(-1, x.shape[-1]).T,
    (1, None, 0),
)
# Any axes here, one axis in torch.
FLAT = Layout(lambda s: (math.prod(s),), lambda x, s: x.reshape(s), lambda x: x.reshape(-1), (0,))
# Torch keeps one more row, of zeros, for a padding code.
PADDED = Layout(
    lambda s: (s[0] + 1, s[1]), lambda x, s: x[:-1], lambda x: np.pad(x, ((0, 1), (0, 0)))
)


def half_split(layout: Layout, dims: int, parts: slice = slice(None)) -> Layout:
    """Returns `layout` for weights before a rotation that pairs dim j with j + dims/2 in torch.

    Here pairs are neighbours: 2j, 2j + 1. The order of the first `dims` entries of the last axis
    changes, with the same function of positions.

    Args:
      layout: Where everything else is.
      dims: Rotated dims of each head.
      parts: The part of the last axis but one that is rotated: queries and keys, not values.
    """

    def swap(x: np.ndarray, split: tuple[int, int]) -> np.ndarray:
        rotated = (..., parts, slice(dims)) if x.ndim > 1 else (slice(dims),)
        turned = x.copy()
        pairs = x[rotated].reshape(*x[rotated].shape[:-1], *split)
        turned[rotated] = pairs.swapaxes(-1, -2).reshape(x[rotated].shape)
        return turned

    return layout._replace(
        load=lambda x, s: swap(layout.load(x, s), (2, dims // 2)),
        save=lambda x: layout.save(swap(x, (dims // 2, 2))),
    )


class Rule(NamedTuple):
    """One line of a table.

    `{layer}` in the name runs over the leaf's first axis. `{depth}` runs over the code depth, and
    over the leaf's first axis too unless that has length 1: then torch repeats one tensor. With
    `single` the first axis must have length 1 and has no place in the name. Where several tensors
    make one leaf, each has a rule with the same path and its `part`.
    """

    path: str
    """Regex of the leaf's path."""
    name: str
    """Torch name, with the groups of the regex."""
    layout: Layout = PLAIN
    single: bool = False
    part: int | slice | None = None
    """Which part of the leaf's last axis but one the tensor is; None for all of it."""


class Slot(NamedTuple):
    """Where one torch tensor goes."""

    name: str
    torch_shape: Shape
    path: tuple[str | int, ...]
    row: int | None
    """Position on the leaf's first axis; None for the whole leaf."""
    shape: Shape
    """Of the tensor here."""
    layout: Layout
    part: int | slice | None = None

    def view(self, leaf: Any) -> Any:
        """Returns the tensor's part of the leaf; a view of a NumPy array."""
        return self.view_part(leaf if self.row is None else leaf[self.row])

    def view_part(self, row: Any) -> Any:
        """Returns the tensor's part of the leaf's row."""
        return row if self.part is None else row[..., self.part, :]


def model_slots(rules: Sequence[Rule], blueprint: Blueprint[Any], depth: int = 1) -> list[Slot]:
    """Returns the place of every torch tensor of a model with code depth `depth`.

    Raises:
      InputError: If the model has a leaf that the official layout cannot hold.
    """
    slots = []
    for path, leaf in flatten_dict(_abstract(blueprint)).items():
        joined = "/".join(map(str, path[1:]))
        matches = [(rule, m) for rule in rules if (m := re.fullmatch(rule.path, joined))]
        if not matches or (matches[0][0].single and leaf.shape[0] != 1):
            raise InputError(f"{joined} {leaf.shape} has no counterpart in the official model")
        for rule, match in matches:
            if rule.path == matches[0][0].path:
                slots += _leaf_slots(rule, match.expand(rule.name), path, leaf.shape, depth)
    return slots


def _leaf_slots(
    rule: Rule, template: str, path: tuple[str | int, ...], leaf: Shape, depth: int
) -> list[Slot]:
    rows: list[int | None] = [None]
    if rule.single:
        rows = [0]
    elif "{layer}" in template:
        rows = list(range(leaf[0]))
    elif "{depth}" in template:
        rows = [i % leaf[0] for i in range(depth)]
    slots = []
    for i, row in enumerate(rows):
        slot = Slot("", (), path, row, (), rule.layout, rule.part)
        shape = slot.view(np.broadcast_to(np.float32(0), leaf)).shape
        name = template.format(layer=i, depth=i)
        slots.append(slot._replace(name=name, torch_shape=rule.layout.shape(shape), shape=shape))
    return slots


def _abstract(blueprint: Blueprint[Any]) -> dict[str, Tree]:
    return {"params": blueprint.abstract_params, "extra": blueprint.abstract_extra}  # type: ignore[attr-defined]


def load_tensors(
    slots: Sequence[Slot], tensors: Tensors, blueprint: Blueprint[Any], what: str
) -> tuple[Tree, Tree]:
    """Fills a model's trees (params, extra), float32, from torch tensors of any float type.

    Raises:
      InputError: An unknown or missing name, a wrong shape, a value that is not finite, or repeats
        of one shared tensor that differ.
    """
    check_tensors(slots, {name: tensor.shape for name, tensor in tensors.items()}, what)
    abstract = flatten_dict(_abstract(blueprint))
    leaves = {path: np.empty(leaf.shape, np.float32) for path, leaf in abstract.items()}
    filled: dict[tuple[Any, ...], str] = {}
    for slot in slots:
        tensor = np.asarray(tensors[slot.name], np.float32)
        if not np.isfinite(tensor).all():
            raise InputError(f"{what}: {slot.name} holds a value that is not finite")
        if slot.layout is PADDED and tensor[-1].any():
            raise InputError(f"{what}: the last row of {slot.name}, padding, is not zero")
        value = slot.layout.load(tensor, slot.shape)
        target = slot.view(leaves[slot.path])
        first = filled.setdefault((slot.path, slot.row, str(slot.part)), slot.name)
        if first == slot.name:
            target[...] = value
        elif not np.array_equal(target, value):
            raise InputError(
                f"{what}: {slot.name} differs from {first}, expected one shared tensor"
            )
    trees = unflatten_dict(leaves)
    return trees.get("params", {}), trees.get("extra", {})


def check_tensors(slots: Sequence[Slot], shapes: Mapping[str, Shape], what: str) -> None:
    """Compares the names and shapes of a file's tensors with those that a model wants.

    Raises:
      InputError: An unknown or missing name, or a wrong shape.
    """
    names = {slot.name for slot in slots}
    if unknown := [name for name in shapes if name not in names]:
        raise InputError(f"{what}: unknown tensor {unknown[0]} ({len(unknown)} in all)")
    if missing := [slot.name for slot in slots if slot.name not in shapes]:
        raise InputError(f"{what}: tensor {missing[0]} is missing ({len(missing)} in all)")
    for slot in slots:
        if shapes[slot.name] != slot.torch_shape:
            raise InputError(
                f"{what}: {slot.name} has shape {shapes[slot.name]}, expected {slot.torch_shape}"
            )


def read_block(
    slots: Sequence[Slot],
    block: np.ndarray,
    bounds: Sequence[tuple[int, int]],
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
) -> None:
    """Fills a block of one leaf; a device's shard, say.

    Args:
      slots: Where the tensors of this leaf go.
      block: To be filled, of the size that `bounds` say.
      bounds: Start and stop of the block on each axis of the leaf. An axis of which a `part` is a
        tensor must be whole.
      read: Returns a range of the tensor of that name; it is cast to the dtype of `block`.
    """
    for slot in slots:
        inside, target = list(bounds), block
        if slot.row is not None:
            start, stop = inside.pop(0)
            if not start <= slot.row < stop:
                continue
            target = block[slot.row - start]
        target = slot.view_part(target)
        if slot.part is not None:
            inside[-2:-1] = [] if isinstance(slot.part, int) else [(0, slot.shape[-2])]
        wanted = [slice(0, size) for size in slot.torch_shape]
        read_shape, rest = list(slot.shape), []
        for axis, (start, stop) in enumerate(inside):
            there = slot.layout.axes[axis] if axis < len(slot.layout.axes) else None
            if there is None:
                rest.append(slice(start, stop))
                continue
            step = slot.torch_shape[there] // slot.shape[axis]
            wanted[there] = slice(start * step, stop * step)
            read_shape[axis] = stop - start
            rest.append(slice(None))
        tensor = read(slot.name, tuple(wanted))
        target[...] = slot.layout.load(tensor, tuple(read_shape))[tuple(rest)]


def save_tensors(slots: Sequence[Slot], params: Tree, extra: Tree) -> dict[str, np.ndarray]:
    """The inverse of `load_tensors`: torch name -> contiguous array, shared tensors repeated."""
    trees = flatten_dict({"params": params, "extra": extra})
    leaves = {tuple(map(str, path)): leaf for path, leaf in trees.items()}
    tensors = {}
    for slot in slots:
        leaf = np.asarray(leaves[tuple(map(str, slot.path))])
        tensors[slot.name] = np.ascontiguousarray(slot.layout.save(slot.view(leaf)))
    return tensors
