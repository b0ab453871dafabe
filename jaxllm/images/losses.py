"""Losses of tokenizer training: reconstruction, perceptual, adversarial and its adaptive weight.

Esser et al. (arXiv:2012.09841) as used by RQ-VAE; every function returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Discriminate = Callable[[jax.Array], jax.Array]


def reconstruction_loss(
    images: jax.Array, decoded: jax.Array, kind: Literal["l1", "l2"]
) -> jax.Array:
    """Mean absolute or squared error over [B, H, W, channels]."""
    error = images - decoded
    return jnp.mean(jnp.abs(error)) if kind == "l1" else jnp.mean(error * error)


def generator_loss(logits: jax.Array, kind: Literal["hinge", "non_saturating"]) -> jax.Array:
    """What the decoder minimises, from the patch logits of its images."""
    if kind == "hinge":
        return -jnp.mean(logits)
    return jnp.mean(jax.nn.softplus(-logits))


def discriminator_loss(
    real: jax.Array, fake: jax.Array, kind: Literal["hinge", "non_saturating"]
) -> jax.Array:
    """What the discriminator minimises, from patch logits of real and decoded images."""
    if kind == "hinge":
        return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def r1_penalty(discriminate: Discriminate, images: jax.Array) -> jax.Array:
    """Mean squared gradient norm of D at real images (Mescheder et al., arXiv:1801.04406)."""
    gradient = jax.grad(lambda x: jnp.sum(discriminate(x)))(images)
    return jnp.mean(jnp.sum(gradient * gradient, axis=(1, 2, 3)))


def adaptive_weight(
    nll_gradient: jax.Array, adversarial_gradient: jax.Array, *, limit: float = 1e4
) -> jax.Array:
    """Lambda = clip(|g_nll| / (|g_adv| + 1e-4), 0, limit), gradients of the last kernel."""
    nll, adversarial = jnp.linalg.norm(nll_gradient), jnp.linalg.norm(adversarial_gradient)
    return jax.lax.stop_gradient(jnp.clip(nll / (adversarial + 1e-4), 0.0, limit))
