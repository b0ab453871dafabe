"""A small convolutional classifier: scores samples, and gives features at small scale.

It takes the place that Inception and VGG have at full scale: its pooled features feed the Fréchet
distance and its maps the perceptual loss. A network that is used for the loss is never used to
score.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.nn.conv import Conv
from jaxllm.nn.norm import GroupNorm


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the classifier."""

    channels: int = 1
    num_classes: int = 10
    widths: tuple[int, ...] = (32, 64, 96)
    """Channels per stage; each stage halves the image."""
    groups: int = 8


class ImageClassifier(nnx.Module):
    """Stages of strided and plain 3x3 convolutions, mean pooling, one linear layer."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        sizes = [config.channels, *config.widths]
        self.downs = nnx.List(
            [Conv(a, b, stride=2, rngs=rngs) for a, b in zip(sizes, config.widths, strict=False)]
        )
        self.convs = nnx.List([Conv(width, width, rngs=rngs) for width in config.widths])
        self.norms = nnx.List([GroupNorm(width, groups=config.groups) for width in config.widths])
        self.out = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.widths[-1], config.num_classes))
        )
        self.out_bias = nnx.Param(jnp.zeros((config.num_classes,)))

    def feature_maps(self, images: jax.Array) -> list[jax.Array]:
        """Returns the activations after each stage, [B, h, w, width] from fine to coarse.

        Args:
          images: float [B, H, W, channels] in [-1, 1].
        """
        maps, h = [], images
        for down, conv, norm in zip(self.downs, self.convs, self.norms, strict=True):
            h = jax.nn.relu(down(h))
            h = jax.nn.relu(norm(conv(h)))
            maps.append(h)
        return maps

    def features(self, images: jax.Array) -> jax.Array:
        """Returns the pooled features of the last stage, [B, width]."""
        return jnp.mean(self.feature_maps(images)[-1], axis=(1, 2))

    def logits(self, features: jax.Array) -> jax.Array:
        """Maps pooled features [B, width] to class logits [B, classes]."""
        return features @ self.out[...] + self.out_bias[...]


CLASSIFIER_RULES = (
    (r"kernel$", (None, None, "channels_in", "channels_out")),
    (r"out$", ("embed", None)),
    (r"(scale|bias)$", (None,)),
)
