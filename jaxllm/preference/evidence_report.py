"""The page of the GDPO experiment: every sentence with a number is computed from the results."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from jaxllm.preference.evidence_findings import expectations, large_findings, review_findings
from jaxllm.preference.evidence_tables import (
    COLUMNS,
    NAMES,
    PAIRS,
    REVIEW_COLUMNS,
    best_distances,
    distances,
    gap,
    interval,
    js,
    known_lines,
    table,
)
from jaxllm.training.evidence import EvidencePage

_PARTS = {
    "opinions": "opinions",
    "large": "opinions with more pairs",
    "reviews": "ratings",
}


def evidence_markdown(result: dict[str, Any]) -> str:
    """The page; parts that were never run are left out."""
    seconds = ", ".join(
        f"{title} {result[part]['cpu_seconds']:.0f} s"
        for part, title in _PARTS.items()
        if "cpu_seconds" in result.get(part, ())
    )
    lines = [
        "# Does DPO sharpen a group's beliefs, and does GDPO keep them?\n",
        f"`{result['command']}` made this page on {result['device']}, jax "
        f"{result['versions']['jax']}.{f' CPU time by part: {seconds}.' if seconds else ''}\n",
        "JS is the square root of the Jensen-Shannon divergence (nats, at most 0.833) between the "
        "group's distribution and the model's at the belief token, with the 95 % interval of a "
        "bootstrap over seeds and topics or snippets, rough with this few seeds.\n",
        "![curves](gdpo.png)\n",
    ]
    if "opinions" in result:
        lines += _opinions(result["config"], result["opinions"])
    if "large" in result:
        lines += _large(result["config"], result["large"], result.get("opinions"))
    if "reviews" in result:
        lines += _reviews(result["config"], result["reviews"])
    lines += [
        "\n## Limits\n",
        "Neither the paper's models nor its data nor its scale; no number here is the paper's. "
        "Beliefs are given. Rejected beliefs are drawn evenly, which the closed form assumes and "
        "the paper does not state. All topics of the synthetic world are seen in training; only "
        "their combination with a style is new. GDPO gets p as a label, which DPO and SFT do not; "
        "the arms with p estimated from the pairs remove that advantage. "
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
        *distances(arms, {"JS at the lowest held-out loss": best_distances(arms)}),
        "\n### Other measures at the end, means over seeds\n",
        *table(arms, COLUMNS, samples),
        "\nJS of samples is never 0; the perfect model's is below. CBC: the stated option belongs "
        "to the stated number; BPC: the answer's words belong to the stated option.\n",
        *known_lines(part["lines"]),
        "\n### Pairs of the test prompts\n",
        "Nats of log(policy/reference). Margins in belief and text are of pairs of different "
        "beliefs; accuracies and margins of majority and minority of pairs behind one belief.\n",
        *table(arms, PAIRS, samples),
        "\n### What was expected, and what came out\n",
        *expectations(part),
    ]
    if missing := [name for name in NAMES if name not in arms]:
        lines.append(f"\nNot run: {', '.join(NAMES[name] for name in missing)}.")
    return lines


def _start_note(part: dict[str, Any]) -> str:
    """What the criteria are worth, given where their arms begin."""
    last, every = (js(part["arms"][name]).mean() for name in ("sft_last", "sft_all"))
    uniform = part["lines"]["uniform over the topic's options"]
    return (
        "\nThe start of the released code sees one accepted row of each prompt and is at "
        f"{last:.3f}, where even guessing evenly among the options is at {uniform:.3f}, so from "
        "there the criteria ask little of GDPO, and DPO has a majority of its own to keep. The "
        f"arms from SFT on all rows, which is at {every:.3f}, ask more."
    )


def _large(config: dict[str, Any], part: dict[str, Any], few: dict[str, Any] | None) -> list[str]:
    """The same arms with more pairs, beside what they came to with few."""
    arms, small = part["arms"], {} if few is None else few["arms"]
    n, large = config["pairs"], config["large_pairs"]
    both = [name for name in arms if name in small]
    beside = {
        f"JS, N = {n}": {name: interval(js(small[name])) for name in both},
        "minus that": {name: gap(js(arms[name]) - js(small[name])) for name in both},
    }
    lines = [
        f"\n## The same world with N = {large}\n",
        "Nothing but N is changed: topics, prompts, model, rates and numbers of steps are those "
        f"above, so that the supervised steps draw {config['batch'] * config['sft_steps']:,} of "
        f"{', '.join(f'{count:,}' for count in part['rows'])} rows by seed. A belief has rows from "
        f"a share of 1/{large} on, not only from 1/{n}, and shares of rows are that much nearer to "
        "p.\n",
        *distances(arms, beside),
        "",
        *table(arms, COLUMNS, config["samples"]),
        "\n### What was expected, and what came out\n",
        *large_findings(part),
    ]
    if missing := [name for name in config["large_arms"] if name not in arms]:
        lines.append(f"\nNot run: {', '.join(NAMES[name] for name in missing)}.")
    return lines


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
        *table(part["arms"], REVIEW_COLUMNS, whole["samples"]),
        "\nMargin and accuracy: log-ratio to the start of the chosen minus the rejected sentence "
        "behind one belief, on test snippets, with sentences of the training snippets.",
    ]
    lines += ["\n### What came out\n", *review_findings(part)]
    if missing := [name for name in config["arms"] if name not in part["arms"]]:
        lines.append(f"\nNot run: {', '.join(NAMES[name] for name in missing)}.")
    return lines


# -- the picture ---------------------------------------------------------------------------------


def plot_evidence(result: dict[str, Any]) -> Figure:
    """Draws JS distance and majority bias over the steps of the second stage."""
    panels = []
    if "opinions" in result:
        arms = result["opinions"]["arms"]
        panels += [
            ("opinions: JS to the group", arms, "js"),
            ("opinions: majority bias", arms, "bias"),
        ]
    if "large" in result:
        title = f"opinions, N = {result['config']['large_pairs']}: JS to the group"
        panels.append((title, result["large"]["arms"], "js"))
    if "reviews" in result:
        panels.append(("reviews: JS to the raters", result["reviews"]["arms"], "js"))
    places = {name: place for place, name in enumerate(NAMES)}
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    size = (6 * columns, 4 * lines + 1)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    handles: dict[str, Any] = {}
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, arms, key) in zip(axes.flat, panels, strict=False):
        for name, seeds in arms.items():
            if name in ("sft_last", "sft_all"):
                continue
            steps = [point["step"] for point in seeds[0]["curve"]]
            curves = np.asarray([[point[key] for point in one["curve"]] for one in seeds])
            colour, style = f"C{places[name] % 10}", ("-", "--", ":")[places[name] // 10]
            handles[NAMES[name]] = axis.plot(steps, curves.mean(0), style, color=colour)[0]
            axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.1)
        axis.set(xlabel="step of the second stage", title=title)
        axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles, loc="lower center", ncols=2 * columns, fontsize=7)
    figure.tight_layout(rect=(0, 1 / size[1], 1, 1))
    return figure


PAGE = EvidencePage("gdpo", evidence_markdown, plot_evidence, dpi=110)
