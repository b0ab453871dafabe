"""Formats of preference records: one JSON object in, a `Record` of texts, messages or ids out.

Known kinds, recognised from their fields: `pairs` (TRL's standard and conversational pairs with a
prompt or without, HH dialogues), `unpaired` (a label 0 or 1), `lists` (completions with scores),
`gdpo` (the 15-column rows of arXiv:2412.20299), `pandalm` and `pandalm_soft` (three annotators),
`llmbar`. Any text field may be replaced by token ids: `prompt_ids`, `chosen_ids`, ... A record may
also state beliefs: `belief`, with which every completion begins, and `beliefs` with
`probabilities`, the group's distribution. A pair with a prompt may have a `target`, the answer of
supervised training that SLiC-HF keeps likely; an unpaired completion a `density_ratio`,
p(desirable)/p(undesirable) of its prompt, by which BCO weights undesirable ones.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.data.chat import check_messages
from jaxllm.data.images import bundled
from jaxllm.errors import InputError

Kind = Literal["pairs", "unpaired", "lists", "gdpo", "pandalm", "pandalm_soft", "llmbar"]
Content = str | list[dict[str, Any]] | tuple[int, ...]
"""A text, messages, or token ids."""
BeliefPairs = Literal["conditioned", "different"]
SUM_TOLERANCE = 0.01
"""How far probabilities may be from summing to 1; rounded survey shares are within it."""
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class StatedBelief:
    """A belief that completions state before they answer."""

    text: str
    """What every completion begins with; of a pair of different beliefs, what the first does."""
    names: tuple[str, ...]
    """The texts that may follow the prompt, one per belief."""
    target: tuple[float, ...]
    """The group's probability of each; sums to 1."""


@dataclass(frozen=True)
class Record:
    """One prompt with its completions: two of a pair, chosen first; one with a label; or a list."""

    prompt: Content
    completions: tuple[Content, ...]
    desirable: bool | None = None
    scores: tuple[float, ...] | None = None
    margin: float | None = None
    belief: StatedBelief | None = None
    target: Content | None = None
    density_ratio: float | None = None


def parse_preference(
    row: Mapping[str, Any], kind: Kind | None = None, belief_pairs: BeliefPairs = "conditioned"
) -> Record:
    """Returns the record that a JSON object holds.

    Args:
      row: The object.
      kind: Its format; None recognises it by its fields.
      belief_pairs: What the rejected completion of a `gdpo` row states: `conditioned` is the belief
        of the chosen one (as GDPO), `different` its own (as the DPO baseline).

    Raises:
      InputError: A missing field, one of another form or outside its range, or a pair whose
        responses are equal or empty.
    """
    record = _PARSERS[kind or recognise(row)](row, belief_pairs)
    for content in record.completions:
        if not _filled(content):
            raise InputError("a response is empty")
    if record.target is not None and not _filled(record.target):
        raise InputError("`target` is empty")
    pair = len(record.completions) == 2 and record.scores is None
    if pair and record.completions[0] == record.completions[1]:
        raise InputError("chosen and rejected are equal")
    return record


def recognise(row: Mapping[str, Any]) -> Kind:
    """Returns the kind whose fields a record has."""
    signs: list[tuple[Kind, tuple[str, ...]]] = [
        ("gdpo", ("accept_response", "reject_response")),
        ("pandalm", ("response1", "response2")),
        ("llmbar", ("output_1", "output_2")),
        ("pairs", ("chosen", "rejected", "chosen_ids", "rejected_ids")),
        ("lists", ("completions", "completions_ids")),
        ("unpaired", ("completion", "completion_ids", "label")),
    ]
    for kind, names in signs:
        if any(name in row for name in names):
            return kind
    found = ", ".join(map(str, row)) or "none"
    raise InputError(
        "expected `chosen` and `rejected`, `completion` and `label`, `completions` and `scores`, "
        f"or the fields of a known data set; found {found:.80}"
    )


