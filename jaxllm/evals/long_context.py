"""Long-context benchmarks: records of LongBench, LooGLE and BABILong, and their metrics.

LongBench (arXiv:2308.14508), LooGLE (arXiv:2311.04939), BABILong (arXiv:2406.10149), as HeadKV
(arXiv:2410.19258, appendix) runs them. Readers take rows of JSONL files; scores are in [0, 1].
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import InputError
from jaxllm.evals.text import character_similarity, exact_match, rouge_l, token_f1


@dataclass(frozen=True)
class LongContextRecord:
    """One question about one long text.

    Attributes:
      task: Data set, such as `hotpotqa`, `loogle_longdep_qa` or `qa1`.
      context: The long text.
      question: The question; empty for summaries.
      answers: References, any of which is right.
      labels: Closed set of answers, where the task has one.
      identity: Carried through.
    """

    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    labels: tuple[str, ...] = ()
    identity: str = ""


# -- records --------------------------------------------------------------------------------------


def longbench_record(row: Mapping[str, Any], where: str) -> LongContextRecord:
    """Reads a row of LongBench: `input`, `context`, `answers`, `dataset`, `all_classes`, `_id`.

    Args:
      row: The JSON object.
      where: File and line, for messages.

    Raises:
      InputError: A field that is missing or of another kind.
    """
    classes = row.get("all_classes") or ()
    return LongContextRecord(
        task=_text(row, "dataset", where),
        context=_text(row, "context", where),
        question=_text(row, "input", where),
        answers=_texts(row.get("answers"), "answers", where),
        labels=_texts(classes, "all_classes", where) if classes else (),
        identity=str(row.get("_id", "")),
    )


def loogle_records(row: Mapping[str, Any], where: str) -> list[LongContextRecord]:
    """Reads a row of LooGLE in either of its forms.

    The first release has a document a row, `input` with `qa_pairs` of `Q` and `A` (as a list, or as
    the text of a Python literal, which is parsed but never run) or, for summaries, `output`. The
    later one has a question a row: `context`, `question`, `answer`, `task`.

    Raises:
      InputError: A field that is missing or of another kind.
    """
    if "question" in row:
        task = _text(row, "task", where) if "task" in row else "longdep_qa"
        answers = _texts([row.get("answer")], "answer", where)
        context, question = (_text(row, name, where) for name in ("context", "question"))
        identity = str(row.get("id", ""))
        return [LongContextRecord(f"loogle_{task}", context, question, answers, (), identity)]
    context, title = _text(row, "input", where), str(row.get("title", ""))
    pairs = row.get("qa_pairs", "none")
    if isinstance(pairs, str) and pairs != "none":
        try:
            pairs = ast.literal_eval(pairs)
        except (ValueError, SyntaxError):
            raise InputError(f"{where}: qa_pairs is not a list of pairs") from None
    if pairs in ("none", None, []):
        answers = _texts([row.get("output")], "output", where)
        return [LongContextRecord("loogle_summarization", context, "", answers, (), title)]
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise InputError(f"{where}: qa_pairs is not a list of pairs")
    return [
        LongContextRecord(
            task=_loogle_task(pair),
            context=context,
            question=_text(pair, "Q", f"{where}: pair {number}"),
            answers=_texts([pair.get("A")], "A", f"{where}: pair {number}"),
            identity=title,
        )
        for number, pair in enumerate(pairs)
    ]


def _loogle_task(pair: Mapping[str, Any]) -> str:
    """Returns the task of a question: long ones may say which of four kinds they are."""
    kind = str(pair.get("type", "")).lower()
    for word in ("comprehension", "retrieval", "timeline", "computation"):
        if word in kind:
            return f"loogle_{word}"
    return "loogle_shortdep_qa" if "S" in pair and not kind else "loogle_longdep_qa"


def babilong_record(row: Mapping[str, Any], task: str, where: str) -> LongContextRecord:
    """Reads a row of BABILong: `input`, `question`, `target`.

    Args:
      row: The JSON object.
      task: `qa1` to `qa10`, which decides the labels.
      where: File and line, for messages.

    Raises:
      InputError: An unknown task, a missing field, or a target outside the labels.
    """
    if task not in BABILONG_LABELS:
        raise InputError(f"task {task!r} is not one of {', '.join(BABILONG_LABELS)}")
    target, labels = _text(row, "target", where), BABILONG_LABELS[task]
    unknown = [part for part in _targets(target) if part not in labels]
    if unknown:
        raise InputError(f"{where}: target {unknown[0]!r} is not one of {', '.join(labels)}")
    context, question = (_text(row, name, where) for name in ("input", "question"))
    return LongContextRecord(task, context, question, (target,), labels)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} is {type(value).__name__}, expected a text")
    return value


def _texts(values: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"{where}: field {name!r} is {values!r:.40}, expected a list of texts")
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: field {name!r} holds something that is not a text")
    return tuple(values)


# -- prompts --------------------------------------------------------------------------------------


def truncate_middle(ids: Sequence[int], limit: int) -> list[int]:
    """Keeps the first and last `limit // 2` tokens of a prompt longer than `limit`.

    Instructions stand at both ends. An odd limit gives one token less, as the released code does.

    Raises:
      InputError: A limit below 2.
    """
    if limit < 2:
        raise InputError(f"limit {limit} leaves nothing of a prompt, expected at least 2")
    ids = list(ids)
    return ids if len(ids) <= limit else ids[: limit // 2] + ids[-(limit // 2) :]


# -- metrics --------------------------------------------------------------------------------------

_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_NAMES = ("bill", "fred", "jeff", "mary")
BABILONG_LABELS: Mapping[str, tuple[str, ...]] = {
    "qa1": _ROOMS,
    "qa2": _ROOMS,
    "qa3": _ROOMS,
    "qa4": _ROOMS,
    "qa5": ("apple", "football", "milk", *_NAMES),
    "qa6": ("no", "yes"),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": ("no", "yes"),
    "qa10": ("maybe", "no", "yes"),
}
"""Answers of each task; a target may name several, with commas between."""


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best token F1 over the references."""
    return max(token_f1(prediction, answer).f1 for answer in answers)


