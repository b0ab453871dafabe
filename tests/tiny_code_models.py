"""Code models small enough for exact tests, with random instead of zero heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.images.code_models import code_log_probs
from jaxllm.models.code_model import CodeModelConfig, code_model
from jaxllm.models.dnd import DnDConfig
from jaxllm.models.rq_transformer import RQTransformerConfig
from jaxllm.nn.module import Blueprint

# fmt: off
SHAPE: dict[str, Any] = dict(
    codebook_size=12, grid=(2, 2), depth=3, num_classes=3, layers=4, heads=2, dim=16, mlp_hidden=24,
)
CASES: dict[str, CodeModelConfig] = {
    "dnd": DnDConfig(**SHAPE),
    "vertical": DnDConfig(**SHAPE, structure="vertical"),
    "parallel": DnDConfig(**SHAPE, structure="parallel"),
    "flat": DnDConfig(**SHAPE, structure="flat"),
    "rq": RQTransformerConfig(**SHAPE | dict(layers=2), depth_layers=2, code_dim=5),
    "options": DnDConfig(
        **SHAPE | dict(heads=4), kv_heads=2, head_layers=(0, 1, 3), per_depth_embedding=True,
        share_heads=True, class_rotary="zero",
    ),
}
# fmt: on

# One blueprint per config: `apply` then compiles once for all tests of a process.
tiny_blueprint = cache(code_model)


def random_model(
    config: CodeModelConfig, seed: int = 0, dtype: Any = jnp.float32
) -> tuple[Blueprint[Any], Any, Any]:
    """Returns (blueprint, params, extra) with every array random: heads, norms and codebook too."""
    blueprint = tiny_blueprint(config, dtype)
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        around = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return (around + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    abstract = (blueprint.abstract_params, blueprint.abstract_extra)
    params, extra = jax.tree_util.tree_map_with_path(fill, abstract)
    return blueprint, params, extra


@partial(jax.jit, static_argnums=0)
def apply(blueprint: Blueprint[Any], params: Any, extra: Any, codes: Any, class_ids: Any) -> Any:
    """Returns (uncached logits, log-probabilities of `codes`), one compiled call."""
    model = blueprint.build(params, extra)
    return teacher_logits(model, codes, class_ids), code_log_probs(model, codes, class_ids)[0]


def teacher_logits(model: Any, codes: jax.Array, class_ids: jax.Array) -> jax.Array:
    """Returns the uncached logits float32 [B, cells, C, V]."""
    hidden = model.hidden(codes, class_ids)
    logits = [
        jnp.dot(h, model.head_kernel(i).astype(h.dtype), preferred_element_type=jnp.float32)
        for i, h in enumerate(hidden)
    ]
    return jnp.stack(logits, axis=2)


def some_codes(
    config: CodeModelConfig, batch: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns random codes [batch, cells, C] and classes [batch]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(config.codebook_size, size=(batch, config.cells, config.depth))
    return codes.astype(np.int32), rng.integers(config.num_classes, size=batch).astype(np.int32)


def numpy_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """RMS norm of the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def numpy_block(
    x: np.ndarray, w: Any, rotate: Callable[[np.ndarray, int], np.ndarray] | None = None
) -> np.ndarray:
    """One causal transformer block on [T, D] in float64, written from its definition.

    `rotate(heads, t)` turns the queries or keys [..., H] of position t.
    """
    qkv = np.einsum("td,dkgh->tkgh", numpy_norm(x, w["attn_norm"]["scale"]), w["attn"]["qkv"])
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if rotate is not None:
        q, k = (np.stack([rotate(part[t], t) for t in range(len(x))]) for part in (q, k))
    mixed = np.zeros_like(q)
    for t in range(len(x)):
        scores = np.einsum("kgh,skh->kgs", q[t], k[: t + 1]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed[t] = np.einsum("kgs,skh->kgh", weights, v[: t + 1])
    out = w["attn"]["out"]
    x = x + np.einsum("tnh,nhd->td", mixed.reshape(len(x), *out.shape[:2]), out)
    y = numpy_norm(x, w["mlp_norm"]["scale"])
    gate = y @ w["mlp"]["gate"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp"]["up"])) @ w["mlp"]["down"]
