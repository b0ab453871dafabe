"""The image tokenizer: a convolutional autoencoder around a residual quantizer (RQ-VAE).

Section 3.1 of arXiv:2410.01912 uses the RQ-VAE of arXiv:2203.01941 unchanged: an encoder that
shrinks by 2^(levels - 1), a 1x1 convolution to the code dimension, residual quantization to d codes
per cell (Eq. 2), a 1x1 convolution and the mirrored decoder. Decoding the first i codes only gives
the coarse image that depth i can represent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.conv import Conv, Downsample, ResnetBlock, SpatialAttention, Upsample
from jaxllm.nn.module import Buffer
from jaxllm.nn.norm import GroupNorm
from jaxllm.quantize import BSQ, FSQ, LFQ, QuantizeOutput, ResidualVQ, SimVQ


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Shape of the autoencoder; the defaults are the paper's, 256 pixels to a 16x16 grid."""

    image_size: tuple[int, int] = (256, 256)
    """Height and width in pixels, multiples of `factor`."""
    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each level; every level but the last halves the image."""
    patch: int = 1
    """Pixels along one side that are folded into channels first (and unfolded last): 2 makes a
    small model of small images several times cheaper. 1 is the paper's network."""
    res_blocks: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    attention_levels: tuple[int, ...] = ()
    """Levels with attention after each residual block (the middle always has one)."""
    groups: int = 32
    """Groups of every GroupNorm."""
    latent_dim: int = 256
    """Channels between the networks and the 1x1 convolutions."""
    quantizer: ResidualVQ | FSQ | LFQ | BSQ | SimVQ = field(
        default_factory=lambda: ResidualVQ(codebook_size=16384, code_dim=256, depth=2)
    )
    remat: bool = False
    """Recompute each residual block in the backward pass."""

    def __post_init__(self) -> None:
        for name in ("channels", "width", "patch", "res_blocks", "groups", "latent_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")
        last = len(self.multipliers) - 1
        if last < 0 or any(not 0 <= level <= last for level in self.attention_levels):
            raise InputError(
                f"attention_levels {self.attention_levels} must lie in 0 .. {last}, the levels of "
                f"multipliers {self.multipliers}"
            )
        for size in self.image_size:
            if size < 1 or size % self.factor:
                raise InputError(
                    f"image_size {self.image_size} is not a positive multiple of {self.factor}, "
                    f"which {len(self.multipliers)} levels and patches of {self.patch} need"
                )
        if any(self.width * m % self.groups for m in self.multipliers):
            raise InputError(
                f"width {self.width} x {self.multipliers} does not split into {self.groups} groups"
            )

    @property
    def factor(self) -> int:
        """Pixels per grid cell along one axis, f."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the code grid."""
        return self.image_size[0] // self.factor, self.image_size[1] // self.factor


