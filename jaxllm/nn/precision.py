"""The compute dtype of a run."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp

from jaxllm.parallel.mesh import target_platform


def compute_dtype(precision: Literal["auto", "float32", "bfloat16"]) -> Any:
    """Returns bfloat16 on TPU and GPU and float32 on CPU for `auto`, else what is asked for.

    The mesh in context says what the platform is, as in `target_platform`.
    """
    if precision == "auto":
        return jnp.float32 if target_platform() == "cpu" else jnp.bfloat16
    return jnp.dtype(precision)
