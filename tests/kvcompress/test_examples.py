"""Needles and stories: exact spans, insertion at sentence ends, true answers, fixed seeds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.evals.long_context import babilong_record, label_in_first_sentence
from jaxllm.kvcompress.examples import (
    babi_records,
    example_grid,
    haystack,
    insertion_point,
    needle_example,
    reasoning_example,
)
from jaxllm.kvcompress.scores import find_span


class Bytes:
    """UTF-8 bytes, numbers 3 and up."""

    marks: tuple[int, ...] = ()

    def encode(self, text):
        return [*self.marks, *(3 + byte for byte in text.encode())]

    def decode(self, ids):
        return bytes(i - 3 for i in ids).decode(errors="ignore")


class Pairs(Bytes):
    """Merges every two bytes, so that pieces of a text depend on where it starts."""

    def encode(self, text):
        data = text.encode()
        return [
            int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2)
        ]

    def decode(self, ids):
        return (
            b"".join(int(i).to_bytes(2, "big") for i in ids).rstrip(b"\0").decode(errors="ignore")
        )


TEXT = haystack()[:6000]


@pytest.mark.parametrize("tokenizer", [Bytes(), Pairs()])
@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("build", [needle_example, reasoning_example])
def test_spans_are_the_answers_own_tokens(build, tokenizer, bos):
    for depth in (0, 37, 100):
        x = build(tokenizer, TEXT, length=900, depth=depth, seed=4, bos=bos, margin=100)
        start, end = x.span
        assert tokenizer.decode(x.prompt_ids[start:end]) == f" {x.answer}"
        assert x.prompt_ids[start:end] == x.answer_ids
        assert find_span(x.prompt_ids, x.answer_ids) == x.span
        shown = tokenizer.decode(x.prompt_ids[bos is not None :])
        assert shown.count(x.answer) == 1 and shown.endswith(f"Question: {x.question}\nAnswer:")
        assert (x.prompt_ids[0] == 1) == (bos == 1)


def test_needles_go_behind_the_end_of_a_sentence():
    for depth in (10, 50, 90):
        x = needle_example(Bytes(), TEXT, length=2000, depth=depth, seed=0)
        shown = Bytes().decode(x.prompt_ids)
        before = shown[: shown.index(x.answer)]
        assert before.rstrip()[-1] in ".!?"
        assert len(before) - 1 <= 1800 * depth / 100 < len(before) + 400
    assert insertion_point("One. Two three. Four", 60) == 4
    assert insertion_point("One. Two three. Four", 80) == 15
    assert insertion_point("One. Two three. Four", 100) == 20
    assert insertion_point('He said "No." Then 3.5 left', 90) == 13
    assert insertion_point("no end here", 50) == 0


def test_the_reasoning_needle_is_r_then_c1_then_c2_and_its_answer_is_right():
    seen = set()
    for seed in range(12):
        x = reasoning_example(Bytes(), TEXT, length=700, depth=50, seed=seed)
        shown = Bytes().decode(x.prompt_ids)
        ages = re.search(r"(\w+) is (\d+) years old and (\w+) is (\d+)\.", shown)
        wanted, a, b = re.search(r"the (older|younger) of (\w+) and (\w+)", x.question).groups()
        assert (a, b) == (ages[1], ages[3]) and ages[2] != ages[4]
        first = (int(ages[2]) > int(ages[4])) == (wanted == "older")
        assert x.answer.startswith(a if first else b)
        wrong = Bytes().decode(x.prompt_ids[slice(*x.distractor)])
        assert wrong.startswith(f" {b if first else a} likes ") and wrong[1:] != x.answer
        assert ages.start() < x.distractor[0] < x.span[0]
        seen.add((wanted, first))
        released = reasoning_example(
            Bytes(), TEXT, length=700, depth=50, seed=seed, order="released"
        )
        assert released.span[1] == released.distractor[0] and released.answer == x.answer
        late = Bytes().decode(released.prompt_ids).index(" years old")
        assert released.distractor[1] <= late
    assert len(seen) == 4


def test_a_grid_is_every_combination_and_repeats_itself():
    options = dict(lengths=(400, 600), depths=(0, 50, 100), needles=3, seed=7)
    grid = list(example_grid("reasoning", Bytes(), TEXT, order="released", **options))
    assert len(grid) == 18 and len({x.prompt_ids for x in grid}) == 18
    assert len({x.question for x in grid}) == 3
    assert grid == list(example_grid("reasoning", Bytes(), TEXT, order="released", **options))
    assert [(x.length, x.depth) for x in grid[:4]] == [(400, 0), (400, 50), (400, 100), (600, 0)]


def test_bad_examples_are_refused():
    good = dict(length=400, depth=50, seed=0)
    with pytest.raises(InputError, match="depth 101"):
        needle_example(Bytes(), TEXT, **{**good, "depth": 101})
    with pytest.raises(InputError, match="haystack has 11"):
        needle_example(Bytes(), "Short text.", **good)
    with pytest.raises(InputError, match="length 200 less 200"):
        needle_example(Bytes(), TEXT, **{**good, "length": 200})
    with pytest.raises(InputError, match="needle order 'c1'"):
        reasoning_example(Bytes(), TEXT, **good, order="c1")
    marking = Bytes()
    marking.marks = (1,)
    with pytest.raises(InputError, match="adds marks"):
        needle_example(marking, TEXT, **good)


# -- bAbI -----------------------------------------------------------------------------------------


def simulate(text):
    """Where everyone and everything is, and where things were, from the sentences alone."""
    people, holder, rooms = {}, {}, {}
    for sentence in re.findall(r"[A-Z][^.]*\.", text):
        words = sentence[:-1].split()
        if words[1] in ("moved", "went", "travelled", "journeyed"):
            people[words[0]] = words[-1]
            for item, who in holder.items():
                if who == words[0]:
                    rooms[item].append(words[-1])
        elif words[1] in ("picked", "took", "grabbed", "got"):
            item = words[-1]
            assert item not in holder  # Nobody takes what somebody holds,
            here = people[words[0]]
            assert rooms.setdefault(item, [here])[-1] == here  # nor what lies elsewhere.
            holder[item] = words[0]
        elif words[1] in ("dropped", "put", "left", "discarded"):
            assert holder.pop(words[-1]) == words[0]
    return people, rooms


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_stories_have_the_answer_their_sentences_give(task):
    filler = ["the rain fell on.", "no news came in."]
    records = babi_records(task, 60, seed=3, facts=10, filler=filler, sentences=5)
    for number, row in enumerate(records):
        people, rooms = simulate(row["input"])
        subject = row["question"][:-1].split()
        if task == "qa1":
            expected = people[subject[-1]]
        elif task == "qa2":
            expected = rooms[subject[-1]][-1]
        else:
            item, room = subject[3], subject[-1]
            assert rooms[item][-1] == room
            expected = rooms[item][-2]
            assert expected != room
        assert row["target"] == expected
        assert sum(row["input"].count(sentence) for sentence in filler) == 5
        record = babilong_record(row, task, f"row {number}")
        assert label_in_first_sentence(
            f"It is the {expected}.", expected, record.question, record.labels
        )
    assert len({row["target"] for row in records}) == 6
    assert records == babi_records(task, 60, seed=3, facts=10, filler=filler, sentences=5)
    assert records[:5] == babi_records(task, 5, seed=3, facts=10, filler=filler, sentences=5)


def test_bad_stories_are_refused():
    with pytest.raises(InputError, match="task 'qa4'"):
        babi_records("qa4", 1, seed=0)
    with pytest.raises(InputError, match="3 facts, qa3 needs at least 4"):
        babi_records("qa3", 1, seed=0, facts=3)
    with pytest.raises(InputError, match="5 sentences of filler"):
        babi_records("qa1", 1, seed=0, sentences=5)
    assert len(babi_records("qa3", 20, seed=0, facts=4)) == 20
    assert np.array(babi_records("qa2", 1, seed=0, facts=2)[0]["input"].split(".")).size == 3
