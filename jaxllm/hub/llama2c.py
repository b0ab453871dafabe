"""Checkpoints of llama2.c (`.bin`, version 0) as decoder language models.

Little endian: seven int32 (dim, hidden, layers, query heads, kv heads, vocabulary, positions), then
float32 tensors, those of layers stacked over the layers, matrices as [out, in]. A negative
vocabulary means an output projection of its own, at the end. Rotary pairs are interleaved, and the
file holds their cosine and sine tables, which are recomputed here. Source: the export script of
llama2.c.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxllm.errors import InputError
from jaxllm.hub.layouts import HEADS_IN, HEADS_OUT, LINEAR, PLAIN, Layout
from jaxllm.models.decoder import Decoder, DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.module import Blueprint

Tree = Any

# In file order: path, part of the leaf's last axis but one, layout of one layer.
_LAYERED: tuple[tuple[str, int | slice | None, Layout], ...] = (
    ("layers/attn_norm/scale", None, PLAIN),
    ("layers/attn/qkv", slice(0, -2), HEADS_IN),
    ("layers/attn/qkv", -2, HEADS_IN),
    ("layers/attn/qkv", -1, HEADS_IN),
    ("layers/attn/out", None, HEADS_OUT),
    ("layers/mlp_norm/scale", None, PLAIN),
    ("layers/mlp/gate", None, LINEAR),
    ("layers/mlp/down", None, LINEAR),
    ("layers/mlp/up", None, LINEAR),
)


def load_llama2c(
    path: str | os.PathLike[str],
) -> tuple[DecoderConfig, Blueprint[Decoder], Tree]:
    """Reads a llama2.c checkpoint.

    Returns:
      Config, blueprint and float32 parameters, as `load_decoder`.

    Raises:
      InputError: The file is missing, its header describes no model, its size is another than the
        header's, or a weight is not finite.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a llama2.c checkpoint") from error
    try:
        config = _header(content)
    except InputError as error:
        raise InputError(f"{path}: {error}, expected a llama2.c checkpoint") from None
    blueprint = decoder(config)
    floats = np.frombuffer(content, "<f4", offset=28, count=(len(content) - 28) // 4)
    shapes = flatten_dict(blueprint.abstract_params, sep="/")  # type: ignore[attr-defined]
    tables = config.max_positions * config.attention.head_dim
    expected = blueprint.parameter_count + tables
    if len(content) != 28 + 4 * expected:
        raise InputError(f"{path}: {len(content)} bytes, expected {28 + 4 * expected}")
    if not np.isfinite(floats).all():
        raise InputError(f"{path}: holds a value that is not finite")
    leaves = {name: np.empty(leaf.shape, np.float32) for name, leaf in shapes.items()}
    position = 0

    def take(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal position
        start, position = position, position + int(np.prod(shape))
        return floats[start:position].reshape(shape)

    leaves["embed"][...] = take(leaves["embed"].shape)
    for name, part, layout in _LAYERED:
        for row in leaves[name]:
            target = row if part is None else row[..., part, :]
            target[...] = layout.load(take(layout.shape(target.shape)), target.shape)
    leaves["norm/scale"][...] = take(leaves["norm/scale"].shape)
    if "head" in leaves:
        take((tables,))
        leaves["head"][...] = take(leaves["head"].shape[::-1]).T
    arrays = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    return config, blueprint, unflatten_dict(arrays, sep="/")


def _header(content: bytes) -> DecoderConfig:
    if len(content) < 28:
        raise InputError(f"{len(content)} bytes are no header")
    dim, hidden, layers, heads, kv_heads, vocab, positions = np.frombuffer(
        content, "<i4", count=7
    ).tolist()
    if heads < 1 or dim % heads:
        raise InputError(f"dim {dim} over {heads} heads")
    return DecoderConfig(
        vocab_size=abs(vocab),
        dim=dim,
        layers=layers,
        attention=AttentionConfig(heads, kv_heads, dim // heads),
        mlp=MlpConfig(hidden),
        max_positions=positions,
        tie_embeddings=vocab > 0,
    )
