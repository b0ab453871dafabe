"""Long texts with a needle, to measure heads by and to test caches on.

* `needle_example`: one fact hidden in a text (HeadKV-R and ER, section 3.1 of arXiv:2410.19258).
* `reasoning_example`: the needle (r, c1, c2) of HeadKV-R2: statements to reason over, a wrong
  answer and the right one, of which only the last scores.
* `babi_records`: facts of QA1 to QA3 of bAbI among other sentences (BABILong, arXiv:2406.10149), as
  the records that `evals.long_context.babilong_record` reads.

A prompt is made of separately encoded pieces, so that spans are exact by construction: looking for
the needle's tokens in the whole prompt, as the released code does, finds a wrong place whenever the
tokenizer merges across the seam or puts a mark in front.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from jaxllm.data.images import bundled
from jaxllm.errors import InputError

NeedleOrder = Literal["paper", "released"]
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)")
_MARGIN = 200
"""Tokens of a length that the released code leaves to needle, question and answer."""


class Tokenizer(Protocol):
    """What the builders need; `encode` must add no marks of its own."""

    def encode(self, text: str) -> Sequence[int]:
        """Returns the token ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids."""
        ...


@dataclass(frozen=True)
class Example:
    """A prompt with a known answer.

    Attributes:
      prompt_ids: All tokens of the prompt.
      answer_ids: Tokens of the answer, to be generated or forced.
      span: Start and end of the answer's copy in the prompt.
      distractor: Start and end of the wrong answer c1, None without one.
      answer: Text of the answer.
      question: Text of the question.
      depth: Where the needle was asked to be, in percent.
      length: Tokens asked for.
      question_start: Where the question begins; before it is the context.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    span: tuple[int, int]
    distractor: tuple[int, int] | None
    answer: str
    question: str
    depth: float
    length: int
    question_start: int


_PEOPLE = (
    "John",
    "Mary",
    "Daniel",
    "Sandra",
    "Oliver",
    "Helen",
    "Peter",
    "Alice",
    "Victor",
    "Nora",
)
_THINGS = (
    *("painting old ships", "growing white roses", "baking rye bread", "playing the cello"),
    *("collecting sea glass", "reading star maps", "carving chess pieces", "mending clocks"),
)
_PLACES = (
    "in the stone mill",
    "under the east bridge",
    "behind the blue chapel",
    "at the salt pier",
)
_OBJECTS = ("copper key", "green lantern", "silver flute", "paper crown", "glass compass")


def haystack() -> str:
    """Returns the bundled text of Shakespeare's plays."""
    return (bundled("text") / "tinyshakespeare.txt").read_text(encoding="utf-8")


def needle_example(
    tokenizer: Tokenizer,
    text: str,
    *,
    length: int,
    depth: float,
    seed: int,
    bos: int | None = None,
    margin: int = _MARGIN,
) -> Example:
    """Hides one fact in a text and asks for it; the answer is the fact's own words.

    Args:
      tokenizer: Encodes the pieces.
      text: Haystack of at least `length - margin` tokens.
      length: Tokens of haystack and `margin` together.
      depth: Where to insert, in percent of the haystack; moved back to the end of a sentence.
      seed: Chooses the fact.
      bos: Token put first, which shifts all spans by one.
      margin: Tokens of `length` left to needle and question.

    Raises:
      InputError: A depth outside [0, 100], a haystack that is too short, or a tokenizer that adds
        marks.
    """
    rng = np.random.default_rng(seed)
    person, thing, place = (str(rng.choice(x)) for x in (_PEOPLE, _OBJECTS, _PLACES))
    answer = f"{person} hid the {thing} {place}."
    question = f"Where did {person} hide the {thing}?"
    return _build(tokenizer, text, [("answer", answer)], question, length, depth, bos, margin)


