"""Plots of run folders: loss curves and evaluation metrics over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from jaxllm.errors import InputError  # noqa: E402
from jaxllm.training.log import read_metrics  # noqa: E402

FORMATS = ("png", "svg", "pdf")


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of one metric, without the rows that lack it."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def plot_runs(runs: Sequence[Path], out: Path, metrics: Sequence[str] | None = None) -> list[str]:
    """Writes one panel per metric, one line per run; returns the metrics drawn.

    Args:
      runs: Run folders.
      out: PNG, SVG or PDF to write.
      metrics: Names as in metrics.jsonl; by default the loss and every `nll` and `psnr` of training
        and evaluation.

    Raises:
      InputError: A folder without metrics, none of the metrics found, or another ending of `out`.
    """
    if out.suffix[1:].lower() not in FORMATS:
        raise InputError(f"{out}: its ending must be one of {', '.join(FORMATS)}")
    short = len({run.name for run in runs}) == len(runs)
    tables = {run.name if short else str(run): read_metrics(run / "metrics.jsonl") for run in runs}
    known = sorted({key for rows in tables.values() for row in rows for key in row} - {"step"})
    if metrics is None:
        wanted = ("loss", "nll", "psnr", "accuracy", "reconstruction")
        metrics = [name for name in known if name.split("/")[-1].split("_")[0] in wanted]
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        what = unknown[0] if unknown else "no metric"
        raise InputError(
            f"{what}: not in {runs[0]}/metrics.jsonl, which has {', '.join(known[:12])}"
        )
    columns = min(3, len(metrics))
    rows_of_panels = -(-len(metrics) // columns)
    figure, axes = plt.subplots(
        rows_of_panels, columns, figsize=(4.2 * columns, 3 * rows_of_panels), squeeze=False
    )
    for axis, name in zip(axes.flat, metrics, strict=False):
        for run, rows in tables.items():
            steps, values = series(rows, name)
            axis.plot(steps, values, marker="o" if len(steps) < 12 else None, ms=3, label=run)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(metrics) :]:
        axis.set_visible(False)
    if len(tables) > 1:
        axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    figure.savefig(temporary, dpi=120, format=out.suffix[1:].lower())
    temporary.replace(out)
    plt.close(figure)
    return list(metrics)
