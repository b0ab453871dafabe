"""`jaxllm bench decode`: greedy decoding beside transformers on PyTorch, same weights, float32.

Two Llama-shaped models with random weights: 24M parameters (288 wide, 6 layers) and 134M (768
wide, 12 layers). Each side runs a prompt (prefill) and then draws the most likely token again and
again with a key/value cache. The logits of the prompt are compared before anything is timed; sides
take turns and the medians of their phases are compared. Compiling is timed apart. `plain jax` is a
loop with no features; see `bench_plain.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decoding.bench_plain import PlainSide
from jaxllm.decoding.language_model import LanguageModel
from jaxllm.decoding.text import TextSampler, TextSampling, row_keys
from jaxllm.errors import InputError
from jaxllm.evals.timing import Phases, first_runs, machine, medians, seconds_of, take_turns
from jaxllm.models.bench_shapes import SHAPES
from jaxllm.models.decoder import Decoder, DecoderConfig, decoder
from jaxllm.nn.module import Blueprint
from jaxllm.training.run_folder import versions

Tree = Any
_LARGEST_ERROR = 1e-3
_TORCH, _COMPILED = "torch eager", "torch compiled"


def bench_decode(
    *,
    repeats: int,
    batches: Sequence[int],
    threads: int,
    shapes: Mapping[str, DecoderConfig] = SHAPES,
    prompt: int = 128,
    new_tokens: int = 64,
    compiled_torch: bool = True,
) -> dict[str, Any]:
    """Returns seconds of prefill and tokens per second of decoding of each side, and the ratios.

    Args:
      repeats: Timed repeats of each side, taking turns.
      batches: Rows decoded at once.
      threads: Threads of the PyTorch side.
      shapes: Models by name.
      prompt: Tokens of each prompt.
      new_tokens: Tokens drawn per row.
      compiled_torch: Also time `torch.compile` with a static cache.

    Raises:
      InputError: The two sides' logits differ.
    """
    rows, errors, traces, agree = [], {}, {}, {}
    for name, config in shapes.items():
        blueprint = decoder(config, jnp.float32)
        params, _ = jax.jit(blueprint.init)(jax.random.key(0))
        sampler = LanguageModel(name, config, blueprint, params, None, ()).sampler()
        torch_model = _torch_model(config, params, threads)
        if torch_model is not None:
            errors[name] = _largest_difference(blueprint, params, torch_model, prompt)
        for batch in batches:
            ids = np.random.default_rng(batch).integers(0, config.vocab_size, (batch, prompt))
            ours = OurSide(sampler, params, ids, new_tokens)
            plain = PlainSide(config, blueprint, params, ids, new_tokens)
            sides: dict[str, Any] = {"jaxllm": ours, "plain jax": plain}
            if torch_model is not None:
                sides |= _torch_sides(torch_model, ids, new_tokens, compiled_torch)
            first = first_runs(sides, optional=(_COMPILED,))
            for run in sides.values():
                run()
            found = take_turns(sides, repeats)
            rows += _rows(name, batch, batch * new_tokens, found, first)
            for other in ("plain jax", _TORCH):
                if other in sides:
                    same = np.asarray(ours.tokens) == np.asarray(sides[other].tokens)
                    share = float(np.cumprod(same, axis=1).mean())
                    agree[f"{name} batch {batch} {other}"] = share
        traces[name] = sampler.traces / len(set(batches))
    return {
        "decoding": rows,
        "prompt tokens": prompt,
        "new tokens": new_tokens,
        "repeats": repeats,
        "traces of the decode loop per batch size": traces,
        "largest logit difference to transformers": errors or None,
        "share of tokens before the first that differs from ours": agree,
        "threads of torch": threads,
        **machine(),
        "versions": versions("torch", "transformers"),
    }


def _rows(
    model: str, batch: int, tokens: int, found: dict[str, list[Phases]], first: dict[str, float]
) -> list[dict[str, Any]]:
    """One line per side; the last two columns say how many times as long as jaxllm it takes."""
    median = {side: medians(runs) for side, runs in found.items()}
    ours = median["jaxllm"]
    rows = []
    for side, phases in median.items():
        times = [run["decode"] for run in found[side]]
        rows.append(
            {
                "model": model,
                "batch": batch,
                "side": side,
                "prefill ms": 1e3 * phases["prefill"],
                "decode tokens/s": tokens / phases["decode"],
                "slowest": tokens / max(times),
                "fastest": tokens / min(times),
                "compile s": max(0.0, first[side] - sum(phases.values())),
                "prefill: jaxllm is faster by": phases["prefill"] / ours["prefill"],
                "decode: jaxllm is faster by": phases["decode"] / ours["decode"],
            }
        )
    return rows


class OurSide:
    """Greedy decoding through the same class that `jaxllm generate` uses."""

    def __init__(self, sampler: TextSampler, params: Tree, ids: np.ndarray, new_tokens: int):
        self.sampler, self.params, self.ids = sampler, params, ids.tolist()
        self.sampling = TextSampling(max_new_tokens=new_tokens, temperature=0.0)
        self.keys = row_keys(0, range(len(ids)))
        self.layers = sampler.layers(params, {})
        self.tokens = jnp.zeros(())

    def __call__(self) -> Phases:
        """Runs both phases and returns their seconds."""
        state: Any = None

        def prefill() -> None:
            nonlocal state
            state = self.sampler.prefill(
                self.params,
                {},
                self.ids,
                self.keys,
                max_new_tokens=self.sampling.max_new_tokens,
                layers=self.layers,
            )
            jax.block_until_ready(state)

        def decode() -> None:
            nonlocal state
            parts, count = [], 0
            while count < self.sampling.max_new_tokens:
                state, drawn = self.sampler.decode(
                    self.params, {}, state, self.sampling, self.layers
                )
                parts.append(drawn.tokens)
                count += drawn.tokens.shape[1]
            tokens = jnp.concatenate(parts, axis=1)[:, : self.sampling.max_new_tokens]
            self.tokens = jax.block_until_ready(tokens)

        return {"prefill": seconds_of(prefill), "decode": seconds_of(decode)}


def _torch_model(config: DecoderConfig, params: Tree, threads: int) -> Any:
    """Returns the same model in transformers, or None where that or torch is not installed."""
    try:
        from jaxllm.hub.bench_torch import llama_model
    except ImportError:
        return None
    return llama_model(config, params, threads)


def _torch_sides(
    model: Any, ids: np.ndarray, new_tokens: int, compiled: bool
) -> dict[str, Callable[[], Phases]]:
    from jaxllm.decoding.bench_torch import CompiledSide, EagerSide

    sides: dict[str, Any] = {_TORCH: EagerSide(model, ids, new_tokens)}
    if compiled:
        sides[_COMPILED] = CompiledSide(model, ids, new_tokens)
    return sides


def _largest_difference(
    blueprint: Blueprint[Decoder], params: Tree, torch_model: Any, prompt: int
) -> float:
    """Returns the largest absolute difference of the logits of one prompt.

    Raises:
      InputError: It is more than float32 rounding explains, so that timing would mean nothing.
    """
    from jaxllm.hub.bench_torch import prompt_logits

    vocabulary = torch_model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, prompt))

    @jax.jit
    def ours(params: Tree, tokens: jax.Array) -> jax.Array:
        model = blueprint.build(params, {})
        return model.logits(model.hidden(tokens))

    error = float(np.abs(np.asarray(ours(params, ids)) - prompt_logits(torch_model, ids)).max())
    if not error < _LARGEST_ERROR:
        raise InputError(f"logits differ from transformers by {error:.1e}; not timed")
    return error
