"""What a tokenizer keeps of an image: PSNR and code use by depth, and pictures of both."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.pipeline import padded_batches
from jaxllm.evals.images import psnr
from jaxllm.images.pictures import save_grid
from jaxllm.models.image_tokenizer import ImageTokenizer
from jaxllm.nn.module import Blueprint
from jaxllm.parallel.processes import fetch
from jaxllm.quantize import (
    ErrorStats,
    ResidualVQ,
    count_codes,
    error_stats,
    merge_errors,
    usage_report,
)

EVAL_BATCH = 64


@partial(jax.jit, static_argnums=0)
def _measure(
    tokenizer: Blueprint[ImageTokenizer], params: Any, extra: Any, images: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns latents, codes, decoded images by depth [C, B, H, W, c], and their PSNR [C, B]."""
    model = tokenizer.build(params, extra)
    latents = model.encode(images)
    codes = model.quantize(latents).codes
    flat = codes.reshape(codes.shape[0], -1, codes.shape[-1])
    depth = model.config.quantizer.depth
    decoded = jnp.stack([jnp.clip(model.from_codes(flat, i + 1), -1, 1) for i in range(depth)])
    return latents, codes, decoded, jnp.stack([psnr(images, d, 2.0) for d in decoded])


def reconstruct(
    tokenizer: Blueprint[ImageTokenizer], params: Any, extra: Any, images: np.ndarray
) -> np.ndarray:
    """Returns images [n, H, W, channels] decoded from their first 1 .. C codes, [C, n, ...]."""
    parts = []
    for batch, real in padded_batches({"image": images}, EVAL_BATCH):
        decoded = _measure(tokenizer, params, extra, batch["image"])[2]
        parts.append(fetch(decoded)[:, :real])
    return np.concatenate(parts, axis=1)


def measure_tokenizer(
    tokenizer: Blueprint[ImageTokenizer], params: Any, extra: Any, images: np.ndarray
) -> dict[str, float]:
    """Returns PSNR (dB, mean over images) and the use of codes, each by depth.

    Args:
      tokenizer: Blueprint.
      params: Tokenizer parameters.
      extra: Its buffers.
      images: float32 [n, H, W, channels] in [-1, 1].
    """
    model = tokenizer.build(params, extra)
    quantizer = model.config.quantizer
    values = []
    counts = np.zeros((quantizer.depth, quantizer.size), np.int64)
    errors: ErrorStats | None = None
    for batch, real in padded_batches({"image": images}, EVAL_BATCH):
        latents, codes, _, quality = _measure(tokenizer, params, extra, batch["image"])
        values.append(fetch(quality)[:, :real])
        counts = counts + fetch(count_codes(codes[:real], quantizer.size))
        if isinstance(quantizer, ResidualVQ):
            levels = quantizer.embed_levels(*model.quantizer_parts(), codes[:real])
            found = error_stats(latents[:real], levels)
            errors = found if errors is None else merge_errors(errors, found)
    report = usage_report(counts, errors)
    per_depth = {"psnr": np.concatenate(values, axis=1).mean(axis=1)}
    for name in ("usage", "attainable_usage", "perplexity", "relative_error", "norm"):
        if name in report:
            per_depth[name] = np.asarray(report[name])
    return {
        f"{name}_depth{i + 1}": float(value)
        for name, series in per_depth.items()
        for i, value in enumerate(series)
    }


def save_reconstructions(
    tokenizer: Blueprint[ImageTokenizer], params: Any, extra: Any, images: np.ndarray, path: Path
) -> None:
    """Writes a grid: the originals, then what each number of codes keeps of them."""
    by_depth = reconstruct(tokenizer, params, extra, images)
    names = ["original"] + [f"depth 1-{i + 1}" if i else "depth 1" for i in range(len(by_depth))]
    save_grid(path, [images, *by_depth], row_names=names)
