"""Head importance of a model: one teacher-forced pass per example, keeping a few attention rows.

A layer's probe stands in the place of its cache. It attends as training does, through whatever
kernel fits, and recomputes only the rows that generate the answer, reduced at once to one number
per head: no T x T array exists, and of the [B, N, A, T] rows only one layer's at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxllm.decoding.generate import TextGenerator
from jaxllm.decoding.language_model import LanguageModel
from jaxllm.decoding.text import TextSampling, bucket
from jaxllm.decoding.text_cache import grouped, logits
from jaxllm.errors import InputError
from jaxllm.kvcompress.examples import Example
from jaxllm.kvcompress.scores import (
    generating_rows,
    passes_argmax,
    passes_qa_f1,
    passes_rouge,
    reasoning_scores,
    retrieval_scores,
)
from jaxllm.nn.attention import attend

Estimator = Literal["r", "er", "r2"]
Gate = Literal["argmax", "generate", "none"]


@dataclass(frozen=True)
class HeadScores:
    """What `measure_heads` found.

    Attributes:
      runs: float32 [examples that passed, L, N].
      passed: bool [examples].
    """

    runs: np.ndarray
    passed: np.ndarray


@struct.dataclass
class Rows:
    """Which attention rows an example is judged by; A of them, padded.

    Attributes:
      index: int [B, A] query of each row.
      generated: int [B, A] token that it generates.
      steps: bool [B, A] rows that exist.
      ids: int [B, T] tokens of the columns.
      span: int [B, 2] the answer among the columns.
    """

    index: jax.Array
    generated: jax.Array
    steps: jax.Array
    ids: jax.Array
    span: jax.Array


@struct.dataclass
class Probe:
    """Stands for one layer's cache and ends up holding its head scores, float32 [B, N]."""

    rows: Rows
    scores: jax.Array
    estimator: Estimator = struct.field(pytree_node=False)
    window: int | None = struct.field(pytree_node=False)
    soft_cap: float | None = struct.field(pytree_node=False)

    def extend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Probe]:
        """Attends causally among T new tokens, padded on the right, and scores the heads."""
        del positions  # They count up from 0.
        out = attend(q, k, v, causal=True, window=self.window, soft_cap=self.soft_cap)
        picked = jnp.take_along_axis(q, self.rows.index[:, :, None, None], axis=1)
        scores = logits(grouped(picked, k.shape[2]), k.transpose(0, 2, 1, 3), self.soft_cap)
        columns, queries = jnp.arange(k.shape[1]), self.rows.index[:, None, None, :, None]
        seen = columns <= queries
        if self.window is not None:
            seen &= columns > queries - self.window
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        attention = weights.reshape(len(q), q.shape[2], *weights.shape[3:])  # [B, N, A, T]
        rows = self.rows
        if self.estimator == "r":
            found = retrieval_scores(attention, rows.ids, rows.generated, rows.span, rows.steps)
        else:
            found = reasoning_scores(attention, rows.span, rows.steps)
        return out, Probe(rows, found, self.estimator, self.window, self.soft_cap)