def best_rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Best ROUGE-L F over the references."""
    return max(rouge_l(prediction, answer).f1 for answer in answers)


def best_exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Whether the prediction is one of the references after SQuAD normalisation."""
    return float(any(exact_match(prediction, answer) for answer in answers))


def number_share(prediction: str, answers: Sequence[str]) -> float:
    """LongBench's score of counts and paragraph numbers: how much of what is named is right.

    The share of the numbers in the prediction that equal the first number of the answer, which is
    such as `12` or `Paragraph 12`.

    Raises:
      InputError: An answer without a number.
    """

    def score(answer: str) -> float:
        wanted = re.search(r"\d+", answer)
        if wanted is None:
            raise InputError(f"answer {answer!r} has no number, which its task needs")
        named = re.findall(r"\d+", prediction)
        return named.count(wanted[0]) / len(named) if named else 0.0

    return max(map(score, answers))


def code_similarity(prediction: str, answers: Sequence[str]) -> float:
    """LongBench's score of code: character similarity of the first line that is code.

    Lines with a backquote, `#` or `//` are comments or prose.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search("`|#|//", line)), "")
    return max(character_similarity(code, answer) for answer in answers)


def classification(prediction: str, answers: Sequence[str], labels: Sequence[str]) -> float:
    """LongBench's score of a closed set: 1 / (labels named) if the right one is among them.

    A label that is part of the right answer, but not the answer, does not count as named.
    """

    def score(answer: str) -> float:
        named = [label for label in labels if label in prediction]
        named = [label for label in named if label == answer or label not in answer]
        return 1 / len(named) if answer in named else 0.0

    return max(map(score, answers))


def label_in_first_sentence(
    prediction: str,
    target: str,
    question: str,
    labels: Sequence[str],
    *,
    substrings: bool = False,
) -> bool:
    """BABILong's match: the first sentence names the target and no other label.

    Labels that the question names are not looked at. Of a target with commas all parts must be
    named and nothing else.

    Args:
      prediction: The model's text.
      target: The right answer.
      question: The question.
      labels: All answers of the task.
      substrings: Find labels inside words too, as the released code does: it can then never accept
        the answer "none", which names "one" as well.
    """

    def named_in(text: str) -> set[str]:
        if substrings:
            return {label for label in labels if label in text}
        return {label for label in labels if re.search(rf"\b{re.escape(label)}\b", text)}

    sentence = re.split(r"\.|<context>|<example>|question", prediction.lower(), maxsplit=1)[0]
    return named_in(sentence) - named_in(question.lower()) == set(_targets(target))


def _targets(target: str) -> list[str]:
    return [part.strip() for part in target.lower().split(",")]


_QA = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa")
_LOOGLE_QA = ("loogle_shortdep_qa", "loogle_longdep_qa")
_SUMMARIES = ("gov_report", "qmsum", "multi_news", "samsum", "loogle_summarization")
_NUMBERS = ("passage_count", "passage_retrieval_en")
_CODE = ("lcc", "repobench-p")
_CLOSED = ("trec",)
_FIRST_LINE = ("trec", "triviaqa", "samsum")
MAX_NEW_TOKENS: Mapping[str, int] = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "loogle_comprehension": 64,
    "loogle_retrieval": 64,
    "loogle_timeline": 32,
    "loogle_computation": 32,
    "babilong": 15,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "lcc": 64,
    "repobench-p": 64,
}
"""New tokens: down to BABILong, whose tasks share one limit, in HeadKV's evaluation; then in
LongBench's."""


def score_record(record: LongContextRecord, prediction: str) -> float:
    """Returns the task's own metric.

    Raises:
      InputError: A task whose metric is not among these.
    """
    task = record.task
    if task in BABILONG_LABELS:
        answer = record.answers[0]
        return float(label_in_first_sentence(prediction, answer, record.question, record.labels))
    if task in _FIRST_LINE:  # The few-shot tasks: a model goes on with another example.
        prediction = prediction.lstrip("\n").split("\n")[0]
    if task in _CLOSED:
        return classification(prediction, record.answers, record.labels)
    metrics: dict[str, Callable[[str, Sequence[str]], float]] = {
        **dict.fromkeys((*_QA, *_LOOGLE_QA), qa_f1),
        **dict.fromkeys(_SUMMARIES, best_rouge_l),
        **dict.fromkeys(_NUMBERS, number_share),
        **dict.fromkeys(_CODE, code_similarity),
    }
    if task.startswith("loogle_") and task not in metrics:
        return qa_f1(prediction, record.answers)
    if task not in metrics:
        raise InputError(f"task {task!r} has no metric here, expected one of {', '.join(metrics)}")
    return metrics[task](prediction, record.answers)
