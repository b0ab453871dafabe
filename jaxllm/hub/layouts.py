"""A table of torch tensors and the leaves they fill here, read in both directions.

A `Rule` names a leaf's path, its torch name and how its axes lie in torch. `model_slots` applies a
table to one model; `load_tensors` then consumes every tensor once and fills every leaf, and
`save_tensors` is its exact inverse.
"""

from __future__ import annotations

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


PLAIN = Layout(lambda s: s, lambda x, s: x, lambda x: x)
LINEAR = Layout(lambda s: s[::-1], lambda x, s: x.T, lambda x: x.T)
CONV = Layout(
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda x, s: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
)
QKV = Layout(lambda s: (s[1] * s[2] * s[3], s[0]), _load_qkv, _save_qkv)
HEADS_OUT = Layout(
    lambda s: (s[2], s[0] * s[1]),
    lambda x, s: x.T.reshape(s),
    lambda x: x.reshape(-1, x.shape[-1]).T,
)
# Torch keeps one more row, of zeros, for a padding code.
PADDED = Layout(
    lambda s: (s[0] + 1, s[1]), lambda x, s: x[:-1], lambda x: np.pad(x, ((0, 1), (0, 0)))
)


class Rule(NamedTuple):
    """One line of a table.

    `{layer}` in the name runs over the leaf's first axis. `{depth}` runs over the code depth, and
    over the leaf's first axis too unless that has length 1: then torch repeats one tensor. With
    `single` the first axis must have length 1 and has no place in the name.
    """

    path: str
    """Regex of the leaf's path."""
    name: str
    """Torch name, with the groups of the regex."""
    layout: Layout = PLAIN
    single: bool = False


class Slot(NamedTuple):
    """Where one torch tensor goes."""

    name: str
    torch_shape: Shape
    path: tuple[str | int, ...]
    row: int | None
    """Position on the leaf's first axis; None for the whole leaf."""
    shape: Shape
    layout: Layout


def model_slots(rules: Sequence[Rule], blueprint: Blueprint[Any], depth: int = 1) -> list[Slot]:
    """Returns the place of every torch tensor of a model with code depth `depth`.

    Raises:
      InputError: If the model has a leaf that the official layout cannot hold.
    """
    slots = []
    for path, leaf in flatten_dict(_abstract(blueprint)).items():
        joined = "/".join(map(str, path[1:]))
        matches = ((rule, re.fullmatch(rule.path, joined)) for rule in rules)
        rule, match = next(((r, m) for r, m in matches if m), (None, None))
        if rule is None or match is None or (rule.single and leaf.shape[0] != 1):
            raise InputError(f"{joined} {leaf.shape} has no counterpart in the official model")
        template = match.expand(rule.name)
        rows: list[int | None] = [None]
        if rule.single:
            rows = [0]
        elif "{layer}" in template:
            rows = list(range(leaf.shape[0]))
        elif "{depth}" in template:
            rows = [i % leaf.shape[0] for i in range(depth)]
        for i, row in enumerate(rows):
            shape = leaf.shape if row is None else leaf.shape[1:]
            name = template.format(layer=i, depth=i)
            slots.append(Slot(name, rule.layout.shape(shape), path, row, shape, rule.layout))
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
    names = {slot.name for slot in slots}
    if unknown := [name for name in tensors if name not in names]:
        raise InputError(f"{what}: unknown tensor {unknown[0]} ({len(unknown)} in all)")
    if missing := [slot.name for slot in slots if slot.name not in tensors]:
        raise InputError(f"{what}: tensor {missing[0]} is missing ({len(missing)} in all)")
    abstract = flatten_dict(_abstract(blueprint))
    leaves = {path: np.empty(leaf.shape, np.float32) for path, leaf in abstract.items()}
    filled: dict[tuple[Any, int | None], str] = {}
    for slot in slots:
        tensor = tensors[slot.name]
        if tensor.shape != slot.torch_shape:
            raise InputError(
                f"{what}: {slot.name} has shape {tensor.shape}, expected {slot.torch_shape}"
            )
        tensor = np.asarray(tensor, np.float32)
        if not np.isfinite(tensor).all():
            raise InputError(f"{what}: {slot.name} holds a value that is not finite")
        if slot.layout is PADDED and tensor[-1].any():
            raise InputError(f"{what}: the last row of {slot.name}, padding, is not zero")
        value = slot.layout.load(tensor, slot.shape)
        target = leaves[slot.path][... if slot.row is None else slot.row]
        first = filled.setdefault((slot.path, slot.row), slot.name)
        if first == slot.name:
            target[...] = value
        elif not np.array_equal(target, value):
            raise InputError(
                f"{what}: {slot.name} differs from {first}, expected one shared tensor"
            )
    trees = unflatten_dict(leaves)
    return trees.get("params", {}), trees.get("extra", {})


def save_tensors(slots: Sequence[Slot], params: Tree, extra: Tree) -> dict[str, np.ndarray]:
    """The inverse of `load_tensors`: torch name -> contiguous array, shared tensors repeated."""
    trees = flatten_dict({"params": params, "extra": extra})
    leaves = {tuple(map(str, path)): leaf for path, leaf in trees.items()}
    tensors = {}
    for slot in slots:
        leaf = np.asarray(leaves[tuple(map(str, slot.path))])
        value = leaf if slot.row is None else leaf[slot.row]
        tensors[slot.name] = np.ascontiguousarray(slot.layout.save(value))
    return tensors
