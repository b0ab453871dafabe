"""InceptionV3 as the Fréchet inception distance uses it (arXiv:1512.00567, arXiv:1706.08500).

The network of the 2015-12-05 TensorFlow graph, in the layout of its PyTorch conversion
`pt_inception-2015-12-05` (pytorch-fid), which differs from torchvision's InceptionV3: 1008
classes, averages over a 3x3 window leave padding out, and the last block takes a maximum there.

Each block is a table: parallel branches of convolutions, named as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from jaxllm.errors import InputError
from jaxllm.models.perceptual import from_torch

IMAGE_SIZE, FEATURES, CLASSES, BATCH_NORM_EPS = 299, 2048, 1008, 1e-3
Padding = Literal["SAME", "VALID"]


class ConvSpec(NamedTuple):
    """One convolution with batch norm and ReLU; SAME pads (k - 1) / 2 zeros on each side."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Padding = "SAME"


# A stage is a convolution, or several of the same input whose outputs are concatenated.
Stage = ConvSpec | tuple[ConvSpec, ...]


class BlockSpec(NamedTuple):
    """Branches of the same input, then the pooling branch; outputs are concatenated in order.

    Attributes:
      branches: each a sequence of stages.
      pool: "mean" or "max" over 3x3 with stride 1, or "reduce": maximum over 3x3 with stride 2.
      pool_channels: channels of the 1x1 convolution `branch_pool` after the pool; 0 for none.
    """

    branches: tuple[tuple[Stage, ...], ...]
    pool: Literal["mean", "max", "reduce"]
    pool_channels: int = 0


_REDUCE: tuple = (2, "VALID")


def _block_a(pool_channels: int) -> BlockSpec:
    return BlockSpec(
        (
            (ConvSpec("branch1x1", 64),),
            (ConvSpec("branch5x5_1", 48), ConvSpec("branch5x5_2", 64, (5, 5))),
            (
                ConvSpec("branch3x3dbl_1", 64),
                ConvSpec("branch3x3dbl_2", 96, (3, 3)),
                ConvSpec("branch3x3dbl_3", 96, (3, 3)),
            ),
        ),
        "mean",
        pool_channels,
    )


def _block_b() -> BlockSpec:
    return BlockSpec(
        (
            (ConvSpec("branch3x3", 384, (3, 3), *_REDUCE),),
            (
                ConvSpec("branch3x3dbl_1", 64),
                ConvSpec("branch3x3dbl_2", 96, (3, 3)),
                ConvSpec("branch3x3dbl_3", 96, (3, 3), *_REDUCE),
            ),
        ),
        "reduce",
    )


def _block_c(channels: int) -> BlockSpec:
    return BlockSpec(
        (
            (ConvSpec("branch1x1", 192),),
            (
                ConvSpec("branch7x7_1", channels),
                ConvSpec("branch7x7_2", channels, (1, 7)),
                ConvSpec("branch7x7_3", 192, (7, 1)),
            ),
            (
                ConvSpec("branch7x7dbl_1", channels),
                ConvSpec("branch7x7dbl_2", channels, (7, 1)),
                ConvSpec("branch7x7dbl_3", channels, (1, 7)),
                ConvSpec("branch7x7dbl_4", channels, (7, 1)),
                ConvSpec("branch7x7dbl_5", 192, (1, 7)),
            ),
        ),
        "mean",
        192,
    )


def _block_d() -> BlockSpec:
    return BlockSpec(
        (
            (ConvSpec("branch3x3_1", 192), ConvSpec("branch3x3_2", 320, (3, 3), *_REDUCE)),
            (
                ConvSpec("branch7x7x3_1", 192),
                ConvSpec("branch7x7x3_2", 192, (1, 7)),
                ConvSpec("branch7x7x3_3", 192, (7, 1)),
                ConvSpec("branch7x7x3_4", 192, (3, 3), *_REDUCE),
            ),
        ),
        "reduce",
    )


