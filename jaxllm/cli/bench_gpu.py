"""`jaxllm bench gpu`: training steps and decoding on one NVIDIA card, as shares of its peaks.

Sides run one after the other, each in a process of its own, so that each has the whole memory of
the card; see `evals/apart.py`. The goals stand beside what is found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax

from jaxllm.errors import InputError
from jaxllm.evals.apart import Runner, run_apart
from jaxllm.evals.timing import machine
from jaxllm.images.bench_gpu import code_model_training
from jaxllm.kvcompress.bench_gpu import DecodeSetting, bench_decoding
from jaxllm.models.bench_shapes import DND_XL, LLAMA_1B
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.dnd import DnDConfig
from jaxllm.planning.cards import Card, find_card
from jaxllm.training.bench_gpu import CHECKED_UPDATES, COMPILED, Found, bench_steps, language_model
from jaxllm.training.run_folder import versions

MFU_GOAL = 0.45
RATIO_GOAL = 1.0
BANDWIDTH_GOAL = 0.7
PARTS = ("dnd", "llama", "decode")
DECODED_ROWS = (1, 8, 32, 128)
PROMPTS = (2048, 8192, 32768)


def bench_gpu(
    *,
    repeats: int,
    batches: Sequence[int],
    threads: int,
    parts: Sequence[str] | None = None,
    peak_tflops: float | None = None,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """Runs the parts on the card that JAX sees.

    Args:
      repeats: Timed steps of each side.
      batches: Rows of a step; none for each part's own.
      threads: Threads of PyTorch on the host.
      parts: Of `PARTS`; None for all.
      peak_tflops: Dense bfloat16 TFLOP/s of a card that is not known.
      bandwidth: TB/s of its memory.

    Raises:
      InputError: No GPU, an unknown card without its peaks, or sides that differ.
    """
    card = find_card(gpu_name(), peak_tflops, bandwidth)
    parts = PARTS if parts is None else parts
    training = Found([], {}, [])
    if "dnd" in parts or "llama" in parts:
        training = train(card, repeats, batches, threads, parts)
    decoding = Found([], {}, [])
    if "decode" in parts:
        points = tuple((rows, prompt) for rows in batches or DECODED_ROWS for prompt in PROMPTS)
        setting = DecodeSetting(LLAMA_1B, points, repeats)
        decoding = bench_decoding(setting, card, threads=threads)
    return report(card, repeats, training, decoding)


def gpu_name() -> str:
    """Returns what JAX calls the GPU, taking no memory of it.

    Raises:
      InputError: There is none.
    """
    # This process only looks: it must not take most of the memory, as JAX does by default.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise InputError(
            f"bench gpu needs an NVIDIA GPU; JAX sees only {device.platform} "
            '(extra: pip install "jaxllm[gpu]")'
        )
    return device.device_kind


def train(
    card: Card,
    repeats: int,
    batches: Sequence[int],
    threads: int,
    parts: Sequence[str],
    *,
    code_config: DnDConfig = DND_XL,
    text_config: DecoderConfig = LLAMA_1B,
    length: int = 2048,
    device: str = "cuda",
    precision: str = "bfloat16",
    run: Runner = run_apart,
) -> Found:
    """Times the training steps among `parts`: 64 images and 8 rows unless `batches` are given."""
    models = []
    if "dnd" in parts:
        models += [
            code_model_training("DnD-XL", code_config, batch, device, threads, precision)
            for batch in batches or (64,)
        ]
    if "llama" in parts:
        models += [
            language_model("Llama 1.1B", text_config, batch, length, device, threads, precision)
            for batch in batches or (8,)
        ]
    return bench_steps(models, card, repeats, run)


def report(card: Card, repeats: int, training: Found, decoding: Found) -> dict[str, Any]:
    """Returns the result: rows, goals beside what was found, and what was left out and why."""
    return {
        "training": training.rows,
        "decoding, Llama 1.1B": decoding.rows,
        "goals": training_goals(training.rows) + decoding_goals(decoding.rows),
        "left out": training.left_out + decoding.left_out,
        f"largest difference of the first {CHECKED_UPDATES} losses": training.errors,
        "differences of logits, of their root mean square": decoding.errors,
        "card": card.name,
        "peak TFLOP/s, TB/s": [card.peak_flops / 1e12, card.bandwidth / 1e12],
        "repeats": repeats,
        **machine(),
        "versions": versions("jax-cuda12-plugin", "torch", "transformers"),
    }


def training_goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per goal: what was wanted at least, the least found, and whether it is met."""
    ours = [row["MFU"] for row in rows if row["side"] == "jaxllm" and "Llama" in row["model"]]
    ratios = [row["jaxllm is faster by"] for row in rows if row["side"] == COMPILED]
    return [
        goal("MFU of the Llama's training step", MFU_GOAL, ours),
        goal("training steps beside torch compiled", RATIO_GOAL, ratios),
    ]


def decoding_goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `training_goals`, for full caches."""
    full = [row for row in rows if row["side"] == "jaxllm, full"]
    ratios = [row["times torch compiled"] for row in full if row["times torch compiled"]]
    shares = [row["share of bandwidth"] for row in full if row["batch"] == 1]
    return [
        goal("share of bandwidth in decoding, batch 1", BANDWIDTH_GOAL, shares),
        goal("decoding beside torch compiled", RATIO_GOAL, ratios),
    ]


def goal(name: str, least: float, found: Sequence[float]) -> dict[str, Any]:
    """Returns one goal's row; found and met are None where nothing was measured."""
    worst = min(found) if found else None
    return {
        "goal": name,
        "at least": least,
        "found": worst,
        "met": None if worst is None else worst >= least,
    }
