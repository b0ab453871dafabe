"""Which tensor of a Hugging Face model is which leaf of `Decoder`, family by family.

Rotary pairs are interleaved here and half-split in all of these families, so queries and keys (and
their biases and norms) change the order of their dims on the way; `layouts.half_split` does and
undoes it exactly.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxllm.hub.layouts import (
    FLAT,
    HEADS_IN,
    HEADS_OUT,
    LINEAR,
    PLAIN,
    Layout,
    Rule,
    half_split,
)
from jaxllm.models.decoder import DecoderConfig

# GPT-2 stores kernels as [in, out], and queries, keys and values of all heads one after the other.
_CONV1D_QKV = Layout(
    lambda s: (s[0], s[1] * s[2] * s[3]),
    lambda x, s: x.reshape(s[0], s[2], s[1], s[3]).swapaxes(1, 2),
    lambda x: x.swapaxes(1, 2).reshape(len(x), -1),
    (0,),
)
_CONV1D_QKV_BIAS = Layout(
    lambda s: (s[0] * s[1] * s[2],),
    lambda x, s: x.reshape(s[1], s[0], s[2]).swapaxes(0, 1),
    lambda x: x.swapaxes(0, 1).reshape(-1),
)
_CONV1D_OUT = Layout(
    lambda s: (s[0] * s[1], s[2]),
    lambda x, s: x.reshape(s),
    lambda x: x.reshape(-1, x.shape[-1]),
    (0, None, 1),
)


class Table(NamedTuple):
    """The tensors of one family."""

    rules: tuple[Rule, ...]
    prefix: str
    """Before every name but the head's; files of the bare model lack it."""
    head: str
    """Name of the output projection, which tied files may hold too."""
    ignored: re.Pattern[str]
    """Tables that old files hold and that are recomputed."""


def tensor_table(model_type: str, config: DecoderConfig) -> Table:
    """Returns the table of a family, for a model of this config."""
    dims = 0 if config.rope is None else config.rope.dims(config.attention.head_dim)
    if model_type == "gpt2":
        ignored = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
        return Table(_gpt2_rules(), "transformer.", "lm_head.weight", ignored)
    if model_type == "gpt_neox":
        ignored = re.compile(r".*\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)")
        return Table(_neox_rules(dims), "gpt_neox.", "embed_out.weight", ignored)
    ignored = re.compile(r".*\.rotary_emb\.inv_freq")
    post_norms = model_type == "gemma2"
    return Table(_llama_rules(dims, post_norms), "model.", "lm_head.weight", ignored)


def _llama_rules(dims: int, post_norms: bool) -> tuple[Rule, ...]:
    """Llama, Mistral, Qwen2, Qwen3; Gemma 2 with two norms more, one of them under Llama's name."""
    layer = "model.layers.{layer}"
    attn = f"{layer}.self_attn"
    weight, bias = half_split(HEADS_IN, dims), half_split(FLAT, dims)
    norm = half_split(PLAIN._replace(axes=()), dims)
    queries, key, value = slice(0, -2), -2, -1
    mlp_norm = "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
    return (
        Rule("embed", "model.embed_tokens.weight"),
        Rule("layers/attn_norm/scale", f"{layer}.input_layernorm.weight"),
        Rule("layers/attn/qkv", f"{attn}.q_proj.weight", weight, part=queries),
        Rule("layers/attn/qkv", f"{attn}.k_proj.weight", weight, part=key),
        Rule("layers/attn/qkv", f"{attn}.v_proj.weight", HEADS_IN, part=value),
        Rule("layers/attn/qkv_bias", f"{attn}.q_proj.bias", bias, part=queries),
        Rule("layers/attn/qkv_bias", f"{attn}.k_proj.bias", bias, part=key),
        Rule("layers/attn/qkv_bias", f"{attn}.v_proj.bias", FLAT, part=value),
        Rule(r"layers/attn/(q|k)_norm/scale", rf"{attn}.\1_norm.weight", norm),
        Rule("layers/attn/out", f"{attn}.o_proj.weight", HEADS_OUT),
        Rule("layers/attn/out_bias", f"{attn}.o_proj.bias"),
        Rule("layers/attn_post_norm/scale", f"{layer}.post_attention_layernorm.weight"),
        Rule("layers/mlp_norm/scale", f"{layer}.{mlp_norm}.weight"),
        Rule(r"layers/mlp/(gate|up|down)", rf"{layer}.mlp.\1_proj.weight", LINEAR),
        Rule(r"layers/mlp/(gate|up|down)_bias", rf"{layer}.mlp.\1_proj.bias"),
        Rule("layers/mlp_post_norm/scale", f"{layer}.post_feedforward_layernorm.weight"),
        Rule("norm/scale", "model.norm.weight"),
        Rule("head", "lm_head.weight", LINEAR),
    )


