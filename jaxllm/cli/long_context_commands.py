"""`jaxllm heads`, and `jaxllm eval haystack`, `babilong` and `longbench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm.data.records import check_target, read_jsonl
from jaxllm.data.text_tokenizers import Tokenizer
from jaxllm.decoding.language_model import LanguageModel, load_language_model
from jaxllm.errors import InputError
from jaxllm.evals.long_context import (
    MAX_NEW_TOKENS,
    LongContextRecord,
    babilong_record,
    best_exact_match,
    best_rouge_l,
    longbench_record,
    loogle_records,
    qa_f1,
    score_record,
    truncate_middle,
)
from jaxllm.kvcompress.evaluate import Case, Question, evaluate_plans
from jaxllm.kvcompress.examples import Example, example_grid
from jaxllm.kvcompress.examples import haystack as shakespeare


def heads(options: argparse.Namespace) -> dict[str, Any]:
    """Measures head scores on generated examples and writes the official JSON file."""
    from jaxllm.kvcompress.measure import measure_heads
    from jaxllm.kvcompress.scores import top_heads, write_scores

    check_target(Path(options.output))
    model = load_language_model(options.model)
    kind = "reasoning" if options.estimator == "r2" else "needle"
    examples = _examples(model, kind, options)
    found = measure_heads(
        model, examples, options.estimator, gate=options.gate, batch=options.batch
    )
    # The file holds, for each head, one number per example that passed.
    write_scores(Path(options.output), found.runs.transpose(1, 2, 0))
    mean = found.runs.mean(axis=0)
    return {
        "output": options.output,
        "examples": len(examples),
        "passed": int(found.passed.sum()),
        "highest heads": [
            {"layer": layer, "head": head, "score": float(mean[layer, head])}
            for layer, head in top_heads(mean, min(10, mean.size))
        ],
    }


def haystack(options: argparse.Namespace) -> dict[str, Any]:
    """Asks for needles and scores the answers."""
    model = load_language_model(options.model)
    cases = []
    for example in _examples(model, options.kind, options):
        limit = options.max_new_tokens or len(example.answer_ids)
        cut = example.question_start
        question = Question(example.prompt_ids[cut:], _judge(options, example.answer), limit)
        cases.append(Case(example.prompt_ids[:cut], (question,)))
    return _table(model, cases, options)


def _judge(options: argparse.Namespace, answer: str) -> Callable[[str], float]:
    metric = {"f1": qa_f1, "exact": best_exact_match, "rouge": best_rouge_l}[options.metric]
    return lambda text: metric(text, [answer])


def records(options: argparse.Namespace) -> dict[str, Any]:
    """Asks the questions of benchmark files, each scored by its own metric."""
    found = [record for path in options.input for record in _read(options, Path(path))]
    model = load_language_model(options.model)
    tokenizer = model.need_tokenizer("an evaluation")
    cases = [_case(tokenizer, record, options) for record in found]
    return {"records": len(found), **_table(model, cases, options)}


def _table(model: LanguageModel, cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
    rows = evaluate_plans(model, cases, options.kv, options.protocol, batch=options.batch)
    return {"contexts": len(cases), "plans": rows}


def _examples(model: LanguageModel, kind: Any, options: argparse.Namespace) -> list[Example]:
    text = shakespeare() if options.text is None else _text(Path(options.text))
    tokenizer = model.need_tokenizer("a haystack")
    return list(
        example_grid(
            kind,
            tokenizer,
            text,
            lengths=options.lengths,
            depths=options.depths,
            needles=options.needles,
            seed=options.seed,
            bos=tokenizer.bos if tokenizer.adds_bos else None,
            margin=options.margin,
        )
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a UTF-8 text ({error})") from None


def _read(options: argparse.Namespace, path: Path) -> list[LongContextRecord]:
    rows = read_jsonl(path)[: options.limit]
    found: list[LongContextRecord] = []
    for number, row in enumerate(rows, 1):
        where = f"{path}:{number}"
        if options.name == "babilong":
            found.append(babilong_record(row, path.stem, where))
        elif "answers" in row and "context" in row:
            found.append(longbench_record(row, where))
        else:
            found += loogle_records(row, where)
    return found


def _case(tokenizer: Tokenizer, record: LongContextRecord, options: argparse.Namespace) -> Case:
    """One generic prompt for every benchmark: the context, the question, `Answer:`."""
    context = tokenizer.encode(record.context, bos=tokenizer.adds_bos)
    asked = f"\n\nQuestion: {record.question}\nAnswer:" if record.question else "\n\nSummary:"
    question = tokenizer.encode(asked)
    if options.max_prompt is not None:
        room = options.max_prompt - len(question)
        if room < 2:
            raise InputError(f"--max-prompt {options.max_prompt} is shorter than a question")
        context = truncate_middle(context, room)
    task = "babilong" if options.name == "babilong" else record.task
    limit = options.max_new_tokens or MAX_NEW_TOKENS.get(task, 64)
    asked_once = Question(tuple(question), lambda text: score_record(record, text), limit)
    return Case(tuple(context), (asked_once,))
