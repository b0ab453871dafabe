"""Tiny models of every Hugging Face family: configs, weights from a formula, golden logits.

`python tests/hub/hf_reference.py` writes the golden files with transformers; tests that have no
transformers compare with them. Weights are a function of a tensor's name and shape, so that only
logits need to be stored.
"""

from __future__ import annotations

import copy
import json
import sys
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"

_SMALL = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# One model per family, each with what sets the family apart.
CONFIGS: dict[str, dict] = {
    "llama": _SMALL | {"model_type": "llama", "rope_scaling": LLAMA3_SCALING},
    "mistral": _SMALL | {"model_type": "mistral", "sliding_window": 4, "head_dim": 12},
    "qwen2": _SMALL
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": _SMALL | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": _SMALL
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 37,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 24,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": 37,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rotary_pct": 0.25,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}

# Rows: padded on the left, padded on the right, full.
LENGTH = 11
MASK = np.stack([np.arange(LENGTH) >= 4, np.arange(LENGTH) < 8, np.ones(LENGTH, bool)])


def tokens(vocab_size: int) -> np.ndarray:
    """Returns token ids [3, T]; where `MASK` is false they are ids as good as any."""
    return np.random.default_rng(5).integers(0, vocab_size, MASK.shape).astype(np.int32)


def positions() -> np.ndarray:
    """Returns the positions [3, T] of real tokens, -1 elsewhere."""
    return np.where(MASK, np.cumsum(MASK, axis=1) - 1, -1).astype(np.int32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 tensor of that name: norms near 1 (or 0), the rest of unit gain."""
    uniform = 2 * np.random.default_rng(zlib.crc32(name.encode())).random(shape) - 1
    if "norm" in name or ".ln_" in name:
        return (0.3 * uniform + (1.0 if name.endswith("weight") else 0.0)).astype(np.float32)
    fan_in = shape[-1] if len(shape) > 1 else 8
    return (uniform * np.sqrt(3.0 / fan_in)).astype(np.float32)


def write_folder(folder: Path, config: dict, dtype=np.float32, **changes: np.ndarray) -> dict:
    """Writes config.json and model.safetensors with weights by `weight`; returns the tensors.

    `changes` replaces tensors by name, None drops one.
    """
    from safetensors.numpy import save_file

    from jaxllm.hub.hf_config import config_from_hf
    from jaxllm.hub.hf_tensors import tensor_table
    from jaxllm.hub.layouts import model_slots
    from jaxllm.models.decoder import decoder

    model_type, parsed = config_from_hf(config)
    slots = model_slots(tensor_table(model_type, parsed).rules, decoder(parsed))
    tensors = {slot.name: weight(slot.name, slot.torch_shape).astype(dtype) for slot in slots}
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def torch_model(config: dict):
    """Returns the transformers model of a config with weights by `weight`, float32, on the CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # A copy, because transformers writes into nested settings.
    settings = copy.deepcopy({name: x for name, x in config.items() if name != "model_type"})
    parsed = AutoConfig.for_model(config["model_type"], **settings)
    model = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if config["model_type"] == "gpt_neox":  # Its name in files, whatever it is in memory.
                name = name.replace("lm_head", "embed_out")
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model.float().eval()


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    """Returns float32 logits [real tokens, V] of `ids` under `MASK` and `positions`."""
    import torch

    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(MASK).long(),
            position_ids=torch.from_numpy(np.maximum(positions(), 0)).long(),
        )
    return found.logits.float().numpy()[MASK]


def logits(blueprint, params, ids: np.ndarray) -> np.ndarray:
    """Returns the same of a model of this library."""
    import jax

    def run(params):
        model = blueprint.build(params, {})
        return model.logits(model.hidden(ids, positions()))

    return np.asarray(jax.jit(run)(params))[MASK]


def main() -> int:
    GOLDEN.mkdir(exist_ok=True)
    for family, config in CONFIGS.items():
        found = torch_logits(torch_model(config), tokens(config["vocab_size"]))
        np.savez_compressed(GOLDEN / f"hf_{family}.npz", config=json.dumps(config), logits=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
