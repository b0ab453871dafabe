"""The page of the HeadKV experiment: every sentence with a number is computed from the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxllm.training.evidence import EvidencePage

Row = dict[str, Any]
NAMES = {
    "full": "full cache",
    "streaming": "streaming (sinks and newest)",
    "uniform": "uniform (SnapKV)",
    "pyramid": "pyramid (PyramidKV)",
    "inverse_pyramid": "inverse pyramid",
    "adaptive": "adaptive (Ada-KV, simulated)",
    "duo": "two levels (Duo)",
    "layer_mean": "layer mean of the scores",
    "r": "HeadKV-R",
    "er": "HeadKV ER",
    "r2": "HeadKV-R2",
    "random": "random scores",
    "shuffled": "shuffled scores",
    "inverted": "inverted scores",
}
TITLES = {
    "aware": "question in the window",
    "multi_turn": "later questions of a conversation",
    "agnostic": "compressed before any question",
}
_COLOURS = {
    "full": "black",
    "uniform": "tab:blue",
    "adaptive": "tab:orange",
    "duo": "tab:brown",
    "layer_mean": "tab:green",
    "r": "tab:pink",
    "er": "tab:purple",
    "r2": "tab:red",
    "random": "tab:gray",
}


def main_method(rows: Sequence[Row]) -> str:
    """The method that stands for HeadKV among a task's rows: R2 where the task has it, else ER."""
    names = {row["method"] for row in rows}
    return next((name for name in ("r2", "er", "r") if name in names), "uniform")


def _settings(result: dict[str, Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["task"], row["protocol"]) for row in result["settings"]))


def _of(result: dict[str, Any], task: str, protocol: str) -> list[Row]:
    rows = result["settings"]
    return [row for row in rows if (row["task"], row["protocol"]) == (task, protocol)]


def evidence_markdown(result: dict[str, Any]) -> str:
    """Returns the page."""
    config = result["config"]
    lines = [
        "# Evidence: HeadKV\n",
        f"Made by `make evidence NAME=headkv` in {result['seconds']:.0f} s on {result['device']}. "
        f"Decoders of two layers (8 query heads, 4 KV heads of 16 dims, "
        "[trained](headkv_models/README.md) on synthetic recall tasks), seeds "
        f"{', '.join(map(str, config['seeds']))}; "
        f"{config['sequences']} test sequences a model, other than those that beta, the whole "
        f"heads of Duo and the head scores were chosen on ({config['validation']} for validation, "
        f"{config['examples']} for scores). Intervals: 95 % percentile bootstrap over models and "
        "their sequences; with this few models they are rough. Nothing here says anything about "
        "LongBench, large models or accelerators.\n",
        "![overview](headkv.png)\n",
        f"`b` is the mean number of entries of a KV head besides the window of {config['window']} "
        "and the ring of new entries; all methods have the same sum of entries (Duo at most that). "
        "A whole head of Duo takes the prompt's length, so that at small b all its heads stream. "
        "Bytes hold everything: keys, values, positions, ring, stored queries; float32, one "
        "sequence. Ada-KV's budgets depend on the input: its bytes are those it would have if "
        "packed. Answers are teacher-forced, which for 'all tokens right' equals greedy decoding. "
        "The last token of a question in the prompt is read again from the compressed cache.\n",
        *_summary(result),
    ]
    for task, protocol in _settings(result):
        lines += _tables(_of(result, task, protocol), task, protocol)
    lines += _models(result) + _causal(result) + _long(result) + _times(result)
    return "\n".join(lines) + "\n"


