"""Normalisation layers; statistics are float32 whatever the input dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, dim: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [..., D] and returns its dtype."""
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Returns x / rms(x) * scale in the dtype of `x` [..., D]."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group norm over [B, h, w, channels] images (Wu and He, arXiv:1803.08494)."""

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-6):
        if channels % groups:
            raise ValueError(f"{channels} channels do not split into {groups} groups")
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises each group of channels of each image of `x` [B, h, w, channels]."""
        batch, height, width, channels = x.shape
        wide = x.astype(jnp.float32).reshape(batch, height * width, self.groups, -1)
        mean = jnp.mean(wide, axis=(1, 3), keepdims=True)
        centred = wide - mean
        variance = jnp.mean(centred * centred, axis=(1, 3), keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)