def option_beliefs() -> dict[str, int]:
    """The GDPO authors' map from survey options to beliefs: 5 strongly positive, 0 refused."""
    return json.loads(bundled("gdpo_option_map", "option_map.json").read_text(encoding="utf-8"))


# -- pairs, labels, lists ------------------------------------------------------------------------


def _pairs(row: Mapping[str, Any], _: BeliefPairs) -> Record:
    chosen, rejected = _content(row, "chosen"), _content(row, "rejected")
    if type(chosen) is not type(rejected):
        raise InputError("`chosen` and `rejected` are of different forms, expected the same")
    target: tuple[Content, ...] = ()
    if "target" in row or "target_ids" in row:
        target = (_content(row, "target"),)
        if type(target[0]) is not type(chosen):
            raise InputError("`target` and `chosen` are of different forms, expected the same")
    if "prompt" in row or "prompt_ids" in row:
        prompt, completions = _explicit(_content(row, "prompt"), (chosen, rejected, *target))
        completions, target = completions[:2], completions[2:]
    elif target:
        raise InputError("`target` needs `prompt`, the text that it follows")
    else:
        if chosen == rejected:
            raise InputError("chosen and rejected are equal")
        prompt, completions = _implicit(chosen, rejected)
    margin = None if row.get("margin") is None else _number(row["margin"], "margin")
    belief = _stated(row, completions)
    return Record(
        prompt, completions, margin=margin, belief=belief, target=next(iter(target), None)
    )


def _unpaired(row: Mapping[str, Any], _: BeliefPairs) -> Record:
    prompt, completions = _explicit(_content(row, "prompt"), (_content(row, "completion"),))
    label = _field(row, "label")
    if type(label) not in (bool, int) or label not in (0, 1):
        raise InputError(f"`label` is {label!r:.40}, expected true, false, 0 or 1")
    ratio = None
    if row.get("density_ratio") is not None:
        ratio = _number(row["density_ratio"], "density_ratio")
        if ratio <= 0:
            raise InputError(f"`density_ratio` is {ratio:g}, expected above 0")
    belief = _stated(row, completions)
    return Record(prompt, completions, desirable=bool(label), belief=belief, density_ratio=ratio)


def _lists(row: Mapping[str, Any], _: BeliefPairs) -> Record:
    name = "completions_ids" if "completions_ids" in row else "completions"
    given, scores = _field(row, name), _field(row, "scores")
    if not isinstance(given, list) or len(given) < 2:
        raise InputError(f"`{name}` must be a list of at least two completions")
    if not isinstance(scores, list) or len(scores) != len(given):
        raise InputError(f"`scores` must be a list of {len(given)} numbers, one per completion")
    form = _ids if name == "completions_ids" else _text_or_messages
    prompt, completions = _explicit(
        _content(row, "prompt"), tuple(form(item, name) for item in given)
    )
    return Record(prompt, completions, scores=tuple(_number(s, "scores") for s in scores))


def _explicit(
    prompt: Content, completions: tuple[Content, ...]
) -> tuple[Content, tuple[Content, ...]]:
    """Checks that prompt and completions go together; messages lose a repeated prompt."""
    chat = isinstance(completions[0], list)
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and not chat:
        raise InputError("`prompt` holds messages, so completions must be messages too")
    if chat and isinstance(prompt, list):
        size = len(prompt)
        completions = tuple(c[size:] if c[:size] == prompt else c for c in completions)
        _check_turns(prompt, completions)
    return prompt, completions


