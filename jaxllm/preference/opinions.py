"""A synthetic world of opinions in which everything is known, to study GDPO and DPO in minutes.

Every topic has 2 to 5 options and a group distribution over them; a response states an option and
argues for it in words that belong to one belief, so a classifier of responses is exact. Rows are in
GDPO's format (arXiv:2412.20299) and read by `records.read_examples`.

    prompt      <Q> style topic topic <A>
    response    d < label > five words EOS

Pairs per (topic, style): floor(N p_b) accept belief b and reject another one, drawn evenly.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.records import write_jsonl
from jaxllm.data.text_tokenizers import Tokenizer, tokenizer_from_files
from jaxllm.errors import InputError

BELIEFS = 6
LABELS = ("refuse", "oppose", "doubt", "balance", "favour", "praise")
"""The option that states each belief: refused, strongly and mildly negative, neutral, ..."""
OPTIONS = {2: (2, 4), 3: (2, 3, 4), 4: (1, 2, 4, 5), 5: (0, 1, 2, 4, 5)}
"""Belief ids of topics with K options."""
OPTION_SHARES = {2: 0.16, 3: 0.20, 4: 0.33, 5: 0.31}
"""How often topics have K options, as in GlobalOpinionQA."""
CONCENTRATION = 0.8
"""Of the Dirichlet distribution of opinions: the mean of the largest share is 0.583."""
STYLES = ("plain", "formal", "blunt", "warm", "ironic")
FILLERS = ("well", "so", "indeed", "perhaps", "really", "then", "still")
WORDS_PER_BELIEF = 8
TEMPLATES = ("wfwtw", "fwtww", "wwfwt", "twfww")
"""Five words each: w belongs to the belief, f is a filler, t a word of the topic."""
SPECIAL = ("<pad>", "<bos>", "<eos>")
MARKS = ("<Q>", "<A>", "<", ">")
CLASSES = ("DK/Refused", "Very bad", "Somewhat bad", "Same", "Somewhat good", "Very good")
"""Coarse name of each belief, the `options_map` of rows."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Topic:
    """What is asked, and what the group thinks of it."""

    words: tuple[str, str]
    beliefs: tuple[int, ...]
    """Ids of its options."""
    probabilities: tuple[float, ...]
    """Of all six beliefs; 0 where the topic has no such option."""


@dataclass(frozen=True)
class Prompt:
    """A topic asked in one style."""

    topic: int
    style: str
    text: str


@dataclass(frozen=True)
class OpinionWorld:
    """Topics, language and split of one seed.

    For every topic one style, drawn at random, is held out for `test`; a tenth of the remaining
    prompts are for `eval`.
    """

    seed: int = 0
    topics_count: int = 48
    eval_share: float = 0.1

    def __post_init__(self) -> None:
        if self.topics_count < 1 or not 0 <= self.eval_share < 1:
            raise InputError(
                f"topics_count {self.topics_count} and eval_share {self.eval_share}, expected at "
                "least 1 and [0, 1)"
            )

    @cached_property
    def topics(self) -> tuple[Topic, ...]:
        """All topics."""
        rng = np.random.default_rng((self.seed, 0))
        return tuple(_topic(rng, number) for number in range(self.topics_count))

    @cached_property
    def splits(self) -> dict[str, list[Prompt]]:
        """Prompts of `train`, `eval` and `test`."""
        rng = np.random.default_rng((self.seed, 1))
        held_out = rng.integers(len(STYLES), size=self.topics_count)
        test: list[Prompt] = []
        rest: list[Prompt] = []
        for number, topic in enumerate(self.topics):
            for place, style in enumerate(STYLES):
                prompt = Prompt(number, style, " ".join((style, *topic.words)))
                (test if place == held_out[number] else rest).append(prompt)
        chosen = rng.permutation(len(rest))[: round(len(rest) * self.eval_share)]
        return {
            "train": [p for i, p in enumerate(rest) if i not in set(chosen.tolist())],
            "eval": [rest[i] for i in sorted(chosen.tolist())],
            "test": test,
        }

    def rows(self, split: str, pairs: int = 10) -> list[Row]:
        """Returns the preference rows of a split: floor(pairs p_b) for every belief b of a prompt.

        Args:
          split: `train`, `eval` or `test`.
          pairs: N; 10 is the paper's small set, 100 its large one.
        """
        if split not in self.splits:
            raise InputError(f"split {split!r} is not one of {', '.join(self.splits)}")
        rows: list[Row] = []
        for prompt in self.splits[split]:
            topic = self.topics[prompt.topic]
            place = STYLES.index(prompt.style)
            rng = np.random.default_rng((self.seed, 2, prompt.topic, place))
            for belief in topic.beliefs:
                # A product such as 100 * 0.29 may come out just below its value.
                for _ in range(int(np.floor(pairs * topic.probabilities[belief] + 1e-9))):
                    others = [other for other in topic.beliefs if other != belief]
                    rejected = others[int(rng.integers(len(others)))]
                    rows.append(_row(prompt, topic, belief, rejected, rng))
        return rows

    @property
    def tokenizer(self) -> Tokenizer:
        """A tokenizer with one id for every word of the world."""
        return _tokenizer(vocabulary(self.topics_count))

    def write(self, split: str, path: Path, pairs: int = 10) -> None:
        """Writes the rows of a split as JSONL."""
        write_jsonl(path, self.rows(split, pairs))