def _summary(result: dict[str, Any]) -> list[str]:
    """Counts of settings in which HeadKV is ahead and behind, by task and method."""
    lines = [
        "## HeadKV against each method\n",
        "Accuracy of HeadKV (R2 where the task has reasoning examples, else ER) minus that of the "
        "method, paired by sequence: settings (protocol and budget) with the interval above zero, "
        "around it, below it, and the smallest and largest difference.\n",
        "| task | against | ahead | undecided | behind | least | most |",
        "|---|---|---|---|---|---|---|",
    ]
    losses = []
    for task in dict.fromkeys(row["task"] for row in result["settings"]):
        own = [row for row in result["settings"] if row["task"] == task]
        main = main_method(own)
        for method in dict.fromkeys(row["method"] for row in own):
            if method in (main, "full"):
                continue
            gaps = [row for row in own if row["method"] == method]
            ahead = sum(row["behind"][1] > 0 for row in gaps)
            lost = [row for row in gaps if row["behind"][2] < 0]
            means = [row["behind"][0] for row in gaps]
            lines.append(
                f"| {task} | {NAMES[method]} | {ahead} | {len(gaps) - ahead - len(lost)} "
                f"| {len(lost)} | {min(means):+.3f} | {max(means):+.3f} |"
            )
            losses += [
                f"{task}, {TITLES[row['protocol']]}, b = {row['budget']}: {NAMES[method]} is ahead "
                f"by {-row['behind'][0]:.3f} [{-row['behind'][2]:.3f}, {-row['behind'][1]:.3f}]"
                for row in lost
            ]
    lines += ["\nSettings in which HeadKV loses (interval below zero):\n"]
    return [*lines, *([f"- {loss}" for loss in losses] or ["- none"]), ""]


def _tables(rows: list[Row], task: str, protocol: str) -> list[str]:
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["budget"]): row for row in rows}
    head = [
        f"| method | {' | '.join(f'b = {b}' for b in budgets)} |",
        "|---" * (1 + len(budgets)) + "|",
    ]

    def table(cell: Any) -> list[str]:
        return [
            *head,
            *(
                f"| {NAMES[m]} | {' | '.join(cell(found[m, b]) for b in budgets)} |"
                for m in methods
            ),
        ]

    def accuracy(row: Row) -> str:
        mean, low, high = row["accuracy"]
        return f"{mean:.3f} [{low:.2f}, {high:.2f}]"

    def closeness(row: Row) -> str:
        option = "" if row["option"] is None else f", {row['option']:g}"
        return f"{row['divergence']:.3f}, {row['agreement']:.2f}{option}"

    return [
        f"## {task}: {TITLES[protocol]}\n",
        "Share of questions answered.\n",
        *table(accuracy),
        "\nKL from the full cache's next-token distribution (nats), top-1 agreement with it, and "
        "what was chosen on validation sequences (beta, or whole heads of Duo).\n",
        *table(closeness),
        "\nBytes a sequence.\n",
        *table(lambda row: f"{row['bytes']:,}"),
        "",
    ]


def _models(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Head scores\n",
        "Share of the summed score in the best head, the best quarter of query heads and each "
        "layer.\n",
        "| task | seed | estimator | best head | best quarter | by layer |",
        "|---|---|---|---|---|---|",
    ]
    for model in result["models"]:
        for name in ("r", "er", "r2"):
            if name not in model:
                continue
            scores = np.asarray(model[name])
            ordered = np.sort(scores, axis=None)[::-1] / scores.sum()
            layers = ", ".join(f"{part:.2f}" for part in scores.sum(1) / scores.sum())
            lines.append(
                f"| {model['task']} | {model['seed']} | {name} | {ordered[0]:.2f} "
                f"| {ordered[: len(ordered) // 4].sum():.2f} | {layers} |"
            )
    return [*lines, ""]


