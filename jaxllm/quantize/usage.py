"""Codebook metrics over a stated set of vectors: usage, perplexity, bits, error and norm per depth.

Counts and error sums are arrays to add up or merge over batches; the metrics are computed from the
total. Usage of a single batch says little: with few vectors even a perfect codebook cannot use all
codes, so `attainable_usage` is reported beside it.

Shapes: `...` any leading axes, C code depth, K codebook size, E code dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError


def count_codes(codes: jax.Array, size: int, mask: jax.Array | None = None) -> jax.Array:
    """Counts codes; add the results of batches for a whole set (int32: below 2^31 per code).

    Args:
      codes: int `[..., C]`; -1 (dropped) is not counted.
      size: K.
      mask: bool `[...]`, False at padding.

    Returns:
      int32 `[C, K]`.
    """
    counted = codes >= 0
    if mask is not None:
        counted &= mask[..., None]
    columns = codes.reshape(-1, codes.shape[-1]).T
    weights = counted.reshape(columns.shape[::-1]).T.astype(jnp.int32)
    return jax.vmap(lambda w, c: jax.ops.segment_sum(w, c, size))(weights, jnp.maximum(columns, 0))


def usage(counts: np.ndarray | jax.Array) -> np.ndarray:
    """Fraction of codes that occur, `[C]` of counts `[C, K]`."""
    return (np.asarray(counts) > 0).mean(-1)


def perplexity(counts: np.ndarray | jax.Array) -> np.ndarray:
    """`exp` of the entropy of code frequencies, `[C]` of counts `[C, K]`; NaN without counts."""
    table = np.asarray(counts, np.float64)
    total = table.sum(-1, keepdims=True)
    p = np.divide(table, total, out=np.full_like(table, np.nan), where=total > 0)
    return np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(-1))


def attainable_usage(tokens: int | np.ndarray, size: int) -> np.ndarray:
    """Expected usage when codes are uniform and independent, `1 - (1 - 1/K)^tokens`."""
    if size == 1:
        return np.minimum(np.asarray(tokens, np.float64), 1.0)
    return -np.expm1(np.asarray(tokens, np.float64) * np.log1p(-1.0 / size))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ErrorStats:
    """Running means over vectors; `merge_errors` combines batches.

    Attributes:
      vectors: number of vectors, float32 scalar (exact below 2^24, then rounded).
      mean: `[E]`, mean vector.
      variance: scalar, mean squared distance from the mean vector.
      error: `[C]`, mean squared distance from the sum of the first 1..C levels.
      norm: `[C]`, mean norm of the code vector of each level.
    """

    vectors: jax.Array
    mean: jax.Array
    variance: jax.Array
    error: jax.Array
    norm: jax.Array


def error_stats(z: jax.Array, levels: jax.Array, mask: jax.Array | None = None) -> ErrorStats:
    """Error statistics of one batch.

    Args:
      z: `[..., E]`.
      levels: `[..., C, E]`, the vector of each level (`embed_levels`; for a quantizer without
        levels `decode(...)[..., None, :]`).
      mask: bool `[...]`, False at padding.

    Returns:
      `ErrorStats` of the valid vectors.
    """
    vectors = z.reshape(-1, z.shape[-1]).astype(jnp.float32)
    codes = levels.reshape(-1, *levels.shape[-2:]).astype(jnp.float32)
    valid = jnp.ones(vectors.shape[:1], bool) if mask is None else mask.reshape(-1)
    count = valid.sum().astype(jnp.float32)

    def average(values: jax.Array) -> jax.Array:
        kept = jnp.where(valid.reshape(-1, *(1,) * (values.ndim - 1)), values, 0.0)
        return kept.sum(0) / jnp.maximum(count, 1.0)

    mean = average(vectors)
    gaps = vectors[:, None] - jnp.cumsum(codes, axis=1)
    return ErrorStats(
        count,
        mean,
        average(jnp.square(vectors - mean).sum(-1)),
        average(jnp.square(gaps).sum(-1)),
        average(jnp.linalg.norm(codes, axis=-1)),
    )


def merge_errors(first: ErrorStats, second: ErrorStats) -> ErrorStats:
    """Statistics of both sets together (variance by the formula of Chan, Golub and LeVeque)."""
    vectors = first.vectors + second.vectors
    share = second.vectors / jnp.maximum(vectors, 1.0)

    def mix(a: jax.Array, b: jax.Array) -> jax.Array:
        return a + share * (b - a)

    between = share * (1.0 - share) * jnp.square(second.mean - first.mean).sum()
    return ErrorStats(
        vectors,
        mix(first.mean, second.mean),
        mix(first.variance, second.variance) + between,
        mix(first.error, second.error),
        mix(first.norm, second.norm),
    )


def usage_report(
    counts: np.ndarray | jax.Array, errors: ErrorStats | None = None
) -> dict[str, float | list[float]]:
    """Metrics of a set of vectors as plain numbers; lists run over depth.

    Args:
      counts: `[C, K]`, from `count_codes` over the whole set.
      errors: from `error_stats` and `merge_errors` over the whole set.

    Returns:
      `tokens`, `usage`, `attainable_usage`, `perplexity`, `bits` (log2 of the perplexity), scalar
      `bits_per_vector` (`C log2 K`, the size of the codes) and, with errors, `relative_error`
      (`mean |z - q_i|^2 / mean |z - mean z|^2` after i levels) and `norm` (mean code norm).

    Raises:
      InputError: counts are not a table `[C, K]`.
    """
    table = np.asarray(counts)
    if table.ndim != 2:
        raise InputError(f"usage_report: counts have shape {table.shape}, expected [C, K]")
    depth, size = table.shape
    tokens = table.sum(-1, dtype=np.int64)
    spread = perplexity(table)
    report: dict[str, float | list[float]] = {
        "tokens": tokens.tolist(),
        "usage": usage(table).tolist(),
        "attainable_usage": attainable_usage(tokens, size).tolist(),
        "perplexity": spread.tolist(),
        "bits": np.log2(spread).tolist(),
        "bits_per_vector": float(depth * np.log2(size)),
    }
    if errors is not None:
        error = np.asarray(errors.error, np.float64)
        report["relative_error"] = (error / max(float(errors.variance), 1e-30)).tolist()
        report["norm"] = np.asarray(errors.norm, np.float64).tolist()
    return report
