"""k-means start of codebooks, plain and residual: Lloyd's algorithm is an EMA step with decay 0.

Shapes: N vectors, C code depth, K codebook size, E code dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.quantize.codebook import draw_rows
from jaxllm.quantize.interface import Params, State, check_input
from jaxllm.quantize.residual import ResidualVQ


def residual_kmeans_start(
    config: ResidualVQ, key: jax.Array, vectors: jax.Array, iterations: int = 10
) -> tuple[Params, State]:
    """Returns parameters and state of a quantizer whose codebooks are fitted to vectors.

    Every iteration encodes with the current codebooks and moves each code to the mean of the
    residuals that chose it (at all levels if the codebook is shared); an empty code is put on a
    random residual. The start is random vectors.

    Args:
      config: the quantizer.
      key: random key.
      vectors: `[N, E]`, for instance the first batch.
      iterations: Lloyd iterations, at least 1.

    Returns:
      As `config.init`; EMA counts are the cluster sizes.

    Raises:
      InputError: wrong shapes, no vectors or no iterations.
    """
    check_input("k-means", config.code_dim, vectors, None)
    if iterations < 1 or vectors.size == 0:
        raise InputError(
            f"k-means: {iterations} iterations over vectors of shape {vectors.shape}, "
            "expected at least one of each"
        )
    lloyd = ResidualVQ(
        config.codebook_size,
        config.code_dim,
        config.depth,
        config.shared,
        decay=0.0,
        restart_below=1.0,
        cosine=config.cosine,
        chunk_size=config.chunk_size,
    )
    vectors = vectors.reshape(-1, config.code_dim).astype(jnp.float32)
    _, state = lloyd.init(key)
    everything = jnp.ones((1, vectors.shape[0]), bool)
    state["codebook"] = jnp.stack(
        [
            draw_rows(jax.random.fold_in(key, i), vectors[None], everything, config.size)[0]
            for i in range(state["codebook"].shape[0])
        ]
    )

    def iterate(step: jax.Array, state: State) -> State:
        step_key = jax.random.fold_in(key, config.depth + step)
        return lloyd.quantize({}, state, vectors, train=True, key=step_key).state

    state = jax.lax.fori_loop(0, iterations, iterate, state)
    return ({}, state) if config.update == "ema" else ({"codebook": state["codebook"]}, {})


def kmeans_start(
    key: jax.Array, vectors: jax.Array, size: int, iterations: int = 10
) -> tuple[jax.Array, jax.Array]:
    """Returns k-means centres `[size, E]` and cluster sizes `[size]` of vectors `[N, E]`."""
    config = ResidualVQ(size, vectors.shape[-1])
    _, state = residual_kmeans_start(config, key, vectors, iterations)
    return state["codebook"][0], state["counts"][0]
