"""Perceptual distance: LPIPS on VGG16 (Zhang et al., arXiv:1801.03924), or any feature network.

LPIPS compares five VGG16 feature maps, unit-normalised over channels: squared differences, weighted
by one learned non-negative weight a channel, mean over positions, sum over the maps. The same
distance over another network's maps is `feature_distance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxllm.errors import InputError

M = TypeVar("M", bound=nnx.Module)

NORM_EPS = 1e-10
# LPIPS version 0.1: brings [-1, 1] images to the ImageNet statistics VGG16 was trained with.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

# Output channels of the convolutions between max pools; the last of each stage is tapped.
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Index of each convolution in torchvision's `features`, which counts ReLUs and pools too.
VGG16_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


class Conv(nnx.Module):
    """A 3x3 convolution with bias and zero padding."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, h, w, out]."""
        kernel = self.kernel[...].astype(x.dtype)
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x + self.bias[...].astype(x.dtype)


class VGG16Features(nnx.Module):
    """The convolutions of VGG16 up to relu5_3 (configuration D of arXiv:1409.1556)."""

    def __init__(self, *, rngs: nnx.Rngs):
        channels = [3, *(c for stage in VGG16_STAGES for c in stage)]
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.convs = nnx.List([Conv(c_in, c_out, rngs=rngs) for c_in, c_out in pairs])

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Feature maps relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of scaled images.

        Args:
          x: [B, h, w, 3], h and w at least 16.

        Returns:
          Five maps [B, h/2^i, w/2^i, c] with c = 64, 128, 256, 512, 512.
        """
        taps: list[jax.Array] = []
        convs = iter(self.convs)
        for stage in VGG16_STAGES:
            if taps:
                x = jax.lax.reduce_window(
                    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
                )
            for _ in stage:
                x = jax.nn.relu(next(convs)(x))
            taps.append(x)
        return taps


class LPIPS(nnx.Module):
    """LPIPS-VGG16, version 0.1; as a loss it is differentiated with respect to the images only."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.vgg = VGG16Features(rngs=rngs)
        # Kernels of 1x1 convolutions to one channel.
        self.lin = nnx.List(
            [nnx.Param(jnp.full((1, 1, s[-1], 1), 1 / s[-1])) for s in VGG16_STAGES]
        )

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Distance of each pair of images.

        Args:
          a: [B, h, w, 3] images in [-1, 1], h and w at least 16.
          b: [B, h, w, 3] images in [-1, 1].

        Returns:
          [B] float32, at least 0.

        Raises:
          InputError: shapes differ, are not RGB, or are smaller than 16 pixels.
        """
        if a.shape != b.shape or len(a.shape) != 4 or a.shape[3] != 3 or min(a.shape[1:3]) < 16:
            raise InputError(f"images {a.shape} and {b.shape}, expected equal [B, >=16, >=16, 3]")
        shift, scale = jnp.asarray(SHIFT, a.dtype), jnp.asarray(SCALE, a.dtype)
        features_a, features_b = (self.vgg((x - shift) / scale) for x in (a, b))
        return feature_distance(features_a, features_b, [w[...][0, 0, :, 0] for w in self.lin])


def feature_distance(
    features_a: Sequence[jax.Array],
    features_b: Sequence[jax.Array],
    weights: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """Eq. 1 of arXiv:1801.03924 over the feature maps of any network.

    Args:
      features_a: maps [B, h, w, c] of the first images, sizes free to differ from map to map.
      features_b: maps of the second images, of the same shapes.
      weights: one [c] per map; all ones if absent.

    Returns:
      [B] float32: squared distance of channel-normalised maps, mean over positions, sum over maps.

    Raises:
      InputError: lists of different lengths, maps of different shapes, or weights that do not fit.
    """
    shapes_a, shapes_b = [f.shape for f in features_a], [f.shape for f in features_b]
    if shapes_a != shapes_b or not shapes_a:
        raise InputError(f"feature maps of shapes {shapes_a} and {shapes_b}, expected equal")
    if weights is None:
        weights = [jnp.ones(shape[-1]) for shape in shapes_a]
    if [w.shape for w in weights] != [shape[-1:] for shape in shapes_a]:
        raise InputError(f"weights {[w.shape for w in weights]} for maps {shapes_a}, expected [c]")
    total = jnp.float32(0)
    for a, b, w in zip(features_a, features_b, weights, strict=True):
        squared = (_unit_channels(a) - _unit_channels(b)) ** 2
        total += jnp.mean(jnp.sum(squared * w.astype(jnp.float32), axis=-1), axis=(1, 2))
    return total


def _unit_channels(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    # The derivative of the root is infinite at 0, where all channels of a ReLU map may be.
    positive = squared > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)
    return x / (norm + NORM_EPS)


def import_lpips(vgg: Mapping[str, np.ndarray], lin: Mapping[str, np.ndarray]) -> LPIPS:
    """LPIPS from the two official files.

    Args:
      vgg: torchvision's VGG16: `features.N.weight` and `features.N.bias`; the classifier's
        `classifier.N.*` may be there and is not used.
      lin: LPIPS 0.1: `lin0.model.1.weight` to `lin4.model.1.weight`.

    Raises:
      InputError: a missing or unknown name, a wrong shape, or a negative `lin` weight.
    """
    negative = [name for name, w in lin.items() if np.min(w) < 0]
    if negative:
        raise InputError(f"LPIPS weights: {negative[0]} is negative, expected weights >= 0")
    paths: dict[str, tuple[str | int, ...]] = {}
    for i, index in enumerate(VGG16_INDICES):
        paths[f"features.{index}.weight"] = ("vgg", "convs", i, "kernel")
        paths[f"features.{index}.bias"] = ("vgg", "convs", i, "bias")
    for i in range(len(VGG16_STAGES)):
        paths[f"lin{i}.model.1.weight"] = ("lin", i)
    tensors = {name: x for name, x in vgg.items() if not name.startswith("classifier.")} | dict(lin)
    return from_torch(lambda: LPIPS(rngs=nnx.Rngs(0)), tensors, paths, "LPIPS weights")


def from_torch(
    build: Callable[[], M],
    tensors: Mapping[str, np.ndarray],
    paths: Mapping[str, tuple[str | int, ...]],
    what: str,
) -> M:
    """A module whose every leaf is one torch tensor, in float32.

    Args:
      build: makes the module; only its shapes are evaluated.
      tensors: torch name -> array; convolutions [out, in, h, w] and matrices [out, in].
      paths: torch name -> path of the leaf in the module's pure dict.
      what: what an error calls the tensors.

    Raises:
      InputError: a missing or unknown name, or a shape that does not fit its leaf.
    """
    missing, unknown = sorted(paths.keys() - tensors.keys()), sorted(tensors.keys() - paths.keys())
    if missing or unknown:
        raise InputError(
            f"{what}: {len(missing)} names missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, expected {len(paths)} known names"
        )
    graphdef, state = nnx.split(nnx.eval_shape(build))
    leaves = flatten_dict(nnx.to_pure_dict(state))
    filled = {}
    for name, path in paths.items():
        x = np.asarray(tensors[name], np.float32)
        x = x.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(x.ndim, range(x.ndim)))
        if x.shape != leaves[path].shape:
            raise InputError(
                f"{what}: {name} has shape {np.shape(tensors[name])}, expected "
                f"{leaves[path].shape} once transposed"
            )
        filled[path] = jnp.asarray(x)
    return nnx.merge(graphdef, unflatten_dict(filled))