def reasoning_example(
    tokenizer: Tokenizer,
    text: str,
    *,
    length: int,
    depth: float,
    seed: int,
    bos: int | None = None,
    margin: int = _MARGIN,
    order: NeedleOrder = "paper",
) -> Example:
    """Hides a needle (r, c1, c2): two ages and what the two like; asks about one by age.

    Args:
      tokenizer: As for `needle_example`, as are all other arguments but `order`.
      text: Haystack.
      length: Tokens.
      depth: Percent.
      seed: Chooses names, ages, likings and which of the two is asked for.
      bos: First token.
      margin: Tokens for needle and question.
      order: `paper` puts r, c1, c2 in this order, `released` c2, c1, r (the released file).
    """
    if order not in ("paper", "released"):
        raise InputError(f"needle order {order!r} is not one of paper, released")
    rng = np.random.default_rng(seed)
    first, second = (str(name) for name in rng.choice(_PEOPLE, 2, replace=False))
    liked = [str(thing) for thing in rng.choice(_THINGS, 2, replace=False)]
    ages = rng.choice(np.arange(20, 60), 2, replace=False).tolist()
    older = bool(rng.integers(2))
    right = int(np.argmax(ages) if older else np.argmin(ages))
    likings = [
        f"{name} likes {what} most." for name, what in zip((first, second), liked, strict=True)
    ]
    parts = [
        ("reason", f"{first} is {ages[0]} years old and {second} is {ages[1]}."),
        ("distractor", likings[1 - right]),
        ("answer", likings[right]),
    ]
    question = f"What does the {'older' if older else 'younger'} of {first} and {second} like most?"
    if order == "released":
        parts.reverse()
    return _build(tokenizer, text, parts, question, length, depth, bos, margin)


def example_grid(
    kind: Literal["needle", "reasoning"],
    tokenizer: Tokenizer,
    text: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    needles: int,
    seed: int,
    **options: Any,
) -> Iterator[Example]:
    """Yields every combination of needle, length and depth (the paper's: 3 x 5 x 10, 2 x 5 x 10).

    Args:
      kind: Which builder.
      tokenizer: Encodes the pieces.
      text: Haystack.
      lengths: Tokens.
      depths: Percent.
      needles: Different needles.
      seed: With the number of a needle it makes the needle's own seed.
      **options: `bos`, `margin` and, for `reasoning`, `order`.
    """
    build = {"needle": needle_example, "reasoning": reasoning_example}[kind]
    for number in range(needles):
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        for length in lengths:
            for depth in depths:
                yield build(tokenizer, text, length=length, depth=depth, seed=own, **options)


def insertion_point(text: str, depth: float) -> int:
    """Returns the character behind the last end of a sentence at or before `depth` percent."""
    wanted = round(len(text) * depth / 100)
    if wanted >= len(text):
        return len(text)
    ends = [match.end() for match in _SENTENCE_END.finditer(text, 0, wanted + 1)]
    return max((end for end in ends if end <= wanted), default=0)


def _build(
    tokenizer: Tokenizer,
    text: str,
    parts: list[tuple[str, str]],
    question: str,
    length: int,
    depth: float,
    bos: int | None,
    margin: int,
) -> Example:
    if not 0 <= depth <= 100:
        raise InputError(f"depth {depth} must be between 0 and 100 percent")
    if len(tokenizer.encode("")):
        raise InputError("the tokenizer adds marks to an empty text; turn that off")
    wanted = length - margin
    # Twice the characters a token can be expected to have spare encoding a whole book each time.
    ids = list(tokenizer.encode(text[: 16 * max(wanted, 1)]))
    if len(ids) < wanted:
        ids = list(tokenizer.encode(text))
    if wanted < 1 or len(ids) < wanted:
        raise InputError(
            f"length {length} less {margin} for needle and question, the haystack has {len(ids)}"
        )
    context = tokenizer.decode(ids[:wanted])
    cut = insertion_point(context, depth)
    prompt: list[int] = [] if bos is None else [bos]
    prompt += tokenizer.encode(context[:cut])
    spans: dict[str, tuple[int, int]] = {}
    for name, sentence in parts:
        pieces = tokenizer.encode(f" {sentence}")
        spans[name] = (len(prompt), len(prompt) + len(pieces))
        prompt += pieces
    prompt += tokenizer.encode(context[cut:])
    question_start = len(prompt)
    prompt += tokenizer.encode(f"\n\nQuestion: {question}\nAnswer:")
    start, end = spans["answer"]
    return Example(
        prompt_ids=tuple(prompt),
        answer_ids=tuple(prompt[start:end]),
        span=(start, end),
        distractor=spans.get("distractor"),
        answer=dict(parts)["answer"],
        question=question,
        depth=depth,
        length=length,
        question_start=question_start,
    )


