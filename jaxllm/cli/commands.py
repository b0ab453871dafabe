"""What each subcommand does; every function returns the result to print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.records import check_target, write_jsonl
from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.errors import InputError
from jaxllm.images.sample import Decoder, Generator, tokenizer_run_of


def sample(options: argparse.Namespace) -> dict[str, Any]:
    """Draws images of given classes and writes them as one grid, a row per class."""
    from jaxllm.images.pictures import save_grid

    for name in ("n", "best_of"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {getattr(options, name)} must be at least 1")
    if options.complete and options.best_of > 1:
        raise InputError("--complete and --best-of cannot be combined")
    if options.rows and not options.complete:
        raise InputError(f"--rows {options.rows} needs --complete, the image whose rows are kept")
    check_target(Path(options.out))
    generator = Generator.load(Path(options.run))
    tokenizer = options.tokenizer or tokenizer_run_of(Path(options.run), generator.run)
    decoder = Decoder.load(Path(tokenizer))
    config = _sampling(generator.run.sampling, options)
    known = range(generator.run.model.num_classes)
    classes = list(known) if options.class_id is None else options.class_id
    ids = np.repeat(classes, options.n)
    if options.complete:
        codes, log_probs = _complete(generator, decoder, ids, config, options)
        totals = log_probs.sum(axis=(1, 2))
    elif options.best_of > 1:
        codes, totals = generator.best_of(ids, options.best_of, seed=options.seed, config=config)
    else:
        codes, log_probs = generator.sample(ids, seed=options.seed, config=config)
        totals = log_probs.sum(axis=(1, 2))
    images = decoder(codes)
    images = images.reshape(len(classes), options.n, *images.shape[1:])
    names = [generator.class_names[c] for c in classes]
    save_grid(Path(options.out), list(images), row_names=names)
    mean = totals.reshape(len(classes), options.n).mean(axis=1)
    rows = [
        {"class": name, "class_id": int(c), "images": options.n, "mean log-prob (nats)": float(m)}
        for name, c, m in zip(names, classes, mean, strict=True)
    ]
    return {"out": options.out, "seed": options.seed, "classes": rows}


def _sampling(base: SamplingConfig, options: argparse.Namespace) -> SamplingConfig:
    given = {
        "cfg_scale": options.cfg_scale,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "cfg_interval": options.cfg_interval,
    }
    changes: dict[str, Any] = {k: tuple(v) for k, v in given.items() if v is not None}
    if options.cfg_schedule is not None:
        changes["cfg_schedule"] = options.cfg_schedule
    fields = {name: getattr(base, name) for name in base.__dataclass_fields__}
    return SamplingConfig(**{**fields, **changes})


def _complete(
    generator: Generator,
    decoder: Decoder,
    ids: np.ndarray,
    config: SamplingConfig,
    options: argparse.Namespace,
) -> tuple[np.ndarray, np.ndarray]:
    from jaxllm.data.images import PrepareImage, read_image
    from jaxllm.images.codes import encode_images

    if not 0 < options.rows <= generator.run.model.grid[0]:
        raise InputError(
            f"--rows {options.rows} must be between 1 and {generator.run.model.grid[0]}"
        )
    picture = read_image(Path(options.complete), decoder.data.channels)
    prepare = PrepareImage(decoder.data, train=False)
    try:
        image = prepare({"image": picture, "label": 0}, np.random.default_rng(0))["image"]
    except InputError as error:
        raise InputError(f"{options.complete}: {error}") from None
    codes = encode_images(decoder.blueprint, decoder.params, decoder.extra, image[None])
    given = np.repeat(codes, len(ids), axis=0)
    return generator.sample(
        ids, seed=options.seed, config=config, given=given, given_rows=options.rows
    )


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Completes prompts with a language model."""
    from jaxllm.cli.text_commands import generate as run

    return run(options)


def logprobs(options: argparse.Namespace) -> dict[str, Any]:
    """Scores completions under a language model, or codes under a code model."""
    from jaxllm.cli import text_commands
    from jaxllm.decoding.language_model import is_language_model

    if is_language_model(options.model):
        return text_commands.logprobs(options)
    return _code_logprobs(options)