def _causal(result: dict[str, Any]) -> list[str]:
    if not result["causal"]:
        return []
    lines = [
        "## Are the scored heads needed?\n",
        "Accuracy with the full cache after the outputs of n query heads are set to zero, mean of "
        "the models. 'Same layers' draws random heads of the highest's layers, as many of each; "
        "'as bad' is the share of those draws that cost at least as much as the highest heads.\n",
        "| task | estimator | n | nothing zeroed | highest | random | same layers | as bad |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["causal"]:
        cells = [np.mean(row[name]) for name in ("whole", "top", "random", "same_layers", "worse")]
        numbers = " | ".join(f"{cell:.3f}" for cell in cells)
        lines.append(f"| {row['task']} | {row['estimator']} | {row['heads']} | {numbers} |")
    rows = result["causal"]
    for name, title in (
        ("random", "random heads"),
        ("same_layers", "random heads of their layers"),
    ):
        worse = sum(np.mean(row["top"]) < np.mean(row[name]) for row in rows)
        lines.append(
            f"\nZeroing the highest heads costs more than zeroing as many {title} in {worse} of "
            f"{len(rows)} rows."
        )
    return [*lines, ""]


def _long(result: dict[str, Any]) -> list[str]:
    if not result["long"]:
        return []
    models = len(result["config"]["long_seeds"])
    alone = "; intervals are over its sequences alone" if models == 1 else ""
    lines = [
        "## Compression during long decoding (set_get)\n",
        "Answers in the second half of a sequence. `every`: the prompt (first half) is compressed, "
        "and again whenever the ring is full: memory is constant. `prompt only`: what comes after "
        "the prompt is kept, as in the released code, and memory grows; its bytes are those at the "
        f"end. Models: {models}{alone}. Controls are one draw.\n",
        "| b | method | mode | accuracy | set 1-16 tokens before | 17-48 | more | bytes | beta |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["long"]:
        mean, low, high = row["accuracy"]
        far = " | ".join(f"{value:.3f}" for value in row["by_distance"])
        beta = "" if row["option"] is None else f"{row['option']:g}"
        lines.append(
            f"| {row['budget'] or 'all'} | {NAMES[row['method']]} | {row['mode']} "
            f"| {mean:.3f} [{low:.2f}, {high:.2f}] | {far} | {row['bytes']:,} | {beta} |"
        )
    return [*lines, ""]


def _times(result: dict[str, Any]) -> list[str]:
    if not result["times"]:
        return []
    config = result["config"]
    lines = [
        "## Decode steps of the real caches\n",
        f"One sequence, a context of {config['timed_length']} tokens, b = "
        f"{config['timed_budget']}; microseconds of a step, compression included, median of "
        "interleaved blocks on the machine above, float32. Ada-KV has no cache of static shape. "
        "Where other work shares the cores, ratios say more than microseconds.\n",
        "| method | us a step | bytes held | bytes planned | rungs | compile (s) | traces |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["times"]:
        rungs = ", ".join(map(str, row["rungs"]))
        lines.append(
            f"| {NAMES[row['method']]} | {row['microseconds']:.0f} | {row['bytes']:,} "
            f"| {row['planned_bytes']:,} | {rungs} | {row['compile_seconds']:.1f} "
            f"| {row['traces']} |"
        )
    return [*lines, ""]


# -- the picture ----------------------------------------------------------------------------------


def plot_evidence(result: dict[str, Any]) -> Figure | None:
    """Draws accuracy over budget, one panel per task and protocol, with intervals."""
    settings = _settings(result)
    if not settings:
        return None
    tasks = list(dict.fromkeys(task for task, _ in settings))
    width = max(sum(task == name for task, _ in settings) for name in tasks)
    size = (4.3 * width, 3.4 * len(tasks))
    figure, axes = plt.subplots(len(tasks), width, figsize=size, squeeze=False, sharey=True)
    for line, task in enumerate(tasks):
        for place, (_, protocol) in enumerate(s for s in settings if s[0] == task):
            axis, rows = axes[line, place], _of(result, task, protocol)
            for method, colour in _COLOURS.items():
                own = [row for row in rows if row["method"] == method]
                if not own:
                    continue
                x = [row["budget"] for row in own]
                mean, low, high = np.array([row["accuracy"] for row in own]).T
                style = "--" if method in ("full", "random") else "-"
                axis.plot(x, mean, style, marker=".", color=colour, label=NAMES[method])
                if method != "full":
                    axis.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [str(value) for value in x])
            axis.set_title(f"{task}: {TITLES[protocol]}", fontsize=9)
            axis.set_xlabel("entries a KV head, besides the window", fontsize=8)
            axis.grid(alpha=0.3)
        axes[line, 0].set_ylabel("questions answered")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    return figure


PAGE = EvidencePage("headkv", evidence_markdown, plot_evidence)
