"""Matrix products over flattened token axes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.parallel.mesh import target_platform

Kernels = Sequence[tuple[str, int, int]]
"""(path regex, number of stack axes, number of input axes) of a model's kernels."""
Module = TypeVar("Module")

_FEW_ROWS = 64
"""Up to here a product reads its kernel once and is bound by that."""


class OutputsFirst(nnx.Param):
    """A kernel stored [*O, *I] instead of [*I, *O].

    The product of a few rows then goes along the kernel's rows, which the CPU backend reads as they
    lie; a kernel [*I, *O] it packs anew for every product. With 8 rows that takes half the time.
    """


def project(x: jax.Array, kernel: nnx.Variable, *, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` axes of `x` with the input axes of `kernel`.

    All other axes of `x` are merged into one for the product. The weight gradient then contracts a
    single axis; over two of them (batch and time) the CPU backend is about three times slower.

    Args:
      x: [..., *I].
      kernel: [*I, *O], or [*O, *I] when `OutputsFirst`; cast to the dtype of `x`.
      inputs: Number of axes in I.

    Returns:
      [..., *O] in the dtype of `x`.
    """
    if not isinstance(kernel, nnx.Variable):
        raise TypeError(f"a kernel is an nnx.Variable, which says how it lies, not {type(kernel)}")
    leading, width = x.shape[: x.ndim - inputs], math.prod(x.shape[x.ndim - inputs :])
    rows, weights = x.reshape(-1, width), kernel[...].astype(x.dtype)
    if isinstance(kernel, OutputsFirst):
        outputs = weights.shape[:-inputs]
        flat = rows_times(rows, weights.reshape(-1, width))
    else:
        outputs = weights.shape[inputs:]
        flat = jnp.dot(rows, weights.reshape(width, -1))
    return flat.reshape(*leading, *outputs)


def some_outputs(kernel: nnx.Variable, axis: int, first: int, count: int) -> nnx.Variable:
    """Returns the kernel of `count` places of one output axis, from `first` on.

    Args:
      kernel: As `project` takes it, with one input axis.
      axis: Which of the axes O.
      first: The first place.
      count: Places; all of them return `kernel` itself.
    """
    weights, at = kernel[...], axis if isinstance(kernel, OutputsFirst) else axis + 1
    if count == weights.shape[at]:
        return kernel
    return type(kernel)(jax.lax.slice_in_dim(weights, first, first + count, axis=at))


def rows_times(
    rows: jax.Array, kernel: jax.Array, accumulator: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Returns [R, O], the products of `rows` [R, I] with a kernel whose outputs come first, [O, I].

    Args:
      rows: [R, I].
      kernel: [O, I], same dtype.
      accumulator: Dtype of the result; None for that of `rows`.
    """
    if len(rows) > _FEW_ROWS or target_platform() != "cpu":
        return jnp.einsum("ri,oi->ro", rows, kernel, preferred_element_type=accumulator)
    turned = jnp.einsum("oi,ri->or", kernel, rows, preferred_element_type=accumulator)
    # Without the barrier the compiler swaps the factors back.
    return jax.lax.optimization_barrier(turned).T


def outputs_first(layer: Module, kernels: Kernels, prefix: str) -> Module:
    """Returns one unstacked layer with its kernels stored `OutputsFirst`.

    Args:
      layer: A module of its own, which is changed.
      kernels: Where the model's kernels are.
      prefix: Path of the stack that the layer was taken from.
    """
    for (*owners, name), variable in nnx.to_flat_state(nnx.state(layer)):
        found = kernel_axes("/".join((prefix, *map(str, owners), str(name))), kernels)
        if found is not None:
            value = variable[...]
            order = (*range(found[1], value.ndim), *range(found[1]))
            owner: Any = layer
            for attribute in owners:
                owner = getattr(owner, str(attribute))
            setattr(owner, str(name), OutputsFirst(value.transpose(order)))
    return layer


def kernel_axes(path: str, kernels: Kernels) -> tuple[int, int] | None:
    """Returns the stack and input axes of the kernel at `path`, None for what is no kernel."""
    return next(((s, i) for pattern, s, i in kernels if re.search(pattern, path)), None)
