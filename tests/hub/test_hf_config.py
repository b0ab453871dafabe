"""config.json both ways: published models, refusals by name, and what no family can express."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hf_reference import CONFIGS
from published_configs import PUBLISHED

from jaxllm.errors import InputError
from jaxllm.hub.hf_config import config_from_hf, config_to_hf, read_config
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.norm import NormConfig
from jaxllm.nn.rope import RopeConfig


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(name):
    count, found = PUBLISHED[name]
    model_type, config = config_from_hf(found)
    assert decoder(config).parameter_count == count
    # What is written reads as the same model, and carries every number over.
    written_type, written = config_to_hf(config, model_type)
    assert written_type == model_type
    assert config_from_hf(written)[1].layer_windows == config.layer_windows
    for key in written.keys() & found.keys() - {"sliding_window", "max_window_layers"}:
        assert written[key] == found[key], key


def test_fields_of_a_config():
    config = config_from_hf(PUBLISHED["Llama-3.2-1B"][1])[1]
    assert config == DecoderConfig(
        vocab_size=128256,
        dim=2048,
        layers=16,
        attention=AttentionConfig(32, 8, 64),
        mlp=MlpConfig(8192),
        norm=NormConfig(eps=1e-5),
        rope=RopeConfig(500000.0, 1.0, "llama3", 32.0, 1.0, 4.0, 8192),
        max_positions=131072,
        tie_embeddings=True,
    )
    assert config_from_hf(PUBLISHED["Mistral-7B"][1])[1].windows == (4096,)
    gemma = config_from_hf(PUBLISHED["Gemma-2-2B"][1])[1]
    assert gemma.windows == (4096, None) and gemma.tie_embeddings and gemma.scale_embeddings
    assert gemma.attention.scale == 1 / 16 and gemma.attention.soft_cap == 50.0
    pythia = config_from_hf(PUBLISHED["Pythia-2.8B"][1])[1]
    assert pythia.rope == RopeConfig(fraction=0.25) and pythia.parallel_residual
    assert pythia.mlp == MlpConfig(10240, "gelu", gated=False, bias=True)


def test_rope_as_transformers_5_writes_it():
    found = {key: x for key, x in CONFIGS["llama"].items() if not key.startswith("rope_")}
    parameters = CONFIGS["llama"]["rope_scaling"] | {"rope_theta": 10000.0}
    assert config_from_hf(found | {"rope_parameters": parameters}) == config_from_hf(
        CONFIGS["llama"]
    )
    neox = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = config_from_hf(CONFIGS["gpt_neox"] | {"rope_parameters": neox})[1]
    assert config.rope == RopeConfig(500.0, 0.5)


def test_windows_of_qwen():
    base = CONFIGS["qwen2"] | {"num_hidden_layers": 4}
    assert config_from_hf(base)[1].layer_windows == (None, 4, 4, 4)
    assert config_from_hf(base | {"use_sliding_window": False})[1].windows == (None,)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert config_from_hf(base | {"layer_types": kinds})[1].windows == (None, 4)


REFUSED = [
    ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope type 'yarn' is not"),
    ("llama", dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope type 'dynamic' is not"),
    ("llama", dict(rope_scaling={"rope_type": "linear"}), "rope type 'linear' needs factor"),
    ("llama", dict(rope_scaling={"rope_type": ["linear"]}), "rope type ['linear'] is not one of"),
    (
        "llama",
        dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "mscale": 1.0}),
        "has an unknown setting 'mscale'",
    ),
    ("llama", dict(rope_theta="10000"), "rope_theta is '10000', expected int or float"),
    ("llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
    ("llama", dict(hidden_act="quick_gelu"), "hidden_act 'quick_gelu' is not one of silu"),
    (
        "llama",
        dict(quantization_config={"bits": 4}),
        "quantization_config {'bits': 4} is not",
    ),
    ("llama", dict(num_local_experts=8), "num_local_experts 8 is not known of llama models"),
    ("llama", dict(sliding_window=512), "sliding_window 512 is not known of llama models"),
    ("llama", dict(num_key_value_heads=3), "heads 4 is not a multiple of kv_heads 3"),
    ("llama", dict(hidden_size=None), "hidden_size is missing"),
    ("llama", dict(hidden_size=32.0), "hidden_size is 32.0, expected int"),
    ("llama", dict(num_hidden_layers=True), "num_hidden_layers is True, expected int"),
    ("llama", dict(model_type="mixtral"), "model_type 'mixtral' is not one of llama, mistral"),
    ("mistral", dict(attention_bias=True), "attention_bias True is not known of mistral"),
    ("qwen2", dict(layer_types=["full_attention"]), "1 layer_types for 3 layers"),
    ("qwen2", dict(layer_types=["chunked_attention"] * 3), "layer_types has 'chunked_attention'"),
    ("qwen2", dict(layer_types=[[]] * 3), "layer_types has [], not one of sliding_attention"),
    (
        "qwen3",
        dict(layer_types=["sliding_attention"] * 3),
        "'sliding_attention' without a sliding_window",
    ),
    ("gemma2", dict(hidden_act="relu"), "hidden_act 'relu' is not supported"),
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention True is not"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights False is not supported"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention True is not known of gpt2"),
    ("gpt2", dict(n_head=5), "n_embd 32 is not a multiple of n_head 5"),
    ("gpt_neox", dict(rotary_pct=0.1), "rotates 1 of 16 head dims"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(family, changes, message):
    with pytest.raises(InputError) as error:
        config_from_hf(CONFIGS[family] | changes)
    assert message in str(error.value)


def test_keys_that_are_off_or_say_nothing_are_taken():
    more = dict(quantization_config=None, is_moe=False, attention_dropout=0.1, max_length=20)
    assert config_from_hf(CONFIGS["llama"] | more) == config_from_hf(CONFIGS["llama"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "expected a JSON file"), ("[]", "holds a list"), ("{}", "None")],
)
def test_unreadable_config_files(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


# -- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_writes_what_it_read(family):
    model_type, config = config_from_hf(CONFIGS[family])
    assert model_type == family
    written_type, written = config_to_hf(config, family)
    assert written_type == family and json.loads(json.dumps(written)) == written
    back = config_from_hf(written)[1]
    assert back.layer_windows == config.layer_windows
    assert dataclasses.replace(back, windows=config.windows) == config


def test_the_family_is_found_by_what_it_expresses():
    for family in CONFIGS:
        found, _ = config_to_hf(config_from_hf(CONFIGS[family])[1])
        assert found == family
    plain = dataclasses.replace(config_from_hf(CONFIGS["mistral"])[1], windows=(None,))
    assert config_to_hf(plain)[0] == "llama" and config_to_hf(plain, "mistral")[0] == "mistral"
    # Settings of a run are no part of the model.
    config_to_hf(dataclasses.replace(plain, dropout=0.1, remat="full", init_std=0.01))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", dict(parallel_residual=True), "llama has no parallel_residual = True"),
        ("llama", dict(norm=NormConfig("layer")), "llama has no norm.kind = 'layer'"),
        ("llama", dict(rope=RopeConfig(fraction=0.5)), "llama has no rope.fraction = 0.5"),
        ("gpt2", dict(windows=(4,)), "gpt2 has no windows ="),
        ("qwen2", dict(windows=(3, 4, None)), "qwen2 has no windows ="),
    ],
)
def test_what_no_family_has_is_refused(family, changes, message):
    config = dataclasses.replace(config_from_hf(CONFIGS[family])[1], **changes)
    with pytest.raises(InputError) as error:
        config_to_hf(config, family)
    assert message in str(error.value)
