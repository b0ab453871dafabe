"""Low-rank adaptation (LoRA, arXiv:2106.09685): W + (alpha / rank) A B, with only A and B trained.

A kernel [*S, *I, *O] has stack axes S, input axes I and output axes O; its adapter is A [*S, *I, r]
and B [*S, r, *O]. B starts at zero, so an adapted model starts as the model itself. Adapters mirror
the tree of the parameters: the kernel at `layers/mlp/up` has `layers/mlp/up/a` and `.../b`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxllm.errors import InputError
from jaxllm.nn.linear import Kernels, kernel_axes
from jaxllm.parallel.sharding import Rules

Tree = Any
Module = TypeVar("Module")


@dataclass(frozen=True)
class LoraConfig:
    """Which kernels get adapters, and of what rank."""

    rank: int = 8
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("attn/(qkv|out)$", "mlp/(gate|up|down)$")
    """Regular expressions, searched in the paths of kernels."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank {self.rank} must be at least 1")
        if not self.alpha > 0:
            raise InputError(f"lora.alpha {self.alpha} must be above 0")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise InputError(
                    f"lora.targets {target!r} is no regular expression: {error}"
                ) from None

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / self.rank


def init_adapters(key: jax.Array, params: Tree, config: LoraConfig, kernels: Kernels) -> Tree:
    """Returns fresh adapters of the kernels of `params` that the config chooses; traceable.

    A is uniform within +-1/sqrt(inputs), B is zero.

    Raises:
      InputError: A target that chooses no kernel.
    """
    flat = flatten_dict(params, sep="/")
    chosen = {path: found for path in flat if (found := kernel_axes(path, kernels)) is not None}
    for target in config.targets:
        if not any(re.search(target, path) for path in chosen):
            raise InputError(
                f"lora.targets {target!r} chooses none of the kernels {', '.join(sorted(chosen))}"
            )
    adapters = {}
    for number, (path, (stack, inputs)) in enumerate(sorted(chosen.items())):
        if not any(re.search(target, path) for target in config.targets):
            continue
        shape = flat[path].shape
        first, last = shape[: stack + inputs], shape[stack + inputs :]
        bound = 1 / math.sqrt(math.prod(shape[stack : stack + inputs]))
        adapters[f"{path}/a"] = jax.random.uniform(
            jax.random.fold_in(key, number), (*first, config.rank), minval=-bound, maxval=bound
        )
        adapters[f"{path}/b"] = jnp.zeros((*shape[:stack], config.rank, *last))
    return unflatten_dict(adapters, sep="/")


def merge(params: Tree, adapters: Tree, config: LoraConfig, kernels: Kernels) -> Tree:
    """Returns `params` with the adapters added to their kernels, computed in float32."""
    flat, small = flatten_dict(params, sep="/"), flatten_dict(adapters, sep="/")
    for path in {name.rsplit("/", 1)[0] for name in small}:
        found = kernel_axes(path, kernels)
        if found is None or path not in flat:
            raise InputError(f"an adapter of {path!r}, which the model does not have")
        change = _change(small[f"{path}/a"], small[f"{path}/b"], found[0])
        wide = flat[path].astype(jnp.float32) + config.scale * change
        flat[path] = wide.astype(flat[path].dtype)
    return unflatten_dict(flat, sep="/")


def adapt_layer(layer: Module, adapters: Tree, scale: float) -> Module:
    """Returns one unstacked layer, a pytree of modules, with its adapters added.

    Meant for the inside of a scan over layers: the sum exists for one layer at a time, and so does
    its gradient, which goes on to A and B only.
    """
    small = flatten_dict(adapters, sep="/")

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if f"{name}/a" not in small:
            return leaf
        change = _change(small[f"{name}/a"], small[f"{name}/b"], 0)
        return (leaf.astype(jnp.float32) + scale * change).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, layer)


def lora_rules(rules: Rules, kernels: Kernels, paths: Sequence[str]) -> Rules:
    """Returns sharding rules of the adapters of the kernels at `paths`.

    The axes of a kernel keep their places; the rank is replicated.
    """
    made: list[tuple[str, tuple[str | None, ...]]] = []
    for path in paths:
        found = kernel_axes(path, kernels)
        names = next((axes for pattern, axes in rules if re.search(pattern, path)), None)
        if found is not None and names is not None:
            stack, cut = found[0], sum(found)
            made.append((rf"(^|/){re.escape(path)}/a$", (*names[:cut], None)))
            made.append((rf"(^|/){re.escape(path)}/b$", (*names[:stack], None, *names[cut:])))
    return made


def _change(a: jax.Array, b: jax.Array, stack: int) -> jax.Array:
    """A B for every element of the stack, float32, in the shape of the kernel."""
    axes, rank = a.shape[:stack], a.shape[-1]
    first, last = a.shape[stack:-1], b.shape[stack + 1 :]
    left = a.astype(jnp.float32).reshape(*axes, -1, rank)
    right = b.astype(jnp.float32).reshape(*axes, rank, -1)
    return (left @ right).reshape(*axes, *first, *last)
