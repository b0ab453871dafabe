"""A Llama of transformers on PyTorch that holds given parameters: what benchmarks time ours beside.

Only benchmarks import this file; the library itself needs neither package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from jaxllm.hub.hf_config import config_to_hf
from jaxllm.hub.hf_tensors import tensor_table
from jaxllm.hub.layouts import model_slots, save_tensors
from jaxllm.models.decoder import DecoderConfig, decoder


def llama_model(config: DecoderConfig, params: Any, threads: int) -> Any:
    """Returns the transformers model that holds `params`, in float32."""
    torch.set_num_threads(threads)
    model_type, settings = config_to_hf(config, "llama")
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{k: v for k, v in settings.items() if k != "architectures"}),
        attn_implementation="sdpa",
    )
    slots = model_slots(tensor_table(model_type, config).rules, decoder(config))
    tensors = save_tensors(slots, params, {})
    weights = {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


@torch.inference_mode()
def prompt_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Returns float32 logits [B, T, V] of whole sequences."""
    return model(torch.from_numpy(ids), use_cache=False).logits.numpy()
