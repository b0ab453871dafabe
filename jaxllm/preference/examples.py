"""Examples of a run: read from its file, judged anew where it says so, in the form it trains on."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.chat import ChatTemplate, tokenizer_chat_template
from jaxllm.data.text_tokenizers import Tokenizer
from jaxllm.errors import InputError
from jaxllm.models.decoder import DecoderConfig
from jaxllm.preference.config import (
    FeedbackConfig,
    GivenFeedback,
    JudgeFeedback,
    LexiconFeedback,
    OfflineData,
    RewardModelFeedback,
    RuleFeedback,
    Target,
    VerifierFeedback,
)
from jaxllm.preference.feedback import Feedback, Judge, RewardModel, Rule
from jaxllm.preference.records import Example, Examples, is_pair, read_examples
from jaxllm.preference.reviews import lexicon_reward
from jaxllm.preference.reward_scorer import RewardScorer

_log = logging.getLogger(__name__)


# -- feedback ------------------------------------------------------------------------------------


def open_feedback(config: FeedbackConfig) -> Feedback | None:
    """Returns what scores completions, None for labels that are given.

    Raises:
      InputError: A function that is not found, or a folder that is no reward model's run.
    """
    match config:
        case GivenFeedback():
            return None
        case LexiconFeedback():
            return Rule(lexicon_reward)
        case RuleFeedback():
            return Rule(_function(config.function))
        case JudgeFeedback():
            return Judge(_function(config.function))
        case VerifierFeedback():
            return RewardModel(_function(config.function), config.batch_size)
        case RewardModelFeedback():
            return RewardModel(RewardScorer(config.run), config.batch_size)


def _function(path: str) -> Callable[..., Any]:
    """The function at package.module:name, which the user's own config names."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise InputError(f"feedback.function {path!r}, expected package.module:name")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise InputError(f"feedback.function {path!r}: {error}") from None
    if not callable(found):
        raise InputError(f"feedback.function {path!r}: {module} has no function {name!r}")
    return found


# -- reading -------------------------------------------------------------------------------------


def offline_examples(
    path: str,
    data: OfflineData,
    target: Target,
    feedback: Feedback | None,
    tokenizer: Tokenizer | None,
    config: DecoderConfig,
) -> Examples:
    """Returns the examples of a file as an algorithm takes them.

    Raises:
      InputError: A bad record, examples of another kind than the algorithm takes, an id outside the
        vocabulary, or an example longer than the model's context.
    """
    if not path:
        raise InputError("data.file is empty, expected a file of preference records")
    read = read_examples(Path(path), tokenizer, data.record_config(), chat_template(tokenizer))
    check_ids(read, config)
    examples: Iterable[Example] = read
    if feedback is not None:
        examples = judged(list(read), feedback, tokenizer)
    if data.unpair:
        examples = unpaired(examples)
    made = list(in_form(examples, target))
    if not made:
        raise InputError(f"{path}: leaves no example to train on")
    return Examples(made, read.skipped, read.joined)


def chat_template(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The tokenizer's chat template, None without one."""
    if tokenizer is None:
        return None
    try:
        return tokenizer_chat_template(tokenizer, "policy")
    except InputError:
        return None


def check_ids(examples: Iterable[Example], config: DecoderConfig) -> None:
    """Refuses ids outside the vocabulary and examples longer than the context.

    Raises:
      InputError: Naming the record.
    """
    stretched = config.rope is not None and config.rope.scaling != "none"
    for example in examples:
        answers = (*example.completion_ids, example.target_ids or ())
        ids = max(max(part, default=0) for part in (example.prompt_ids, *answers))
        if ids >= config.vocab_size:
            raise InputError(
                f"{example.identity}: token id {ids} is outside the policy's vocabulary of "
                f"{config.vocab_size}"
            )
        length = len(example.prompt_ids) + max(map(len, answers)) - 1
        if length > config.max_positions and not stretched:
            raise InputError(
                f"{example.identity}: {length} tokens, the policy has {config.max_positions} "
                "positions; set data.max_prompt, data.max_completion or a shorter data.row_length"
            )


# -- judging -------------------------------------------------------------------------------------


def judged(
    examples: Sequence[Example], feedback: Feedback, tokenizer: Tokenizer | None
) -> list[Example]:
    """Returns the same completions with what `feedback` says of them in the place of labels.

    Pairs are ordered by their scores, with the difference as margin; pairs of equal scores are left
    out and counted. Lists get scores. Labelled completions become lists of one.

    Raises:
      InputError: No tokenizer to make texts with.
    """
    if tokenizer is None:
        raise InputError("feedback judges texts; the policy has no tokenizer")
    out, ties = [], 0
    for example in examples:
        texts = [[tokenizer.decode(ids) for ids in example.completion_ids]]
        scores = feedback([tokenizer.decode(example.prompt_ids)], texts)[0].tolist()
        if not is_pair(example):
            out.append(replace(example, scores=tuple(scores), desirable=None))
            continue
        if scores[0] == scores[1]:
            ties += 1
            continue
        ids = example.completion_ids
        ordered = ids if scores[0] > scores[1] else ids[::-1]
        margin = abs(scores[0] - scores[1])
        out.append(replace(example, completion_ids=ordered, margin=margin))
    if ties:
        _log.warning("%d pairs of equal scores are left out", ties)
    return out


def unpaired(examples: Iterable[Example]) -> list[Example]:
    """Returns two completions with labels for each pair, the chosen one desirable."""
    out = []
    for example in examples:
        if not is_pair(example):
            raise InputError(f"{example.identity}: data.unpair takes pairs, found {form(example)}")
        out += [
            replace(example, completion_ids=(ids,), desirable=good, margin=None)
            for ids, good in zip(example.completion_ids, (True, False), strict=True)
        ]
    return out


def form(example: Example) -> str:
    """What an example is, in words."""
    if is_pair(example):
        return "pairs"
    return "lists with scores" if example.scores is not None else "completions with labels"


def in_form(examples: Iterable[Example], target: Target) -> Iterable[Example]:
    """Yields examples as an algorithm takes them.

    Single completions without labels (SFT) are the chosen, the desirable or the best ones.

    Raises:
      InputError: Examples that are of another kind.
    """
    wanted = {"pairs": "pairs", "labels": "completions with labels", "lists": "lists with scores"}
    for example in examples:
        found = form(example)
        if target == "rewards":
            yield from _with_rewards(example, found)
        elif target == "completions":
            best = _best(example)
            if best is not None:
                yield replace(
                    example, completion_ids=(best,), desirable=None, scores=None, margin=None
                )
        elif found != wanted[target]:
            unpair = target == "labels" and found == "pairs"
            hint = "; data.unpair True makes two of each pair" if unpair else ""
            raise InputError(
                f"{example.identity}: the algorithm takes {wanted[target]}, found {found}{hint}"
            )
        else:
            yield example


def _best(example: Example) -> tuple[int, ...] | None:
    if example.scores is not None:
        return example.completion_ids[int(np.argmax(example.scores))]
    return None if example.desirable is False else example.completion_ids[0]


def _with_rewards(example: Example, found: str) -> Iterable[Example]:
    if example.scores is None:
        raise InputError(f"{example.identity}: the algorithm takes scores, found {found}")
    for ids, score in zip(example.completion_ids, example.scores, strict=True):
        yield replace(example, completion_ids=(ids,), scores=(score,))