def _code_logprobs(options: argparse.Namespace) -> dict[str, Any]:
    """Reads {"class_id", "codes": positions x depth}, adds "logprobs" and "sum"."""
    from jaxllm.images.code_models import CodeScorer
    from jaxllm.images.records import read_code_rows

    check_target(Path(options.output))
    generator = Generator.load(Path(options.model))
    model = generator.run.model
    rows = read_code_rows(Path(options.input), model)
    codes = np.stack([np.asarray(row["codes"], np.int32) for row in rows])
    classes = np.asarray([row["class_id"] for row in rows], np.int32)
    scorer = CodeScorer(generator.sampler.build)
    values, _ = scorer(generator.params, generator.extra, codes, classes)
    out = [
        {**row, "logprobs": np.round(v.astype(float), 6).tolist(), "sum": float(v.sum())}
        for row, v in zip(rows, values, strict=True)
    ]
    write_jsonl(Path(options.output), out)
    total = values.sum(axis=(1, 2))
    by_depth = values.sum(axis=1).mean(axis=0)
    return {
        "output": options.output,
        "rows": len(rows),
        "mean log-prob (nats per image)": float(total.mean()),
        "by depth": [float(v) for v in by_depth],
    }


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark that was named."""
    if options.name == "images":
        return _eval_images(options)
    from jaxllm.cli import long_context_commands

    if options.name == "haystack":
        return long_context_commands.haystack(options)
    return long_context_commands.records(options)


def heads(options: argparse.Namespace) -> dict[str, Any]:
    """Measures head scores and writes them in the official format."""
    from jaxllm.cli.long_context_commands import heads as run

    return run(options)


def _eval_images(options: argparse.Namespace) -> dict[str, Any]:
    """Compares two folders of images by Fréchet distance, precision/recall, inception form."""
    from jaxllm.images.compare import compare_folders

    return compare_folders(
        Path(options.real),
        Path(options.fake),
        inception=None if options.inception is None else Path(options.inception),
        classifier=None if options.classifier is None else Path(options.classifier),
        splits=options.splits,
    )


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Imports a checkpoint as a run folder, or exports a language model for transformers."""
    *form, options.to = options.to
    if form not in ([], ["hf"]):
        raise InputError(f"--to {' '.join(form)} {options.to}: expected --to DIR or --to hf DIR")
    if options.kind is None and not form:
        raise InputError("--from says what the source is; only --to hf DIR does without")
    text = options.kind == "hf" or bool(form)
    if form and options.kind not in (None, "hf"):
        raise InputError(f"--to hf writes language models, not what --from {options.kind} reads")
    image_options = ("ema", "heads", "head_layers", "grid") if text else ()
    for name in (*image_options, *(() if form else ("dtype",))):
        if getattr(options, name):
            meant = "--to hf" if name == "dtype" else "--from dnd and llamagen"
            raise InputError(f"--{name.replace('_', '-')} is an option of {meant}")
    if text:
        from jaxllm.cli.text_commands import export_hf, import_hf

        return (export_hf if form else import_hf)(options)
    from jaxllm.hub.official import ImportOptions
    from jaxllm.images.convert import convert as run

    return run(
        options.kind,
        Path(options.source),
        Path(options.to),
        options=ImportOptions(
            ema=options.ema,
            heads=options.heads,
            head_layers=None if options.head_layers is None else tuple(options.head_layers),
            grid=tuple(options.grid or (16, 16)),
        ),
    )


def plot(options: argparse.Namespace) -> dict[str, Any]:
    """Plots metrics of run folders."""
    from jaxllm.plots import plot_runs

    check_target(Path(options.out))
    drawn = plot_runs([Path(run) for run in options.runs], Path(options.out), options.metric)
    return {"out": options.out, "metrics": drawn}


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Times a system beside what one would use instead."""
    from jaxllm.cli.bench_commands import bench as run

    return run(options)


def data(options: argparse.Namespace) -> dict[str, Any]:
    """Lists, describes or verifies bundled data."""
    from jaxllm.data.provenance import describe, names, verify

    found = [describe(name) for name in (names() if options.name is None else [options.name])]
    if options.verify:
        for result in found:
            result["verified files"] = verify(result["name"])
    return {"data sets": found} if options.name is None else found[0]


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Plans a config on a topology."""
    from jaxllm.cli.plan_command import plan as run

    return run(options)
