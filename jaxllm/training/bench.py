"""`jaxllm bench train`: a training step beside the same step in transformers on PyTorch.

Forward pass, loss over the whole vocabulary, backward pass, clipping and AdamW, all in float32, on
one batch of random tokens and from the same parameters. The losses of the first updates are
compared before anything is timed. A third side is ours with the vocabulary loss in the plain way,
all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from jaxllm.training.state import TrainState, new_state
from jaxllm.training.step import Batch, LossFn, Metrics, StepFn, make_step

Tree = Any
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0)
CHECKED_UPDATES = 3
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
            "jaxllm": our_step(config, params, ids, language_model_loss(packed=False)),
            "jaxllm, all logits at once": our_step(config, params, ids, _full_loss),
        }
        sides |= _torch_sides(config, params, ids, threads, compiled_torch)
        found, differences = race(sides, repeats, "tokens", batch * length, optional=(_COMPILED,))
        rows += [{"batch": batch, **row} for row in found]
        errors = larger(errors, differences)
    return {
        "training": rows,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens per row": length,
        "repeats": repeats,
        f"largest difference of the first {CHECKED_UPDATES} losses": errors,
        "threads of torch": threads,
        **machine(),
        "versions": versions("torch", "transformers"),
    }


def race(
    sides: dict[str, Any],
    repeats: int,
    unit: str,
    amount: int,
    optional: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Compares the losses of the first updates of all sides, then times updates in turns.

    Args:
      sides: Name -> one update, which returns its seconds as `step` and appends to `losses`; one
        of them is `jaxllm`. Optional sides that do not run are removed.
      repeats: Timed updates of each side.
      unit: What an update takes, for the name of its rate.
      amount: How many of them.
      optional: Sides that may fail to start.

    Returns:
      A row per side, and each other side's largest difference from the losses of `jaxllm`.

    Raises:
      InputError: Losses differ.
    """
    first = first_runs(sides, optional=optional)
    for _ in range(CHECKED_UPDATES - 1):
        for step in sides.values():
            step()
    errors = compare_losses(sides)
    found = take_turns(sides, repeats)
    median = {side: medians(runs)["step"] for side, runs in found.items()}
    rows = [
        {
            "side": side,
            "ms per step": 1e3 * median[side],
            "fastest": 1e3 * min(run["step"] for run in runs),
            "slowest": 1e3 * max(run["step"] for run in runs),
            f"{unit}/s": amount / median[side],
            "compile s": max(0.0, first[side] - median[side]),
            "jaxllm is faster by": median[side] / median["jaxllm"],
        }
        for side, runs in found.items()
    ]
    return rows, errors


def larger(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Returns the larger value of every name."""
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in one | other}


def compare_losses(
    sides: Mapping[str, Any], largest_error: float = _LARGEST_ERROR
) -> dict[str, float]:
    """Returns each other side's largest difference from the losses of `jaxllm`, in nats.

    Args:
      sides: Name -> anything with `losses`.
      largest_error: What rounding explains.

    Raises:
      InputError: One is more than that, so that timing would mean nothing.
    """
    ours, errors = np.asarray(sides["jaxllm"].losses), {}
    for name, step in sides.items():
        error = float(np.abs(np.asarray(step.losses) - ours).max())
        if not error < largest_error:
            raise InputError(f"{name}: losses {step.losses} differ from {ours}; not timed")
        if name != "jaxllm":
            errors[name] = error
    return errors


class Updates:
    """One update after the other of a state on one batch; a side of `race`."""

    def __init__(self, step: StepFn, state: TrainState, batch: Batch):
        self.step, self.state, self.batch = jax.jit(step, donate_argnums=(0,)), state, batch
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


def our_step(
    config: DecoderConfig,
    params: Tree,
    ids: np.ndarray,
    loss_fn: LossFn,
    dtype: Any = jnp.float32,
) -> Updates:
    """Returns training steps, computing in `dtype`, through the functions of a training run."""
    optimizer = make_optimizer(OPTIMIZER, 1000)
    blueprint = decoder(config, dtype)
    state = new_state(jax.tree.map(jnp.array, params), optimizer, ema=False)
    batch = {
        "tokens": jnp.asarray(ids[:, :-1], jnp.int32),
        "targets": jnp.asarray(ids[:, 1:], jnp.int32),
        "weights": jnp.ones((len(ids), ids.shape[1] - 1), jnp.float32),
    }
    return Updates(make_step(loss_fn, blueprint.build, optimizer, OPTIMIZER), state, batch)


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
