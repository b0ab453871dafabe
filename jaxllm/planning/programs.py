"""Programs to be planned: a jitted function and abstract arguments with their places.

Nothing here holds data: parameters, states, batches and caches are shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.errors import InputError
from jaxllm.models.decoder import DECODER_RULES, DecoderConfig, decoder
from jaxllm.nn.stack import take_layer
from jaxllm.parallel.sharding import activation_spec, batch_sharding, leaf_paths, spec_for
from jaxllm.planning.checks import Expected
from jaxllm.planning.flops import decode_flops
from jaxllm.training.job import Program
from jaxllm.training.loop import abstract_state, jit_step

NewCaches = Callable[[int, int, int], list[Any]]


@dataclass(frozen=True)
class Planned:
    """One program on one mesh."""

    name: str
    function: Any
    """Jitted."""
    arguments: tuple[Any, ...]
    """Abstract arrays with shardings."""
    parts: dict[str, Any]
    """What the arguments consist of, for the memory table: name -> tree of abstract arrays."""
    model_flops: float | None
    """FLOPs of one call by formula, over all chips; None where there is no formula."""
    tokens: int | None
    """Tokens of one call, for rates; None where there are none."""
    layer_bytes: float
    """Bytes of the largest layer's parameters as a gathered layer needs them."""
    expected: Expected = Expected()


def training_step(
    program: Program,
    mesh: Mesh,
    *,
    model_flops: float | None = None,
    tokens: int | None = None,
    expected: Expected = Expected(),  # noqa: B008
) -> Planned:
    """Returns the update step of a job; call it with `mesh` in context.

    Args:
      program: Of the job.
      mesh: In context.
      model_flops: See `Planned`.
      tokens: See `Planned`.
      expected: What the compiled program is checked against.

    Raises:
      InputError: The batch does not divide over the mesh.
    """
    state = abstract_state(program, mesh)
    rows = batch_sharding(mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for size in sorted({leaf.shape[0] for leaf in program.batch.values()}):
        if size % ways:
            raise InputError(f"batch size {size} does not divide over data x fsdp = {ways} devices")
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows)
        for name, leaf in program.batch.items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "average": state.ema,
        **state.extra,  # A reference, codebooks, ...: each is a part of its own.
        "other state": (state.step, state.first_bad),
        "batch": batch,
    }
    return Planned(
        "training step",
        jit_step(program.step, shardings, rows),
        (state, batch, jax.eval_shape(lambda: jax.random.key(0))),
        {name: part for name, part in parts.items() if jax.tree.leaves(part)},
        model_flops,
        tokens,
        _layer_bytes(state.params),
        expected,
    )


def decode_step(
    config: DecoderConfig,
    mesh: Mesh,
    new_caches: NewCaches,
    *,
    rows: int,
    context: int,
    dtype: Any = jnp.bfloat16,
) -> Planned:
    """Returns the step that draws the next token of `rows` full caches, greedily.

    Args:
      config: The model.
      mesh: In context.
      new_caches: (rows, prompt slots, all slots) -> one cache a layer.
      rows: B.
      context: Tokens that each row holds, the prompt's length.
      dtype: Of parameters and computation.

    Raises:
      InputError: The rows do not divide over the mesh.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise InputError(f"{rows} rows do not divide over data x fsdp = {ways} devices")
    blueprint = decoder(config, dtype)
    abstract = blueprint.abstract_params  # type: ignore[attr-defined]
    params = placed(abstract, {p: spec_for(p, x.shape, DECODER_RULES, mesh)
                               for p, x in leaf_paths(abstract)}, mesh, dtype)  # fmt: skip
    layers = [
        jax.tree.map(lambda leaf: _unstacked(leaf, mesh), params["layers"])
        for _ in range(config.layers)
    ]
    # Room is made once a block of tokens; the step is one that finds it.
    caches = jax.eval_shape(lambda: [c.begin_block(1) for c in new_caches(rows, context, context)])
    caches = jax.tree.map(lambda leaf: _cache_leaf(leaf, rows, mesh), caches)
    line = NamedSharding(mesh, activation_spec(mesh, (rows, 1), ("batch", None)))
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=line)

    def step(params: Any, layers: Any, caches: Any, tokens: Any, positions: Any) -> Any:
        # The stacked layers are arguments that nothing reads, which `jit` leaves out.
        model = blueprint.build(params, {})
        stacks = [blueprint.build({**params, "layers": _stacked(x)}, {}).layers for x in layers]
        blocks = [take_layer(stack, 0) for stack in stacks]
        hidden, caches = model.step(blocks, caches, tokens, positions)
        chosen = jnp.argmax(model.logits(hidden[:, -1]), axis=-1)
        return chosen.astype(jnp.int32), caches

    places = jax.tree.map(lambda leaf: leaf.sharding, caches)
    rest = {name: part for name, part in params.items() if name != "layers"}
    entries = sum(x.size for p, x in leaf_paths(caches) if p.endswith("keys"))
    per_head = entries / rows / config.layers / config.attention.kv_heads
    return Planned(
        "decode step",
        jax.jit(step, donate_argnums=2, out_shardings=(None, places)),
        (params, layers, caches, tokens, tokens),
        {"parameters": (rest, layers), "cache": caches, "tokens": (tokens, tokens)},
        decode_flops(config, rows, per_head / config.attention.head_dim),
        rows,
        _layer_bytes(params),
    )


def placed(tree: Any, specs: dict[str, P], mesh: Mesh, dtype: Any) -> Any:
    """Returns abstract arrays of `dtype` placed by path."""
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=NamedSharding(mesh, specs[path]))
        for path, leaf in leaf_paths(tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _unstacked(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    place = NamedSharding(mesh, P(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)


def _stacked(layer: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], layer)


def _cache_leaf(leaf: Any, rows: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Places an array of a cache: rows over the batch axes, heads over `tensor`."""
    names: tuple[str | None, ...] = (None,) * leaf.ndim
    if leaf.ndim >= 2 and leaf.shape[0] == rows:
        heads = "heads" if leaf.ndim >= 3 else None
        names = ("batch", heads, *(None,) * (leaf.ndim - 2))
    place = NamedSharding(mesh, activation_spec(mesh, leaf.shape, names))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _layer_bytes(params: Any) -> float:
    """Bytes of the largest unit that may be gathered whole: a layer, or any other parameter.

    Parameters under a name that ends in `layers` are stacked; all of one layer counts together.
    """
    units: dict[str, float] = {}
    for path, leaf in leaf_paths(params):
        parts = path.split("/")
        stack = next((i for i, part in enumerate(parts) if part.endswith("layers")), None)
        size = leaf.size * leaf.dtype.itemsize
        if stack is None:
            units[path] = size
        else:
            name = "/".join(parts[: stack + 1])
            units[name] = units.get(name, 0.0) + size / leaf.shape[0]
    return max(units.values())
