"""Official PyTorch weights as parameter trees of this library, and back.

One table per architecture says which torch tensor is which leaf here and how its axes lie there:
the DnD-Transformer (and LlamaGen's, which it grew from), the RQ-VAE image tokenizer, its PatchGAN
discriminator. The tables are read in both directions. Importing consumes every tensor exactly once
and fills every leaf; anything missing, unknown or of another shape is refused by name.

The config is derived from the shapes; `ImportOptions` holds what shapes do not tell. Sources of the
facts: the code releases of arXiv:2410.01912, arXiv:2203.01941 and arXiv:2406.06525.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxllm.errors import InputError
from jaxllm.hub.layouts import (
    CONV,
    HEADS_OUT,
    LINEAR,
    PADDED,
    QKV,
    Rule,
    Shape,
    Slot,
    Tensors,
    Tree,
    load_tensors,
    model_slots,
    save_tensors,
)
from jaxllm.models.code_model import code_model
from jaxllm.models.discriminator import Discriminator, DiscriminatorConfig
from jaxllm.models.dnd import SIZES, DnDConfig, Structure
from jaxllm.models.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from jaxllm.nn.mlp import swiglu_hidden
from jaxllm.nn.module import Blueprint
from jaxllm.quantize import ResidualVQ

# Attention heads by model width: the registry of the paper's code, and LlamaGen's larger models.
RELEASED_HEADS = {dim: heads for _, heads, dim in SIZES.values()} | {
    1792: 28,
    2560: 40,
    3200: 32,
    4096: 32,
}
# 0-indexed layers with a head, by (layers, depth), from the release's training scripts.
RELEASED_HEAD_LAYERS = {(48, 2): (39, 47), (48, 8): (26, 29, 32, 35, 38, 41, 44, 47)}
# Recomputed tables that some files hold, and a counter that nothing reads.
_IGNORED = re.compile(r"freqs_cis|causal_mask|.*\.num_batches_tracked")


@dataclass(frozen=True)
class ImportOptions:
    """What the shapes of the tensors do not tell."""

    ema: bool = False
    """Take a file's averaged weights; the released samples were drawn with the raw ones."""
    heads: int | None = None
    """Attention heads; None for the released model of that width."""
    head_layers: tuple[int, ...] | None = None
    """0-indexed layer after which each depth is predicted; None for the released choice."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the code grid."""
    num_classes: int | None = None
    """None: one class row is an unconditional model, otherwise the last row is the null class."""
    structure: Structure = "dnd"
    share_heads: bool = False
    """The file repeats one output projection for all depths."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width in pixels that the tokenizer is meant for."""
    groups: int = 32
    """Groups of the tokenizer's norms."""
    shared_codebook: bool | None = None
    """None: shared if the codebooks of all depths are equal."""


DEFAULTS = ImportOptions()


class Imported(NamedTuple):
    """A model's config and its two trees, as `Blueprint.build` takes them; NumPy float32."""

    config: Any
    params: Tree
    extra: Tree
    tensors: int
    """Official tensors that went into it, each once."""


# -- tables --------------------------------------------------------------------------------------


def _module(path: str, name: str) -> tuple[Rule, Rule, Rule]:
    """The leaves that convolutions and norms may have."""
    return (
        Rule(f"{path}/kernel", f"{name}.weight", CONV),
        Rule(f"{path}/scale", f"{name}.weight"),
        Rule(f"{path}/bias", f"{name}.bias"),
    )


