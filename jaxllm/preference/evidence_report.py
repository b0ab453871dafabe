"""The page of the GDPO experiment: every sentence with a number is computed from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from jaxllm.evals.statistics import nested_interval
from jaxllm.training.run_folder import write_json, write_text

NAMES = {
    "sft_last": "SFT, last row of a prompt (start)",
    "sft_all": "SFT, all rows",
    "sft_continued": "SFT continued, all rows",
    "dpo_0.05": "DPO, beta 0.05",
    "dpo_0.1": "DPO, beta 0.1",
    "dpo_0.5": "DPO, beta 0.5",
    "dpo_1": "DPO, beta 1",
    "dpo_nll": "DPO, beta 0.1, and NLL",
    "ipo": "IPO, tau 0.1, sums",
    "kto": "KTO, beta 0.1",
    "bdpo": "belief-conditioned DPO only",
    "kl": "belief KL only",
    "kl_nll": "belief KL and NLL",
    "nll_bdpo": "belief NLL and conditioned DPO",
    "gdpo": "GDPO",
    "gdpo_fair": "GDPO, p estimated from the rows",
}
_COLUMNS = {
    "js_few": "JS, {samples} samples",
    "js_64": "JS, 64 samples",
    "kl": "KL(p, q)",
    "bias": "majority bias",
    "minority": "minority recall",
    "entropy": "entropy ratio",
    "mass": "belief mass",
    "cbc": "CBC",
    "bpc": "BPC",
}
_PAIRS = {
    "belief_margin": "margin in the belief",
    "text_margin": "margin in the text",
    "majority_accuracy": "accuracy, majority",
    "minority_accuracy": "accuracy, minority",
    "majority_margin": "margin, majority",
    "minority_margin": "margin, minority",
    "text_nll": "NLL of the answer",
}


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Writes gdpo.json, gdpo.md and gdpo.png to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "gdpo.json", result)
    write_text(folder / "gdpo.md", evidence_markdown(result))
    plot_evidence(result, folder / "gdpo.png")


def command(result: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command that makes the page: `make evidence` with what differs from the defaults."""
    changed = []
    for name, value in result["config"].items():
        if value != defaults[name]:
            values = value if isinstance(value, list) else [value]
            changed.append(f"--{name.replace('_', '-')} {' '.join(map(str, values))}")
    arguments = f" EVIDENCE_ARGS='{' '.join(changed)}'" if changed else ""
    return f"make evidence NAME=gdpo{arguments}"


def evidence_markdown(result: dict[str, Any]) -> str:
    """The page."""
    config, arms = result["config"], result["arms"]
    lines = [
        "# Does DPO sharpen a group's beliefs, and does GDPO keep them?\n",
        f"`{result['command']}` made this page in {result['seconds']:.0f} s on "
        f"{result['device']}, jax {result['versions']['jax']}.\n",
        f"The synthetic world of opinions, {config['topics']} topics, N = {config['pairs']} pairs, "
        f"seeds {', '.join(map(str, config['seeds']))}; a decoder of {result['parameters']:,} "
        f"parameters, batch {config['batch']}, {config['sft_steps']} supervised steps at "
        f"{config['sft_rate']:g}, then {config['steps']} steps at {config['rate']:g}, in every "
        "second-stage arm from the model of the first line. Test prompts combine topics and styles "
        "that were seen apart. JS is the square root of the Jensen-Shannon divergence (nats) "
        "between the group's distribution and the model's at the belief token, with the 95 % "
        "interval of a bootstrap over seeds and topics.\n",
        "## Criteria fixed in advance\n",
        "| criterion | by seed | |",
        "|---|---|---|",
    ]
    for gate in result["gates"]:
        gaps = ", ".join(f"{gap:.4f}" for gap in gate["by_seed"])
        lines.append(f"| {gate['criterion']} | {gaps} | {'pass' if gate['passed'] else 'FAIL'} |")
    lines += ["\n## Distance to the group\n", *_distances(result)]
    lines += ["\n## Other measures at the end, means over seeds\n", *_table(result, _COLUMNS)]
    lines += [
        "\nJS of samples is never 0; the perfect model's is below. CBC: the stated option belongs "
        "to the stated number; BPC: the answer's words belong to the stated option.\n",
        "| known distribution | JS |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in result["lines"].items()),
        "\n## Pairs of the test prompts\n",
        "Nats of log(policy/reference). Margins in belief and text are of pairs of different "
        "beliefs; accuracies and margins of majority and minority of pairs behind one belief.\n",
        *_table(result, _PAIRS),
        "\n![curves](gdpo.png)\n",
        "## Limits\n",
        "Neither the paper's models nor its data nor its scale. Beliefs and their distribution are "
        "given, rejected beliefs are drawn evenly (the paper does not say how), all topics are "
        "seen in training, and GDPO gets p as a label, which DPO and SFT do not; the row with p "
        "estimated from the rows removes that advantage. How far DPO goes depends on beta, steps "
        "and reference.",
    ]
    if missing := [name for name in NAMES if name not in arms]:
        lines.append(f"\nNot run: {', '.join(NAMES[name] for name in missing)}.")
    return "\n".join(lines) + "\n"


def _distances(result: dict[str, Any]) -> list[str]:
    lines = [
        "| arm | JS at the end | by seed | JS at the lowest held-out loss | GDPO's minus this |",
        "|---|---|---|---|---|",
    ]
    arms = result["arms"]
    gdpo = arms.get("gdpo")
    for name, seeds in arms.items():
        values = np.asarray([one["js"] for one in seeds])
        whole = nested_interval(values)
        best = [min(one["curve"], key=lambda point: point["loss"])["js"] for one in seeds]
        by_seed = ", ".join(f"{row.mean():.3f}" for row in values)
        gap = ""
        if gdpo is not None and name != "gdpo":
            difference = nested_interval(np.asarray([one["js"] for one in gdpo]) - values)
            gap = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        lines.append(
            f"| {NAMES[name]} | {whole.mean:.3f} [{whole.low:.3f}, {whole.high:.3f}] | {by_seed} "
            f"| {np.mean(best):.3f} | {gap} |"
        )
    return lines


def _table(result: dict[str, Any], columns: dict[str, str]) -> list[str]:
    heads = [head.format(samples=result["config"]["samples"]) for head in columns.values()]
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, seeds in result["arms"].items():
        cells = []
        for column in columns:
            found = [one[column] for one in seeds if column in one]
            cells.append(f"{np.mean(found):.3f}" if found else "")
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return lines


def plot_evidence(result: dict[str, Any], path: Path) -> None:
    """Draws JS distance, majority bias and held-out loss over the steps of the second stage."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for place, (name, seeds) in enumerate(result["arms"].items()):
        if name in ("sft_last", "sft_all"):
            continue
        steps = [point["step"] for point in seeds[0]["curve"]]
        for axis, key in zip(axes, ("js", "bias"), strict=True):
            curves = np.asarray([[point[key] for point in one["curve"]] for one in seeds])
            colour, style = f"C{place % 10}", "-" if place < 10 else "--"
            axis.plot(steps, curves.mean(0), style, color=colour, label=NAMES[name])
            axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.1)
    for axis, title in zip(axes, ("JS distance to the group", "majority bias"), strict=True):
        axis.set(xlabel="step of the second stage", title=title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=7)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
