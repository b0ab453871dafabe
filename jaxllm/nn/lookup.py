"""Rows of an embedding table on a mesh."""

from __future__ import annotations

from typing import Any

import jax

from jaxllm.parallel.sharding import constrain


def look_up(table: jax.Array, ids: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns `table[ids]`, examples split over the mesh as activations are.

    Each device looks up its slice of D for the rows of its fsdp group, then rows and slices change
    places: only activations cross the links, where the table or the activations of the whole batch
    otherwise would.

    Args:
      table: [V, D], D split over `fsdp` and V over `tensor`.
      ids: int [B, ...].
      dtype: Of the result, None for the table's; rows cross the links in it.
    """
    rest = (None,) * (ids.ndim - 1)
    x = table[constrain(ids, "lookup_rows", *rest)]
    x = constrain(x, "lookup_rows", *rest, "embed")
    return constrain(x if dtype is None else x.astype(dtype), "batch", *rest, None)