def dnd_rules(*, llamagen: bool) -> tuple[Rule, ...]:
    """The DnD-Transformer; LlamaGen's single head has no number in its names."""
    index = "" if llamagen else ".{depth}"
    return (
        Rule("class_embed", "cls_embedding.embedding_table.weight"),
        Rule("token_embed", "tok_embeddings.weight", single=True),
        Rule("layers/attn_norm/scale", "layers.{layer}.attention_norm.weight"),
        Rule("layers/attn/qkv", "layers.{layer}.attention.wqkv.weight", QKV),
        Rule("layers/attn/out", "layers.{layer}.attention.wo.weight", HEADS_OUT),
        Rule("layers/mlp_norm/scale", "layers.{layer}.ffn_norm.weight"),
        Rule("layers/mlp/gate", "layers.{layer}.feed_forward.w1.weight", LINEAR),
        Rule("layers/mlp/up", "layers.{layer}.feed_forward.w3.weight", LINEAR),
        Rule("layers/mlp/down", "layers.{layer}.feed_forward.w2.weight", LINEAR),
        Rule("head_norm", f"norm{index}.weight", single=llamagen),
        Rule("head_out", f"output{index}.weight", LINEAR, single=llamagen),
    )


def tokenizer_rules(levels: int) -> tuple[Rule, ...]:
    """The RQ-VAE; both networks number their levels from high resolution (0) to low."""
    rules: list[Rule] = []
    for coder, side in (("encoder", "down"), ("decoder", "up")):
        here, there = rf"{coder}/levels/(\d+)", rf"{coder}.{side}.\1"
        middle, mid = f"{coder}/middle", f"{coder}.mid"
        rules += [
            *_module(rf"{here}/blocks/(\d+)/shortcut", rf"{there}.block.\2.nin_shortcut"),
            *_module(rf"{here}/blocks/(\d+)/(\w+)", rf"{there}.block.\2.\3"),
            *_module(rf"{here}/attentions/(\d+)/out", rf"{there}.attn.\2.proj_out"),
            *_module(rf"{here}/attentions/(\d+)/(\w+)", rf"{there}.attn.\2.\3"),
            *_module(rf"{middle}/(block_\d)/(\w+)", rf"{mid}.\1.\2"),
            *_module(rf"{middle}/attention/out", rf"{mid}.attn_1.proj_out"),
            *_module(rf"{middle}/attention/(\w+)", rf"{mid}.attn_1.\1"),
            *_module(rf"{coder}/(conv_in|norm_out|conv_out)", rf"{coder}.\1"),
        ]
    rules += _module(r"encoder/downs/(\d+)/conv", r"encoder.down.\1.downsample.conv")
    for i in range(levels - 1):  # The level with the highest resolution has no up-sampling.
        rules += _module(f"decoder/ups/{i}/conv", f"decoder.up.{i + 1}.upsample.conv")
    codebook = "quantizer.codebooks.{depth}"
    return (
        *rules,
        *_module("(quant_conv|post_quant_conv)", r"\1"),
        Rule("quantizer_state/codebook", f"{codebook}.weight", PADDED),
        Rule("quantizer_state/counts", f"{codebook}.cluster_size_ema"),
        Rule("quantizer_state/sums", f"{codebook}.embed_ema"),
    )


def discriminator_rules(layers: int) -> tuple[Rule, ...]:
    """The PatchGAN with BatchNorm: convolution, norm and activation are numbered one by one."""
    rules = [*_module("conv_in", "main.0"), *_module("conv_out", f"main.{2 + 3 * layers}")]
    for i in range(layers):
        norm = f"main.{3 + 3 * i}"
        rules += [
            *_module(f"convs/{i}", f"main.{2 + 3 * i}"),
            *_module(f"norms/{i}", norm),
            Rule(f"norms/{i}/mean", f"{norm}.running_mean"),
            Rule(f"norms/{i}/variance", f"{norm}.running_var"),
        ]
    return tuple(rules)


# -- models --------------------------------------------------------------------------------------


def import_dnd(tensors: Tensors, options: ImportOptions = DEFAULTS) -> Imported:
    """Returns the code model of a DnD-Transformer or LlamaGen state dict.

    Args:
      tensors: Torch name -> array, without wrapper prefixes.
      options: What the shapes do not tell.

    Raises:
      InputError: As `load_tensors`; or options that the shapes contradict or that are needed.
    """
    tensors = _without_ignored(tensors)
    config = dnd_config(tensors, options)
    blueprint = code_model(config)
    slots = model_slots(dnd_rules(llamagen="norm.weight" in tensors), blueprint, config.depth)
    return Imported(config, *load_tensors(slots, tensors, blueprint, "code model"), len(slots))


