"""A batch sharded over eight devices gives the state, codes and losses of one device."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.quantize import LFQ, ResidualVQ, count_codes

CONFIGS = {
    "pooled": ResidualVQ(32, 4, depth=2, chunk_size=64),
    "sequential": ResidualVQ(32, 4, depth=2, ema_mode="sequential", chunk_size=64),
    "separate_dropout": ResidualVQ(32, 4, depth=3, shared=False, dropout=0.5, chunk_size=1000),
    "entropy": ResidualVQ(32, 4, entropy_weight=0.1, entropy_temperature=1.0, chunk_size=64),
    "lfq": LFQ(4, inverse_temperature=1.0),
}


def mesh():
    assert jax.device_count() == 8
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_devices_equal_one(name):
    config = CONFIGS[name]
    params, state = config.init(jax.random.key(0))
    z = 2.0 + jax.random.normal(jax.random.key(1), (16, 4, 4, 4))
    mask = jax.random.bernoulli(jax.random.key(2), 0.8, (16, 4, 4))

    @jax.jit
    def step(state, z, mask, key):
        output = config.quantize(params, state, z, train=True, key=key, mask=mask)
        return output, count_codes(output.codes, config.size, mask)

    over_data = NamedSharding(mesh(), PartitionSpec("data"))
    everywhere = NamedSharding(mesh(), PartitionSpec())
    one, many = state, jax.device_put(state, everywhere)
    for i in range(3):
        key = jax.random.key(i)
        first, first_counts = step(one, z, mask, key)
        second, second_counts = step(
            many,
            jax.device_put(z, over_data),
            jax.device_put(mask, over_data),
            jax.device_put(key, everywhere),
        )
        np.testing.assert_array_equal(first.codes, second.codes)
        np.testing.assert_array_equal(first_counts, second_counts)
        for a, b in zip(
            jax.tree.leaves((first.state, first.losses, first.quantized)),
            jax.tree.leaves((second.state, second.losses, second.quantized)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
        one, many = first.state, second.state


def test_the_batch_never_moves_between_devices():
    """Search, statistics and restart exchange sums of codebook size, never vectors."""
    config = ResidualVQ(32, 4, depth=2, chunk_size=128)
    _, state = config.init(jax.random.key(0))
    over_data = NamedSharding(mesh(), PartitionSpec("data"))
    everywhere = NamedSharding(mesh(), PartitionSpec())
    step = jax.jit(
        lambda state, z, key: config.quantize({}, state, z, train=True, key=key),
        in_shardings=(everywhere, over_data, everywhere),
    )
    z = jnp.zeros((64, 4, 4, 4))
    compiled = step.lower(state, z, jax.random.key(0)).compile().as_text()
    moves = ("all-gather", "all-to-all", "collective-permute")
    assert not [move for move in moves if move in compiled]
    reductions = [line for line in compiled.splitlines() if " all-reduce(" in line]
    assert reductions
    for line in reductions:
        shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", line.split(" all-reduce(")[0])
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        assert sizes and max(sizes) <= 32 * 4


def test_one_trace_per_shape():
    """The configuration is static and hashable, so steps do not retrace."""
    config = CONFIGS["pooled"]
    _, state = config.init(jax.random.key(0))
    traces = 0

    @jax.jit
    def step(state, z, key):
        nonlocal traces
        traces += 1
        return config.quantize({}, state, z, train=True, key=key).state

    for i in range(3):
        state = step(state, jnp.zeros((8, 4)), jax.random.key(i))
    assert traces == 1
