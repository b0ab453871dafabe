"""Long-context records and metrics on cases worked out by hand, and the BABILong files."""

from __future__ import annotations

import json

import pytest
from kv_reference import BABILONG, needs

from jaxllm.data.records import read_jsonl
from jaxllm.errors import InputError
from jaxllm.evals.long_context import (
    BABILONG_LABELS,
    MAX_NEW_TOKENS,
    LongContextRecord,
    babilong_record,
    best_rouge_l,
    classification,
    label_in_first_sentence,
    longbench_record,
    loogle_records,
    qa_f1,
    score_record,
    truncate_middle,
)

LONGBENCH = {
    "input": "Who kept the lamp?",
    "context": "Nora kept the lamp. Peter sold oil.",
    "answers": ["Nora", "old Nora"],
    "length": 8,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "a1",
}


def test_longbench_rows():
    record = longbench_record(LONGBENCH, "f:1")
    assert record == LongContextRecord(
        "hotpotqa", LONGBENCH["context"], "Who kept the lamp?", ("Nora", "old Nora"), (), "a1"
    )
    closed = {**LONGBENCH, "dataset": "trec", "all_classes": ["City", "Date"]}
    assert longbench_record(closed, "f:1").labels == ("City", "Date")
    for change, message in [
        ({"context": None}, "f:1: field 'context' is NoneType"),
        ({"answers": []}, r"f:1: field 'answers' is \[\]"),
        ({"answers": "Nora"}, "f:1: field 'answers' is 'Nora'"),
        ({"answers": [3]}, "f:1: field 'answers' holds something"),
    ]:
        with pytest.raises(InputError, match=message):
            longbench_record({**LONGBENCH, **change}, "f:1")


def test_loogle_rows_of_both_releases():
    pairs = [{"Q": "Who?", "A": "It's Nora", "S": ["Nora kept"]}, {"Q": "When?", "A": "1900"}]
    old = {
        "input": "Nora kept the lamp.",
        "title": "Lamps",
        "qa_pairs": str(pairs),
        "output": "none",
    }
    found = loogle_records(old, "f:2")
    assert [record.task for record in found] == ["loogle_shortdep_qa", "loogle_longdep_qa"]
    assert found[0].answers == ("It's Nora",) and found[1].question == "When?"
    assert found == loogle_records({**old, "qa_pairs": pairs}, "f:2")
    (summary,) = loogle_records({**old, "qa_pairs": "none", "output": "A lamp."}, "f:2")
    assert summary.task == "loogle_summarization" and summary.answers == ("A lamp.",)
    new = {"context": "Text.", "question": "Who?", "answer": "Nora", "task": "timeline", "id": 7}
    (record,) = loogle_records(new, "f:3")
    assert (record.task, record.answers, record.identity) == ("loogle_timeline", ("Nora",), "7")
    for bad in ("[{'Q': f()}]", "[1, 2]", "__import__('os')"):
        with pytest.raises(InputError, match="f:2: qa_pairs is not a list of pairs"):
            loogle_records({**old, "qa_pairs": bad}, "f:2")
    kinds = {
        "Multiple information retrieval": "retrieval",
        "Timeline reorder": "timeline",
        "Computation": "computation",
        "Comprehension and reasoning": "comprehension",
        "Other": "longdep_qa",
    }
    for kind, task in kinds.items():
        (record,) = loogle_records({**old, "qa_pairs": [{**pairs[0], "type": kind}]}, "f:2")
        assert record.task == f"loogle_{task}" and MAX_NEW_TOKENS.get(record.task, 64) in (32, 64)
    with pytest.raises(InputError, match="pair 1: field 'Q'"):
        loogle_records({**old, "qa_pairs": [pairs[0], {"A": "x"}]}, "f:2")


def test_babilong_rows(tmp_path):
    path = tmp_path / "qa1.jsonl"
    row = {"input": "Nora moved to the garden.", "question": "Where is Nora? ", "target": "garden"}
    path.write_text(json.dumps(row) + "\n")
    (found,) = (babilong_record(x, "qa1", f"{path}:{i}") for i, x in enumerate(read_jsonl(path), 1))
    assert found.answers == ("garden",) and found.labels == BABILONG_LABELS["qa1"]
    with pytest.raises(InputError, match="target 'cellar' is not one of bathroom"):
        babilong_record({**row, "target": "cellar"}, "qa1", "f:1")
    with pytest.raises(InputError, match="task 'qa21'"):
        babilong_record(row, "qa21", "f:1")