def _implicit(chosen: Content, rejected: Content) -> tuple[Content, tuple[Content, Content]]:
    """Splits two dialogues or texts with the same beginning into a prompt and what differs."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        hh = chosen.startswith(HUMAN) and rejected.startswith(HUMAN)
        cut = _hh_prompt(chosen, rejected) if hh else _common_words(chosen, rejected)
        return chosen[:cut], (chosen[cut:], rejected[cut:])
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise InputError("`chosen_ids` and `rejected_ids` need `prompt_ids`")
    turns = 0
    for mine, other in zip(chosen, rejected, strict=False):
        if mine != other:
            break
        turns += 1
    completions = (chosen[turns:], rejected[turns:])
    _check_turns(chosen[:turns], completions)
    return chosen[:turns], completions


def _hh_prompt(chosen: str, rejected: str) -> int:
    """Where the last answer begins; both dialogues must be the same up to it."""
    ends = []
    for text in (chosen, rejected):
        place = text.rfind(ASSISTANT)
        ends.append(place + len(ASSISTANT))
        if place < 0 or text.rfind(HUMAN) > place:
            raise InputError("a dialogue does not end with an answer after `Assistant:`")
    if chosen[: ends[0]] != rejected[: ends[1]]:
        raise InputError(
            "prompt mismatch: chosen and rejected dialogues differ before their last answers"
        )
    return ends[0]


def _common_words(chosen: str, rejected: str) -> int:
    """Length of the common prefix in whole words; a space before the next word is not part of it.

    A prefix in characters would leave the first letters of two similar answers in the prompt.
    """
    common = os.path.commonprefix([chosen, rejected])
    cut = max((i + 1 for i, letter in enumerate(common) if letter.isspace()), default=0)
    cut -= common[cut - 1 : cut] == " "
    if not common[:cut].strip():
        raise InputError("prompt mismatch: chosen and rejected share no first word")
    return cut


def _check_turns(prompt: list[dict[str, Any]], completions: Sequence[Content]) -> None:
    if not prompt or prompt[-1]["role"] == "assistant":
        raise InputError(
            "prompt mismatch: the turns before the response do not end with a question"
        )
    for turns in completions:
        other = next((t["role"] for t in turns if t["role"] != "assistant"), None)  # type: ignore[index]
        if other is not None:
            raise InputError(f"a response holds a turn of {other!r}, expected the assistant only")


def _stated(row: Mapping[str, Any], completions: Sequence[Content]) -> StatedBelief | None:
    if "belief" not in row and "beliefs" not in row:
        return None
    text, names = _string(row, "belief"), _field(row, "beliefs")
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise InputError("`beliefs` must be a list of texts")
    if not all(isinstance(c, str) and c.startswith(text) for c in completions):
        raise InputError(f"completions must begin with the belief {text!r:.40}")
    target = _probabilities(_field(row, "probabilities"), len(names))
    return StatedBelief(text, tuple(names), target)


# -- formats of data sets ------------------------------------------------------------------------


def _gdpo(row: Mapping[str, Any], belief_pairs: BeliefPairs) -> Record:
    """Section 4 of arXiv:2412.20299: `<Q>prompt<A>`, then `d<choice>answer` or `d` and a review."""
    probabilities = _field(row, "probabilities")
    count = len(probabilities) if isinstance(probabilities, list) else 0
    if not 2 <= count <= 10:
        raise InputError("`probabilities` must be a list of 2 to 10 numbers, one per digit")
    target = _probabilities(probabilities, count)
    stated = []
    for side in ("accept", "reject"):
        number = _field(row, f"{side}_choice_id")
        if type(number) is not int or not 0 <= number < count:
            raise InputError(f"`{side}_choice_id` is {number!r:.40}, expected 0 to {count - 1}")
        named = "accept_choice" in row
        stated.append(f"{number}<{_string(row, f'{side}_choice')}" if named else str(number))
    mark = ">" if "accept_choice" in row else ""
    first, second = stated[0], stated[0 if belief_pairs == "conditioned" else 1]
    context = row.get("context") or ""
    return Record(
        f"{context}<Q>{_string(row, 'prompt')}<A>",
        (
            f"{first}{mark}{_response(row, 'accept_response')}",
            f"{second}{mark}{_response(row, 'reject_response')}",
        ),
        belief=StatedBelief(first, tuple(map(str, range(count))), target),
    )


def _pandalm(row: Mapping[str, Any], _: BeliefPairs) -> Record:
    """The response that most annotators prefer; the margin is the lead in shares of votes."""
    prompt, responses, shares = _votes(row)
    if shares[0] == shares[1]:
        raise InputError("the annotators prefer neither response (a tie)")
    ordered = responses if shares[0] > shares[1] else responses[::-1]
    return Record(prompt, ordered, margin=abs(shares[0] - shares[1]))


def _pandalm_soft(row: Mapping[str, Any], _: BeliefPairs) -> Record:
    """Both responses with their shares of the votes as scores; a tie is half a vote for each."""
    prompt, responses, shares = _votes(row)
    if responses[0] == responses[1]:
        raise InputError("both responses are equal")
    return Record(prompt, responses, scores=shares)


def _votes(row: Mapping[str, Any]) -> tuple[str, tuple[str, str], tuple[float, float]]:
    votes = Counter(_field(row, f"annotator{number}") for number in (1, 2, 3))
    if unknown := set(votes) - {0, 1, 2}:
        raise InputError(f"an annotator's vote is {unknown.pop()!r:.40}, expected 1, 2 or 0 (tie)")
    instruction, extra = _string(row, "instruction"), row.get("input") or ""
    prompt = "\n\n".join(part for part in (instruction, extra) if part) + "\n\n"
    shares = tuple((votes[side] + votes[0] / 2) / 3 for side in (1, 2))
    return (
        prompt,
        (_string(row, "response1"), _string(row, "response2")),
        (shares[0], shares[1]),
    )


def _llmbar(row: Mapping[str, Any], _: BeliefPairs) -> Record:
    """LLMBar (arXiv:2310.07641): the label is the number of the better output."""
    outputs = (_string(row, "output_1"), _string(row, "output_2"))
    label = _field(row, "label")
    if label not in (1, 2):
        raise InputError(f"`label` is {label!r:.40}, expected 1 or 2")
    ordered = outputs if label == 1 else outputs[::-1]
    return Record(f"{_string(row, 'input')}\n\n", ordered)


_PARSERS: dict[Kind, Callable[[Mapping[str, Any], BeliefPairs], Record]] = {
    "pairs": _pairs,
    "unpaired": _unpaired,
    "lists": _lists,
    "gdpo": _gdpo,
    "pandalm": _pandalm,
    "pandalm_soft": _pandalm_soft,
    "llmbar": _llmbar,
}


# -- fields --------------------------------------------------------------------------------------


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise InputError(f"field `{name}` is missing")
    return row[name]


def _string(row: Mapping[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise InputError(f"`{name}` is a {type(value).__name__}, expected text")
    return value


def _response(row: Mapping[str, Any], name: str) -> str:
    """A text that must not be empty by itself, because a belief is put before it."""
    text = _string(row, name)
    if not text.strip():
        raise InputError("a response is empty")
    return text


def _content(row: Mapping[str, Any], name: str) -> Content:
    ids = f"{name}_ids"
    if name in row and ids in row:
        raise InputError(f"both `{name}` and `{ids}` are given, expected one")
    return _ids(row[ids], ids) if ids in row else _text_or_messages(_field(row, name), name)


def _text_or_messages(value: Any, name: str) -> Content:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InputError(f"`{name}` is a {type(value).__name__}, expected text or messages")
    check_messages(value)
    return value


def _ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise InputError(f"`{name}` must be a list of token ids")
    return tuple(value)


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"`{name}` holds {value!r:.40}, expected finite numbers")
    return float(value)


def _probabilities(values: Any, count: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != count:
        raise InputError(f"`probabilities` must be a list of {count} numbers, one per belief")
    numbers = [_number(value, "probabilities") for value in values]
    total = sum(numbers)
    if min(numbers) < 0 or abs(total - 1) > SUM_TOLERANCE:
        raise InputError(
            f"`probabilities` sum to {total:.4g} with least {min(numbers):.4g}, expected numbers "
            f">= 0 that sum to 1 within {SUM_TOLERANCE}"
        )
    return tuple(number / total for number in numbers)


def _filled(content: Content) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    if isinstance(content, tuple):
        return bool(content)
    return any(str(message.get("content") or "").strip() for message in content)
