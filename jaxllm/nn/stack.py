"""Identical layers stored stacked: every parameter gains a leading axis of length L.

The stacked module is a pytree, so scanning all layers, scanning some of them and unrolling them
are slices of the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx

from jaxllm.parallel.mesh import target_platform

Layer = TypeVar("Layer")
Remat = Literal["none", "dots", "full"]

_UNROLLED_ON_CPU = 8
"""Layers of a loop's body: what a layer keeps for the backward pass is then not copied into and out
of stacked arrays, which takes a fifth of a small model's training step on 2 cores."""

_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack_layers(make: Callable[[nnx.Rngs], Layer], layers: int, rngs: nnx.Rngs) -> Layer:
    """Builds `layers` independent copies of `make(rngs)` as one module with stacked parameters."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def build(key: jax.Array) -> Layer:
        return make(nnx.Rngs(params=key))

    return build(jax.random.split(rngs.params(), layers))


def slice_layers(stacked: Layer, start: int, stop: int) -> Layer:
    """Returns layers `start` to `stop - 1` of a stacked module, still stacked."""
    return jax.tree.map(lambda leaf: leaf[start:stop], stacked)


def take_layer(stacked: Layer, index: int) -> Layer:
    """Returns one layer of a stacked module, unstacked."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def scan_layers(
    apply: Callable[[Any, jax.Array, Any], jax.Array],
    stacked: Any,
    x: jax.Array,
    per_layer: Any = None,
    *,
    remat: Remat = "none",
) -> jax.Array:
    """Runs `x = apply(layer, x, per_layer[i])` over the layers of `stacked` with `lax.scan`.

    Args:
      apply: One layer's forward pass.
      stacked: Module with stacked parameters.
      x: Activations, any shape that `apply` keeps.
      per_layer: Pytree with a leading axis L (dropout keys, say), or None.
      remat: What the backward pass may keep of a layer: everything (`none`), matrix products
        without a batch axis (`dots`) or only the layer's input (`full`).
    """

    def body(carry: jax.Array, scanned: tuple[Any, Any]) -> tuple[jax.Array, None]:
        return apply(scanned[0], carry, scanned[1]), None

    if remat != "none":
        # Inside a scan common-subexpression elimination cannot undo the rematerialisation.
        body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
        return jax.lax.scan(body, x, (stacked, per_layer))[0]
    unroll = _UNROLLED_ON_CPU if target_platform() == "cpu" else 1
    return jax.lax.scan(body, x, (stacked, per_layer), unroll=unroll)[0]