def _gpt2_rules() -> tuple[Rule, ...]:
    layer = "transformer.h.{layer}"
    return (
        Rule("embed", "transformer.wte.weight"),
        Rule("position_embed", "transformer.wpe.weight"),
        *_layer_norm("layers/attn_norm", f"{layer}.ln_1"),
        Rule("layers/attn/qkv", f"{layer}.attn.c_attn.weight", _CONV1D_QKV),
        Rule("layers/attn/qkv_bias", f"{layer}.attn.c_attn.bias", _CONV1D_QKV_BIAS),
        Rule("layers/attn/out", f"{layer}.attn.c_proj.weight", _CONV1D_OUT),
        Rule("layers/attn/out_bias", f"{layer}.attn.c_proj.bias"),
        *_layer_norm("layers/mlp_norm", f"{layer}.ln_2"),
        Rule("layers/mlp/up", f"{layer}.mlp.c_fc.weight"),
        Rule("layers/mlp/up_bias", f"{layer}.mlp.c_fc.bias"),
        Rule("layers/mlp/down", f"{layer}.mlp.c_proj.weight"),
        Rule("layers/mlp/down_bias", f"{layer}.mlp.c_proj.bias"),
        *_layer_norm("norm", "transformer.ln_f"),
        Rule("head", "lm_head.weight", LINEAR),
    )


def _neox_rules(dims: int) -> tuple[Rule, ...]:
    layer = "gpt_neox.layers.{layer}"
    rotated = slice(0, 2)  # Of a head's query, key and value.
    qkv = half_split(HEADS_IN, dims, rotated)
    return (
        Rule("embed", "gpt_neox.embed_in.weight"),
        *_layer_norm("layers/attn_norm", f"{layer}.input_layernorm"),
        Rule("layers/attn/qkv", f"{layer}.attention.query_key_value.weight", qkv),
        Rule(
            "layers/attn/qkv_bias",
            f"{layer}.attention.query_key_value.bias",
            half_split(FLAT, dims, rotated),
        ),
        Rule("layers/attn/out", f"{layer}.attention.dense.weight", HEADS_OUT),
        Rule("layers/attn/out_bias", f"{layer}.attention.dense.bias"),
        *_layer_norm("layers/mlp_norm", f"{layer}.post_attention_layernorm"),
        Rule("layers/mlp/up", f"{layer}.mlp.dense_h_to_4h.weight", LINEAR),
        Rule("layers/mlp/up_bias", f"{layer}.mlp.dense_h_to_4h.bias"),
        Rule("layers/mlp/down", f"{layer}.mlp.dense_4h_to_h.weight", LINEAR),
        Rule("layers/mlp/down_bias", f"{layer}.mlp.dense_4h_to_h.bias"),
        *_layer_norm("norm", "gpt_neox.final_layer_norm"),
        Rule("head", "embed_out.weight", LINEAR),
    )


def _layer_norm(path: str, name: str) -> tuple[Rule, Rule]:
    return Rule(f"{path}/scale", f"{name}.weight"), Rule(f"{path}/bias", f"{name}.bias")
