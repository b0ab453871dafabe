"""Evidence on the DnD-Transformer's claims at a size that two cores can repeat.

Real images, an exact tokenizer (residual k-means of pixel patches, no network), and the five code
models on the very same codes. Section 3.1 and Table 3 of arXiv:2410.01912 are what is re-examined;
the paper's FID values are not reproduced here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxllm.data.images import ImageDataConfig, open_images
from jaxllm.data.pipeline import stack_examples
from jaxllm.decoding.code_stacks import CodeSampler, SamplingConfig
from jaxllm.errors import InputError
from jaxllm.evals.statistics import mean_interval, paired_difference
from jaxllm.images.code_models import CodeScorer, code_loss
from jaxllm.models.code_model import CodeModelConfig, code_model
from jaxllm.models.dnd import DnDConfig
from jaxllm.models.rq_transformer import RQTransformerConfig
from jaxllm.quantize import ResidualVQ, residual_kmeans_start
from jaxllm.training.evidence import EvidencePage, check_interval
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import make_step

PATCH, SIZE = 7, 28


@dataclass(frozen=True)
class EvidenceRun:
    """Sizes of the experiment."""

    seeds: tuple[int, ...] = (0, 1, 2)
    codebook_size: int = 32
    depths: tuple[int, ...] = (2, 4)
    steps: int = 400
    eval_every: int = 50
    batch_size: int = 64
    dim: int = 48
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        check_interval(self.seeds)
        if not 1 <= min(self.depths) <= max(self.depths) <= 4:
            raise InputError(f"depths {self.depths} must be between 1 and 4, one head per layer")


def dnd_evidence(run: EvidenceRun, folder: Path) -> dict[str, Any]:
    """Runs all parts and writes dnd.json, dnd.md and dnd.png to `folder`."""
    began = time.perf_counter()
    patches = {split: _patches(split) for split in ("train", "validation", "test")}
    result: dict[str, Any] = {
        **PAGE.begin(run),
        "images": {split: len(p["patches"]) for split, p in patches.items()},
        "reconstruction": reconstruction_by_depth(run, patches),
        "likelihood": [],
    }
    for depth in run.depths:
        result["likelihood"] += likelihoods(run, depth, patches)
        result["seconds"] = round(time.perf_counter() - began, 1)
        PAGE.write(result, folder)
    return result


def _patches(split: Any) -> dict[str, np.ndarray]:
    """Returns pixel patches float32 [n, cells, PATCH * PATCH] in [0, 1] and labels [n]."""
    source = open_images(ImageDataConfig(balance=0.0), split)
    examples = stack_examples(source)
    pixels = examples["image"].astype(np.float32) / 255.0
    cells = einops.rearrange(pixels, "n (h p) (w q) c -> n (h w) (p q c)", p=PATCH, q=PATCH)
    return {"patches": cells, "label": examples["label"].astype(np.int32)}


# -- 1. reconstruction -----------------------------------------------------------------------------


def reconstruction_by_depth(run: EvidenceRun, patches: Any) -> list[dict[str, Any]]:
    """Test PSNR of residual k-means at equal codebook size and at equal bits, by seed."""
    size = run.codebook_size
    settings = [(size, 1, False)]
    settings += [(size, d, shared) for d in (2, 4) for shared in (False, True)]
    # Equal bits: one large codebook or two small ones, at half and at the full number of codes.
    settings += [((size // 2) ** 2, 1, False), (size // 2, 2, False), (size**2, 1, False)]
    rows = []
    for size, depth, shared in settings:
        quantizer, fitted = _fit(size, depth, shared, run.seeds, patches)
        quality = [_psnr(quantizer, one, patches) for one in fitted]
        rows.append(
            {
                "codebook_size": size,
                "depth": depth,
                "codebook": "shared" if shared else "separate",
                "bits_per_cell": depth * float(np.log2(size)),
                "psnr": quality,
            }
        )
    return rows


def _fit(
    size: int, depth: int, shared: bool, seeds: Sequence[int], patches: Any
) -> tuple[ResidualVQ, list[Any]]:
    """Returns the quantizer and its fitted arrays for every seed."""
    vectors = patches["train"]["patches"]
    quantizer = ResidualVQ(size, vectors.shape[-1], depth, shared)
    fit = jax.jit(lambda key, v: residual_kmeans_start(quantizer, key, v, 20))
    flat = vectors.reshape(-1, vectors.shape[-1])
    return quantizer, [fit(jax.random.key(seed), flat) for seed in seeds]


def _psnr(quantizer: ResidualVQ, fitted: Any, patches: Any) -> float:
    test = patches["test"]["patches"]
    out = quantizer.quantize(fitted[0], fitted[1], jnp.asarray(test), train=False).quantized
    return float(-10 * np.log10(np.mean((np.asarray(out) - test) ** 2)))


# -- 2. likelihood and speed -----------------------------------------------------------------------


def structures(run: EvidenceRun, depth: int) -> dict[str, CodeModelConfig]:
    """The five models over one grid: four layers each, the same width."""
    cells = SIZE // PATCH
    shape: dict[str, Any] = dict(
        codebook_size=run.codebook_size,
        grid=(cells, cells),
        depth=depth,
        num_classes=13,
        heads=4,
        dim=run.dim,
        dropout=0.1,
        class_dropout=0.0,
    )
    own = {**shape, "layers": 4, "per_depth_embedding": True}
    first = 4 - depth
    heads = tuple(range(first, 4))
    return {
        "flattened": DnDConfig(**own, structure="flat"),
        "dnd": DnDConfig(**own, head_layers=heads),
        "vertical": DnDConfig(**own, head_layers=heads, structure="vertical"),
        "parallel": DnDConfig(**own, structure="parallel"),
        "rq-transformer": RQTransformerConfig(
            **shape, layers=3, depth_layers=1, code_dim=PATCH * PATCH
        ),
    }


def likelihoods(run: EvidenceRun, depth: int, patches: Any) -> list[dict[str, Any]]:
    """Test NLL in nats per image of every structure and seed on one set of codes."""
    quantizer, (fitted,) = _fit(run.codebook_size, depth, False, (0,), patches)
    codes = {}
    for split, part in patches.items():
        found = quantizer.quantize(
            fitted[0], fitted[1], jnp.asarray(part["patches"]), train=False
        ).codes
        codes[split] = {"codes": np.asarray(found), "label": part["label"]}
    codebook = np.asarray(quantizer.codebook(*fitted))
    rows = []
    for name, config in structures(run, depth).items():
        runs = [*map(_trial(run, config, codes, codebook), run.seeds)]
        nll = [r["nll"] for r in runs]
        rows.append(
            {
                "depth": depth,
                "model": name,
                "parameters": code_model(config).parameter_count,
                "nll": nll,
                "nll_by_depth": [r["by_depth"] for r in runs],
                "chosen_step": [r["step"] for r in runs],
                "images_per_second": [r["images_per_second"] for r in runs],
            }
        )
        print(f"depth {depth} {name}: {mean_interval(nll)} nats", flush=True)
    return rows


def _trial(
    run: EvidenceRun, config: CodeModelConfig, codes: Any, codebook: np.ndarray
) -> Callable[[int], dict[str, Any]]:
    """Returns a function that trains, scores and times one model from a seed; compiled once."""
    blueprint = code_model(config)
    settings = OptimizerConfig(
        learning_rate=run.learning_rate, schedule="cosine", warmup_steps=20, weight_decay=0.05
    )
    optimizer = make_optimizer(settings, run.steps)
    step = jax.jit(make_step(code_loss, blueprint.build, optimizer, settings), donate_argnums=0)
    init = jax.jit(blueprint.init)
    scorer, sampler = CodeScorer(blueprint.build), CodeSampler(blueprint.build)

    def trial(seed: int) -> dict[str, Any]:
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        params, extra = init(key)
        if extra:
            extra = {"codebook": codebook}
        # The step takes its state's arrays for good; `extra` is needed again for scoring.
        state = new_state(params, optimizer, ema=False, extra=jax.tree.map(jnp.array, extra))
        best: dict[str, Any] = {"validation": np.inf}
        for number in range(1, run.steps + 1):
            rows = rng.integers(0, len(codes["train"]["label"]), run.batch_size)
            batch = {name: jnp.asarray(value[rows]) for name, value in codes["train"].items()}
            state, _ = step(state, batch, key)
            if number % run.eval_every == 0:
                value = scorer.summary(state.params, extra, codes["validation"])["nll"]
                if value < best["validation"]:
                    kept = jax.tree.map(jnp.array, state.params)
                    best = {"validation": value, "step": number, "params": kept}
        test = scorer.summary(best["params"], extra, codes["test"])
        return {
            "nll": test["nll"],
            "by_depth": [test[f"nll_depth{i + 1}"] for i in range(config.depth)],
            "step": best["step"],
            "images_per_second": _speed(sampler, best["params"], extra, seed),
        }

    return trial


def _speed(sampler: CodeSampler, params: Any, extra: Any, seed: int, batch: int = 64) -> float:
    """Median images per second of five batches, compilation apart."""
    setting, seconds, classes = SamplingConfig(cfg_scale=(1.0,)), [], np.arange(batch) % 13
    for repeat in range(6):
        start = time.perf_counter()
        key = jax.random.key(100 * seed + repeat)
        jax.block_until_ready(sampler(params, extra, classes, key, setting))
        seconds.append(time.perf_counter() - start)
    return batch / float(np.median(seconds[1:]))


# -- 3. the page -----------------------------------------------------------------------------------


def _row(result: dict[str, Any], depth: int, model: str) -> dict[str, Any]:
    return next(r for r in result["likelihood"] if (r["depth"], r["model"]) == (depth, model))


def evidence_markdown(result: dict[str, Any]) -> str:
    """Returns the page, with every number computed from `result`."""
    config = result["config"]
    n = len(config["seeds"])
    lines = [
        "# Evidence: DnD-Transformer\n",
        "Made by `make evidence NAME=dnd`. Seeds "
        f"{', '.join(map(str, config['seeds']))}; intervals are 95 % t-intervals over {n} seeds. "
        f"Images: {result['images']['train']} train, {result['images']['validation']} validation, "
        f"{result['images']['test']} test, of bundled Fashion-MNIST and QuickDraw at 28x28, cut "
        f"into a 4x4 grid of 7x7 patches. {result['seconds']:.0f} s on {result['device']} with two "
        "cores.\n",
        "![overview](dnd.png)\n",
        "## Reconstruction by depth\n",
        "Residual k-means on the patches, PSNR on test images (peak 1).\n",
        "| codebook size | depth | codebooks | bits per cell | PSNR (dB) |",
        "|---|---|---|---|---|",
    ]
    for row in result["reconstruction"]:
        lines.append(
            f"| {row['codebook_size']} | {row['depth']} | {row['codebook']} "
            f"| {row['bits_per_cell']:.0f} | {mean_interval(row['psnr'])} |"
        )
    size = config["codebook_size"]
    lines += [
        "\nDepth is judged twice: at equal codebook size, and at equal bits, where one large "
        f"codebook is the fair comparison: 1x{(size // 2) ** 2} against 2x{size // 2} and "
        f"1x{size**2} against 2x{size}.\n",
        "## Likelihood on the same codes\n",
        f"Test NLL in nats per image, {config['steps']} steps, step chosen on validation. All "
        "models have four layers of the same width (RQ-Transformer: 3 body + 1 depth). Sampling "
        "speed is a median on the same machine, in images per second at batch 64.\n",
    ]
    depths = sorted({row["depth"] for row in result["likelihood"]})
    for depth in depths:
        lines += [
            f"### d = {depth}\n",
            "| model | parameters | NLL (nats per image) | by depth (mean) | images/s |",
            "|---|---|---|---|---|",
        ]
        for row in (r for r in result["likelihood"] if r["depth"] == depth):
            by_depth = " + ".join(f"{v:.1f}" for v in np.mean(row["nll_by_depth"], axis=0))
            lines.append(
                f"| {row['model']} | {row['parameters']:,} | {mean_interval(row['nll'])} "
                f"| {by_depth} | {np.mean(row['images_per_second']):.0f} |"
            )
        lines += ["", *_verdicts(result, depth), ""]
    return "\n".join(lines)


def _verdicts(result: dict[str, Any], depth: int) -> list[str]:
    try:
        own, flat = _row(result, depth, "dnd"), _row(result, depth, "flattened")
        others = [_row(result, depth, name) for name in ("vertical", "parallel", "rq-transformer")]
    except StopIteration:
        return []
    ratio = np.mean(own["nll"]) / np.mean(flat["nll"])
    speed = np.mean(own["images_per_second"]) / np.mean(flat["images_per_second"])
    lines = [
        f"- DnD is at {ratio:.3f} of the flattened model's NLL "
        f"(expected within 1.05: {'yes' if ratio < 1.05 else 'no'}) and samples {speed:.2f} times "
        "as fast."
    ]
    for row in others:
        gap = paired_difference(row["nll"], own["nll"])
        clear = "the interval excludes zero" if gap.excludes(0) else "the interval includes zero"
        lines.append(f"- {row['model']} minus DnD: {gap} nats, paired by seed; {clear}.")
    return lines


def plot_evidence(result: dict[str, Any]) -> Figure:
    """Draws PSNR over bits and NLL by model."""
    depths = sorted({row["depth"] for row in result["likelihood"]})
    figure, axes = plt.subplots(1, 1 + len(depths), figsize=(4.2 * (1 + len(depths)), 3.4))
    axes = np.atleast_1d(axes)
    styles: Sequence[tuple[str, str]] = (("separate", "o"), ("shared", "s"))
    for kind, marker in styles:
        rows = [r for r in result["reconstruction"] if r["codebook"] == kind]
        points = [(r["bits_per_cell"], np.mean(r["psnr"])) for r in rows]
        axes[0].plot(*zip(*points, strict=True), marker, label=f"{kind} codebooks")
        for row, (x, y) in zip(rows, points, strict=True):
            axes[0].annotate(f"{row['depth']}x{row['codebook_size']}", (x, y), fontsize=7)
    axes[0].set_xlabel("bits per cell")
    axes[0].set_title("test PSNR (dB)", fontsize=10)
    axes[0].legend(fontsize=7)
    for axis, depth in zip(axes[1:], depths, strict=True):
        rows = [r for r in result["likelihood"] if r["depth"] == depth]
        for i, row in enumerate(rows):
            axis.scatter([i] * len(row["nll"]), row["nll"], s=14)
        axis.set_xticks(range(len(rows)), [r["model"] for r in rows], rotation=30, fontsize=8)
        axis.set_title(f"d = {depth}: test nats per image, one dot a seed", fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


PAGE = EvidencePage("dnd", evidence_markdown, plot_evidence)
