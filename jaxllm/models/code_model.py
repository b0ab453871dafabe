"""One way to build any model over code grids, with its sharding rules."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxllm.models.dnd import DnDConfig, DnDTransformer
from jaxllm.models.rq_transformer import RQTransformer, RQTransformerConfig
from jaxllm.nn.module import Blueprint

CodeModelConfig = DnDConfig | RQTransformerConfig


def code_model(config: CodeModelConfig, dtype: Any = jnp.float32) -> Blueprint[Any]:
    """Returns the blueprint of the model that `config` describes, computing in `dtype`."""
    if isinstance(config, DnDConfig):
        return Blueprint(lambda rngs: DnDTransformer(config, rngs=rngs, dtype=dtype))
    return Blueprint(lambda rngs: RQTransformer(config, rngs=rngs, dtype=dtype))


# Path regex -> logical axes. Everything under `layers` and `depth_layers` is stacked.
CODE_MODEL_RULES = (
    (r"layers/attn/qkv$", ("layers", "embed", "heads", None, None)),
    (r"layers/attn/out$", ("layers", "heads", None, "embed")),
    (r"layers/mlp/(gate|up)$", ("layers", "embed", "mlp")),
    (r"layers/mlp/down$", ("layers", "mlp", "embed")),
    (r"layers/(attn|mlp)_norm/scale$", ("layers", None)),
    (r"^token_embed$", (None, "vocab", "embed")),
    (r"^(class|position|depth)_embed$", (None, "embed")),
    (r"^(input|depth)_proj$", (None, "embed")),
    (r"^head_norm$", (None, None)),
    (r"^norm/scale$", (None,)),
    (r"^head_out$", (None, "embed", "vocab")),
)
