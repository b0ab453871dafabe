"""`jaxllm bench dnd`: sampling speed beside the flattened model and an eager PyTorch loop.

All sides draw the same number of images of the same size, with a key/value cache, guidance off,
temperature 1, float32. Repeats are interleaved; the medians are compared. Before anything is timed
the PyTorch loop's logits are checked against ours on the same weights.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.decoding.code_stacks import CodeSampler, SamplingConfig
from jaxllm.errors import InputError
from jaxllm.models.code_model import code_model
from jaxllm.models.dnd import DnDConfig
from jaxllm.training.run_folder import versions

DEMO_SHAPE = dict(
    codebook_size=256,
    grid=(8, 8),
    depth=2,
    num_classes=13,
    layers=6,
    heads=4,
    dim=128,
    mlp_hidden=352,
    per_depth_embedding=True,
)


def bench_dnd(*, repeats: int, batches: Sequence[int], threads: int) -> dict[str, Any]:
    """Returns images per second of each side at each batch size and the ratios of the medians.

    Args:
      repeats: Timed repeats of each side, interleaved.
      batches: Numbers of images drawn at once.
      threads: Threads of the PyTorch side.
    """
    dnd = DnDConfig(**DEMO_SHAPE, head_layers=(3, 5))  # type: ignore[arg-type]
    configs = {
        "dnd": dnd,
        "flattened": DnDConfig(**DEMO_SHAPE, structure="flat"),  # type: ignore[arg-type]
    }
    params, torch_side, torch_version, error = random_params(dnd), None, None, None
    try:
        import torch

        from jaxllm.images.bench_torch import eager_sampler, largest_difference

        torch_side, torch_version = eager_sampler, torch.__version__
        error = largest_difference(params, dnd)
        if error > 1e-3:
            raise InputError(f"the PyTorch loop differs from ours by {error:.1e}; not timed")
    except ImportError:
        pass
    samplers = {name: CodeSampler(code_model(c).build) for name, c in configs.items()}
    rows = []
    for batch in batches:
        sides = {name: _ours(samplers[name], c, batch) for name, c in configs.items()}
        if torch_side is not None:
            sides["torch eager"] = torch_side(params, dnd, batch, threads)
        rows += _race(sides, repeats, batch)
    return {
        "sampling": rows,
        "repeats": repeats,
        "compilations per batch size": {
            name: sampler.traces / len(set(batches)) for name, sampler in samplers.items()
        },
        "largest logit difference to torch": error,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "threads of torch": threads,
        "load average": os.getloadavg()[0],
        "versions": {**versions(), **({"torch": torch_version} if torch_version else {})},
    }


def _race(sides: dict[str, Callable[[], None]], repeats: int, batch: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "batch": batch,
            "side": name,
            "images/s": batch / median[name],
            "seconds": median[name],
            "min": min(times),
            "max": max(times),
            "dnd is faster by": median[name] / median["dnd"],
        }
        for name, times in seconds.items()
    ]


def random_params(config: DnDConfig) -> Any:
    """Returns the float32 parameters that every side of a benchmark starts from."""
    params, _ = jax.jit(code_model(config).init)(jax.random.key(0))
    shape = params["head_out"].shape  # Zero heads would make every code equally likely.
    params["head_out"] = 0.05 * jax.random.normal(jax.random.key(1), shape)
    return params


def _ours(sampler: CodeSampler, config: DnDConfig, batch: int) -> Callable[[], None]:
    """Returns a function that draws one batch, already compiled."""
    params, classes = random_params(config), np.arange(batch) % config.num_classes
    setting = SamplingConfig(cfg_scale=(1.0,))
    seeds = iter(range(10**6))

    def run() -> None:
        jax.block_until_ready(sampler(params, {}, classes, jax.random.key(next(seeds)), setting))

    run()
    return run
