"""Normalisation layers; statistics are float32 whatever the input dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.errors import InputError

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True)
class NormConfig:
    """Which norm a transformer uses; `make_norm` builds it."""

    kind: NormKind = "rms"
    eps: float = 1e-5
    unit_offset: bool = False
    """Multiply by 1 + scale, as Gemma does, instead of by scale; RMS only."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(NormKind):
            raise InputError(f"norm kind {self.kind!r} is not one of {get_args(NormKind)}")
        if not self.eps > 0:
            raise InputError(f"norm eps {self.eps} must be positive")
        if self.unit_offset and self.kind != "rms":
            raise InputError(f"unit_offset is for norm kind 'rms', not {self.kind!r}")


def make_norm(dim: int, config: NormConfig) -> RMSNorm | LayerNorm:
    """Returns a fresh norm over the last axis, of length `dim`."""
    if config.kind == "layer":
        return LayerNorm(dim, eps=config.eps)
    return RMSNorm(dim, eps=config.eps, unit_offset=config.unit_offset)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, unit_offset: bool = False):
        self.scale = nnx.Param(jnp.zeros((dim,)) if unit_offset else jnp.ones((dim,)))
        self.eps, self.unit_offset = eps, unit_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [..., D] and returns its dtype."""
        scale = self.scale[...]
        if self.unit_offset:  # In float32: bfloat16 would lose most of a small scale beside the 1.
            scale = 1.0 + scale.astype(jnp.float32)
        return rms_norm(x, scale, self.eps)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis with scale and bias (Ba et al., arXiv:1607.06450)."""

    def __init__(self, dim: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` [..., D] and returns its dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.eps)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


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