def export_dnd(
    params: Tree, extra: Tree, config: DnDConfig, *, llamagen: bool = False
) -> dict[str, np.ndarray]:
    """Returns the official state dict of a code model; `llamagen` takes its names, depth 1 only.

    Raises:
      InputError: If the official code has no such model.
    """
    if config.class_rotary != "zero":
        raise InputError(
            f"class_rotary is {config.class_rotary!r}; the official model computes with 'zero'"
        )
    slots = model_slots(dnd_rules(llamagen=llamagen), code_model(config), config.depth)
    return save_tensors(slots, params, extra)


def dnd_config(tensors: Mapping[str, Any], options: ImportOptions = DEFAULTS) -> DnDConfig:
    """Derives the config of a code model from anything with official names and `.shape`."""
    codebook_size, dim = _shape(tensors, "tok_embeddings.weight", 2)
    class_rows, _ = _shape(tensors, "cls_embedding.embedding_table.weight", 2)
    layers = _count(tensors, "layers.{}.attention.wqkv.weight")
    depth = 1 if "norm.weight" in tensors else _count(tensors, "norm.{}.weight")
    rows, _ = _shape(tensors, "layers.0.attention.wqkv.weight", 2)
    hidden, _ = _shape(tensors, "layers.0.feed_forward.w1.weight", 2)
    heads = options.heads or RELEASED_HEADS.get(dim)
    if heads is None:
        raise InputError(f"no released model has {dim} dimensions; give its number of heads")
    kv_heads, rest = divmod((rows - dim) * heads, 2 * dim)
    if rest or kv_heads < 1 or dim % heads:
        raise InputError(
            f"layers.0.attention.wqkv.weight has {rows} rows, which {heads} heads of {dim} "
            "dimensions do not split into queries, keys and values"
        )
    classes = options.num_classes
    if classes is None:
        classes = max(1, class_rows - 1)
    if class_rows not in (classes, classes + 1):
        raise InputError(f"the class table has {class_rows} rows, not {classes} or {classes + 1}")
    head_layers = options.head_layers
    if head_layers is None and depth > 1 and options.structure in ("dnd", "vertical"):
        head_layers = RELEASED_HEAD_LAYERS.get((layers, depth))
        if head_layers is None:
            raise InputError(
                f"no released model has {layers} layers and {depth} codes per cell; give its "
                "head_layers"
            )
    return DnDConfig(
        codebook_size=codebook_size,
        grid=options.grid,
        depth=depth,
        num_classes=classes,
        layers=layers,
        heads=heads,
        dim=dim,
        kv_heads=None if kv_heads == heads else kv_heads,
        mlp_hidden=None if hidden == swiglu_hidden(dim) else hidden,
        head_layers=head_layers,
        structure=options.structure,
        class_dropout=0.1 if class_rows > classes else 0.0,
        share_heads=options.share_heads,
        class_rotary="zero",
    )


def import_tokenizer(tensors: Tensors, options: ImportOptions = DEFAULTS) -> Imported:
    """Returns the image tokenizer of an RQ-VAE state dict; arguments and errors as `import_dnd`."""
    tensors = _without_ignored(tensors)
    config = tokenizer_config(tensors, options)
    blueprint = _tokenizer(config)
    slots = _tokenizer_slots(config, blueprint)
    return Imported(config, *load_tensors(slots, tensors, blueprint, "tokenizer"), len(slots))


def export_tokenizer(
    params: Tree, extra: Tree, config: ImageTokenizerConfig
) -> dict[str, np.ndarray]:
    """Returns the official state dict of a tokenizer, with the zero padding row of codebooks.

    Raises:
      InputError: If the official code has no such model.
    """
    if config.patch != 1:
        raise InputError(f"patch is {config.patch}; the official tokenizer folds no pixels")
    return save_tensors(_tokenizer_slots(config, _tokenizer(config)), params, extra)


