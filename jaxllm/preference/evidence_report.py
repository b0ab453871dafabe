"""The page of the GDPO experiment: every sentence with a number is computed from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from jaxllm.evals.statistics import nested_interval
from jaxllm.training.run_folder import to_plain, write_json, write_text

NAMES = {
    "sft_last": "SFT, last row of a prompt",
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
    "dpo_0.1_all": "DPO, beta 0.1, from SFT on all rows",
    "dpo_1_all": "DPO, beta 1, from SFT on all rows",
    "gdpo_all": "GDPO, from SFT on all rows",
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

_REVIEW_COLUMNS = {
    "kl": "KL(p, q)",
    "bias": "majority bias",
    "mass": "belief mass",
    "margin": "margin",
    "accuracy": "accuracy",
}


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Writes gdpo.json, gdpo.md and gdpo.png to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "gdpo.json", result)
    write_text(folder / "gdpo.md", evidence_markdown(result))
    plot_evidence(result, folder / "gdpo.png")


def command(name: str, run: Any) -> str:
    """The command that makes a page: `make evidence` with what differs from the defaults."""
    changed = _changes(to_plain(run), to_plain(type(run)()))
    arguments = f" EVIDENCE_ARGS='{' '.join(changed)}'" if changed else ""
    return f"make evidence NAME={name}{arguments}"


def _changes(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "--") -> list[str]:
    changed = []
    for name, value in values.items():
        key = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, dict):
            changed += _changes(value, defaults[name], f"{key}.")
        elif value != defaults[name]:
            shown = value if isinstance(value, list) else [value]
            changed.append(f"{key} {' '.join(map(str, shown))}")
    return changed


def evidence_markdown(result: dict[str, Any]) -> str:
    """The page; parts that were never run are left out."""
    seconds = sum(result[part]["seconds"] for part in ("opinions", "reviews") if part in result)
    lines = [
        "# Does DPO sharpen a group's beliefs, and does GDPO keep them?\n",
        f"`{result['command']}` made this page in {seconds:.0f} s on "
        f"{result['device']}, jax {result['versions']['jax']}.\n",
        "JS is the square root of the Jensen-Shannon divergence (nats, at most 0.833) between the "
        "group's distribution and the model's at the belief token, with the 95 % interval of a "
        "bootstrap over seeds and topics or snippets, rough with this few seeds.\n",
        "![curves](gdpo.png)\n",
    ]
    if "opinions" in result:
        lines += _opinions(result["config"], result["opinions"])
    if "reviews" in result:
        lines += _reviews(result["config"], result["reviews"])
    lines += [
        "\n## Limits\n",
        "Neither the paper's models nor its data nor its scale; no number here is the paper's. "
        "Beliefs and their distribution are given. Rejected beliefs are drawn evenly, which the "
        "closed form assumes and the paper does not state. All topics of the synthetic world are "
        "seen in training; only their combination with a style is new. GDPO gets p as a label, "
        "which DPO and SFT do not; the rows with p estimated from the pairs remove that advantage. "
        "How far DPO goes depends on beta, steps, rate and reference.",
    ]
    return "\n".join(lines) + "\n"


def _opinions(config: dict[str, Any], part: dict[str, Any]) -> list[str]:
    arms = part["arms"]
    lines = [
        "## The synthetic world of opinions\n",
        f"{config['topics']} topics, N = {config['pairs']} pairs per prompt before rounding down, "
        f"seeds {', '.join(map(str, config['seeds']))}; a decoder of {part['parameters']:,} "
        f"parameters, batch {config['batch']}, {config['sft_steps']} supervised steps at "
        f"{config['sft_rate']:g}, then {config['steps']} steps at {config['rate']:g}, in every "
        "second-stage arm from SFT on the last row of each prompt, as in the released code, where "
        "nothing else is said. Test prompts combine topics and styles that were seen apart.\n",
        "Criteria fixed in advance, for every seed; everything else is reported, not gated:\n",
        "| criterion | by seed | |",
        "|---|---|---|",
    ]
    for gate in part["gates"]:
        gaps = ", ".join(f"{gap:.4f}" for gap in gate["by_seed"])
        lines.append(f"| {gate['criterion']} | {gaps} | {'pass' if gate['passed'] else 'FAIL'} |")
    lines.append(_start_note(part))
    samples = config["samples"]
    lines += [
        "\n### Distance to the group\n",
        *distances(arms, "JS at the lowest held-out loss"),
        "\n### Other measures at the end, means over seeds\n",
        *_table(arms, _COLUMNS, samples),
        "\nJS of samples is never 0; the perfect model's is below. CBC: the stated option belongs "
        "to the stated number; BPC: the answer's words belong to the stated option.\n",
        *known_lines(part["lines"]),
        "\n### Pairs of the test prompts\n",
        "Nats of log(policy/reference). Margins in belief and text are of pairs of different "
        "beliefs; accuracies and margins of majority and minority of pairs behind one belief.\n",
        *_table(arms, _PAIRS, samples),
        "\n### What was expected, and what came out\n",
        *expectations(part),
    ]
    if missing := [name for name in NAMES if name not in arms]:
        lines.append(f"\nNot run: {', '.join(NAMES[name] for name in missing)}.")
    return lines


def _start_note(part: dict[str, Any]) -> str:
    """What the criteria are worth, given where their arms begin."""
    last, every = (_js(part["arms"][name]).mean() for name in ("sft_last", "sft_all"))
    uniform = part["lines"]["uniform over the topic's options"]
    return (
        "\nThe start of the released code sees one accepted row of each prompt and is at "
        f"{last:.3f}, where even guessing evenly among the options is at {uniform:.3f}, so from "
        "there the criteria ask little of GDPO, and DPO has a majority of its own to keep. The "
        f"arms from SFT on all rows, which is at {every:.3f}, ask more."
    )


def _reviews(whole: dict[str, Any], part: dict[str, Any]) -> list[str]:
    config = whole["reviews"]
    low, high = part["raters"]
    lines = [
        "\n## Real ratings\n",
        f"Snippets of {config['source']} reviews of at most {config['longest']} tokens "
        f"({part['snippets']:,} of them), each rated by {low} to {high} people; the five buckets "
        "of ratings are the beliefs, and a snippet's raters are the group. By seed, "
        f"{config['train']:,} snippets make {', '.join(f'{n:,}' for n in part['pairs'])} pairs "
        f"(N = {config['pairs']}), and {config['test']} others are measured. {config['model']} "
        f"({part['parameters']:,} parameters) takes {config['sft_steps']} supervised steps of "
        f"{config['batch']} accepted completions at {config['sft_rate']:g}, then every arm "
        f"{config['steps']} steps at {config['rate']:g} from there.\n",
        *distances(part["arms"]),
        "",
        *known_lines(part["lines"]),
        "\nAs many raters drawn again from a snippet's own shares: an estimate, too low if "
        "anything, of what is left when the distribution itself is known.\n",
        *_table(part["arms"], _REVIEW_COLUMNS, whole["samples"]),
        "\nMargin and accuracy: log-ratio to the start of the chosen minus the rejected sentence "
        "behind one belief, on test snippets, with sentences of the training snippets.",
    ]
    lines += ["\n### What came out\n", *_review_findings(part)]
    if missing := [name for name in config["arms"] if name not in part["arms"]]:
        lines.append(f"\nNot run: {', '.join(NAMES[name] for name in missing)}.")
    return lines


def _review_findings(part: dict[str, Any]) -> list[str]:
    """How every arm stands to the predictor that knows no text, and GDPO to its controls."""
    arms, marginal = part["arms"], part["lines"]["marginal of the training snippets"]
    groups: dict[str, list[str]] = {"below": [], "above": [], "not told apart from": []}
    for name, seeds in arms.items():
        found = nested_interval(_js(seeds))
        side = "not told apart from"
        if found.excludes(marginal):
            side = "below" if found.mean < marginal else "above"
        groups[side].append(NAMES[name])
    lines = [
        f"- {side.capitalize()} the marginal's {marginal:.3f}: {'; '.join(names)}."
        for side, names in groups.items()
        if names
    ]
    if "gdpo" in arms:
        lines += [
            f"- GDPO minus {NAMES[name]}: {_gap(_js(arms['gdpo']) - _js(arms[name]))}."
            for name in ("dpo_0.1", "sft_continued", "gdpo_fair", "kl_nll")
            if name in arms
        ]
    return lines


def distances(arms: dict[str, Any], best_title: str | None = None) -> list[str]:
    """A table of the JS distance of every arm, and its difference to its start and to GDPO."""
    head = "| arm | JS at the end | by seed | minus the start's | GDPO's minus this |"
    lines = [head + (f" {best_title} |" if best_title else "")]
    lines.append("|---" * (5 + bool(best_title)) + "|")
    for name, seeds in arms.items():
        values = _js(seeds)
        whole = nested_interval(values)
        by_seed = ", ".join(f"{row.mean():.3f}" for row in values)
        row = f"| {NAMES[name]} | {whole.mean:.3f} [{whole.low:.3f}, {whole.high:.3f}] | {by_seed} "
        start = seeds[0].get("start")
        row += f"| {'' if start is None else _gap(values - _js(arms[start]))} "
        other = arms.get("gdpo")
        row += f"| {'' if other is None or name == 'gdpo' else _gap(_js(other) - values)} |"
        if best_title:
            # By the first of equal losses.
            best = [min(one["curve"], key=lambda point: point["loss"])["js"] for one in seeds]
            row += f" {np.mean(best):.3f} |"
        lines.append(row)
    return lines


def known_lines(lines: dict[str, float]) -> list[str]:
    """A table of known distributions."""
    return [
        "| known distribution | JS |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in lines.items()),
    ]


def _js(seeds: list[dict[str, Any]]) -> np.ndarray:
    return np.asarray([one["js"] for one in seeds])


def _gap(values: np.ndarray) -> str:
    found = nested_interval(values)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _table(arms: dict[str, Any], columns: dict[str, str], samples: int) -> list[str]:
    heads = [head.format(samples=samples) for head in columns.values()]
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, seeds in arms.items():
        cells = []
        for column in columns:
            found = [one[column] for one in seeds if column in one]
            cells.append(f"{np.mean(found):.3f}" if found else "")
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return lines


# -- what was expected ---------------------------------------------------------------------------


def expectations(part: dict[str, Any]) -> list[str]:
    """One line for each expectation written down before the run whose arms were run."""
    arms = part["arms"]
    lines: list[str] = []

    def mean(name: str, key: str) -> float:
        return float(np.mean([np.mean(one[key]) for one in arms[name]]))

    def has(*names: str) -> bool:
        return set(names) <= set(arms)

    def against(first: str, second: str) -> str:
        return f"JS differs by {_gap(_js(arms[first]) - _js(arms[second]))}"

    for name in ("dpo_0.1", "dpo_0.1_all"):
        if has(name):
            curves = np.asarray([[p["js"] for p in one["curve"]] for one in arms[name]])
            rises = float(np.mean(np.diff(curves, axis=1) > 0))
            lines.append(
                f"- Expected: under {NAMES[name]}, JS rises with the steps and the majority is "
                f"over-represented. Found: {rises:.0%} of the curve's steps rise, from "
                f"{curves[:, 0].mean():.3f} to {curves[:, -1].mean():.3f}; majority bias "
                f"{mean(name, 'bias'):.2f}; {mean(name, 'belief_margin'):.1f} nats of margin lie "
                f"in the belief, {mean(name, 'text_margin'):.1f} in the text, where the closed "
                "form has all of it in the belief."
            )
    betas = [name for name in ("dpo_0.05", "dpo_0.1", "dpo_0.5", "dpo_1") if name in arms]
    if len(betas) > 1:
        found = ", ".join(f"{name.removeprefix('dpo_')}: {mean(name, 'js'):.3f}" for name in betas)
        lines.append(f"- Expected: the smaller DPO's beta, the larger JS. Found by beta: {found}.")
    if has("gdpo", "sft_all"):
        lines.append(
            "- Expected: GDPO ends at or below SFT, with belief mass and majority bias near 1. "
            f"Found: against SFT on all rows {against('gdpo', 'sft_all')}, against the start "
            f"{against('gdpo', 'sft_last')}; mass {mean('gdpo', 'mass'):.3f}, bias "
            f"{mean('gdpo', 'bias'):.3f}."
        )
    if has("dpo_0.1_all", "gdpo_all"):
        lines.append(
            "- Expected: also from a start that is calibrated DPO ends further from the group than "
            f"GDPO. Found: {against('dpo_0.1_all', 'gdpo_all')}."
        )
    if has("bdpo"):
        lines.append(
            "- Expected: conditioned DPO alone leaves the belief near the start and raises BPC. "
            f"Found: {against('bdpo', 'sft_last')}; BPC {mean('sft_last', 'bpc'):.3f} before, "
            f"{mean('bdpo', 'bpc'):.3f} after."
        )
    if has("kl_nll", "gdpo"):
        lines.append(
            "- Expected: without its preference term GDPO is as well calibrated, since calibration "
            f"comes from the KL. Found: KL and NLL against GDPO, {against('kl_nll', 'gdpo')}; "
            f"minority accuracy {mean('kl_nll', 'minority_accuracy'):.3f} without, "
            f"{mean('gdpo', 'minority_accuracy'):.3f} with it."
        )
    if has("gdpo_fair", "sft_continued"):
        lines.append(
            "- Expected: GDPO that sees no more than the pairs is near SFT on all of them. Found: "
            f"against SFT continued on all rows, {against('gdpo_fair', 'sft_continued')}; against "
            f"GDPO with p, {against('gdpo_fair', 'gdpo')}."
        )
    if has("ipo", "dpo_0.1"):
        lines.append(
            "- Expected: IPO on sums sharpens less than DPO, its margin being bounded. Found: "
            f"{against('ipo', 'dpo_0.1')}."
        )
    return lines


# -- the picture ---------------------------------------------------------------------------------


def plot_evidence(result: dict[str, Any], path: Path) -> None:
    """Draws JS distance and majority bias over the steps of the second stage."""
    panels = []
    if "opinions" in result:
        arms = result["opinions"]["arms"]
        panels += [
            ("opinions: JS to the group", arms, "js"),
            ("opinions: majority bias", arms, "bias"),
        ]
    if "reviews" in result:
        panels.append(("reviews: JS to the raters", result["reviews"]["arms"], "js"))
    places = {name: place for place, name in enumerate(NAMES)}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.4), squeeze=False)
    handles: dict[str, Any] = {}
    for axis, (title, arms, key) in zip(axes[0], panels, strict=True):
        for name, seeds in arms.items():
            if name in ("sft_last", "sft_all"):
                continue
            steps = [point["step"] for point in seeds[0]["curve"]]
            curves = np.asarray([[point[key] for point in one["curve"]] for one in seeds])
            place = places[name]
            colour, style = f"C{place % 10}", "-" if place < 10 else "--"
            handles[NAMES[name]] = axis.plot(steps, curves.mean(0), style, color=colour)[0]
            axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.1)
        axis.set(xlabel="step of the second stage", title=title)
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles, loc="lower center", ncols=4, fontsize=7)
    figure.tight_layout(rect=(0, 0.18, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
