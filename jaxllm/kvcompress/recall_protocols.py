"""How the recall tasks are asked under a cache plan, one compiled program for all plans.

Three protocols, all with teacher forcing, under which "every token of an answer is the first
choice" is the same as a correct greedy answer:

  aware       Context and question are one prompt, so the window of the choice holds the question.
  multi_turn  The same for the first question; the others follow, each after the answers before it,
              and only they count.
  agnostic    The context is compressed before any question, and each starts from that same state.

In the first two the last token of the question is read again from the compressed cache. Otherwise
the first token of an answer would come from the uncompressed prefill, and an answer of one token
would say nothing about the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.examples import Example
from jaxllm.kvcompress.masked_cache import Choice, MaskedCache, masked_cache
from jaxllm.kvcompress.recall import Task
from jaxllm.kvcompress.tasks import Batch, ReasonNeedleTask
from jaxllm.models.decoder import Decoder, DecoderConfig

Protocol = Literal["aware", "multi_turn", "agnostic"]
PROTOCOLS: tuple[Protocol, ...] = ("aware", "multi_turn", "agnostic")
Tree = Any


class Asked(NamedTuple):
    """Sequences cut for a protocol.

    Attributes:
      prompt: int32 [R, P], in the cache when it is compressed.
      rest: int32 [R * repeat, Q], read from the compressed cache.
      picks: Places of `rest` whose outputs predict answer tokens, n answers of A tokens in a row.
      answers: int32 [R * repeat, n, A].
      reread: Whether `rest` begins with the last token of the prompt.
      repeat: Continuations of each prompt.
      sequences: Sequences of the task, which the R * repeat * n answers belong to in order.
    """

    prompt: np.ndarray
    rest: np.ndarray
    picks: tuple[int, ...]
    answers: np.ndarray
    reread: bool
    repeat: int
    sequences: int


def ask(task: Task, batch: Batch, protocol: Protocol) -> Asked:
    """Cuts the sequences of a needle task for a protocol.

    Args:
      task: NeedleTask or ReasonNeedleTask, whose queries stand at the same places in every row.
      batch: Its sequences.
      protocol: See the file's first lines.
    """
    tokens, context = batch["tokens"], task.context  # type: ignore[union-attr]
    first = [int(at) for at in batch["query"][0]]
    length = int(batch["span"][0, 0, 1] - batch["span"][0, 0, 0])
    rows, queries = len(tokens), len(first)
    asked = first[0] - context  # Tokens of a question.
    if protocol == "multi_turn":
        start = first[0] - 1
        picks = tuple(at - 1 - start + i for at in first[1:] for i in range(length))
        answers = np.stack([tokens[:, at : at + length] for at in first[1:]], axis=1)
        rest = tokens[:, start : first[-1] + length - 1]
        return Asked(tokens[:, : first[0]], rest, picks, answers, True, 1, rows)
    questions = np.stack([tokens[:, at - asked : at + length] for at in first], axis=1)
    questions = questions.reshape(rows * queries, asked + length)
    answers = questions[:, None, asked:]
    contexts = tokens[:, :context]
    if protocol == "agnostic":
        picks = tuple(asked - 1 + i for i in range(length))
        return Asked(contexts, questions[:, :-1], picks, answers, False, queries, rows)
    prompt = np.concatenate([np.repeat(contexts, queries, axis=0), questions[:, :asked]], axis=1)
    return Asked(prompt, questions[:, asked - 1 : -1], tuple(range(length)), answers, True, 1, rows)


class PlanAsker:
    """Answers of one model shape under any choice; each protocol compiles once.

    Args:
      build: Makes the model from (params, extra).
      config: The model.
      eviction: What all methods share; the number of sinks is part of a choice.
    """

    def __init__(self, build: Callable[[Any, Any], Decoder], config: DecoderConfig, eviction: Any):
        self.config, self.eviction = config, eviction
        self.traces = 0
        self._prefill = jax.jit(partial(_prefill, build, config, eviction), static_argnums=2)
        self._answer = jax.jit(partial(self._traced, build), static_argnums=(4, 5, 6))

    def prefill(self, params: Tree, asked: Asked) -> list[MaskedCache]:
        """Returns full caches of the prompts, which any choice can be applied to."""
        room = asked.rest.shape[1]
        return self._prefill(params, jnp.asarray(asked.prompt), room)

    def answer(
        self, params: Tree, caches: list[MaskedCache], asked: Asked, choice: Choice
    ) -> jax.Array:
        """Returns float32 log-probabilities [R * repeat, n, A, V] at the answer tokens."""
        found = self._answer(
            params,
            caches,
            jnp.asarray(asked.rest),
            choice,
            asked.picks,
            asked.reread,
            asked.repeat,
        )
        return found.reshape(*asked.answers.shape, -1)

    def _traced(self, build: Any, *arguments: Any) -> jax.Array:
        self.traces += 1
        return _answer(build, *arguments)


def _prefill(
    build: Any, config: DecoderConfig, eviction: Eviction, params: Tree, prompt: Any, room: int
) -> list[MaskedCache]:
    rows, length = prompt.shape
    heads = config.attention
    caches = [
        masked_cache(rows, heads.heads, heads.kv_heads, length + room, heads.head_dim, eviction)
        for _ in range(config.layers)
    ]
    model = build(params, {})
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), prompt.shape)
    return model.step(model.unstack(), caches, prompt, positions)[1]


def _answer(
    build: Any,
    params: Tree,
    caches: list[MaskedCache],
    rest: jax.Array,
    choice: Choice,
    picks: tuple[int, ...],
    reread: bool,
    repeat: int,
) -> jax.Array:
    kept = [cache.compress(choice.layer(i)) for i, cache in enumerate(caches)]
    if reread:
        kept = [cache.without_last() for cache in kept]
    if repeat > 1:
        kept = [cache.repeated(repeat) for cache in kept]
    model = build(params, {})
    start = kept[0].fill
    positions = jnp.broadcast_to(start + jnp.arange(rest.shape[1], dtype=jnp.int32), rest.shape)
    hidden, _ = model.step(model.unstack(), kept, rest, positions)
    return jax.nn.log_softmax(model.logits(hidden[:, jnp.asarray(picks)]), axis=-1)


class Measures(NamedTuple):
    """Of one plan; one number per answer, grouped by sequence: float64 [sequences, answers].

    Attributes:
      right: 1 where all tokens of the answer are the first choice.
      divergence: Mean KL(full || plan) of the next-token distribution at the answer, in nats.
      agreement: Share of the answer's tokens whose first choice is that of the full cache.
    """

    right: np.ndarray
    divergence: np.ndarray
    agreement: np.ndarray


def measures(found: jax.Array, full: jax.Array, asked: Asked) -> Measures:
    """Compares log-probabilities [R', n, A, V] with those of the full cache and the answers."""
    tables = _compare(found, full, jnp.asarray(asked.answers))
    return Measures(*(np.asarray(t, np.float64).reshape(asked.sequences, -1) for t in tables))


@jax.jit
def _compare(found: jax.Array, full: jax.Array, answers: jax.Array) -> tuple[jax.Array, ...]:
    best = found.argmax(-1)
    right = jnp.all(best == answers, axis=-1)
    divergence = jnp.sum(jnp.exp(full) * (full - found), axis=-1).mean(-1)
    return right, divergence, jnp.mean(best == full.argmax(-1), axis=-1)


def recall_examples(task: Task, batch: Batch, *, last: bool = False) -> list[Example]:
    """Returns examples for `measure_heads`, one per sequence: its first query, or its last.

    Args:
      task: Of the batch.
      batch: Sequences. Of ReasonNeedleTask those with `single` queries measure retrieval, those
        with pairs retrieval and reasoning.
      last: Take the last query, which has most before it.
    """
    examples, width = [], 3 if isinstance(task, ReasonNeedleTask) else 2  # A mark, one key or two.
    for row, tokens in enumerate(batch["tokens"].tolist()):
        query = int((batch["query"][row] > 0).sum()) - 1 if last else 0
        at, (start, end) = int(batch["query"][row, query]), batch["span"][row, query].tolist()
        answer = tuple(tokens[at : at + end - start])
        other = batch["distractor"][row, query].tolist() if "distractor" in batch else None
        examples.append(
            Example(
                prompt_ids=tuple(tokens[:at]),
                answer_ids=answer,
                span=(start, end),
                distractor=None if other is None or other[0] == start else tuple(other),
                answer=" ".join(map(str, answer)),
                question=" ".join(map(str, tokens[at - width : at])),
                depth=100 * start / at,
                length=at,
                question_start=at - width,
            )
        )
    return examples
