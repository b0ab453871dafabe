"""The full key/value cache: static buffers written in place, one pair per layer.

Each layer has its own buffers. Scanning one stacked buffer through the layers would copy the whole
cache at every token. Any object with the same `extend` method can stand in for `FullCache`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.parallel.sharding import constrain


@struct.dataclass
class FullCache:
    """Keys and values of one layer, [B, K, S, H] each: heads before time, as the products need."""

    keys: jax.Array
    values: jax.Array

    def extend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, FullCache]:
        """Appends T positions and attends causally over everything held.

        Args:
          q: [B, T, N, H] queries of the new positions.
          k: [B, T, K, H] keys.
          v: [B, T, K, H] values.
          position: int scalar, where the first new position goes.

        Returns:
          The attention output [B, T, N, H] and the new cache.
        """
        batch, queries, heads, dim = q.shape
        kv_heads, length = self.keys.shape[1:3]
        start = (0, 0, position, 0)
        keys = jax.lax.dynamic_update_slice(
            self.keys, k.transpose(0, 2, 1, 3).astype(self.keys.dtype), start
        )
        values = jax.lax.dynamic_update_slice(
            self.values, v.transpose(0, 2, 1, 3).astype(self.values.dtype), start
        )
        q_BKGTH = q.reshape(batch, queries, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
        scores = jnp.einsum(
            "bkgth,bksh->bkgts", q_BKGTH, keys.astype(q.dtype), preferred_element_type=jnp.float32
        ) * (dim**-0.5)
        seen = jnp.arange(length) <= position + jnp.arange(queries)[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(q.dtype)
        out = jnp.einsum("bkgts,bksh->bkgth", weights, values.astype(q.dtype))
        out = out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)
        return out, FullCache(keys=keys, values=values)


def init_cache(
    shape: tuple[int, int, int, int], batch: int, dtype: Any = jnp.float32
) -> list[FullCache]:
    """Returns zeroed caches for `shape` = (layers, kv heads, positions, head size)."""
    layers, kv_heads, length, dim = shape
    size = (batch, kv_heads, length, dim)

    def zeros() -> jax.Array:
        return constrain(jnp.zeros(size, dtype), "batch", "heads", None, None)

    return [FullCache(zeros(), zeros()) for _ in range(layers)]
