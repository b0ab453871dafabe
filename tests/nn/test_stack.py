"""Stacked layers: scanned = unrolled, slices, rematerialisation; and the module as plain parts."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.nn import precision
from jaxllm.nn.module import Blueprint, Buffer
from jaxllm.nn.stack import scan_layers, slice_layers, stack_layers, take_layer


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(0.5 * jax.random.normal(rngs.params(), (6, 6)))

    def __call__(self, x, shift):
        return x + jnp.tanh(x @ self.kernel[...] + shift)


def apply(layer, x, shift):
    return layer(x, 0.0 if shift is None else shift)


STACK = stack_layers(Layer, 4, nnx.Rngs(params=jax.random.key(0)))
X = jax.random.normal(jax.random.key(1), (2, 3, 6))
SHIFTS = jnp.arange(4.0)


def test_layers_start_different():
    kernels = np.asarray(STACK.kernel[...])
    assert kernels.shape == (4, 6, 6)
    for a, b in itertools.combinations(kernels, 2):
        assert np.abs(a - b).max() > 0.1


def test_scanned_equals_unrolled_equals_in_parts():
    expected = X
    for i in range(4):
        expected = apply(take_layer(STACK, i), expected, SHIFTS[i])
    np.testing.assert_allclose(scan_layers(apply, STACK, X, SHIFTS), expected, atol=1e-6)
    h = X
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        part = slice_layers((STACK, SHIFTS), start, stop)
        h = scan_layers(apply, part[0], h, part[1])
    np.testing.assert_allclose(h, expected, atol=1e-6)
    without = scan_layers(apply, STACK, X)
    assert np.abs(without - expected).max() > 0.1


@pytest.mark.parametrize("layers", [3, 4, 8])
def test_several_layers_in_a_body_are_the_same_function(layers, monkeypatch):
    def loss(stack, x):
        return jnp.sum(scan_layers(apply, stack, x, SHIFTS) ** 2)

    expected = jax.value_and_grad(loss)(STACK, X)
    monkeypatch.setattr("jaxllm.nn.stack._UNROLLED_ON_CPU", layers)
    found = jax.value_and_grad(loss)(STACK, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_memory_only(remat):
    def loss(x, remat):
        return jnp.sum(scan_layers(apply, STACK, x, SHIFTS, remat=remat) ** 2)

    expected = jax.value_and_grad(loss)(X, "none")
    found = jax.value_and_grad(loss)(X, remat)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    # The backward pass of `full` forms each layer's tanh once more.
    counts = {
        kind: str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(X, kind)).count(" tanh ")
        for kind in ("none", remat)
    }
    assert counts[remat] > counts["none"] >= 1


class WithBuffer(nnx.Module):
    def __init__(self, rngs):
        self.layers = stack_layers(Layer, 2, rngs)
        self.average = Buffer(jnp.full((3,), 7.0))
        self.size = 3


def test_a_blueprint_separates_what_trains_from_what_is_kept():
    blueprint = Blueprint(WithBuffer)
    params, extra = jax.jit(blueprint.init)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {"layers": {"kernel": (2, 6, 6)}}
    assert jax.tree.map(jnp.shape, extra) == {"average": (3,)}
    assert jax.tree.map(jnp.shape, blueprint.abstract_params) == jax.tree.map(jnp.shape, params)
    assert blueprint.parameter_count == 72
    changed = jax.tree.map(lambda x: x + 1, (params, extra))
    model = blueprint.build(*changed)
    np.testing.assert_array_equal(model.average[...], 8.0)
    np.testing.assert_array_equal(model.layers.kernel[...], params["layers"]["kernel"] + 1)
    assert model.size == 3
    again, _ = jax.jit(blueprint.init)(jax.random.key(0))
    np.testing.assert_array_equal(again["layers"]["kernel"], params["layers"]["kernel"])


@pytest.mark.parametrize(
    ("asked", "backend", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("float32", "tpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_compute_dtype(asked, backend, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert jnp.dtype(precision.compute_dtype(asked)) == expected
