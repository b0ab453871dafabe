"""A DnD-Transformer for `jaxllm bench gpu`: its training step beside the same in PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.images.bench import random_params
from jaxllm.images.code_models import code_loss
from jaxllm.models.code_model import code_model
from jaxllm.models.dnd import DnDConfig
from jaxllm.planning.flops import TRAINING, code_model_flops
from jaxllm.training.bench import OPTIMIZER, Updates
from jaxllm.training.bench_gpu import Timed, Trained, time_updates
from jaxllm.training.optimizer import make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import make_step


def code_model_training(
    name: str,
    config: DnDConfig,
    images: int,
    device: str,
    threads: int,
    precision: str = "bfloat16",
) -> Trained:
    """Returns a code model of structure `dnd`, without dropout, to be trained on random codes.

    Args:
      name: For reports.
      config: Its shape.
      images: Grids of codes per step.
      device: PyTorch's name of the card.
      threads: Of PyTorch on a CPU.
      precision: Of the computation; float32 or bfloat16.
    """
    return Trained(
        f"{name}, {images} x {config.cells}",
        partial(_ours, config, images, precision),
        partial(_theirs, config, images, precision, device, threads),
        images * config.cells,
        TRAINING * code_model_flops(config, images),
    )


def _batch(config: DnDConfig, images: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(images)
    codes = rng.integers(0, config.codebook_size, (images, config.cells, config.depth))
    return {"codes": codes, "label": np.arange(images) % config.num_classes}


def _ours(config: DnDConfig, images: int, precision: str, repeats: int) -> Timed:
    blueprint = code_model(config, jnp.dtype(precision))
    optimizer = make_optimizer(OPTIMIZER, 1000)
    state = new_state(random_params(config), optimizer, ema=False)
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in _batch(config, images).items()}
    step = make_step(code_loss, blueprint.build, optimizer, OPTIMIZER)
    return time_updates(Updates(step, state, batch), repeats)


def _theirs(
    config: DnDConfig,
    images: int,
    precision: str,
    device: str,
    threads: int,
    repeats: int,
    compiled: bool,
) -> Timed:
    import torch

    from jaxllm.hub.bench_torch import claim
    from jaxllm.images.bench_train_torch import CodeLoss
    from jaxllm.training.bench_torch import TorchUpdates

    claim(device)
    torch.set_num_threads(threads)
    module: Any = CodeLoss(jax.device_get(random_params(config)), config).to(device)
    batch = _batch(config, images)
    inputs = [torch.from_numpy(batch[name]).to(device) for name in ("codes", "label")]
    half = precision == "bfloat16"
    return time_updates(TorchUpdates(module, inputs, half=half, compiled=compiled), repeats)
