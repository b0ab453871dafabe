"""The PatchGAN discriminator of the tokenizer's adversarial loss.

Isola et al., arXiv:1611.07004; the RQ-VAE's has two layers, 64 filters and BatchNorm. BatchNorm
couples the examples of a batch and, in the reference, is not even the same on every device; it is
kept for comparison and import, GroupNorm is the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.nn.conv import Conv
from jaxllm.nn.module import Buffer
from jaxllm.nn.norm import GroupNorm


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of the discriminator."""

    channels: int = 3
    width: int = 64
    layers: int = 2
    norm: Literal["group", "batch", "none"] = "group"


class BatchNorm(nnx.Module):
    """Batch norm over [B, h, w]; batch statistics in training, stored ones in evaluation.

    The stored ones come from an imported checkpoint. Training here never evaluates the
    discriminator, so it does not update them.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.mean = Buffer(jnp.zeros((channels,)))
        self.variance = Buffer(jnp.ones((channels,)))
        self.eps = eps

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises `x` [B, h, w, channels] per channel."""
        wide = x.astype(jnp.float32)
        if train:
            mean, variance = jnp.mean(wide, (0, 1, 2)), jnp.var(wide, (0, 1, 2))
        else:
            mean, variance = self.mean[...], self.variance[...]
        normal = (wide - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


class Discriminator(nnx.Module):
    """Images [B, H, W, channels] to one realness logit per patch, [B, h, w, 1]."""

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        bias = config.norm == "none"

        def conv(inputs: int, outputs: int, stride: int, bias: bool) -> Conv:
            pad = ((1, 1), (1, 1))
            return Conv(
                inputs, outputs, 4, stride=stride, padding=pad, bias=bias, std=0.02, rngs=rngs
            )

        self.conv_in = conv(config.channels, widths[0], 2, True)
        strides = [2] * (config.layers - 1) + [1]
        self.convs = nnx.List(
            [conv(widths[i], widths[i + 1], strides[i], bias) for i in range(config.layers)]
        )
        self.norms = nnx.List([self._norm(width) for width in widths[1:]] if not bias else [])
        self.conv_out = conv(widths[-1], 1, 1, True)

    def _norm(self, channels: int) -> GroupNorm | BatchNorm:
        if self.config.norm == "batch":
            return BatchNorm(channels)
        return GroupNorm(channels, groups=min(32, channels // 4))

    def __call__(self, images: jax.Array, *, train: bool = True) -> jax.Array:
        """Returns patch logits of images in [-1, 1]."""
        h = jax.nn.leaky_relu(self.conv_in(images), 0.2)
        for i, conv in enumerate(self.convs):
            h = conv(h)
            if len(self.norms):
                norm = self.norms[i]
                h = norm(h, train=train) if isinstance(norm, BatchNorm) else norm(h)
            h = jax.nn.leaky_relu(h, 0.2)
        return self.conv_out(h)
