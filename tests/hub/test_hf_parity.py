"""Logits of transformers and of this library on the same folders, both ways.

Needs torch and transformers; `test_hf_folder.py` compares with stored logits where they are absent.
"""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hf_reference import CONFIGS, logits, tokens, torch_logits, torch_model  # noqa: E402
from published_configs import PUBLISHED  # noqa: E402

from jaxllm.cli.main import main  # noqa: E402
from jaxllm.data.text_tokenizers import train_bpe  # noqa: E402
from jaxllm.hub.hf_config import config_from_hf  # noqa: E402
from jaxllm.hub.hf_folder import load_decoder, save_decoder  # noqa: E402
from jaxllm.hub.hf_tensors import tensor_table  # noqa: E402
from jaxllm.hub.layouts import model_slots  # noqa: E402
from jaxllm.models.decoder import decoder  # noqa: E402
from jaxllm.training.finished_run import write_finished_run  # noqa: E402
from jaxllm.training.language_model import (  # noqa: E402
    JOB,
    LanguageModelRun,
    model_identity,
)

EIGHT = {"num_attention_heads": 8, "head_dim": 4, "num_hidden_layers": 2}
LINEAR = {"rope_type": "linear", "factor": 2.5}
CASES = [
    *((family, {}) for family in CONFIGS),
    # Query heads per key/value head: 1, 2, 4, 8.
    *(
        (family, EIGHT | {"num_key_value_heads": kv_heads, "tie_word_embeddings": kv_heads > 2})
        for family, counts in (("llama", (8, 4, 2, 1)), ("qwen3", (8, 1)), ("qwen2", (8, 2)))
        for kv_heads in counts
    ),
    ("llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 101}),
    ("llama", {"rope_scaling": LINEAR, "hidden_act": "gelu"}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    ("gpt2", {"n_inner": 20, "activation_function": "relu", "vocab_size": 50}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0}),
    ("gpt_neox", {"tie_word_embeddings": True, "rope_scaling": LINEAR}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_logits_equal_both_ways(family, changes, tmp_path):
    """Rows padded left, padded right and full; import, then export and load there."""
    settings = CONFIGS[family] | changes
    reference = torch_model(settings)
    reference.save_pretrained(tmp_path / "in")
    ids = tokens(settings["vocab_size"])
    expected = torch_logits(reference, ids)
    config, blueprint, params = load_decoder(tmp_path / "in")
    np.testing.assert_allclose(logits(blueprint, params, ids), expected, atol=1e-4)
    save_decoder(tmp_path / "out", config, params, source=tmp_path / "in")
    assert (tmp_path / "out/generation_config.json").is_file()
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert type(again) is type(reference)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(torch_logits(again, ids), expected, atol=1e-4)


def test_several_files_are_read_by_both(tmp_path):
    reference = torch_model(CONFIGS["llama"])
    reference.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in/model.safetensors.index.json").is_file()
    config, _, params = load_decoder(tmp_path / "in")
    save_decoder(tmp_path / "out", config, params, max_file_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_trained_run_is_exported_with_its_tokenizer(tmp_path, capsys):
    """`jaxllm convert RUN --to hf DIR`: text in, the same ids and logits in transformers."""
    text = "Once upon a time there was a tokenizer of its own. " * 3
    tokenizer = train_bpe([text], 300)
    config = config_from_hf(CONFIGS["llama"] | {"model_type": "llama", "vocab_size": 320})[1]
    blueprint = decoder(config)
    params, _ = blueprint.init(jax.random.key(0))
    write_finished_run(
        tmp_path / "run",
        job=JOB,
        config=LanguageModelRun(config),
        identity=model_identity(config, tokenizer),
        params=params,
        extra={},
        files=tokenizer.files,
    )
    assert main(["convert", f"{tmp_path}/run", "--to", "hf", f"{tmp_path}/hf"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer.encode(text, bos=tokenizer.adds_bos)
    assert theirs(text).input_ids == ids and theirs.eos_token_id == tokenizer.eos
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    assert again.config.eos_token_id == tokenizer.eos
    ids = tokens(config.vocab_size)
    np.testing.assert_allclose(
        torch_logits(again, ids), logits(blueprint, params, ids), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_published_models(name):
    """The tensors of the full-size model, without its weights."""
    count, found = PUBLISHED[name]
    model_type, config = config_from_hf(found)
    settings = copy.deepcopy({key: x for key, x in found.items() if key != "model_type"})
    parsed = transformers.AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(parsed)
    expected = {key: tuple(x.shape) for key, x in reference.named_parameters()}
    if "embed_out.weight" not in expected and model_type == "gpt_neox":
        # Transformers 5 renames it in memory, not in files.
        expected["embed_out.weight"] = expected.pop("lm_head.weight")
    assert sum(parameter.numel() for parameter in reference.parameters()) == count
    slots = model_slots(tensor_table(model_type, config).rules, decoder(config))
    assert {slot.name: slot.torch_shape for slot in slots} == expected