# -- bAbI -----------------------------------------------------------------------------------------

_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_MOVES = ("moved to", "went to", "travelled to", "journeyed to", "went back to")
_ITEMS = ("apple", "football", "milk")
_TAKES = ("picked up", "took", "grabbed", "got")
_DROPS = ("dropped", "put down", "left", "discarded")


def babi_records(
    task: Literal["qa1", "qa2", "qa3"],
    count: int,
    *,
    seed: int,
    facts: int = 8,
    filler: Sequence[str] = (),
    sentences: int = 0,
) -> list[dict[str, str]]:
    """Returns stories of people, rooms and objects with a question on one, two or three facts.

    QA1 asks where a person is, QA2 where an object is (who holds it, where they went), QA3 where an
    object was before it came to a room (the same over time).

    Args:
      task: Which question.
      count: Records.
      seed: Each record has its own key (seed, number).
      facts: Sentences of the story, at least 1, 2, 4 for the three tasks.
      filler: Sentences to put in between.
      sentences: How many of them, drawn in order from a random start.

    Returns:
      Records `input`, `question`, `target`.

    Raises:
      InputError: An unknown task, too few facts, or no filler to draw from.
    """
    fewest = {"qa1": 1, "qa2": 2, "qa3": 4}
    if task not in fewest:
        raise InputError(f"task {task!r} is not one of {', '.join(fewest)}")
    if facts < fewest[task]:
        raise InputError(f"{facts} facts, {task} needs at least {fewest[task]}")
    if sentences and not filler:
        raise InputError(f"{sentences} sentences of filler asked for, none given")
    records = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        found = None
        while found is None:  # A story may happen to hold no answerable question.
            found = _story(task, facts, rng)
        story, question, target = found
        start = int(rng.integers(len(filler))) if sentences else 0
        between = [filler[(start + i) % len(filler)] for i in range(sentences)]
        # The story keeps its order; each filler sentence falls into one of its gaps.
        gaps = np.sort(rng.integers(0, len(story) + 1, sentences))
        lines: list[str] = []
        for i, sentence in enumerate([*story, ""]):
            lines += [between[j] for j in np.flatnonzero(gaps == i)]
            lines += [sentence] if sentence else []
        records.append({"input": " ".join(lines), "question": question, "target": target})
    return records


def _story(task: str, facts: int, rng: np.random.Generator) -> tuple[list[str], str, str] | None:
    """Sentences, a question and its answer, or None where nothing can be asked."""
    people = [str(x) for x in rng.choice(_PEOPLE[:4], 4, replace=False)]
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    trail: dict[str, list[str]] = {}
    story = []

    def pick(options: Sequence[str]) -> str:
        return str(options[int(rng.integers(len(options)))])

    for _ in range(facts):
        person = pick(people if task == "qa1" else people[:2])
        held = [item for item, who in holder.items() if who == person]
        free = [item for item in _ITEMS if item not in holder]
        action = "move" if task == "qa1" or person not in place else pick(("move", "move", "item"))
        if action == "item" and held:
            item = pick(held)
            story.append(f"{person} {pick(_DROPS)} the {item}.")
            del holder[item]
        elif action == "item" and free:
            item = pick(
                [x for x in free if trail.get(x, [place[person]])[-1] == place[person]] or free
            )
            if trail.get(item, [place[person]])[-1] != place[person]:
                return None  # Nobody can take what lies in another room.
            story.append(f"{person} {pick(_TAKES)} the {item}.")
            holder[item] = person
            trail.setdefault(item, [place[person]])
        else:
            room = pick([x for x in _ROOMS if x != place.get(person)])
            story.append(f"{person} {pick(_MOVES)} the {room}.")
            place[person] = room
            for item in held:
                trail[item].append(room)
    if task == "qa1":
        person = pick(list(place))
        return story, f"Where is {person}?", place[person]
    if task == "qa2":
        return (
            (story, f"Where is the {(item := pick(list(trail)))}?", trail[item][-1])
            if trail
            else None
        )
    moved = [item for item, rooms in trail.items() if len(rooms) > 1]
    if not moved:
        return None
    item = pick(moved)
    return story, f"Where was the {item} before the {trail[item][-1]}?", trail[item][-2]