class Level(nnx.Module):
    """The residual blocks of one resolution, with attention after each where asked for."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        attention: bool,
        groups: int,
        rngs: nnx.Rngs,
    ):
        sizes = [inputs] + [outputs] * (blocks - 1)
        self.blocks = nnx.List(
            [ResnetBlock(size, outputs, groups=groups, rngs=rngs) for size in sizes]
        )
        self.attentions = nnx.List(
            [SpatialAttention(outputs, groups=groups, rngs=rngs) for _ in sizes]
            if attention
            else []
        )

    def __call__(self, x: jax.Array, *, remat: bool) -> jax.Array:
        """Maps [B, h, w, in] to [B, h, w, out]."""
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, remat)
            if len(self.attentions):
                x = self.attentions[i](x)
        return x


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, groups: int, rngs: nnx.Rngs):
        self.block_1 = ResnetBlock(channels, channels, groups=groups, rngs=rngs)
        self.attention = SpatialAttention(channels, groups=groups, rngs=rngs)
        self.block_2 = ResnetBlock(channels, channels, groups=groups, rngs=rngs)

    def __call__(self, x: jax.Array, *, remat: bool) -> jax.Array:
        """Keeps the shape [B, h, w, channels]."""
        return run_block(self.block_2, self.attention(run_block(self.block_1, x, remat)), remat)


def run_block(block: ResnetBlock, x: jax.Array, remat: bool) -> jax.Array:
    """Applies a block, recomputing it in the backward pass when `remat` is set."""
    return jax.checkpoint(lambda b, h: b(h))(block, x) if remat else block(x)


class Encoder(nnx.Module):
    """Image [B, H, W, channels] to latents [B, h, w, latent_dim]."""

    def __init__(self, config: ImageTokenizerConfig, *, rngs: nnx.Rngs):
        widths = [config.width * m for m in config.multipliers]
        inputs = [config.width, *widths[:-1]]
        groups = config.groups
        self.patch = config.patch
        self.conv_in = Conv(config.channels * config.patch**2, config.width, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    a,
                    b,
                    config.res_blocks,
                    attention=i in config.attention_levels,
                    groups=groups,
                    rngs=rngs,
                )
                for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
            ]
        )
        self.downs = nnx.List([Downsample(w, rngs=rngs) for w in widths[:-1]])
        self.middle = Middle(widths[-1], groups=groups, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups=groups)
        self.conv_out = Conv(widths[-1], config.latent_dim, rngs=rngs)
        self.remat = config.remat

    def __call__(self, x: jax.Array) -> jax.Array:
        """Encodes images in [-1, 1]."""
        h = self.conv_in(fold_patches(x, self.patch))
        for i, level in enumerate(self.levels):
            h = level(h, remat=self.remat)
            if i < len(self.downs):
                h = self.downs[i](h)
        h = self.middle(h, remat=self.remat)
        return self.conv_out(jax.nn.silu(self.norm_out(h)))


class Decoder(nnx.Module):
    """Latents [B, h, w, latent_dim] to an image [B, H, W, channels]."""

    def __init__(self, config: ImageTokenizerConfig, *, rngs: nnx.Rngs):
        widths = [config.width * m for m in config.multipliers]
        inputs = [*widths[1:], widths[-1]]
        groups = config.groups
        self.conv_in = Conv(config.latent_dim, widths[-1], rngs=rngs)
        self.middle = Middle(widths[-1], groups=groups, rngs=rngs)
        # Stored from high resolution (0) to low like the reference, executed in reverse.
        self.levels = nnx.List(
            [
                Level(
                    a,
                    b,
                    config.res_blocks + 1,
                    attention=i in config.attention_levels,
                    groups=groups,
                    rngs=rngs,
                )
                for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
            ]
        )
        self.ups = nnx.List([Upsample(w, rngs=rngs) for w in widths[1:]])
        self.norm_out = GroupNorm(widths[0], groups=groups)
        self.patch = config.patch
        self.conv_out = Conv(widths[0], config.channels * config.patch**2, rngs=rngs)
        self.remat = config.remat

    def trunk(self, z: jax.Array) -> jax.Array:
        """Returns everything but the last convolution, [B, H, W, width]."""
        h = self.middle(self.conv_in(z), remat=self.remat)
        for i in reversed(range(len(self.levels))):
            h = self.levels[i](h, remat=self.remat)
            if i > 0:
                h = self.ups[i - 1](h)
        return jax.nn.silu(self.norm_out(h))

    def __call__(self, z: jax.Array) -> jax.Array:
        """Decodes latents to images, nominally in [-1, 1]."""
        return self.last(self.trunk(z))

    def last(self, features: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """Applies the last convolution to `trunk` features, with another kernel where given."""
        return unfold_patches(self.conv_out(features, kernel), self.patch)


def fold_patches(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, c] to [B, H/patch, W/patch, patch * patch * c]."""
    if patch == 1:
        return x
    return einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def unfold_patches(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `fold_patches`."""
    if patch == 1:
        return x
    return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)


class ImageTokenizer(nnx.Module):
    """Encoder, residual quantizer and decoder."""

    def __init__(self, config: ImageTokenizerConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        code_dim = config.quantizer.code_dim
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv(config.latent_dim, code_dim, 1, rngs=rngs)
        self.post_quant_conv = Conv(code_dim, config.latent_dim, 1, rngs=rngs)
        params, state = config.quantizer.init(rngs.params())
        self.quantizer_params = nnx.Dict({k: nnx.Param(v) for k, v in params.items()})
        self.quantizer_state = nnx.Dict({k: Buffer(v) for k, v in state.items()})

    def quantizer_parts(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns the quantizer's (params, state) as plain dicts."""
        return (
            {k: v[...] for k, v in self.quantizer_params.items()},
            {k: v[...] for k, v in self.quantizer_state.items()},
        )

    def encode(self, images: jax.Array) -> jax.Array:
        """Maps images [B, H, W, channels] in [-1, 1] to latents float32 [B, h, w, E]."""
        return self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)

    def quantize(
        self, latents: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> QuantizeOutput:
        """Quantizes latents [B, h, w, E]; `state` of the output is the updated codebook."""
        params, state = self.quantizer_parts()
        return self.config.quantizer.quantize(params, state, latents, train=train, key=key)

    def decode(self, vectors: jax.Array) -> jax.Array:
        """Maps quantized latents [B, h, w, E] to images float32 [B, H, W, channels]."""
        return self.decoder(self.post_quant_conv(vectors.astype(self.dtype))).astype(jnp.float32)

    def to_codes(self, images: jax.Array) -> jax.Array:
        """Maps images to codes int32 [B, cells, C] in raster order."""
        codes = self.quantize(self.encode(images)).codes
        return codes.reshape(codes.shape[0], -1, codes.shape[-1])

    def from_codes(self, codes: jax.Array, depth: int | None = None) -> jax.Array:
        """Decodes codes [B, cells, C], or only their first `depth` levels, to images."""
        params, state = self.quantizer_parts()
        grid = codes.reshape(codes.shape[0], *self.config.grid, codes.shape[-1])
        return self.decode(self.config.quantizer.decode(params, state, grid, depth=depth))


# Path regex -> logical axes; convolution kernels are [kh, kw, in, out].
TOKENIZER_RULES = (
    (r"kernel$", (None, None, "channels_in", "channels_out")),
    (r"(scale|bias)$", (None,)),
    (r"codebook$", (None, None, None)),
    (r"projection$", (None, None)),
)
