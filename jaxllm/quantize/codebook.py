"""One codebook: nearest code, assignment statistics, EMA update, restart of dead codes.

The update is Eq. 6-8 of arXiv:1711.00937 (appendix A.1) with Laplace smoothing, in the form of
RQ-VAE (arXiv:2203.01941): `c <- g c + (1-g) n`, `m <- g m + (1-g) s`, dead entries get a vector of
the batch in `m` and the threshold in `c`, and `e = m / ((c+eps) sum(c) / (sum(c) + K eps))`.

All sums run over the whole (global) batch, so under `jit` a batch that is sharded over devices
gives the state of one device. Shapes: N vectors, C levels, K codes, E code dim.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.quantize.interface import entropy


class Book(NamedTuple):
    """One EMA codebook: vectors `[K, E]`, average counts `[K]`, average sums `[K, E]`; float32."""

    codebook: jax.Array
    counts: jax.Array
    sums: jax.Array


def normalise(vectors: jax.Array) -> jax.Array:
    """Divides by the l2 norm over the last axis, at least 1e-6; the gradient at zero is finite."""
    squares = jnp.square(vectors).sum(-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def _chunks(rows: jax.Array, chunk_size: int) -> jax.Array:
    """`[N, ...]` to `[chunks, N/chunks, ...]`, padded with zeros; chunk i holds rows i, i+chunks...

    Strided chunks keep a batch axis that is sharded over devices sharded inside every chunk.
    """
    count = -(-rows.shape[0] // chunk_size)
    per_chunk = -(-rows.shape[0] // count)
    padding = [(0, count * per_chunk - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1)
    padded = jnp.pad(rows, padding)
    return jnp.moveaxis(padded.reshape(per_chunk, count, *rows.shape[1:]), 1, 0)


def _scores(vectors: jax.Array, table: jax.Array) -> jax.Array:
    """`z.e - |e|^2/2 [N, K]`, which is -1/2 of the squared distance up to a constant per vector."""
    products = jnp.matmul(vectors, table.T, precision=jax.lax.Precision.HIGHEST)
    return products - 0.5 * jnp.square(table).sum(-1)


@partial(jax.jit, static_argnames=("chunk_size", "temperature"))
def nearest_code(
    vectors: jax.Array,
    table: jax.Array,
    *,
    chunk_size: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns the code nearest to every vector in squared distance, the first one at ties.

    Distances are float32 at the highest matmul precision whatever the input dtype: in bfloat16 the
    choice changes.

    Args:
      vectors: `[N, E]`.
      table: `[K, E]`.
      chunk_size: vectors per matmul; the peak temporary is `[chunk_size, K]` float32, over all
        devices together when the batch is sharded.
      temperature: above 0, codes are drawn with probability proportional to
        `exp(-|z - e|^2 / temperature)` (stochastic codes of arXiv:2203.01941).
      key: random key, needed when temperature > 0.

    Returns:
      int32 `[N]`.

    Raises:
      InputError: a temperature without a key.
    """
    if temperature > 0 and key is None:
        raise InputError(f"nearest_code: temperature {temperature} draws codes, pass key=")
    keys = jax.random.key(0) if key is None else key
    if vectors.shape[0] == 0:
        return jnp.zeros((0,), jnp.int32)
    chunks = _chunks(vectors.astype(jnp.float32), chunk_size)
    table = table.astype(jnp.float32)

    def choose(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, index = chunk
        scores = _scores(rows, table)
        if temperature > 0:
            noise = jax.random.gumbel(jax.random.fold_in(keys, index), scores.shape)
            scores = scores * (2.0 / temperature) + noise
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    codes = jax.lax.map(choose, (chunks, jnp.arange(chunks.shape[0])))
    return codes.T.reshape(-1)[: vectors.shape[0]]


@partial(jax.jit, static_argnames=("temperature", "chunk_size"))
def code_entropy(
    vectors: jax.Array, table: jax.Array, weights: jax.Array, *, temperature: float, chunk_size: int
) -> jax.Array:
    """Mean entropy of the soft choice minus the entropy of its mean over the batch, in nats.

    The soft choice is `softmax(-|z - e|^2 / temperature)` (MaskGIT's form). The first term sharpens
    single choices, the second spreads them over the codebook.

    Args:
      vectors: `[N, E]`; gradients flow here and to the table.
      table: `[K, E]`.
      weights: `[N]`, 0 at vectors that do not count.
      temperature: of the soft choice.
      chunk_size: as in `nearest_code`; chunks are recomputed in the backward pass.

    Returns:
      Scalar float32.
    """

    @jax.checkpoint
    def add(
        totals: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        rows, weight = chunk
        log_p = jax.nn.log_softmax(_scores(rows, table) * (2.0 / temperature))
        p = jnp.exp(log_p)
        sample = -(p * log_p).sum(-1)
        return (totals[0] + (weight * sample).sum(), totals[1] + weight @ p), None

    vectors = jnp.where(weights[:, None] > 0, vectors, 0.0)
    start = (jnp.zeros(()), jnp.zeros(table.shape[0]))
    (sample, mean), _ = jax.lax.scan(
        add, start, (_chunks(vectors, chunk_size), _chunks(weights, chunk_size))
    )
    total = jnp.maximum(weights.sum(), 1.0)
    return sample / total - entropy(mean / total)


@partial(jax.jit, static_argnames=("size",))
def assignment_statistics(
    vectors: jax.Array, codes: jax.Array, weights: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns counts `[K]` and sums `[K, E]` of the vectors of every code, float32.

    Args:
      vectors: `[N, E]`.
      codes: int32 `[N]` in 0..size-1.
      weights: `[N]`, 1 where the vector counts, 0 where it does not.
      size: K.
    """
    kept = jnp.where(weights[:, None] > 0, vectors, 0.0)
    return (
        jax.ops.segment_sum(weights, codes, size),
        jax.ops.segment_sum(kept, codes, size),
    )


@partial(jax.jit, static_argnames=("size",))
def draw_rows(
    key: jax.Array, pool: jax.Array, valid: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Draws `size` vectors from the valid ones of a pool, without replacement while they last.

    A pool smaller than `size` is repeated, and all rows get uniform noise below `0.01 / sqrt(E)`,
    so that no two codes are equal. The draw depends on key and shapes only, not on devices.

    Args:
      key: random key.
      pool: `[C, N, E]`.
      valid: bool `[C, N]`.
      size: number of rows.

    Returns:
      Rows `[size, E]`, distinct ones first, and whether there was any valid vector (bool scalar).
    """
    tokens, dim = pool.shape[1:]
    choice_key, noise_key = jax.random.split(key)
    scores = jnp.where(valid, jax.random.uniform(choice_key, valid.shape), -1.0).reshape(-1)
    take = min(size, scores.shape[0])
    index = jax.lax.top_k(scores, take)[1]
    distinct = jnp.minimum(valid.sum(), take)
    index = index[jnp.arange(size) % jnp.maximum(distinct, 1)]
    noise = jax.random.uniform(noise_key, (size, dim)) * (0.01 * dim**-0.5)
    rows = pool[index // tokens, index % tokens]
    return rows + jnp.where(distinct < size, noise, 0.0), distinct > 0


@partial(jax.jit, static_argnames=("decay", "epsilon", "restart_below"))
def update_book(
    book: Book,
    counts: jax.Array,
    sums: jax.Array,
    candidates: tuple[jax.Array, jax.Array] | None,
    *,
    decay: float,
    epsilon: float,
    restart_below: float,
) -> Book:
    """One EMA step, then a restart of the entries whose average count is below the threshold.

    The restart sets sum and count too, not the vector alone: otherwise the next step would compute
    the old vector again from them.

    Args:
      book: the codebook before the step.
      counts: `[K]`, vectors assigned to each code in this batch.
      sums: `[K, E]`, their sums.
      candidates: what `draw_rows` returned; None for no restart. Dead entries take the first rows.
      decay: g, the weight of the old averages.
      epsilon: Laplace smoothing of the counts.
      restart_below: threshold in vectors per batch, and the count that a restarted entry gets.

    Returns:
      The new codebook.
    """
    size = counts.shape[0]
    count = decay * book.counts + (1.0 - decay) * counts
    total = decay * book.sums + (1.0 - decay) * sums
    if candidates is not None:
        rows, available = candidates
        dead = (count < restart_below) & available
        rows = rows[jnp.maximum(jnp.cumsum(dead) - 1, 0)]
        count = jnp.where(dead, restart_below, count)
        total = jnp.where(dead[:, None], rows * restart_below, total)
    everything = count.sum()
    smoothed = (count + epsilon) * everything / (everything + size * epsilon)
    # Nothing was ever counted (all padding so far): keep the initial vectors.
    vectors = jnp.where(everything > 0, total / smoothed[:, None], book.codebook)
    return Book(vectors, count, total)
