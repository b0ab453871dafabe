"""Training steps on a GPU: utilisation of its peak, beside the same steps on PyTorch.

Parameters and optimiser are float32 and the computation is bfloat16 on every side, from the same
parameters, on one batch of random tokens. Each side runs alone, in a process of its own, since a
large model's state does not fit the card several times. Nothing is reported unless the losses of
the first updates agree within what bfloat16 explains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.evals.apart import OUR_SIDE, TORCH_SIDE, Runner, SideFailed, is_out_of_memory, run_apart
from jaxllm.evals.timing import Phases, medians
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.planning.cards import Card
from jaxllm.planning.flops import TRAINING, decoder_flops
from jaxllm.training.bench import CHECKED_UPDATES, compare_losses, our_step
from jaxllm.training.language_model import language_model_loss

LARGEST_ERROR = 0.02
"""Nats between the losses of two sides that both compute in bfloat16."""
COMPILED = "torch compiled"


@dataclass(frozen=True)
class Timed:
    """What a side did.

    Attributes:
      losses: Of its first updates, in nats.
      phases: Seconds of every update after those.
      first: Seconds of the very first update, compiling included.
    """

    losses: list[float]
    phases: list[Phases]
    first: float


@dataclass(frozen=True)
class Trained:
    """A model whose training step is timed.

    Attributes:
      name: For reports.
      ours: repeats -> what our side did; picklable, as `theirs` is.
      theirs: (repeats, compiled) -> what PyTorch did.
      positions: Of a step, over all rows.
      flops: Of a step by formula.
    """

    name: str
    ours: Callable[[int], Timed]
    theirs: Callable[[int, bool], Timed]
    positions: int
    flops: float


@dataclass
class Found:
    """Rows of the report, differences from the losses of our side, and sides without a row."""

    rows: list[dict[str, Any]]
    errors: dict[str, float]
    left_out: list[dict[str, Any]]


def bench_steps(
    models: Sequence[Trained], card: Card, repeats: int, run: Runner = run_apart
) -> Found:
    """Times the training steps of `models`, one side after the other.

    Args:
      models: What is trained.
      card: Its peak is what MFU is measured against.
      repeats: Timed updates of each side.
      run: Runs a side; in a process of its own by default.

    Raises:
      InputError: Losses differ.
      SideFailed: Our side failed, and not for want of memory.
    """
    found = Found([], {}, [])
    for model in models:
        sides: dict[str, Timed] = {}
        for side, call, environment in (
            ("jaxllm", partial(model.ours, repeats), OUR_SIDE),
            ("torch eager", partial(model.theirs, repeats, False), TORCH_SIDE),
            (COMPILED, partial(model.theirs, repeats, True), TORCH_SIDE),
        ):
            try:
                sides[side] = run(call, environment=environment)
            except SideFailed as error:
                if side == "jaxllm" and not is_out_of_memory(error):
                    raise
                found.left_out.append({"what": model.name, "side": side, "reason": str(error)})
                if side == "jaxllm":
                    break  # Nothing to compare the others with.
        if sides:
            errors = compare_losses(sides, LARGEST_ERROR)
            found.errors |= {f"{model.name} {side}": error for side, error in errors.items()}
            found.rows += _rows(model, sides, card)
    return found


def _rows(model: Trained, sides: dict[str, Timed], card: Card) -> list[dict[str, Any]]:
    median = {side: medians(timed.phases)["step"] for side, timed in sides.items()}
    return [
        {
            "model": model.name,
            "side": side,
            "ms per step": 1e3 * median[side],
            "fastest": 1e3 * min(phases["step"] for phases in timed.phases),
            "slowest": 1e3 * max(phases["step"] for phases in timed.phases),
            "positions/s": model.positions / median[side],
            "MFU": model.flops / (median[side] * card.peak_flops),
            "compile s": max(0.0, timed.first - median[side]),
            "jaxllm is faster by": median[side] / median["jaxllm"],
        }
        for side, timed in sides.items()
    ]


def time_updates(step: Any, repeats: int) -> Timed:
    """Runs `step`, one update that returns its seconds and keeps its loss, and times it."""
    first = step()["step"]
    for _ in range(CHECKED_UPDATES - 1):
        step()
    phases = [step() for _ in range(repeats)]
    return Timed(step.losses[:CHECKED_UPDATES], phases, first)


# -- a language model ----------------------------------------------------------------------------


def language_model(
    name: str,
    config: DecoderConfig,
    rows: int,
    length: int,
    device: str,
    threads: int,
    precision: str = "bfloat16",
) -> Trained:
    """Returns a Llama to be trained on `rows` rows of `length` tokens.

    Args:
      name: For reports.
      config: Its shape.
      rows: B.
      length: T.
      device: PyTorch's name of the card.
      threads: Of PyTorch on a CPU.
      precision: Of the computation; float32 or bfloat16.
    """
    shape = (config, rows, length, precision)
    return Trained(
        f"{name}, {rows} x {length}",
        partial(_our_language_model, *shape),
        partial(_their_language_model, *shape, device, threads),
        rows * length,
        TRAINING * decoder_flops(config, rows * length, length),
    )


def _ids(config: DecoderConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, config.vocab_size, (rows, length + 1))


def fresh_params(config: DecoderConfig) -> Any:
    """Returns the float32 parameters that every side starts from."""
    return jax.jit(decoder(config).init)(jax.random.key(0))[0]


def _our_language_model(
    config: DecoderConfig, rows: int, length: int, precision: str, repeats: int
) -> Timed:
    loss_fn, dtype = language_model_loss(packed=False), jnp.dtype(precision)
    ids = _ids(config, rows, length)
    return time_updates(our_step(config, fresh_params(config), ids, loss_fn, dtype), repeats)


def _their_language_model(
    config: DecoderConfig,
    rows: int,
    length: int,
    precision: str,
    device: str,
    threads: int,
    repeats: int,
    compiled: bool,
) -> Timed:
    from jaxllm.hub.bench_torch import claim, llama_model
    from jaxllm.training.bench_torch import TorchStep

    claim(device)
    model = llama_model(config, fresh_params(config), threads, device=device)
    ids = _ids(config, rows, length)
    half = precision == "bfloat16"
    return time_updates(TorchStep(model, ids, half=half, compiled=compiled), repeats)