@needs(BABILONG)
def test_the_babilong_files_hold_valid_records():
    for task in BABILONG_LABELS:
        path = BABILONG.parent / f"{task}.jsonl"
        records = [babilong_record(row, task, str(path)) for row in read_jsonl(path)]
        assert len(records) == 100
        for record in records:
            named = " ".join(record.answers[0].split(","))
            assert label_in_first_sentence(
                f"{named}. The garden", record.answers[0], record.question, record.labels
            )


def test_the_middle_of_a_long_prompt_goes():
    ids = list(range(10))
    assert truncate_middle(ids, 10) == ids and truncate_middle(ids, 11) == ids
    assert truncate_middle(ids, 6) == [0, 1, 2, 7, 8, 9]
    assert truncate_middle(ids, 7) == [0, 1, 2, 7, 8, 9]  # Two equal halves.
    with pytest.raises(InputError, match="limit 1"):
        truncate_middle(ids, 1)


def test_the_best_reference_counts():
    assert qa_f1("The lamp of Nora", ["Nora", "a lamp"]) == 0.5  # 1 of 3 words, either way.
    assert qa_f1("Nora", ["Nora", "Peter"]) == 1.0
    assert best_rouge_l("the old lamp", ["old lamp", "x"]) == pytest.approx(0.8)


def test_closed_sets_share_the_score_among_the_labels_named():
    labels = ["City", "Other location", "Date", "Other"]
    assert classification("City", ["City"], labels) == 1
    assert classification("City or Date", ["City"], labels) == 0.5
    assert classification("Date", ["City"], labels) == 0
    # "Other" is part of the right answer: it was not named on its own.
    assert classification("Other location", ["Other location"], labels) == 1
    # The answer itself counts even where another label contains it.
    assert classification("Other location", ["Other"], labels) == 0.5


def test_only_the_target_may_stand_in_the_first_sentence():
    def right(prediction, target="garden", question="Where is Nora?", task="qa1"):
        return label_in_first_sentence(prediction, target, question, BABILONG_LABELS[task])

    assert right("Nora is in the GARDEN. Before, in the kitchen.")
    assert not right("Garden or kitchen.")
    assert not right("I do not know. The garden.")
    assert not right("Nobody knows")
    # Labels of the question are not looked at.
    assert right("Before the kitchen it was in the garden", question="Before the kitchen?")
    assert right("the garden <example> kitchen")
    assert right("milk and apple", "apple,milk", "What?", "qa8")
    assert not right("milk", "apple,milk", "What?", "qa8")
    assert not right("milk, apple and football", "apple,milk", "What?", "qa8")
    assert right("none", "none", "How many?", "qa7")
    released = dict(question="How many?", labels=BABILONG_LABELS["qa7"], substrings=True)
    assert not label_in_first_sentence("none", "none", **released)
    assert label_in_first_sentence("two", "two", **released)
    assert right("no", "no", "Is it?", "qa6") and not right("yes and no", "no", "Is it?", "qa6")


def test_every_task_has_its_own_metric():
    def record(task, answers=("a lamp",), labels=(), question="?"):
        return LongContextRecord(task, "text", question, answers, labels)

    assert score_record(record("qasper"), "lamp") == 1
    assert score_record(record("loogle_longdep_qa"), "lamp") == 1
    assert score_record(record("loogle_timeline"), "lamp") == 1
    assert score_record(record("gov_report"), "lamp") == pytest.approx(2 / 3)  # ROUGE keeps "a".
    # Few-shot tasks: what follows the first line is another example.
    assert score_record(record("triviaqa"), "\nlamp\nQuestion: x") == 1
    assert score_record(record("qasper"), "lamp\nQuestion: x") < 1
    assert score_record(record("trec", ("Date",), ("Date", "City")), "Date\nCity") == 1
    rooms = BABILONG_LABELS["qa1"]
    assert score_record(record("qa1", ("garden",), rooms), "in the garden.") == 1
    assert score_record(record("passage_count", ("12",)), "12, or 3, or 12") == 2 / 3
    assert score_record(record("passage_count", ("12",)), "none") == 0
    found = score_record(record("passage_retrieval_en", ("Paragraph 7",)), "Paragraph 7.")
    assert found == 1
    with pytest.raises(InputError, match="'seven' has no number"):
        score_record(record("passage_count", ("seven",)), "7")
    # Of "x = 1" and "x = y" four of five characters agree.
    code = "\n# a comment\nx = y\nreturn x"
    assert score_record(record("lcc", ("x = 1",)), code) == pytest.approx(8 / 10)
    assert score_record(record("repobench-p", ("x",)), "```\n```") == 0
    with pytest.raises(InputError, match="task 'dureader' has no metric here"):
        score_record(record("dureader"), "x")
