"""Rich text at small scale: rendered words, and how readable and how likely the drawn ones are.

The paper judges text pictures by rOCR and PPL_OCR with large models (section 4.1 of
arXiv:2410.01912). Words on a cell grid have an exact reader and an exact character model, so both
measures are exact here.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.images import ImageDataConfig, normalise, open_images
from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.errors import InputError
from jaxllm.evals.character_model import CharacterModel
from jaxllm.evals.glyphs import GlyphReader
from jaxllm.evals.ocr import ppl_ocr, rocr
from jaxllm.images.code_models import CodeScorer, code_model_job
from jaxllm.images.codes import open_codes
from jaxllm.images.config import CodeModelRun, TokenizerRun
from jaxllm.images.demo import check_stages, extract_splits, run_stage
from jaxllm.images.pictures import save_grid
from jaxllm.images.reconstruct import measure_tokenizer, reconstruct
from jaxllm.images.runs import replace_in
from jaxllm.images.sample import Decoder, Generator
from jaxllm.images.tokenizer import tokenizer_job
from jaxllm.plots import plot_runs
from jaxllm.training.run_folder import write_json


@dataclass(frozen=True)
class WordsRun:
    """Tokenizer and code model on rendered words."""

    tokenizer: TokenizerRun
    code_model: CodeModelRun
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(cfg_scale=(1.0,)))
    samples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer.data.resolved_source != "words":
            raise InputError(
                f"tokenizer.data.source is {self.tokenizer.data.source!r}; this needs 'words'"
            )
        check_stages(self.tokenizer, self.code_model)


def run_words(run: WordsRun, workdir: Path) -> dict[str, Any]:
    """Runs or resumes both stages and writes `report/`; returns its numbers."""
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    workdir = workdir.resolve()  # The stages' configs name each other's folders.
    data = run.tokenizer.data
    if not run_stage("tokenizer", tokenizer_job(run.tokenizer), workdir, seconds):
        return {}
    decoder = Decoder.load(workdir / "tokenizer")
    extract_splits(decoder, data, "one", workdir, seconds)
    cached = replace_in(run.code_model, data__cache=str(workdir / "codes"), sampling=run.sampling)
    if not run_stage("code_model", code_model_job(cached), workdir, seconds):
        return {}
    start = time.perf_counter()
    generator = Generator.load(workdir / "code_model")
    grid = data.words.grid
    reader = GlyphReader(grid, jitter=data.words.jitter)
    test, texts = pictures_and_texts(data, "test", run.samples)
    _, train_texts = pictures_and_texts(data, "train", 8192)
    language = CharacterModel.fit(train_texts, order=3)
    by_depth = reconstruct(decoder.blueprint, decoder.params, decoder.extra, test)
    codes, _ = generator.sample(np.zeros(run.samples, int), seed=run.seed, config=run.sampling)
    samples = decoder(codes)

    def read(images: np.ndarray) -> list[str]:
        return reader(np.clip((images + 1) / 2, 0, 1))

    fidelity = {
        f"depth 1-{i + 1}": rocr(images, texts, read, unit="char")
        for i, images in enumerate(by_depth)
    }
    likelihood = {
        "real test words": ppl_ocr(test, read, language.score),
        "their reconstructions": ppl_ocr(by_depth[-1], read, language.score),
        "samples": ppl_ocr(samples, read, language.score),
    }
    drawn, known = likelihood["samples"].texts, set(train_texts)
    seconds["sample and score"] = time.perf_counter() - start
    seconds["total"] = time.perf_counter() - began
    result = {
        "tokenizer": measure_tokenizer(decoder.blueprint, decoder.params, decoder.extra, test),
        "rocr": {
            name: {"f1": f.f1, "exact": f.exact, "empty": f.empty} for name, f in fidelity.items()
        },
        "ppl_ocr": {
            name: {k: v for k, v in asdict(p).items() if k not in ("per_image", "texts")}
            for name, p in likelihood.items()
        },
        "share of samples that are training words": float(np.mean([t in known for t in drawn])),
        "share of samples that are held-out words": float(
            np.mean([t in set(texts) - known for t in drawn])
        ),
        "nll": CodeScorer(generator.sampler.build).summary(
            generator.params, generator.extra, open_codes(workdir / "codes" / "test").first_crops()
        ),
        "first samples read as": list(drawn[:40]),
        "seconds": seconds,
    }
    report = workdir / "report"
    save_grid(report / "samples.png", [samples[i : i + 8] for i in range(0, 64, 8)], scale=3)
    rows = [test[:8], *(images[:8] for images in by_depth)]
    names = ["original", *fidelity]
    save_grid(report / "reconstructions.png", rows, row_names=names, scale=3)
    plot_runs([workdir / "tokenizer"], report / "tokenizer_curves.png")
    plot_runs([workdir / "code_model"], report / "code_model_curves.png")
    write_json(report / "report.json", result)
    (report / "report.md").write_text(_markdown(result))
    return result


def pictures_and_texts(
    data: ImageDataConfig, split: Any, limit: int
) -> tuple[np.ndarray, list[str]]:
    """Returns up to `limit` pictures float32 [n, H, W, c] of a split and their true texts."""
    source = open_images(data, split)
    rows = [source[i] for i in range(min(limit, len(source)))]
    return np.stack([normalise(row["image"]) for row in rows]), [row["text"] for row in rows]


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Rendered words\n",
        "![reconstructions](reconstructions.png)\n",
        "| codes kept | rOCR (character ROUGE-L F1) | read exactly | read as empty |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {r['f1']:.3f} | {r['exact']:.1%} | {r['empty']} |"
        for name, r in result["rocr"].items()
    ]
    lines += [
        "\n![samples](samples.png)\n",
        "PPL_OCR is the perplexity per character, end mark included, of what an exact reader "
        "reads, under a character trigram model of the training words. Real words are the floor.\n",
        "| pictures | PPL_OCR | n | read as empty |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {p['perplexity']:.2f} | {p['images']} | {p['empty']} |"
        for name, p in result["ppl_ocr"].items()
    ]
    share = result["share of samples that are training words"]
    held = result["share of samples that are held-out words"]
    lines.append(
        f"\n{share:.0%} of the samples are words of the training split and {held:.0%} words of the "
        f"test split that training never drew. The first ones read: "
        f"{', '.join(result['first samples read as'])}.\n"
    )
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    return "\n".join(lines) + f"\nTime: {parts}.\n"