def measure_heads(
    model: LanguageModel,
    examples: Sequence[Example],
    estimator: Estimator = "r2",
    *,
    gate: Gate = "argmax",
    batch: int = 4,
) -> HeadScores:
    """Scores every head of a model on examples that it answers.

    Args:
      model: The model.
      examples: Prompts with the span of their answer; needles for `r` and `er`, reasoning needles
        for `r2`.
      estimator: Eq. 1 of arXiv:2410.19258 (`r`), or Eq. 2 (`er` and `r2`, which differ in their
        examples only).
      gate: Which examples count. `argmax`: over half of the answer's tokens are the model's first
        choice given those before. `generate`: as released, by ROUGE-1 recall (`r`, `er`) or token
        F1 (`r2`) of a greedy answer above 50 %. `none`: all.
      batch: Examples run together.

    Raises:
      InputError: An unknown estimator or gate, no examples, or none that passed.
    """
    if estimator not in get_args(Estimator) or gate not in get_args(Gate):
        raise InputError(
            f"estimator {estimator!r} and gate {gate!r}, expected one of "
            f"{', '.join(get_args(Estimator))} and one of {', '.join(get_args(Gate))}"
        )
    if not examples:
        raise InputError("no examples to measure heads by")
    run = jax.jit(lambda params, rows: _scores(model, params, rows, estimator))
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    runs: dict[int, np.ndarray] = {}
    passed = np.ones(len(examples), bool)
    width = bucket(max(len(example.answer_ids) for example in examples))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        chosen = [examples[i] for i in (numbers + numbers[-1:] * batch)[:batch]]
        rows = _rows(chosen, width)
        scores, predicted = (np.asarray(x) for x in run(model.params, rows))
        fine = passes_argmax(predicted, rows.generated, rows.steps)
        for place, number in enumerate(numbers):
            runs[number] = scores[:, place]
            passed[number] = gate != "argmax" or fine[place]
    if gate == "generate":
        passed = _answered(model, examples, estimator, batch)
    if not passed.any():
        raise InputError(f"the model answers none of {len(examples)} examples (gate {gate})")
    return HeadScores(np.stack([runs[int(i)] for i in np.flatnonzero(passed)]), passed)


def _scores(
    model: LanguageModel, params: Any, rows: Rows, estimator: Estimator
) -> tuple[jax.Array, jax.Array]:
    """Returns head scores [L, B, N] and the most likely token of each row [B, A]."""
    network = model.blueprint.build(params, {})
    config = model.config
    nothing = jnp.zeros((len(rows.ids), config.attention.heads), jnp.float32)
    probes = [
        Probe(rows, nothing, estimator, window, config.attention.soft_cap)
        for window in config.layer_windows
    ]
    positions = jnp.broadcast_to(jnp.arange(rows.ids.shape[1]), rows.ids.shape)
    hidden, probes = network.step(network.unstack(), probes, rows.ids, positions)
    picked = jnp.take_along_axis(hidden, rows.index[..., None], axis=1)
    predicted = jnp.argmax(network.logits(picked), axis=-1)
    return jnp.stack([probe.scores for probe in probes]), predicted


def _rows(examples: Sequence[Example], width: int) -> Rows:
    """Pads prompts with their answers on the right, to one shape per bucket."""
    whole = [[*e.prompt_ids, *e.answer_ids] for e in examples]
    length = bucket(max(map(len, whole)))
    ids = np.zeros((len(whole), length), np.int32)
    index, generated = (np.zeros((len(whole), width), np.int32) for _ in range(2))
    steps = np.zeros((len(whole), width), bool)
    for row, (example, tokens) in enumerate(zip(examples, whole, strict=True)):
        count = len(example.answer_ids)
        ids[row, : len(tokens)] = tokens
        index[row, :count] = generating_rows(len(example.prompt_ids), count)
        generated[row, :count], steps[row, :count] = example.answer_ids, True
    span = np.array([example.span for example in examples], np.int32)
    arrays = [*map(jnp.asarray, (index, generated, steps, ids, span))]
    return Rows(*arrays)


def _answered(
    model: LanguageModel, examples: Sequence[Example], estimator: Estimator, batch: int
) -> np.ndarray:
    """Greedy answers, judged as the released code judges them."""
    tokenizer = model.need_tokenizer("gate 'generate'")
    generator = TextGenerator(model.params, {}, model.sampler(), tokenizer)
    longest = max(len(example.answer_ids) for example in examples)
    limit = 50 if estimator == "r" else longest
    found = generator(
        [example.prompt_ids for example in examples],
        TextSampling(max_new_tokens=limit, temperature=0.0, stop_ids=model.eos),
        batch=batch,
    )
    judge = passes_qa_f1 if estimator == "r2" else passes_rouge
    return np.array(
        [judge(c.text or "", e.answer) for e, (c,) in zip(examples, found, strict=True)]
    )
