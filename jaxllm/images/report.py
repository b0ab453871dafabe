"""The demo's report: one JSON file for machines and one Markdown page for people."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.images.score import ImageScore
from jaxllm.models.dnd import DnDConfig
from jaxllm.training.run_folder import to_plain, versions, write_json


@dataclass(frozen=True)
class Report:
    """Everything that the report shows."""

    class_names: list[str]
    model: DnDConfig
    tokenizer: dict[str, float]
    nll: dict[str, float]
    unigram: list[float]
    scores: dict[str, ImageScore]
    sampling: SamplingConfig
    seconds: dict[str, float]


def write_report(folder: Path, report: Report) -> dict[str, Any]:
    """Writes report.json and report.md; returns the JSON contents."""
    plain = {
        "tokenizer": report.tokenizer,
        "nll": report.nll,
        "unigram_nats": report.unigram,
        "scores": {name: dataclasses.asdict(score) for name, score in report.scores.items()},
        "sampling": to_plain(report.sampling),
        "seconds": {name: round(value, 1) for name, value in report.seconds.items()},
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", plain)
    (folder / "report.md").write_text(markdown(report))
    return plain


def markdown(report: Report) -> str:
    """Returns the page."""
    sections = (
        "# DnD-Transformer demo\n",
        _tokenizer(report),
        _likelihood(report),
        _samples(report),
        _time(report),
    )
    return "\n".join(sections)


def _tokenizer(report: Report) -> str:
    model, values = report.model, report.tokenizer
    lines = [
        "## Tokenizer, on test images\n",
        "![original, then what each number of codes keeps](reconstructions.png)\n",
        "| codes kept | PSNR (dB) | codes in use | perplexity | perplexity if all used equally |",
        "|---|---|---|---|---|",
    ]
    for i in range(1, model.depth + 1):
        lines.append(
            f"| depth 1-{i} | {values[f'psnr_depth{i}']:.2f} "
            f"| {values[f'usage_depth{i}']:.0%} "
            f"(attainable {values[f'attainable_usage_depth{i}']:.0%})"
            f" | {values[f'perplexity_depth{i}']:.0f} | {model.codebook_size} |"
        )
    return "\n".join(lines) + "\n"


def _likelihood(report: Report) -> str:
    model, nll = report.model, report.nll
    uniform = model.cells * math.log(model.codebook_size)
    lines = [
        "## Code model, on the codes of test images\n",
        "![curves](code_model_curves.png)\n",
        "Negative log-likelihood in nats per image; lower is better.\n",
        "| codes | DnD-Transformer | code frequencies only | uniform |",
        "|---|---|---|---|",
    ]
    for i in range(1, model.depth + 1):
        lines.append(
            f"| depth {i} | {nll[f'nll_depth{i}']:.1f} | {report.unigram[i - 1]:.1f} "
            f"| {uniform:.1f} |"
        )
    lines.append(
        f"| all | {nll['nll']:.1f} | {sum(report.unigram):.1f} | {model.depth * uniform:.1f} |"
    )
    return "\n".join(lines) + "\n"


def _samples(report: Report) -> str:
    cfg = ", ".join(f"{s:g}" for s in report.sampling.cfg_scale)
    temperature = ", ".join(f"{t:g}" for t in report.sampling.temperature)
    lines = [
        "## Samples\n",
        f"![one row per class](samples.png)\n\nDrawn with guidance {cfg} and temperature "
        f"{temperature} by depth, from one seed; real test images are in "
        "[real.png](real.png).\n",
        "All sets have the same number of images per class and are compared with the same training "
        "images, by a classifier that took no part in training the generator. FD is the Fréchet "
        "distance over that classifier's features (not FID). The first row is what real images "
        "reach, the second what this tokenizer allows.\n",
        "| images | n | class accuracy (95 %) | FD to training images | precision | recall "
        "| inception form |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in report.scores.items():
        lines.append(
            f"| {name} | {s.images} | {s.accuracy:.1%} ({s.accuracy_low:.1%} to "
            f"{s.accuracy_high:.1%}) | {s.frechet:.3f} | {s.precision:.2f} | {s.recall:.2f} "
            f"| {s.inception_form:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _time(report: Report) -> str:
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in report.seconds.items())
    return f"## Time\n\n{parts}.\n"
