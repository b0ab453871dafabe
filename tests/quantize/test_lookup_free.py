"""LFQ and BSQ: bit order, entropies against enumeration, extremes, masks."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.quantize import BSQ, LFQ
from jaxllm.quantize.lookup_free import bit_entropy, code_probabilities, mean_code_entropy


def enumerate_entropies(vectors, scale, inverse_temperature):
    """Mean single entropy and entropy of the mean over all 2^d codes, from distances, float64."""
    z = np.asarray(vectors, np.float64)
    codes = scale * np.array(list(itertools.product([-1.0, 1.0], repeat=z.shape[-1])))
    logits = -inverse_temperature * ((z[:, None] - codes) ** 2).sum(-1)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    single = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1).mean()
    mean = p.mean(0)
    return single, -(mean * np.log(np.where(mean > 0, mean, 1.0))).sum()


@pytest.mark.parametrize("dim", [1, 2, 5, 10])
def test_lfq_entropy_equals_enumeration(dim, quantize):
    z = 0.5 * jax.random.normal(jax.random.key(dim), (6, dim))
    config = LFQ(dim, inverse_temperature=0.8, scale=0.7, diversity=0.5)
    single, mean = enumerate_entropies(z, 0.7, 0.8)
    loss = quantize(config, {}, {}, z, train=True).losses["entropy"]
    np.testing.assert_allclose(loss, single - 0.5 * mean, rtol=1e-5, atol=1e-6)


def test_bsq_entropy_equals_enumeration(quantize):
    z = jax.random.normal(jax.random.key(0), (6, 5))
    unit = np.asarray(z) / np.linalg.norm(z, axis=-1, keepdims=True)
    for temperature in (1.0, 3.0):
        single, mean = enumerate_entropies(unit, 5**-0.5, temperature)
        config = BSQ(5, inverse_temperature=temperature)
        loss = quantize(config, {}, {}, z, train=True).losses["entropy"]
        np.testing.assert_allclose(loss, (single - mean) / temperature, rtol=1e-5)


def test_probabilities_follow_the_bit_order_of_the_codes():
    logits = jnp.array([[2.0, -1.0, 0.5]])
    p = np.asarray(code_probabilities(logits))[0]
    bits = np.asarray(LFQ(3).bits(jnp.arange(8)[:, None]))
    sigmoid = 1 / (1 + np.exp(-np.asarray(logits[0])))
    np.testing.assert_allclose(p, np.where(bits, sigmoid, 1 - sigmoid).prod(-1), rtol=1e-6)
    assert p.argmax() == 0b101


def test_code_is_the_number_of_the_signs(quantize):
    z = jnp.array([[1.0, -1.0, 2.0], [-3.0, -0.1, 0.1], [0.0, 0.0, 0.0]])
    output = quantize(LFQ(3, scale=2.0), {}, {}, z, train=False)
    np.testing.assert_array_equal(output.codes[:, 0], [5, 1, 0])
    np.testing.assert_array_equal(output.quantized, [[2, -2, 2], [-2, -2, 2], [-2, -2, -2]])
    np.testing.assert_allclose(output.losses["commitment"], (1 + 1 + 0 + 1 + 1.9**2 * 2 + 12) / 9)


def test_grouped_entropy_is_an_upper_bound_and_exact_for_independent_bits():
    logits = jax.random.normal(jax.random.key(0), (5, 6)) * 3
    weights = jnp.full(5, 0.2)
    exact = float(mean_code_entropy(logits, weights, 6))
    grouped = [float(mean_code_entropy(logits, weights, bits)) for bits in (1, 2, 3)]
    assert all(value >= exact - 1e-6 for value in grouped) and grouped[0] > exact + 1e-3
    mean = jax.nn.sigmoid(logits).mean(0)
    bits = -(mean * jnp.log(mean) + (1 - mean) * jnp.log(1 - mean)).sum()
    np.testing.assert_allclose(grouped[0], bits, rtol=1e-5)
    same = jnp.broadcast_to(logits[:1], (5, 6))
    np.testing.assert_allclose(
        mean_code_entropy(same, weights, 1), mean_code_entropy(same, weights, 6), rtol=1e-5
    )


def test_grouping_splits_eighteen_bits_in_nine_and_nine():
    logits = jax.random.normal(jax.random.key(0), (4, 18))
    weights = jnp.full(4, 0.25)
    halves = mean_code_entropy(logits[:, :9], weights, 9) + mean_code_entropy(
        logits[:, 9:], weights, 9
    )
    np.testing.assert_allclose(mean_code_entropy(logits, weights, 12), halves, rtol=1e-6)


@pytest.mark.parametrize("config", [LFQ(4), LFQ(14), BSQ(4, inverse_temperature=1e4)])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e4, 1e15])
def test_lfq_entropy_finite_at_extremes(config, size, quantize):
    """`log(1 - p + eps)` gives NaN gradients here; log-sigmoid does not."""
    z = size * jnp.sign(jax.random.normal(jax.random.key(0), (8, config.code_dim)))

    def f(z):
        return config.total_loss(quantize(config, {}, {}, z, train=True).losses)

    value, gradient = jax.value_and_grad(f)(z)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bit_entropy_limits():
    np.testing.assert_allclose(bit_entropy(jnp.float32(0.0)), np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(bit_entropy(jnp.array([1e30, -1e30])), 0.0)
    # Far out, where p rounds to 1, the entropy is about |a| exp(-|a|), not 0.
    np.testing.assert_allclose(bit_entropy(jnp.float32(30.0)), 31 * np.exp(-30.0), rtol=1e-4)


def test_entropy_loss_spreads_and_sharpens(quantize):
    """Lower when vectors are decided and different than when undecided or all the same."""
    config = LFQ(2, inverse_temperature=1.0)
    corners = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])

    def loss(z):
        return float(quantize(config, {}, {}, z, train=True).losses["entropy"])

    assert loss(3 * corners) < loss(0.1 * corners) < 1e-3
    assert loss(3 * corners) < -1.3 and abs(loss(3 * jnp.ones((4, 2)))) < 1e-3
    np.testing.assert_allclose(loss(30 * corners), -np.log(4), rtol=1e-5)


def test_straight_through_gradient(quantize):
    z = jax.random.normal(jax.random.key(0), (3, 4))

    def f(z, config):
        return quantize(config, {}, {}, z, train=True).quantized[..., 0].sum()

    np.testing.assert_array_equal(jax.grad(f)(z, LFQ(4))[:, 0], 1.0)
    np.testing.assert_array_equal(jax.grad(f)(z, LFQ(4))[:, 1:], 0.0)
    # BSQ also differentiates z / |z|, so nothing is left along z.
    through = jax.grad(f)(z, BSQ(4))
    np.testing.assert_allclose((through * z).sum(-1), 0.0, atol=1e-6)
    assert float(jnp.abs(through).max()) > 0.1


def test_bsq_codes_lie_on_the_sphere(quantize):
    output = quantize(BSQ(6), {}, {}, jax.random.normal(jax.random.key(0), (9, 6)), train=False)
    np.testing.assert_allclose(jnp.linalg.norm(output.quantized, axis=-1), 1.0, rtol=1e-6)


def test_thirty_bits_keep_every_bit(quantize):
    z = jax.random.normal(jax.random.key(0), (50, 30))
    config = LFQ(30)
    output = quantize(config, {}, {}, z, train=False)
    np.testing.assert_array_equal(config.bits(output.codes), z > 0)