def _block_e(pool: Literal["mean", "max"]) -> BlockSpec:
    return BlockSpec(
        (
            (ConvSpec("branch1x1", 320),),
            (
                ConvSpec("branch3x3_1", 384),
                (
                    ConvSpec("branch3x3_2a", 384, (1, 3)),
                    ConvSpec("branch3x3_2b", 384, (3, 1)),
                ),
            ),
            (
                ConvSpec("branch3x3dbl_1", 448),
                ConvSpec("branch3x3dbl_2", 384, (3, 3)),
                (
                    ConvSpec("branch3x3dbl_3a", 384, (1, 3)),
                    ConvSpec("branch3x3dbl_3b", 384, (3, 1)),
                ),
            ),
        ),
        pool,
        192,
    )


# The stem, with a 3x3 maximum of stride 2 after the third and after the last convolution.
STEM = (
    ConvSpec("Conv2d_1a_3x3", 32, (3, 3), *_REDUCE),
    ConvSpec("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    ConvSpec("Conv2d_2b_3x3", 64, (3, 3)),
    ConvSpec("Conv2d_3b_1x1", 80),
    ConvSpec("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
)
POOL_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm with stored statistics, ReLU."""

    def __init__(self, in_channels: int, spec: ConvSpec, *, rngs: nnx.Rngs):
        self.stride, self.padding = spec.stride, spec.padding
        shape = (*spec.kernel, in_channels, spec.channels)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape))
        self.scale = nnx.Param(jnp.ones(spec.channels))
        self.bias = nnx.Param(jnp.zeros(spec.channels))
        self.mean = nnx.Param(jnp.zeros(spec.channels))
        self.var = nnx.Param(jnp.ones(spec.channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, h', w', out]."""
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            # Accelerators would otherwise round to bfloat16, and distances between sets are small.
            precision=jax.lax.Precision.HIGHEST,
        )
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + BATCH_NORM_EPS)
        return jax.nn.relu((x - self.mean[...]) * factor + self.bias[...])


