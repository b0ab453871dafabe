"""Questions about long contexts under several cache plans, side by side.

Three protocols. `aware`: context and question are one prompt, so the choice of entries sees the
question (how SnapKV and HeadKV, arXiv:2410.19258, are evaluated). `agnostic`: the context is
compressed before any question, and each question starts from that same state. `multi_turn`: the
context is compressed once, the questions follow one another, each seeing the answers before it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decoding.generate import Completion, TextGenerator
from jaxllm.decoding.language_model import LanguageModel
from jaxllm.decoding.text import TextSampler, TextSampling, TextState, row_keys
from jaxllm.errors import InputError
from jaxllm.evals.statistics import bootstrap_interval
from jaxllm.kvcompress.bucketed_cache import BucketedCache, nbytes
from jaxllm.kvcompress.decode import plan_caches
from jaxllm.kvcompress.spec import parse_plan

Protocol = Literal["aware", "agnostic", "multi_turn"]


@dataclass(frozen=True)
class Question:
    """One question on a context.

    Attributes:
      ids: Its tokens, up to where the answer begins.
      judge: Score in [0, 1] of an answer's text.
      max_new_tokens: Longest answer.
    """

    ids: tuple[int, ...]
    judge: Callable[[str], float]
    max_new_tokens: int


@dataclass(frozen=True)
class Case:
    """A context, its tokens with BOS, and what is asked about it."""

    context: tuple[int, ...]
    questions: tuple[Question, ...]


def evaluate_plans(
    model: LanguageModel,
    cases: Sequence[Case],
    specs: Sequence[str],
    protocol: Protocol = "aware",
    *,
    batch: int = 4,
) -> list[dict[str, Any]]:
    """Returns one row per plan: mean score, 95 % interval over questions, cache bytes, seconds.

    Answers are greedy. The same compiled functions and the same cases serve every plan.

    Args:
      model: The model, with a tokenizer.
      cases: What is asked.
      specs: Plans as `--kv` takes them.
      protocol: See the file's first lines.
      batch: Contexts run together.

    Raises:
      InputError: An unknown protocol, a damaged plan, or nothing to ask.
    """
    if protocol not in get_args(Protocol):
        raise InputError(f"protocol {protocol!r} is not one of {', '.join(get_args(Protocol))}")
    if not cases or not all(case.questions for case in cases):
        raise InputError("nothing is asked; every case needs a question")
    plans = [parse_plan(spec) for spec in specs]
    rows = []
    for spec, plan in zip(specs, plans, strict=True):
        sampler = model.sampler(plan_caches(plan, model.config, model.dtype))
        start = time.perf_counter()
        ask = _ask_at_once if protocol == "aware" else _ask_after
        scores, size = ask(model, sampler, cases, protocol, batch)
        interval = bootstrap_interval(scores) if len(scores) > 1 else None
        rows.append(
            {
                "plan": spec,
                "protocol": protocol,
                "score": float(np.mean(scores)),
                "low": None if interval is None else interval.low,
                "high": None if interval is None else interval.high,
                "questions": len(scores),
                "cache bytes per context": size // batch,
                "seconds, compilation included": time.perf_counter() - start,
            }
        )
    return rows


def _sampling(model: LanguageModel, questions: Sequence[Question]) -> TextSampling:
    longest = max(question.max_new_tokens for question in questions)
    return TextSampling(max_new_tokens=longest, temperature=0.0, stop_ids=model.eos)


def _judged(question: Question, completion: Completion, model: LanguageModel) -> float:
    ids = completion.ids[: question.max_new_tokens]
    return float(question.judge(model.need_tokenizer("an evaluation").decode(ids)))


def _ask_at_once(
    model: LanguageModel,
    sampler: TextSampler,
    cases: Sequence[Case],
    protocol: Protocol,
    batch: int,
) -> tuple[list[float], int]:
    """Every question with its context as one prompt; returns scores and bytes of one batch."""
    del protocol
    asked = [(case, question) for case in cases for question in case.questions]
    prompts = [[*case.context, *question.ids] for case, question in asked]
    sampling = _sampling(model, [question for _, question in asked])
    tokenizer = model.need_tokenizer("an evaluation")
    found = TextGenerator(model.params, {}, sampler, tokenizer)(prompts, sampling, batch=batch)
    scores = [_judged(q, c, model) for (_, q), (c,) in zip(asked, found, strict=True)]
    return scores, sampler.cache_bytes(batch, max(map(len, prompts)), sampling.max_new_tokens)


def _ask_after(
    model: LanguageModel,
    sampler: TextSampler,
    cases: Sequence[Case],
    protocol: Protocol,
    batch: int,
) -> tuple[list[float], int]:
    """Contexts are compressed first; returns scores and bytes of one batch of caches."""
    scores, size = [], 0
    order = sorted(range(len(cases)), key=lambda i: len(cases[i].context))
    tokenizer = model.need_tokenizer("an evaluation")
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        filled = [cases[i] for i in (numbers + numbers[-1:] * batch)[:batch]]
        turns = max(len(case.questions) for case in filled)
        sampling = _sampling(model, [q for case in filled for q in case.questions])
        longest = max(len(q.ids) for case in filled for q in case.questions)
        # Every turn may take a padded question and a whole chunk of new tokens.
        room = turns * 2 * (longest + sampling.max_new_tokens + 32)
        state = sampler.prefill(
            model.params,
            {},
            [case.context for case in filled],
            row_keys(0, range(batch)),
            max_new_tokens=room,
        )
        state = compressed(state)
        size = max(size, nbytes(state.caches))
        base = state
        for turn in range(turns):
            questions = [case.questions[min(turn, len(case.questions) - 1)] for case in filled]
            before = base if protocol == "agnostic" else state
            asked = sampler.extend(model.params, {}, before, [q.ids for q in questions])
            asked = dataclasses.replace(asked, done=jnp.zeros(batch, bool), step=jnp.int32(0))
            state, ids = _greedy(model, sampler, asked, sampling)
            for place, number in enumerate(numbers):
                if turn < len(cases[number].questions):
                    own = ids[place][: questions[place].max_new_tokens]
                    scores.append(float(questions[place].judge(tokenizer.decode(own))))
    return scores, size


def _greedy(
    model: LanguageModel, sampler: TextSampler, state: TextState, sampling: TextSampling
) -> tuple[TextState, list[list[int]]]:
    """Decodes until all rows have ended; returns the state and the new ids of each row."""
    ids: list[list[int]] = [[] for _ in range(len(state.position))]
    while True:
        state, drawn = sampler.decode(model.params, {}, state, sampling)
        tokens, valid = np.asarray(drawn.tokens), np.asarray(drawn.valid)
        for row, (own, real) in enumerate(zip(tokens, valid, strict=True)):
            ids[row] += own[real].tolist()
        if bool(np.all(state.done)):
            return state, ids


def compressed(state: TextState) -> TextState:
    """Compresses every cache that can be: before a question, the choice is blind to it."""
    caches = [c.compress() if isinstance(c, BucketedCache) else c for c in state.caches]
    return dataclasses.replace(state, caches=jax.block_until_ready(caches))