def draw_distribution(rng: np.random.Generator) -> tuple[tuple[int, ...], np.ndarray]:
    """Draws the belief ids of a topic's options and their probabilities, float64 [K]."""
    count = int(rng.choice(list(OPTION_SHARES), p=list(OPTION_SHARES.values())))
    return OPTIONS[count], rng.dirichlet([CONCENTRATION] * count)


def vocabulary(topics: int = 48) -> list[str]:
    """All words in the order of their ids; 175 for 48 topics."""
    return [
        *SPECIAL,
        *MARKS,
        *map(str, range(BELIEFS)),
        *LABELS,
        *(f"t{number}" for number in range(2 * topics)),
        *STYLES,
        *(word for belief in range(BELIEFS) for word in belief_words(belief)),
        *FILLERS,
    ]


def belief_words(belief: int) -> list[str]:
    """The words that only responses of a belief use."""
    return [f"{LABELS[belief]}{number}" for number in range(WORDS_PER_BELIEF)]


# -- exact evaluation ----------------------------------------------------------------------------


def classify(response: str) -> int | None:
    """The belief that most words of a response belong to; None without a single most frequent one.

    Args:
      response: What follows the stated option.
    """
    votes = Counter(_WORD_BELIEF[word] for word in response.split() if word in _WORD_BELIEF)
    ranked = votes.most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def verdicts(samples: Sequence[str]) -> list[bool]:
    """Whether the answer of each sample expresses the option it states, for `belief_metrics`.

    A sample without a readable option does not.
    """
    found = []
    for sample in samples:
        _, _, after = sample.partition("<")
        label, mark, answer = after.partition(">")
        known = bool(mark) and label.strip() in LABELS
        found.append(known and classify(answer) == LABELS.index(label.strip()))
    return found


def option_beliefs() -> dict[str, int]:
    """Belief of every option, for class-belief consistency."""
    return {label: belief for belief, label in enumerate(LABELS)}


# -- other views of the rows ---------------------------------------------------------------------


def last_per_prompt(rows: Iterable[Row]) -> list[Row]:
    """The last row of each prompt, which is all that SFT of the released GDPO code sees."""
    return list({row["prompt"]: row for row in rows}.values())


def with_estimated_probabilities(rows: Sequence[Row]) -> list[Row]:
    """Rows whose `probabilities` are the shares of accepted beliefs among the prompt's own rows.

    So GDPO learns from the same information as DPO and SFT.
    """
    counts: dict[str, np.ndarray] = {}
    for row in rows:
        counts.setdefault(row["prompt"], np.zeros(BELIEFS))[row["accept_choice_id"]] += 1
    return [
        {**row, "probabilities": (counts[row["prompt"]] / counts[row["prompt"]].sum()).tolist()}
        for row in rows
    ]


# -- making it -----------------------------------------------------------------------------------

_WORD_BELIEF = {word: belief for belief in range(BELIEFS) for word in belief_words(belief)}


def _topic(rng: np.random.Generator, number: int) -> Topic:
    beliefs, shares = draw_distribution(rng)
    probabilities = np.zeros(BELIEFS)
    probabilities[list(beliefs)] = shares
    words = (f"t{2 * number}", f"t{2 * number + 1}")
    return Topic(words, beliefs, tuple(probabilities.tolist()))


def _row(
    prompt: Prompt, topic: Topic, accepted: int, rejected: int, rng: np.random.Generator
) -> Row:
    answers = [_response(belief, topic, rng) for belief in topic.beliefs]
    said = dict(zip(topic.beliefs, answers, strict=True))
    return {
        "prompt": prompt.text,
        "accept_response": said[accepted],
        "reject_response": said[rejected],
        "accept_choice": LABELS[accepted],
        "reject_choice": LABELS[rejected],
        "style": prompt.style,
        "question": " ".join(topic.words),
        "options": [LABELS[belief] for belief in topic.beliefs],
        "selections": [topic.probabilities[belief] for belief in topic.beliefs],
        "answers": answers,
        "probabilities": list(topic.probabilities),
        "accept_choice_id": accepted,
        "reject_choice_id": rejected,
        "options_map": [CLASSES[belief] for belief in topic.beliefs],
    }


def _response(belief: int, topic: Topic, rng: np.random.Generator) -> str:
    template = int(rng.integers(len(TEMPLATES)))
    words = belief_words(belief)
    # Each template draws its three words from a pair of its own and any other one.
    pool = iter(
        (words[2 * template], words[2 * template + 1], words[int(rng.integers(len(words)))])
    )
    return " ".join(
        next(pool)
        if kind == "w"
        else FILLERS[int(rng.integers(len(FILLERS)))]
        if kind == "f"
        else topic.words[int(rng.integers(2))]
        for kind in TEMPLATES[template]
    )


def _tokenizer(words: Sequence[str]) -> Tokenizer:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    library = tokenizers.Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>")
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(tokenizers.Regex("<Q>|<A>|[<>]"), "isolated"),
        ]
    )
    library.add_special_tokens(list(SPECIAL))
    config = {
        "pad_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "add_bos_token": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {
        "tokenizer.json": library.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    return tokenizer_from_files(files, "the tokenizer of the opinion world")
