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


def llama_model(
    config: DecoderConfig,
    params: Any,
    threads: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Returns the transformers model that holds `params`.

    Args:
      config: Its shape.
      params: Of our model.
      threads: Of PyTorch on a CPU.
      device: Where it is to live.
      dtype: Of its parameters.
    """
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
    for parameter in model.parameters():  # Not the rotary angles, which stay float32.
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval()


@torch.inference_mode()
def prompt_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Returns float32 logits [B, T, V] of whole sequences."""
    logits = model(torch.from_numpy(ids).to(model.device), use_cache=False).logits
    return logits.float().cpu().numpy()


def claim(device: str) -> None:
    """Fails at once, before models are made, where PyTorch cannot use a device."""
    torch.zeros((), device=device)


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
