"""The compute dtype of a run."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp


def compute_dtype(precision: Literal["auto", "float32", "bfloat16"]) -> Any:
    """Returns bfloat16 on TPU and GPU and float32 on CPU for `auto`, else what is asked for."""
    if precision == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(precision)
