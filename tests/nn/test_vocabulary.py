"""Chunked log-probabilities: equal to the full ones, in value, gradient and memory."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.nn.vocabulary import (
    most_likely,
    token_log_probs,
    vocabulary_logits,
    weighted_nll,
)
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import batch_sharding
from jaxllm.planning.hlo import parse

D, V = 6, 11
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.standard_normal((3, 5, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.standard_normal((D, V)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(V, size=(3, 5)))


def full(hidden, kernel, targets=TARGETS, soft_cap=None):
    logits = vocabulary_logits(hidden, kernel, soft_cap)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


# 15 tokens: one by one, with a rest, without one, all at once.
@pytest.mark.parametrize(
    ("chunk", "soft_cap"), [(1, None), (4, 2.0), (7, None), (5, None), (99, None), (99, 2.0)]
)
def test_chunked_equals_full(chunk, soft_cap):
    def weighted(run, *args):
        log_probs = run(*args, TARGETS, soft_cap=soft_cap)
        return jnp.sum(jnp.arange(15.0).reshape(3, 5) * log_probs), log_probs

    found, expected = (
        jax.jit(jax.value_and_grad(partial(weighted, run), (0, 1), has_aux=True))(HIDDEN, KERNEL)
        for run in (partial(token_log_probs, chunk=chunk), full)
    )
    np.testing.assert_allclose(found[0][1], expected[0][1], atol=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_accuracy():
    best = jnp.argmax(HIDDEN @ KERNEL, axis=-1)
    targets = best.at[1, 2].add(1).at[0, 0].add(-1) % V
    log_probs, correct = token_log_probs(HIDDEN, KERNEL, targets, chunk=4, with_accuracy=True)
    np.testing.assert_array_equal(correct, targets == best)
    assert correct.shape == log_probs.shape == (3, 5) and correct.sum() == 13


def test_ids_outside_the_vocabulary_are_clamped():
    outside = TARGETS.at[0, 0].set(V + 3).at[2, 4].set(-5)
    inside = TARGETS.at[0, 0].set(V - 1).at[2, 4].set(0)
    found = token_log_probs(HIDDEN, KERNEL, outside, chunk=4)
    np.testing.assert_allclose(found, full(HIDDEN, KERNEL, inside), atol=1e-5)


def test_bfloat16_accumulates_in_float32():
    """Only the inputs are rounded: summing 512 products in bfloat16 would miss by far more."""
    hidden = jnp.asarray(RNG.standard_normal((7, 512)), jnp.bfloat16)
    kernel = jnp.asarray(RNG.standard_normal((512, V)), jnp.float32)
    targets = jnp.arange(7)
    found = token_log_probs(hidden, kernel, targets, chunk=3)
    assert found.dtype == vocabulary_logits(hidden, kernel).dtype == jnp.float32
    rounded = np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    logits = np.asarray(hidden, np.float64) @ rounded
    expected = logits[np.arange(7), np.arange(7)] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def sizes(jaxpr):
    """Elements of every array in a jaxpr and all that it contains."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_all_logits_never_exist_at_once():
    hidden, kernel = jnp.ones((4, 32, 5)), jnp.ones((5, 300))
    targets = jnp.zeros((4, 32), int)

    def largest(chunk):
        def loss(hidden, kernel):
            return jnp.sum(token_log_probs(hidden, kernel, targets, chunk=chunk))

        return max(sizes(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, kernel).jaxpr))

    assert largest(128) == 128 * 300
    assert largest(16) == 16 * 300


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_device_goes_through_its_own_tokens(shape):
    """Also with a rest in the last chunk: equal to one device in value, accuracy and gradients."""
    mesh = make_mesh(MeshConfig(*shape))
    hidden = jnp.asarray(RNG.standard_normal((8, 5, 8)), jnp.float32)
    kernel = jnp.asarray(RNG.standard_normal((8, 12)), jnp.float32)
    targets = jnp.asarray(RNG.integers(12, size=(8, 5)))

    def weighted(hidden, kernel, targets):
        log_probs, correct = token_log_probs(
            hidden, kernel, targets, chunk=2, soft_cap=3.0, with_accuracy=True
        )
        return jnp.sum(jnp.arange(40.0).reshape(8, 5) / 40 * log_probs), (log_probs, correct)

    def gradients():
        return jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))

    expected = gradients()(hidden, kernel, targets)
    with jax.set_mesh(mesh):
        hidden, targets = jax.device_put((hidden, targets), batch_sharding(mesh))
        kernel = jax.device_put(kernel, NamedSharding(mesh, P("fsdp", "tensor")))
        compiled = gradients().lower(hidden, kernel, targets).compile()
        found = compiled(hidden, kernel, targets)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)
    # Nothing is moved in a loop but the vocabulary's parts of one chunk, where it is split.
    module = parse(compiled.as_text())
    moved = [
        line.results[0].shape
        for _, line, times in module.instructions()
        if line.opcode in ("all-gather", "all-reduce", "reduce-scatter") and times > 1
    ]
    assert all(shape[2] > 1 and math.prod(array) <= 2 * 8 for array in moved)
    assert all((5, 12) != line.results[0].shape[-2:] for _, line, _ in module.instructions())


def test_soft_capped_logits():
    capped = 0.5 * np.tanh(np.asarray(HIDDEN @ KERNEL, np.float64) / 0.5)
    np.testing.assert_allclose(vocabulary_logits(HIDDEN, KERNEL, 0.5), capped, atol=1e-6)
    expected = np.take_along_axis(
        capped - np.log(np.exp(capped).sum(-1, keepdims=True)), np.asarray(TARGETS)[..., None], -1
    )[..., 0]
    found = token_log_probs(HIDDEN, KERNEL, TARGETS, soft_cap=0.5, chunk=4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# 15 tokens: with a rest, without one, all at once.
@pytest.mark.parametrize(("chunk", "soft_cap"), [(4, None), (5, 1.5), (99, 1.5)])
def test_weighted_nll_and_its_gradient_by_everything_equal_the_full_ones(chunk, soft_cap):
    weights = jnp.asarray(RNG.random((3, 5)), jnp.float32).at[0, 1].set(0.0)

    def expected(hidden, kernel, weights):
        log_probs = jax.nn.log_softmax(vocabulary_logits(hidden, kernel, soft_cap))
        picked = jnp.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]
        return 0.5 * -jnp.sum(weights * picked), jnp.argmax(log_probs, axis=-1) == TARGETS

    def found(hidden, kernel, weights):
        loss, correct = weighted_nll(
            hidden, kernel, TARGETS, weights, soft_cap=soft_cap, chunk=chunk
        )
        return 0.5 * loss, correct

    values = [
        (*run(HIDDEN, KERNEL, weights), *jax.grad(run, (0, 1, 2), has_aux=True)(*args))
        for run in (found, expected)
        for args in [(HIDDEN, KERNEL, weights)]
    ]
    for a, b in zip(*map(jax.tree.leaves, values), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_first_of_equally_likely_tokens_is_the_most_likely():
    logits = jnp.array([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [-jnp.inf, -5.0, -jnp.inf]])
    assert most_likely(logits).tolist() == [1, 0, 1]
