"""The whole system on bundled images: classifier, tokenizer, codes, code model, samples, report."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.images import ImageDataConfig, Split
from jaxllm.data.pipeline import Batch
from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.errors import InputError
from jaxllm.images.classifier import Scorer, classifier_job, held_out
from jaxllm.images.code_models import CodeScorer, code_model_job
from jaxllm.images.codes import Crops, encode_images, extract_codes, open_codes, origin
from jaxllm.images.config import ClassifierRun, CodeModelRun, TokenizerRun
from jaxllm.images.pictures import save_grid
from jaxllm.images.reconstruct import measure_tokenizer, save_reconstructions
from jaxllm.images.report import Report, write_report
from jaxllm.images.runs import replace_in
from jaxllm.images.sample import Decoder, Generator
from jaxllm.images.score import equal_per_class, score_table
from jaxllm.images.tokenizer import tokenizer_job
from jaxllm.plots import plot_runs
from jaxllm.training.job import Job
from jaxllm.training.loop import train

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class DemoRun:
    """Every stage of the demo; `--code-model.loop.steps 400` reaches any setting."""

    scorer: ClassifierRun
    """Judges the samples; takes no part in training anything."""
    perceptual: ClassifierRun
    """Another seed of the same network, whose features enter the tokenizer's loss."""
    tokenizer: TokenizerRun
    code_model: CodeModelRun
    crops: Crops = "flip"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    per_row: int = 10
    """Pictures per class in the sample grid."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer.perceptual.kind != "classifier":
            raise InputError("the demo trains its own perceptual network; keep kind 'classifier'")
        check_stages(self.tokenizer, self.code_model)


def check_stages(tokenizer: TokenizerRun, code_model: CodeModelRun) -> None:
    """Raises InputError where the codes of one stage will not fit the model of the next."""
    quantizer, model = tokenizer.model.quantizer, code_model.model
    for name, made, wanted in (
        ("codebook_size", quantizer.size, model.codebook_size),
        ("depth", quantizer.depth, model.depth),
        ("grid", tokenizer.model.grid, model.grid),
    ):
        if made != wanted:
            raise InputError(
                f"the tokenizer makes codes of {name} {made}, the code model has {wanted}"
            )


def run_demo(run: DemoRun, workdir: Path) -> dict[str, Any]:
    """Runs or resumes every stage in sub-folders of `workdir` and writes `report/`.

    Returns:
      The numbers of report.json, or an empty dict when a signal stopped a stage.
    """
    began = time.perf_counter()
    workdir = workdir.resolve()  # The stages' configs name each other's folders.
    data = run.tokenizer.data
    stages: dict[str, Any] = {
        "scorer": lambda: classifier_job(run.scorer),
        "perceptual": lambda: classifier_job(run.perceptual),
        "tokenizer": lambda: tokenizer_job(
            replace_in(run.tokenizer, perceptual__path=str(workdir / "perceptual"))
        ),
    }
    seconds: dict[str, float] = {}
    for name, make in stages.items():
        if not run_stage(name, make(), workdir, seconds):
            return {}
    decoder = Decoder.load(workdir / "tokenizer")
    extract_splits(decoder, data, run.crops, workdir, seconds)
    cached = replace_in(run.code_model, data__cache=str(workdir / "codes"), sampling=run.sampling)
    if not run_stage("code_model", code_model_job(cached), workdir, seconds):
        return {}

    start = time.perf_counter()
    generator = Generator.load(workdir / "code_model")
    test = equal_per_class(held_out(data, "test"))
    real_train = equal_per_class(held_out(dataclasses.replace(data, balance=0.0), "train"))
    codes, _ = generator.sample(test["label"], seed=run.seed, config=run.sampling)
    samples: Batch = {"image": decoder(codes), "label": test["label"]}
    test_codes = encode_images(decoder.blueprint, decoder.params, decoder.extra, test["image"])
    rebuilt: Batch = {"image": decoder(test_codes), "label": test["label"]}
    scores = score_table(
        Scorer.load(workdir / "scorer"),
        {"real test images": test, "their reconstructions": rebuilt, "samples": samples},
        real_train,
    )
    nll = CodeScorer(generator.sampler.build).summary(
        generator.params, generator.extra, open_codes(workdir / "codes" / "test").first_crops()
    )
    tokenizer = measure_tokenizer(decoder.blueprint, decoder.params, decoder.extra, test["image"])
    report = workdir / "report"
    _pictures(run, generator, decoder, test, samples, report)
    plot_runs([workdir / "tokenizer"], report / "tokenizer_curves.png")
    plot_runs([workdir / "code_model"], report / "code_model_curves.png")
    seconds["sample and score"] = time.perf_counter() - start
    return write_report(
        report,
        Report(
            class_names=generator.class_names,
            model=run.code_model.model,
            tokenizer=tokenizer,
            nll=nll,
            unigram=unigram_nats(workdir / "codes"),
            scores=scores,
            sampling=run.sampling,
            seconds={**seconds, "total": time.perf_counter() - began},
        ),
    )


def run_stage(name: str, job: Job, workdir: Path, seconds: dict[str, float]) -> bool:
    """Trains `job` in a sub-folder, books its time, and tells whether it finished."""
    start = time.perf_counter()
    finished = train(job, workdir / name).finished
    seconds[name] = time.perf_counter() - start
    return finished


def extract_splits(
    decoder: Decoder, data: ImageDataConfig, crops: Crops, workdir: Path, seconds: dict[str, float]
) -> None:
    """Extracts the codes of every split that has none yet; only training images get `crops`.

    Raises:
      InputError: A split has the codes of another tokenizer or of other images.
    """
    start = time.perf_counter()
    for split in SPLITS:
        folder = workdir / "codes" / split
        kept = crops if split == "train" else "one"
        if (folder / "meta.json").exists():
            wanted = origin(decoder.params, decoder.extra, data, kept)
            if open_codes(folder).meta.get("made_from") != wanted:
                raise InputError(
                    f"{folder}: holds codes of another tokenizer or of other images; delete codes "
                    f"and code_model in {workdir}, or choose another --workdir"
                )
        else:
            extract_codes(
                decoder.blueprint,
                decoder.params,
                decoder.extra,
                data,
                split,
                folder,
                crops=kept,
                tokenizer_run=workdir / "tokenizer",
            )
    seconds["codes"] = time.perf_counter() - start


def unigram_nats(folder: Path) -> list[float]:
    """Returns nats per image and depth of test codes under the training codes' frequencies.

    What a model that ignores class, position and context would reach; add-one smoothing.
    """
    train_codes, test = open_codes(folder / "train"), open_codes(folder / "test")
    size = train_codes.meta["codebook_size"]
    counted, scored = train_codes.first_crops()["codes"], test.first_crops()["codes"]
    nats = []
    for depth in range(counted.shape[-1]):
        counts = np.bincount(counted[..., depth].reshape(-1), minlength=size) + 1.0
        log_probs = np.log(counts / counts.sum())
        nats.append(float(-log_probs[scored[..., depth]].sum(axis=1).mean()))
    return nats


def _pictures(
    run: DemoRun,
    generator: Generator,
    decoder: Decoder,
    test: Batch,
    samples: Batch,
    report: Path,
) -> None:
    names = generator.class_names
    spread = np.linspace(0, len(test["image"]) - 1, 13).astype(int)
    save_reconstructions(
        decoder.blueprint,
        decoder.params,
        decoder.extra,
        test["image"][spread],
        report / "reconstructions.png",
    )

    def rows(examples: Batch) -> list[np.ndarray]:
        return [examples["image"][examples["label"] == c][: run.per_row] for c in range(len(names))]

    save_grid(report / "samples.png", rows(samples), row_names=names)
    save_grid(report / "real.png", rows(test), row_names=names)
