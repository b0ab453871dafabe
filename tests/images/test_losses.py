"""Tokenizer losses by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.images.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    reconstruction_loss,
)

REAL, FAKE = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0, 1.0])


def test_reconstruction():
    a, b = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [4.0, 1.0]])
    np.testing.assert_allclose(reconstruction_loss(a, b, "l1"), (0 + 2 + 1 + 3) / 4)
    np.testing.assert_allclose(reconstruction_loss(a, b, "l2"), (0 + 4 + 1 + 9) / 4)


def test_hinge():
    np.testing.assert_allclose(generator_loss(FAKE, "hinge"), 2 / 3)
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2.
    np.testing.assert_allclose(discriminator_loss(REAL, FAKE, "hinge"), 0.5 * (2.5 / 3 + 1))


def test_non_saturating():
    def minus_log_sigmoid(x):
        return np.log(1 + np.exp(-np.array(x)))

    np.testing.assert_allclose(
        generator_loss(FAKE, "non_saturating"), minus_log_sigmoid([-3, 0, 1]).mean(), rtol=1e-6
    )
    expected = minus_log_sigmoid([2, 0.5, -1]).mean() + minus_log_sigmoid([3, 0, -1]).mean()
    np.testing.assert_allclose(
        discriminator_loss(REAL, FAKE, "non_saturating"), expected, rtol=1e-6
    )


def test_r1_penalty_of_a_known_gradient():
    """D(x) = sum w x^2 has gradient 2 w x: the penalty is the batch mean of sum (2 w x)^2."""
    w, x = (
        jnp.arange(1.0, 13.0).reshape(2, 2, 3),
        jax.random.normal(jax.random.key(0), (5, 2, 2, 3)),
    )
    found = r1_penalty(lambda images: (w * images**2).sum((1, 2, 3)), x)
    expected = ((2 * np.asarray(w) * np.asarray(x)) ** 2).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Its own gradient exists: for D = sum v x^2 it is d/dv mean sum (2 v x)^2 = mean 8 v x^2.
    gradient = jax.grad(lambda v: r1_penalty(lambda y: (v * y**2).sum((1, 2, 3)), x))(w)
    np.testing.assert_allclose(gradient, (8 * w * x**2).mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("nll", "adversarial", "expected"),
    [
        ([3.0, 4.0], [0.0, 2.0], 5 / 2.0001),
        ([3.0, 4.0], [0.0, 0.0], 1e4),  # 5 / 1e-4 is above the limit.
        ([0.0, 0.0], [1.0, 0.0], 0.0),
    ],
)
def test_adaptive_weight(nll, adversarial, expected):
    nll, adversarial = jnp.array(nll), jnp.array(adversarial)
    np.testing.assert_allclose(adaptive_weight(nll, adversarial), expected, rtol=1e-6)
    if expected not in (0.0, 1e4):
        gradient = jax.grad(adaptive_weight, (0, 1))(nll, adversarial)
        np.testing.assert_array_equal(jnp.stack(gradient), 0.0)
    np.testing.assert_allclose(adaptive_weight(nll, adversarial, limit=1.5), min(1.5, expected))
