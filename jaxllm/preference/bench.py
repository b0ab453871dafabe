"""`jaxllm bench preference`: a DPO step beside the same step in transformers on PyTorch.

Policy and frozen reference score chosen and rejected completions, then come backward pass, clipping
and AdamW, all in float32, on one batch of random tokens and from the same parameters. The losses of
the first updates are compared before anything is timed. Further sides are ours with each prompt
held once, ours with the reference's log-probs computed before the first step, and, where TRL is
installed, a step of its DPOTrainer. What the log-probs take of memory is read off the compiled
programs, beside all logits at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.evals.timing import Phases, machine
from jaxllm.models.bench_shapes import SHAPES
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.vocabulary import token_log_probs, vocabulary_logits
from jaxllm.preference.config import FrozenReference, PrecomputedReference
from jaxllm.preference.log_probs import SlotScores, SlotShape, row_hidden, slot_scores
from jaxllm.preference.pairwise import DPO
from jaxllm.preference.policy import Policy
from jaxllm.preference.records import Example
from jaxllm.preference.rows import Layout, PreferenceRows, RowConfig
from jaxllm.preference.step import PreferenceLoss, preference_step
from jaxllm.training.bench import CHECKED_UPDATES, Updates, larger, race
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.run_folder import versions
from jaxllm.training.state import new_state

Tree = Any
OPTIMIZER = OptimizerConfig(learning_rate=1e-5, weight_decay=0.0, clip_norm=1.0)
ALGORITHM = DPO()
TORCH = "torch eager, TRL's step with all logits"
TRL = "TRL's DPOTrainer"


def bench_preference(
    *,
    repeats: int,
    batches: Sequence[int],
    threads: int,
    config: DecoderConfig = SHAPES["24M"],
    length: int = 256,
    memory_tokens: int = 16384,
) -> dict[str, Any]:
    """Returns seconds per step of each side, the ratios of the medians, and memory.

    Args:
      repeats: Timed steps of each side, taking turns.
      batches: Pairs per step.
      threads: Threads of the PyTorch side.
      config: The model.
      length: Tokens of a prompt with its longest completion; half of them are the prompt's.
      memory_tokens: Tokens of the two programs whose memory is compared.

    Raises:
      InputError: The losses of the first updates differ.
    """
    params, _ = jax.jit(decoder(config, jnp.float32).init)(jax.random.key(0))
    rows: list[dict[str, Any]] = []
    errors: dict[str, float] = {}
    for batch in batches:
        pairs = random_pairs(batch, length, config.vocab_size)
        sides: dict[str, Any] = {
            "jaxllm": our_step(config, params, pairs),
            "jaxllm, prompts once": our_step(config, params, pairs, layout="shared_prompt"),
            "jaxllm, reference computed beforehand": our_step(
                config, params, pairs, precomputed=True
            ),
        }
        sides |= _torch_side(config, params, pairs, threads)
        found, differences = race(sides, repeats, "pairs", batch)
        rows += [{"pairs": batch, **row} for row in found]
        errors = larger(errors, differences)
    return {
        "dpo": rows,
        "log-probs and their gradient": log_prob_memory(config, memory_tokens),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens of a prompt with its longest completion": length,
        "repeats": repeats,
        f"largest difference of the first {CHECKED_UPDATES} losses": errors,
        "threads of torch": threads,
        **machine(),
        "versions": versions("torch", "transformers", "trl"),
    }


def random_pairs(batch: int, length: int, vocab: int) -> list[Example]:
    """Returns pairs of random ids: prompts of length/2, completions of length/4 to length/2.

    One completion is as long as can be, so that no side pads more than another.
    """
    draw = np.random.default_rng(batch)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(x) for x in draw.integers(0, vocab, count))

    longest = length - length // 2
    sizes = draw.integers(length // 4, longest + 1, (batch, 2))
    sizes[0, 0] = longest
    return [Example(ids(length // 2), (ids(int(w)), ids(int(r)))) for w, r in sizes]


def log_prob_memory(config: DecoderConfig, tokens: int) -> list[dict[str, Any]]:
    """Returns the temporary memory of log-probs with their gradient, in chunks and all at once.

    Args:
      config: Its width and vocabulary.
      tokens: Tokens that are scored.

    Returns:
      A row for each form: MB of 10^6 bytes and the ratio to all logits at once. Read off the
      compiled programs; nothing runs.

    Raises:
      InputError: A backend that does not tell.
    """
    hidden = jax.ShapeDtypeStruct((tokens, config.dim), jnp.float32)
    kernel = jax.ShapeDtypeStruct((config.dim, config.vocab_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def chunked(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        found = token_log_probs(hidden, kernel, targets)
        return jnp.sum(found[0] if isinstance(found, tuple) else found)

    def full(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(vocabulary_logits(hidden, kernel))
        return jnp.sum(jnp.take_along_axis(log_probs, targets[:, None], axis=-1))

    taken = {}
    for name, loss in {"in chunks": chunked, "all logits at once": full}.items():
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel, targets)
        analysis = program.compile().memory_analysis()
        if analysis is None:
            raise InputError(f"backend {jax.default_backend()} does not tell a program's memory")
        taken[name] = analysis.temp_size_in_bytes
    return [
        {
            "form": name,
            "tokens": tokens,
            "vocabulary": config.vocab_size,
            "temporary MB": size / 1e6,
            "of all at once": size / taken["all logits at once"],
        }
        for name, size in taken.items()
    ]


def our_step(
    config: DecoderConfig,
    params: Tree,
    pairs: Sequence[Example],
    *,
    layout: Layout = "padded",
    precomputed: bool = False,
) -> Updates:
    """Returns DPO steps through the functions that a training run uses.

    Args:
      config: The model.
      params: Where policy and reference start.
      pairs: The batch of every step.
      layout: Of its rows.
      precomputed: Compute the reference's log-probs once, before the first step.
    """
    made = rows_of(pairs, layout)
    batch: dict[str, Any] = jax.device_put(made.batch(range(len(pairs))))
    shape = SlotShape.of(made)
    policy = Policy(
        folder=Path(),
        reference=PrecomputedReference() if precomputed else FrozenReference(),
        blueprint=decoder(config, jnp.float32),
        config=config,
        other=None,
        lora=None,
        tokenizer=None,
        eos=(),
    )
    extra: dict[str, Tree] = {}
    if precomputed:
        batch |= _reference_logps(policy, params, batch, shape)
    else:
        extra["reference"] = jax.tree.map(jnp.array, params)
    optimizer = make_optimizer(OPTIMIZER, 1000)
    trained = {"policy": jax.tree.map(jnp.array, params)}
    loss_of = PreferenceLoss(ALGORITHM, policy, shape, "pairs")
    return Updates(
        preference_step(loss_of, policy, optimizer, OPTIMIZER),
        new_state(trained, optimizer, ema=False, extra=extra),
        batch,
    )


def rows_of(pairs: Sequence[Example], layout: Layout) -> PreferenceRows:
    """Returns the pairs as one batch of rows that are no longer than the longest needs."""
    longest = 0
    for pair in pairs:
        sizes = [len(ids) for ids in pair.completion_ids]
        size = sum(sizes) if layout == "shared_prompt" else max(sizes)
        longest = max(longest, len(pair.prompt_ids) - 1 + size)
    return PreferenceRows(pairs, RowConfig(layout, batch_size=len(pairs), row_length=longest))


def _reference_logps(
    policy: Policy, params: Tree, batch: dict[str, Any], shape: SlotShape
) -> dict[str, jax.Array]:
    @jax.jit
    def score(params: Tree, batch: dict[str, Any]) -> SlotScores:
        model = policy.blueprint.build(params, {})
        return slot_scores(model, row_hidden(model, batch, shape), batch, shape)

    return {"ref_logps": score(params, batch).logps}


def _torch_side(
    config: DecoderConfig, params: Tree, pairs: Sequence[Example], threads: int
) -> dict[str, Callable[[], Phases]]:
    """Returns the sides in torch; none where it or transformers is missing, one without TRL."""
    try:
        from jaxllm.hub.bench_torch import llama_model
        from jaxllm.preference.bench_torch import TorchStep, TrainerStep
    except ImportError:
        return {}

    def step(side: Callable[..., Callable[[], Phases]]) -> Callable[[], Phases]:
        policy, reference = (llama_model(config, params, threads) for _ in range(2))
        return side(policy, reference, pairs)

    sides = {TORCH: step(TorchStep)}
    if importlib.util.find_spec("trl") is not None:
        sides[TRL] = step(TrainerStep)
    return sides