class Block(nnx.Module):
    """One row of `BLOCKS`."""

    def __init__(self, in_channels: int, spec: BlockSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        for branch in spec.branches:
            channels = in_channels
            for stage in map(_stage, branch):
                for conv in stage:
                    setattr(self, conv.name, ConvNorm(channels, conv, rngs=rngs))
                channels = sum(conv.channels for conv in stage)
        if spec.pool_channels:
            conv = ConvSpec("branch_pool", spec.pool_channels)
            self.branch_pool = ConvNorm(in_channels, conv, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, h', w', out]."""
        outputs = []
        for branch in self.spec.branches:
            y = x
            for stage in map(_stage, branch):
                y = jnp.concatenate([getattr(self, conv.name)(y) for conv in stage], axis=-1)
            outputs.append(y)
        if self.spec.pool == "mean":
            pooled = _window(x, 0, jax.lax.add, 1, "SAME")
            pooled /= _window(jnp.ones_like(x[:1, :, :, :1]), 0, jax.lax.add, 1, "SAME")
        else:
            how: tuple[int, Padding] = (1, "SAME") if self.spec.pool == "max" else (2, "VALID")
            pooled = _window(x, -jnp.inf, jax.lax.max, *how)
        outputs.append(self.branch_pool(pooled) if self.spec.pool_channels else pooled)
        return jnp.concatenate(outputs, axis=-1)

    @staticmethod
    def out_channels(in_channels: int, spec: BlockSpec) -> int:
        """Channels of the output for an input of `in_channels`."""
        last = [conv for branch in spec.branches for conv in _stage(branch[-1])]
        return sum(conv.channels for conv in last) + (spec.pool_channels or in_channels)


class InceptionFeatures(NamedTuple):
    """What the metrics read.

    Attributes:
      pool: [B, 2048] mean over positions of the last block, for FID, precision and recall, and
        `InceptionV3.probabilities`.
      spatial: [B, 2023] the first 7 channels of 17x17 positions after the block Mixed_6d, for
        sFID (arXiv:2103.03841), as the ADM evaluator takes them.
    """

    pool: jax.Array
    spatial: jax.Array


class InceptionV3(nnx.Module):
    """The FID network; weights come from `import_inception`, and are not trained here."""

    def __init__(self, *, rngs: nnx.Rngs):
        channels = 3
        for conv in STEM:
            setattr(self, conv.name, ConvNorm(channels, conv, rngs=rngs))
            channels = conv.channels
        for name, spec in BLOCKS.items():
            setattr(self, name, Block(channels, spec, rngs=rngs))
            channels = Block.out_channels(channels, spec)
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (channels, CLASSES)))
        self.bias = nnx.Param(jnp.zeros(CLASSES))

    def features(self, images: jax.Array, resize: bool = True) -> InceptionFeatures:
        """Features of images of any size; arguments and errors as in `network_input`."""
        x = network_input(images, resize)
        for conv in STEM:
            x = getattr(self, conv.name)(x)
            if conv.name in POOL_AFTER:
                x = _window(x, -jnp.inf, jax.lax.max, 2, "VALID")
        for name in BLOCKS:
            x = getattr(self, name)(x)
            if name == "Mixed_6d":
                spatial = x[..., :7].reshape(len(x), -1)
        return InceptionFeatures(jnp.mean(x, axis=(1, 2)), spatial)

    def logits(self, pool: jax.Array, bias: bool = True) -> jax.Array:
        """[B, 2048] -> [B, 1008] class logits, with or without the output bias."""
        out = jnp.matmul(pool, self.kernel[...], precision=jax.lax.Precision.HIGHEST)
        return out + self.bias[...] if bias else out

    def probabilities(self, pool: jax.Array, bias: bool = False) -> jax.Array:
        """[B, 2048] -> [B, 1008] class probabilities for the Inception score.

        The published scores (the original code and the ADM evaluator) leave the output bias out,
        hence the default.
        """
        return jax.nn.softmax(self.logits(pool, bias), axis=-1)


def network_input(images: jax.Array, resize: bool = True) -> jax.Array:
    """Images as the network expects them.

    Args:
      images: [B, h, w, 3] in [0, 1].
      resize: resize to 299x299 (bilinear between pixel centres, without antialiasing, as
        pytorch-fid does; the TensorFlow graph aligns top left corners and so differs a little).
        Without it h and w are at least 75, and the features are no longer FID's.

    Returns:
      [B, 299, 299, 3] (or h, w) float32 in [-1, 1].

    Raises:
      InputError: not RGB images, or too small to go without resizing.
    """
    smallest = 1 if resize else 75
    if len(images.shape) != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < smallest:
        raise InputError(f"images {images.shape}, expected [B, h, w, 3], h and w >= {smallest}")
    x = images.astype(jnp.float32)
    if resize:
        shape = (len(x), IMAGE_SIZE, IMAGE_SIZE, 3)
        exact = jax.lax.Precision.HIGHEST
        x = jax.image.resize(x, shape, "linear", antialias=False, precision=exact)
    return 2 * x - 1


def _stage(stage: Stage) -> tuple[ConvSpec, ...]:
    return (stage,) if isinstance(stage, ConvSpec) else stage


def _window(
    x: jax.Array, start: float, combine: Callable, stride: int, padding: Padding
) -> jax.Array:
    return jax.lax.reduce_window(x, start, combine, (1, 3, 3, 1), (1, stride, stride, 1), padding)


# Torch suffix of each leaf of a `ConvNorm`.
_SUFFIXES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}


def torch_names() -> dict[str, tuple[str, ...]]:
    """Torch name of every tensor -> path of its leaf in the module's pure dict."""
    state = nnx.state(nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))))
    names: dict[str, tuple[str, ...]] = {"fc.weight": ("kernel",), "fc.bias": ("bias",)}
    for path in flatten_dict(nnx.to_pure_dict(state)):
        if len(path) > 1:
            names[".".join((*path[:-1], _SUFFIXES[path[-1]]))] = path
    return names


def import_inception(state_dict: Mapping[str, np.ndarray]) -> InceptionV3:
    """InceptionV3 from the tensors of `pt_inception-2015-12-05`.

    Args:
      state_dict: torch name -> array; `num_batches_tracked` counters may be there, unused.

    Raises:
      InputError: a missing or unknown name, or a wrong shape.
    """
    tensors = {k: v for k, v in state_dict.items() if not k.endswith(".bn.num_batches_tracked")}
    return from_torch(
        lambda: InceptionV3(rngs=nnx.Rngs(0)), tensors, torch_names(), "Inception weights"
    )
