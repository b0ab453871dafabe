"""The model families of transformers that `Decoder` covers: their `config.json` keys, both ways.

A family lists its keys with the defaults that transformers fills in, and how they become a
`DecoderConfig` and come from one. Facts from the configuration classes of transformers 4 and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxllm.errors import InputError
from jaxllm.models.decoder import DecoderConfig, Windows
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import Activation, MlpConfig
from jaxllm.nn.norm import NormConfig
from jaxllm.nn.rope import RopeConfig

Json = dict[str, Any]

# Names of transformers; the first of each of ours is the one written.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
REQUIRED = object()
_NUMBER = (int, float)


class Key(NamedTuple):
    """One key of a `config.json`."""

    kind: type | tuple[type, ...]
    default: Any = REQUIRED
    nullable: bool = False
    """An explicit null means none, rather than the default."""


class Family(NamedTuple):
    """One `model_type`: its keys and both directions."""

    architecture: str
    """The transformers class of the language model."""
    keys: Mapping[str, Key]
    read: Callable[[Json], DecoderConfig]
    write: Callable[[DecoderConfig], Json]


# -- what families share -------------------------------------------------------------------------


def _only(values: Json, name: str, *allowed: Any) -> None:
    if values[name] not in allowed:
        raise InputError(f"{name} {values[name]!r} is not supported, expected {allowed[0]!r}")


def _activation(values: Json, name: str) -> Activation:
    if values[name] not in ACTIVATIONS:
        raise InputError(f"{name} {values[name]!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[values[name]]


def _activation_name(config: DecoderConfig) -> str:
    return next(name for name, ours in ACTIVATIONS.items() if ours == config.mlp.activation)


# By rope type: name in config.json -> field of `RopeConfig`.
_ROPE_SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_positions",
    },
}


def _rope(values: Json, base: str = "rope_theta", fraction: str | None = None) -> RopeConfig:
    """Reads `rope_theta` and `rope_scaling`, or the one `rope_parameters` of transformers 5."""
    scaling = dict(values["rope_parameters"] or values["rope_scaling"] or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    settings: Json = {
        "base": scaling.pop("rope_theta", values[base]),
        "fraction": scaling.pop("partial_rotary_factor", values[fraction] if fraction else 1.0),
    }
    if not fraction and settings["fraction"] != 1:
        raise InputError(f"partial_rotary_factor {settings['fraction']} is not supported")
    if kind not in tuple(_ROPE_SETTINGS):
        raise InputError(f"rope type {kind!r} is not one of {', '.join(_ROPE_SETTINGS)}")
    for name, ours in _ROPE_SETTINGS[kind].items():
        if name not in scaling:
            raise InputError(f"rope type {kind!r} needs {name}")
        settings[ours] = scaling.pop(name)
    if left := [name for name, value in scaling.items() if value is not None]:
        raise InputError(f"rope type {kind!r} has an unknown setting {left[0]!r}")
    for name, value in settings.items():
        if not isinstance(value, _NUMBER) or isinstance(value, bool):
            raise InputError(f"rope setting {name} is {value!r}, expected a number")
    return RopeConfig(**settings, scaling="none" if kind == "default" else kind)  # type: ignore[arg-type]


def _rope_json(config: DecoderConfig) -> Json:
    rope = config.rope or RopeConfig()
    scaling: Json | None = None
    if rope.scaling != "none":
        names = _ROPE_SETTINGS[rope.scaling]
        settings = {name: getattr(rope, ours) for name, ours in names.items()}
        scaling = {"rope_type": rope.scaling, **settings}
    return {"rope_theta": rope.base, "rope_scaling": scaling}


def _layer_windows(values: Json, default: Callable[[int], bool]) -> Windows:
    """Windows of all layers, from `layer_types` or the rule that the family had before it."""
    window, types = values["sliding_window"], values["layer_types"]
    if types is None:
        local = [default(i) for i in range(values["num_hidden_layers"])]
    else:
        known = {"sliding_attention": True, "full_attention": False}
        if unknown := [kind for kind in types if kind not in tuple(known)]:
            raise InputError(f"layer_types has {unknown[0]!r}, not one of {', '.join(known)}")
        if len(types) != values["num_hidden_layers"]:
            raise InputError(f"{len(types)} layer_types for {values['num_hidden_layers']} layers")
        local = [known[kind] for kind in types]
    windows = tuple(window if here else None for here in local)
    if any(local) and window is None:
        raise InputError("layer_types has 'sliding_attention' without a sliding_window")
    return _shortest(windows)


def _shortest(windows: Windows) -> Windows:
    """Returns the pattern whose repetition gives these windows."""
    layers = len(windows)
    return next(
        windows[:period]
        for period in range(1, layers + 1)
        if all(windows[i] == windows[i % period] for i in range(layers))
    )


# -- Llama and its kin ---------------------------------------------------------------------------


def _llama_keys(**changes: Key) -> dict[str, Key]:
    return {
        "vocab_size": Key(int),
        "hidden_size": Key(int),
        "intermediate_size": Key(int),
        "num_hidden_layers": Key(int),
        "num_attention_heads": Key(int),
        "num_key_value_heads": Key(int, None, True),
        "head_dim": Key(int, None, True),
        "hidden_act": Key(str, "silu"),
        "max_position_embeddings": Key(int, 2048),
        "rms_norm_eps": Key(_NUMBER, 1e-6),
        "tie_word_embeddings": Key(bool, False),
        "rope_theta": Key(_NUMBER, 10000.0),
        "rope_scaling": Key(dict, None, True),
        "rope_parameters": Key(dict, None, True),
    } | changes


def _read_llama_kin(values: Json, attention: Json, **changes: Any) -> DecoderConfig:
    heads = values["num_attention_heads"]
    if heads < 1:
        raise InputError(f"num_attention_heads {heads} must be at least 1")
    mlp = MlpConfig(values["intermediate_size"], _activation(values, "hidden_act"))
    settings: Json = {
        "vocab_size": values["vocab_size"],
        "dim": values["hidden_size"],
        "layers": values["num_hidden_layers"],
        "attention": AttentionConfig(
            heads,
            heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
            values["hidden_size"] // heads if values["head_dim"] is None else values["head_dim"],
            **attention,
        ),
        "mlp": mlp,
        "norm": NormConfig(eps=values["rms_norm_eps"]),
        "rope": _rope(values),
        "max_positions": values["max_position_embeddings"],
        "tie_embeddings": values["tie_word_embeddings"],
    }
    return DecoderConfig(**settings | changes)


def _write_llama_kin(config: DecoderConfig) -> Json:
    attention = config.attention
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": _activation_name(config),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        **_rope_json(config),
    }


def _read_llama(values: Json) -> DecoderConfig:
    bias = values["attention_bias"]
    config = _read_llama_kin(values, {"bias": bias, "out_bias": bias})
    mlp = dataclasses.replace(config.mlp, bias=values["mlp_bias"])
    return dataclasses.replace(config, mlp=mlp)


def _write_llama(config: DecoderConfig) -> Json:
    biases = {"attention_bias": config.attention.bias, "mlp_bias": config.mlp.bias}
    return _write_llama_kin(config) | biases


def _read_mistral(values: Json) -> DecoderConfig:
    return _read_llama_kin(values, {}, windows=(values["sliding_window"],))


def _write_mistral(config: DecoderConfig) -> Json:
    return _write_llama_kin(config) | {"sliding_window": config.layer_windows[0]}


_QWEN_WINDOWS = {
    "use_sliding_window": Key(bool, False),
    "sliding_window": Key(int, 4096, True),
    "max_window_layers": Key(int, 28),
    "layer_types": Key(list, None, True),
}


def _qwen_windows(values: Json) -> Windows:
    if not values["use_sliding_window"]:
        values = values | {"sliding_window": None}
    slides = values["sliding_window"] is not None
    return _layer_windows(values, lambda i: slides and i >= values["max_window_layers"])


def _write_qwen_windows(config: DecoderConfig) -> Json:
    local = [window for window in config.layer_windows if window is not None]
    return {
        "use_sliding_window": bool(local),
        "sliding_window": local[0] if local else None,
        "max_window_layers": config.layers - len(local),
        "layer_types": [
            "full_attention" if window is None else "sliding_attention"
            for window in config.layer_windows
        ],
    }


def _read_qwen2(values: Json) -> DecoderConfig:
    return _read_llama_kin(values, {"bias": True}, windows=_qwen_windows(values))


def _read_qwen3(values: Json) -> DecoderConfig:
    bias = values["attention_bias"]
    attention = {"bias": bias, "out_bias": bias, "qk_norm": True}
    return _read_llama_kin(values, attention, windows=_qwen_windows(values))


def _write_qwen2(config: DecoderConfig) -> Json:
    return _write_llama_kin(config) | _write_qwen_windows(config)


def _write_qwen3(config: DecoderConfig) -> Json:
    return _write_qwen2(config) | {"attention_bias": config.attention.bias}


def _read_gemma2(values: Json) -> DecoderConfig:
    _only(values, "hidden_act", values["hidden_activation"], None)
    _only(values, "use_bidirectional_attention", False, None)
    bias = values["attention_bias"]
    attention = {
        "bias": bias,
        "out_bias": bias,
        "scale": values["query_pre_attn_scalar"] ** -0.5,
        "soft_cap": values["attn_logit_softcapping"],
    }
    return _read_llama_kin(
        values | {"hidden_act": values["hidden_activation"]},
        attention,
        norm=NormConfig(eps=values["rms_norm_eps"], unit_offset=True),
        windows=_layer_windows(values, lambda i: i % 2 == 0),
        post_norms=True,
        scale_embeddings=True,
        logit_soft_cap=values["final_logit_softcapping"],
    )


def _write_gemma2(config: DecoderConfig) -> Json:
    attention = config.attention
    scalar = attention.head_dim if attention.scale is None else round(attention.scale**-2)
    windows = _write_qwen_windows(config)
    return _write_llama_kin(config) | {
        "hidden_act": _gemma_activation(config),
        "hidden_activation": _gemma_activation(config),
        "attention_bias": attention.bias,
        "query_pre_attn_scalar": scalar,
        "sliding_window": windows["sliding_window"],
        "layer_types": windows["layer_types"],
        "attn_logit_softcapping": attention.soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
    }


def _gemma_activation(config: DecoderConfig) -> str:
    tanh = config.mlp.activation == "gelu_tanh"
    return "gelu_pytorch_tanh" if tanh else _activation_name(config)


# -- GPT-2 and GPT-NeoX --------------------------------------------------------------------------


def _read_gpt2(values: Json) -> DecoderConfig:
    _only(values, "scale_attn_weights", True)
    heads, dim = values["n_head"], values["n_embd"]
    if heads < 1 or dim % heads:
        raise InputError(f"n_embd {dim} is not a multiple of n_head {heads}")
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        dim=dim,
        layers=values["n_layer"],
        attention=AttentionConfig(heads, heads, dim // heads, bias=True, out_bias=True),
        mlp=MlpConfig(
            4 * dim if values["n_inner"] is None else values["n_inner"],
            _activation(values, "activation_function"),
            gated=False,
            bias=True,
        ),
        norm=NormConfig("layer", values["layer_norm_epsilon"]),
        rope=None,
        max_positions=values["n_positions"],
        learned_positions=True,
        tie_embeddings=values["tie_word_embeddings"],
    )


def _write_gpt2(config: DecoderConfig) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.dim,
        "n_layer": config.layers,
        "n_head": config.attention.heads,
        "n_inner": config.mlp.hidden,
        "n_positions": config.max_positions,
        "activation_function": _activation_name(config),
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_neox(values: Json) -> DecoderConfig:
    heads, dim = values["num_attention_heads"], values["hidden_size"]
    if heads < 1 or dim % heads:
        raise InputError(f"hidden_size {dim} is not a multiple of num_attention_heads {heads}")
    bias = values["attention_bias"]
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        dim=dim,
        layers=values["num_hidden_layers"],
        attention=AttentionConfig(heads, heads, dim // heads, bias=bias, out_bias=bias),
        mlp=MlpConfig(
            values["intermediate_size"], _activation(values, "hidden_act"), gated=False, bias=True
        ),
        norm=NormConfig("layer", values["layer_norm_eps"]),
        rope=_rope(values, "rotary_emb_base", "rotary_pct"),
        max_positions=values["max_position_embeddings"],
        parallel_residual=values["use_parallel_residual"],
        tie_embeddings=values["tie_word_embeddings"],
    )


def _write_neox(config: DecoderConfig) -> Json:
    rope = config.rope or RopeConfig()
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "hidden_act": _activation_name(config),
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm.eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rotary_emb_base": rope.base,
        "rotary_pct": rope.fraction,
        "rope_scaling": _rope_json(config)["rope_scaling"],
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _llama_keys(attention_bias=Key(bool, False), mlp_bias=Key(bool, False)),
        _read_llama,
        _write_llama,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _llama_keys(num_key_value_heads=Key(int, 8, True), sliding_window=Key(int, 4096, True)),
        _read_mistral,
        _write_mistral,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _llama_keys(**_QWEN_WINDOWS), _read_qwen2, _write_qwen2),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _llama_keys(head_dim=Key(int, 128), attention_bias=Key(bool, False), **_QWEN_WINDOWS),
        _read_qwen3,
        _write_qwen3,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _llama_keys(
            num_key_value_heads=Key(int, 4, True),
            head_dim=Key(int, 256),
            hidden_act=Key(str, None),
            hidden_activation=Key(str, "gelu_pytorch_tanh"),
            tie_word_embeddings=Key(bool, True),
            attention_bias=Key(bool, False),
            query_pre_attn_scalar=Key(_NUMBER, 256),
            sliding_window=Key(int, 4096, True),
            layer_types=Key(list, None, True),
            attn_logit_softcapping=Key(_NUMBER, 50.0, True),
            final_logit_softcapping=Key(_NUMBER, 30.0, True),
            use_bidirectional_attention=Key(bool, None),
        ),
        _read_gemma2,
        _write_gemma2,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "vocab_size": Key(int, 50257),
            "n_embd": Key(int, 768),
            "n_layer": Key(int, 12),
            "n_head": Key(int, 12),
            "n_inner": Key(int, None, True),
            "n_positions": Key(int, 1024),
            "activation_function": Key(str, "gelu_new"),
            "layer_norm_epsilon": Key(_NUMBER, 1e-5),
            "scale_attn_weights": Key(bool, True),
            "tie_word_embeddings": Key(bool, True),
        },
        _read_gpt2,
        _write_gpt2,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {
            "vocab_size": Key(int),
            "hidden_size": Key(int),
            "intermediate_size": Key(int),
            "num_hidden_layers": Key(int),
            "num_attention_heads": Key(int),
            "hidden_act": Key(str, "gelu"),
            "max_position_embeddings": Key(int, 2048),
            "layer_norm_eps": Key(_NUMBER, 1e-5),
            "use_parallel_residual": Key(bool, True),
            "attention_bias": Key(bool, True),
            "tie_word_embeddings": Key(bool, False),
            "rotary_emb_base": Key(_NUMBER, 10000.0),
            "rotary_pct": Key(_NUMBER, 0.25),
            "rope_scaling": Key(dict, None, True),
            "rope_parameters": Key(dict, None, True),
        },
        _read_neox,
        _write_neox,
    ),
}
