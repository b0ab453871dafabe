"""Convolutional blocks of VQGAN-style autoencoders, on [B, h, w, channels] images.

Esser et al., arXiv:2012.09841, as used by the RQ-VAE (arXiv:2203.01941) and the DnD tokenizer.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.nn.norm import GroupNorm


class Conv(nnx.Module):
    """A 2-D convolution with kernel [size, size, in, out] (HWIO) and an optional bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: Literal["SAME", "VALID"] | tuple[tuple[int, int], tuple[int, int]] = "SAME",
        bias: bool = True,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, inputs, outputs)
        if std is None:  # The uniform default of the reference framework, variance 1/(3 fan_in).
            bound = (inputs * size * size) ** -0.5
            kernel = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        else:
            kernel = std * jax.random.normal(rngs.params(), shape)
        self.kernel = nnx.Param(kernel)
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,)))
        self.has_bias = bias
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """Maps [B, h, w, in] to [B, h / stride, w / stride, out] in the dtype of `x`.

        A `kernel` of the same shape takes the place of the layer's own, for whoever needs the
        derivative to this one kernel.
        """
        kernel = self.kernel[...] if kernel is None else kernel
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class ResnetBlock(nnx.Module):
    """GroupNorm, SiLU, 3x3 conv, twice, plus the input (1x1 conv where channels change)."""

    def __init__(self, inputs: int, outputs: int, *, groups: int, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups=groups)
        self.conv1 = Conv(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups=groups)
        self.conv2 = Conv(outputs, outputs, rngs=rngs)
        self.changes = inputs != outputs
        if self.changes:
            self.shortcut = Conv(inputs, outputs, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, h, w, in] to [B, h, w, out]."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.shortcut(x) if self.changes else x)


class SpatialAttention(nnx.Module):
    """Single-head attention over all positions of the image, scale 1/sqrt(channels)."""

    def __init__(self, channels: int, *, groups: int, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, groups=groups)
        self.q = Conv(channels, channels, 1, rngs=rngs)
        self.k = Conv(channels, channels, 1, rngs=rngs)
        self.v = Conv(channels, channels, 1, rngs=rngs)
        self.out = Conv(channels, channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, h, w, channels] to the same shape."""
        batch, height, width, channels = x.shape
        normal = self.norm(x)
        q, k, v = (f(normal).reshape(batch, -1, channels) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("btc,bsc->bts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bts,bsc->btc", weights, v).reshape(x.shape)
        return x + self.out(mixed)


class Downsample(nnx.Module):
    """Stride-2 3x3 convolution after one row and column of zeros on the bottom and right only."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Halves height and width."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Doubles height and width."""
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
