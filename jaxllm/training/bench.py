"""`jaxllm bench train`: a training step beside the same step in transformers on PyTorch.

Forward pass, loss over the whole vocabulary, backward pass, clipping and AdamW, all in float32, on
one batch of random tokens and from the same parameters. The losses of the first updates are
compared before anything is timed. A third side is ours with the vocabulary loss in the plain way,
all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.evals.timing import Phases, first_runs, machine, medians, seconds_of, take_turns
from jaxllm.models.bench_shapes import SHAPES
from jaxllm.models.decoder import Decoder, DecoderConfig, decoder
from jaxllm.training.language_model import language_model_loss
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.run_folder import versions
from jaxllm.training.state import new_state
from jaxllm.training.step import Batch, LossFn, Metrics, make_step

Tree = Any
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0)
_CHECKED_UPDATES = 3
_COMPILED = "torch compiled"
_LARGEST_ERROR = 1e-3


def bench_train(
    *,
    repeats: int,
    batches: Sequence[int],
    threads: int,
    config: DecoderConfig = SHAPES["24M"],
    length: int = 256,
    compiled_torch: bool = True,
) -> dict[str, Any]:
    """Returns seconds per step of each side and the ratios of the medians.

    Args:
      repeats: Timed steps of each side, taking turns.
      batches: Rows per step.
      threads: Threads of the PyTorch side.
      config: The model.
      length: Tokens per row, T.
      compiled_torch: Also time `torch.compile`.

    Raises:
      InputError: The losses of the first updates differ.
    """
    params, _ = jax.jit(decoder(config, jnp.float32).init)(jax.random.key(0))
    rows: list[dict[str, Any]] = []
    errors: dict[str, float] = {}
    for batch in batches:
        ids = np.random.default_rng(batch).integers(0, config.vocab_size, (batch, length + 1))
        sides: dict[str, Any] = {
            "jaxllm": OurStep(config, params, ids, language_model_loss(packed=False)),
            "jaxllm, all logits at once": OurStep(config, params, ids, _full_loss),
        }
        sides |= _torch_sides(config, params, ids, threads, compiled_torch)
        first = first_runs(sides, optional=(_COMPILED,))
        for _ in range(_CHECKED_UPDATES - 1):
            for step in sides.values():
                step()
        for name, error in compare_losses(sides).items():
            errors[name] = max(error, errors.get(name, 0.0))
        rows += _rows(batch, batch * length, take_turns(sides, repeats), first)
    return {
        "training": rows,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens per row": length,
        "repeats": repeats,
        f"largest difference of the first {_CHECKED_UPDATES} losses": errors,
        "threads of torch": threads,
        **machine(),
        "versions": versions("torch", "transformers"),
    }


def compare_losses(sides: dict[str, Any]) -> dict[str, float]:
    """Returns each other side's largest difference from the losses of `jaxllm`.

    Raises:
      InputError: One is more than float32 rounding explains, so that timing would mean nothing.
    """
    ours, errors = np.asarray(sides["jaxllm"].losses), {}
    for name, step in sides.items():
        error = float(np.abs(np.asarray(step.losses) - ours).max())
        if not error < _LARGEST_ERROR:
            raise InputError(f"{name}: losses {step.losses} differ from {ours}; not timed")
        if name != "jaxllm":
            errors[name] = error
    return errors


def _rows(
    batch: int, tokens: int, found: dict[str, list[Phases]], first: dict[str, float]
) -> list[dict[str, Any]]:
    median = {side: medians(runs)["step"] for side, runs in found.items()}
    return [
        {
            "batch": batch,
            "side": side,
            "ms per step": 1e3 * median[side],
            "fastest": 1e3 * min(run["step"] for run in runs),
            "slowest": 1e3 * max(run["step"] for run in runs),
            "tokens/s": tokens / median[side],
            "compile s": max(0.0, first[side] - median[side]),
            "jaxllm is faster by": median[side] / median["jaxllm"],
        }
        for side, runs in found.items()
    ]


class OurStep:
    """One training step after the other, through the functions that a training run uses."""

    def __init__(self, config: DecoderConfig, params: Tree, ids: np.ndarray, loss_fn: LossFn):
        optimizer = make_optimizer(OPTIMIZER, 1000)
        blueprint = decoder(config, jnp.float32)
        self.state = new_state(jax.tree.map(jnp.array, params), optimizer, ema=False)
        step = make_step(loss_fn, blueprint.build, optimizer, OPTIMIZER)
        self.step = jax.jit(step, donate_argnums=(0,))
        self.batch: Batch = {
            "tokens": jnp.asarray(ids[:, :-1], jnp.int32),
            "targets": jnp.asarray(ids[:, 1:], jnp.int32),
            "weights": jnp.ones((len(ids), ids.shape[1] - 1), jnp.float32),
        }
        self.losses: list[float] = []

    def __call__(self) -> Phases:
        """Updates once and returns the seconds it took."""
        metrics: Metrics = {}

        def run() -> None:
            nonlocal metrics
            self.state, metrics = self.step(self.state, self.batch, jax.random.key(0))
            jax.block_until_ready(self.state)

        seconds = seconds_of(run)
        self.losses.append(float(metrics["loss"]))
        return {"step": seconds}


def _full_loss(model: Decoder, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
    """The loss as it is usually written: float32 logits [B, T, V] and their log-softmax."""
    log_probs = jax.nn.log_softmax(model.logits(model.hidden(batch["tokens"])))
    picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    return -jnp.mean(picked), {}


def _torch_sides(
    config: DecoderConfig, params: Tree, ids: np.ndarray, threads: int, compiled: bool
) -> dict[str, Callable[[], Phases]]:
    """Returns the sides in torch; none where that or transformers is not installed."""
    try:
        from jaxllm.hub.bench_torch import llama_model
        from jaxllm.training.bench_torch import TorchStep
    except ImportError:
        return {}
    sides: dict[str, Any] = {"torch eager": TorchStep(llama_model(config, params, threads), ids)}
    if compiled:
        model = llama_model(config, params, threads)
        sides[_COMPILED] = TorchStep(model, ids, compiled=True)
    return sides