def tokenizer_config(tensors: Tensors, options: ImportOptions = DEFAULTS) -> ImageTokenizerConfig:
    """Derives the config of a tokenizer from official names and shapes (and equal codebooks)."""
    width, channels, _, _ = _shape(tensors, "encoder.conv_in.weight", 4)
    levels = range(_count(tensors, "encoder.down.{}.block.0.conv1.weight"))
    widths = [_shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels]
    rows, code_dim = _shape(tensors, "quantizer.codebooks.0.weight", 2)
    depth = _count(tensors, "quantizer.codebooks.{}.weight")
    shared = options.shared_codebook
    if shared is None:
        parts = ("weight", "cluster_size_ema", "embed_ema")
        shared = all(
            np.array_equal(
                tensors.get(f"quantizer.codebooks.{i}.{part}", ()),
                tensors.get(f"quantizer.codebooks.0.{part}", ()),
            )
            for i in range(1, depth)
            for part in parts
        )
    return ImageTokenizerConfig(
        image_size=options.image_size,
        channels=channels,
        width=width,
        multipliers=tuple(size // width for size in widths),
        res_blocks=_count(tensors, "encoder.down.0.block.{}.conv1.weight"),
        attention_levels=tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in tensors),
        groups=options.groups,
        latent_dim=_shape(tensors, "encoder.conv_out.weight", 4)[0],
        quantizer=ResidualVQ(rows - 1, code_dim, depth, shared=shared, ema_mode="sequential"),
    )


def _tokenizer(config: ImageTokenizerConfig) -> Blueprint[ImageTokenizer]:
    return Blueprint(lambda rngs: ImageTokenizer(config, rngs=rngs))


def _tokenizer_slots(
    config: ImageTokenizerConfig, blueprint: Blueprint[ImageTokenizer]
) -> list[Slot]:
    return model_slots(tokenizer_rules(len(config.multipliers)), blueprint, config.quantizer.depth)


def import_discriminator(tensors: Tensors) -> Imported:
    """Returns the discriminator of a PatchGAN state dict; errors as `load_tensors`."""
    tensors = _without_ignored(tensors)
    width, channels, _, _ = _shape(tensors, "main.0.weight", 4)
    layers = sum(x.ndim == 4 for x in tensors.values()) - 2
    config = DiscriminatorConfig(channels, width, max(layers, 0), "batch")
    blueprint = _discriminator(config)
    slots = model_slots(discriminator_rules(config.layers), blueprint)
    return Imported(config, *load_tensors(slots, tensors, blueprint, "discriminator"), len(slots))


def export_discriminator(
    params: Tree, extra: Tree, config: DiscriminatorConfig
) -> dict[str, np.ndarray]:
    """Returns the official state dict of a discriminator with BatchNorm, without its counters."""
    if config.norm != "batch":
        raise InputError(f"norm is {config.norm!r}; the official discriminator has 'batch'")
    slots = model_slots(discriminator_rules(config.layers), _discriminator(config))
    return save_tensors(slots, params, extra)


def _discriminator(config: DiscriminatorConfig) -> Blueprint[Discriminator]:
    return Blueprint(lambda rngs: Discriminator(config, rngs=rngs))


def _without_ignored(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: x for name, x in tensors.items() if not _IGNORED.fullmatch(name)}


def _shape(tensors: Mapping[str, Any], name: str, axes: int) -> Shape:
    if name not in tensors:
        raise InputError(f"tensor {name} is missing")
    if len(tensors[name].shape) != axes:
        raise InputError(f"{name} has shape {tensors[name].shape}, expected {axes} axes")
    return tuple(tensors[name].shape)


def _count(tensors: Mapping[str, Any], template: str) -> int:
    """Returns one more than the largest number in `template` that names a tensor, at least 1."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    numbers = [int(m[1]) for name in tensors if (m := pattern.fullmatch(name))]
    return max(numbers, default=0) + 1
