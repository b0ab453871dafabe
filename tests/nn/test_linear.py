"""Kernels with their outputs first give the same products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.models.decoder import DECODER_KERNELS, Block
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.linear import OutputsFirst, outputs_first, project, rows_times, some_outputs
from jaxllm.nn.mlp import MlpConfig


def block():
    attention = AttentionConfig(heads=2, kv_heads=1, head_dim=4, bias=True)
    return Block(8, attention, MlpConfig(hidden=12, bias=True), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rows", [1, 3, 100], ids="rows {}".format)
@pytest.mark.parametrize("inputs", [1, 2])
def test_products_do_not_depend_on_the_order_of_axes(rows, inputs):
    x = jax.random.normal(jax.random.key(0), (rows, 4, 6))
    kernel = jax.random.normal(jax.random.key(1), ((4, 6, 5, 3) if inputs == 2 else (6, 5, 3)))
    first = kernel.transpose(*range(inputs, kernel.ndim), *range(inputs))
    plain = project(x, nnx.Param(kernel), inputs=inputs)
    turned = project(x, OutputsFirst(first), inputs=inputs)
    assert plain.shape == turned.shape == (*x.shape[: 3 - inputs], 5, 3)
    np.testing.assert_allclose(turned, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plain, jnp.tensordot(x, kernel, inputs), rtol=1e-5, atol=1e-5)


def test_some_outputs_are_columns_of_all():
    x = jax.random.normal(jax.random.key(0), (7, 6))
    kernel = jax.random.normal(jax.random.key(1), (6, 5, 4, 3))
    expected = jnp.tensordot(x, kernel, 1)[:, :, 1:3]
    turned = OutputsFirst(kernel.transpose(1, 2, 3, 0))
    for stored in (nnx.Param(kernel), turned):
        part = some_outputs(stored, 1, 1, 2)
        assert type(part) is type(stored)
        np.testing.assert_allclose(project(x, part), expected, rtol=1e-5, atol=1e-5)
        assert some_outputs(stored, 1, 0, 4) is stored


def test_the_accumulator_is_the_dtype_of_the_result():
    rows, kernel = jnp.ones((2, 300), jnp.bfloat16), jnp.ones((3, 300), jnp.bfloat16)
    assert rows_times(rows, kernel).dtype == jnp.bfloat16
    wide = rows_times(rows + jnp.bfloat16(1 / 128), kernel, jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, np.full((2, 3), 300 + 300 / 128, np.float32))


def test_a_layer_with_outputs_first_is_the_same_layer():
    kernels = {"qkv", "out", "gate", "up", "down"}
    turned = outputs_first(block(), DECODER_KERNELS, "layers")
    state = nnx.to_flat_state(nnx.state(turned))
    assert {path[-1] for path, leaf in state if isinstance(leaf, OutputsFirst)} == kernels
    x = jax.random.normal(jax.random.key(2), (2, 3, 8))

    def attention(q, k, v):
        return q + jnp.repeat(k - v, 2, axis=2)

    expected = block()(x, None, attention)
    np.testing.assert_allclose(turned(x, None, attention), expected, rtol=1e-5, atol=1e-6)
