"""`jaxllm generate`, and `jaxllm logprobs` for language models."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.records import check_target, read_jsonl, write_jsonl
from jaxllm.decoding.generate import TextGenerator
from jaxllm.decoding.language_model import LanguageModel, check_ids, load_language_model
from jaxllm.decoding.text import NewCaches, TextSampling
from jaxllm.errors import InputError


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Completes prompts of the command line or of a JSONL file."""
    if options.stream and (options.json or options.samples > 1 or options.prompts):
        raise InputError("--stream shows one sample of one --prompt and goes without --json")
    if options.output is not None:
        check_target(Path(options.output))
    model = load_language_model(options.model)
    if options.prompts is not None:
        rows, origin = read_jsonl(Path(options.prompts)), options.prompts
    else:
        rows, origin = [{"prompt": options.prompt}], "--prompt"
    prompts = [
        model.prompt_ids(row, f"{origin}: record {number}" if options.prompts else origin)
        for number, row in enumerate(rows, 1)
    ]
    for number, ids in enumerate(prompts, 1):
        where = f"{origin}: record {number}" if options.prompts else origin
        model.check_length(len(ids), where, chunked=options.prefill_chunk is not None)
    sampling = TextSampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop_ids=(*(() if options.ignore_eos else model.eos), *options.stop_id),
    )
    sampler = model.sampler(_caches(model, options.kv), prefill_chunk=options.prefill_chunk)
    generator = TextGenerator(model.params, {}, sampler, model.tokenizer)
    start = time.perf_counter()
    found = generator(
        prompts,
        sampling,
        stop=options.stop,
        samples=options.samples,
        seed=options.seed,
        batch=options.batch,
        on_text=_print_piece if options.stream else None,
    )
    seconds = time.perf_counter() - start
    if options.stream:
        print()
    out = [
        {
            **row,
            **({"sample": number} if options.samples > 1 else {}),
            **({} if c.text is None else {"completion": c.text}),
            "completion_ids": c.ids,
            "logprobs": [round(value, 6) for value in c.log_probs],
            "finish_reason": c.finish_reason,
        }
        for row, completions in zip(rows, found, strict=True)
        for number, c in enumerate(completions)
    ]
    tokens = sum(len(row["completion_ids"]) for row in out)
    summary = {
        "prompts": len(rows),
        "completions": len(out),
        "new tokens": tokens,
        "seconds, compilation included": seconds,
    }
    if options.output is not None:
        write_jsonl(Path(options.output), out)
        return {"output": options.output, **summary}
    if options.json:
        return {**summary, "results": out}
    if not options.stream:
        for row in out:
            print(row.get("completion", " ".join(map(str, row["completion_ids"]))))
            print()
    return summary


def _print_piece(number: int, text: str) -> None:
    del number  # There is one prompt only.
    sys.stdout.write(text)
    sys.stdout.flush()


def _caches(model: LanguageModel, spec: str) -> NewCaches:
    """Returns the maker of caches that `--kv` names."""
    from jaxllm.kvcompress.decode import plan_caches
    from jaxllm.kvcompress.spec import parse_plan

    return plan_caches(parse_plan(spec), model.config, model.dtype)


def logprobs(options: argparse.Namespace) -> dict[str, Any]:
    """Adds the log-probability of every completion token to the records of a JSONL file."""
    from jaxllm.decoding.score import CompletionScorer

    check_target(Path(options.output))
    model = load_language_model(options.model)
    rows = read_jsonl(Path(options.input))
    pairs = [
        _pair(model, row, f"{options.input}: record {number}") for number, row in enumerate(rows, 1)
    ]
    values = CompletionScorer(model.blueprint.build)(model.params, {}, pairs, batch=options.batch)
    out = [
        {**row, "logprobs": np.round(v.astype(float), 6).tolist(), "sum": float(v.sum())}
        for row, v in zip(rows, values, strict=True)
    ]
    write_jsonl(Path(options.output), out)
    return {
        "output": options.output,
        "rows": len(out),
        "completion tokens": sum(len(v) for v in values),
        "mean log-prob (nats per token)": float(np.concatenate(values).mean()),
    }


def _pair(model: LanguageModel, row: dict[str, Any], where: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a record's prompt and completion."""
    given = [name for name in ("completion", "completion_ids") if name in row]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InputError(f"{where}: needs one of completion, completion_ids; has {found}")
    if given == ["completion"] and "prompt" in row:
        if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
            raise InputError(f"{where}: prompt and completion must be strings")
        # As one text: apart, a tokenizer may cut the boundary differently.
        tokenizer = model.need_tokenizer("text")
        ids, count = tokenizer.encode_pair(row["prompt"], row["completion"], bos=tokenizer.adds_bos)
        prompt, completion = ids[:count], ids[count:]
    else:
        prompt = model.prompt_ids(row, where)
        if given == ["completion_ids"]:
            completion = check_ids(
                row["completion_ids"], model.config.vocab_size, f"{where}: completion_ids"
            )
        else:
            completion = model.need_tokenizer("a text completion").encode(row["completion"])
    if not prompt or not completion:
        raise InputError(f"{where}: prompt and completion need at least one token each")
    model.check_length(len(prompt) + len(completion) - 1, where)
    return prompt, completion


def import_hf(options: argparse.Namespace) -> dict[str, Any]:
    """Reads a Hugging Face folder, checking every tensor, and writes it as a run folder."""
    from jaxllm.data.text_tokenizers import TextTokenizerConfig
    from jaxllm.hub.hf_folder import is_hf_folder
    from jaxllm.training.finished_run import check_new_folder, write_finished_run
    from jaxllm.training.language_model import JOB, LanguageModelRun, model_identity

    check_new_folder(Path(options.to))
    if not is_hf_folder(options.source):
        raise InputError(f"{options.source}: no config.json with a model_type, expected one")
    model = load_language_model(options.source)
    # The end marks may be more than the tokenizer's one; they stay where folders keep them.
    files = {"generation_config.json": json.dumps({"eos_token_id": list(model.eos)}).encode()}
    write_finished_run(
        Path(options.to),
        job=JOB,
        config=LanguageModelRun(model.config, TextTokenizerConfig(str(options.source))),
        identity=model_identity(model.config, model.tokenizer),
        params=model.params,
        extra={},
        files=files | ({} if model.tokenizer is None else dict(model.tokenizer.files)),
    )
    return {"to": options.to, "parameters": model.blueprint.parameter_count}


def export_hf(options: argparse.Namespace) -> dict[str, Any]:
    """Writes a run or a Hugging Face folder as a folder that transformers loads."""
    from jaxllm.hub.hf_folder import is_hf_folder, save_decoder

    model = load_language_model(options.source)
    save_decoder(
        options.to,
        model.config,
        model.params,
        dtype=options.dtype or "float32",
        source=options.source if is_hf_folder(options.source) else None,
        tokenizer=model.tokenizer,
        eos=model.eos,
    )
    return {"to": options.to, "parameters": model.blueprint.parameter_count}
