"""Tables of the GDPO experiment's page: arms by row, distances with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.evals.statistics import nested_interval

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
    "gdpo_fair_all": "GDPO, p estimated from the rows, from SFT on all rows",
    "sft_continued_all": "SFT continued, from SFT on all rows",
}
COLUMNS = {
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
PAIRS = {
    "belief_margin": "margin in the belief",
    "text_margin": "margin in the text",
    "majority_accuracy": "accuracy, majority",
    "minority_accuracy": "accuracy, minority",
    "majority_margin": "margin, majority",
    "minority_margin": "margin, minority",
    "text_nll": "NLL of the answer",
}
REVIEW_COLUMNS = {
    "kl": "KL(p, q)",
    "bias": "majority bias",
    "mass": "belief mass",
    "margin": "margin",
    "accuracy": "accuracy",
}


def distances(
    arms: dict[str, Any], more: Mapping[str, Mapping[str, str]] | None = None
) -> list[str]:
    """A table of the JS distance of every arm, and its difference to its start and to GDPO.

    Args:
      arms: Results of every arm by seed.
      more: Further columns, each a title and the cells of the arms that have one.
    """
    more = more or {}
    heads = ("arm", "JS at the end", "by seed", "minus the start's", "GDPO's minus this", *more)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    other = arms.get("gdpo")
    for name, seeds in arms.items():
        values, start = js(seeds), seeds[0].get("start")
        cells = [
            NAMES[name],
            interval(values),
            ", ".join(f"{row.mean():.3f}" for row in values),
            "" if start is None else gap(values - js(arms[start])),
            "" if other is None or name == "gdpo" else gap(js(other) - values),
            *(column.get(name, "") for column in more.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def best_distances(arms: dict[str, Any]) -> dict[str, str]:
    """JS at the lowest held-out loss of every arm, the first of equal ones; means over seeds."""
    found = {}
    for name, seeds in arms.items():
        best = [min(one["curve"], key=lambda point: point["loss"])["js"] for one in seeds]
        found[name] = f"{np.mean(best):.3f}"
    return found


def known_lines(lines: dict[str, float]) -> list[str]:
    """A table of known distributions."""
    return [
        "| known distribution | JS |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in lines.items()),
    ]


def js(seeds: list[dict[str, Any]]) -> np.ndarray:
    """JS distances of an arm [seeds, topics or snippets]."""
    return np.asarray([one["js"] for one in seeds])


def interval(values: np.ndarray) -> str:
    """A mean and its 95 % interval."""
    found = nested_interval(values)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def gap(values: np.ndarray) -> str:
    """A mean difference and its 95 % interval, with signs."""
    found = nested_interval(values)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def table(arms: dict[str, Any], columns: dict[str, str], samples: int) -> list[str]:
    """A table of other measures, means over seeds; `columns` maps their keys to titles."""
    heads = [head.format(samples=samples) for head in columns.values()]
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, seeds in arms.items():
        cells = []
        for column in columns:
            found = [one[column] for one in seeds if column in one]
            cells.append(f"{np.mean(found):.3f}" if found else "")
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return lines
