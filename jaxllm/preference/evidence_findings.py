"""What was expected of the GDPO experiment and what came out, one computed line for each claim."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.evals.statistics import nested_interval
from jaxllm.preference.evidence_tables import NAMES, gap, js


def expectations(part: dict[str, Any]) -> list[str]:
    """One line for each expectation written down before the run whose arms were run."""
    arms = part["arms"]
    lines: list[str] = []

    def mean(name: str, key: str) -> float:
        return float(np.mean([np.mean(one[key]) for one in arms[name]]))

    def has(*names: str) -> bool:
        return set(names) <= set(arms)

    def against(first: str, second: str) -> str:
        return f"JS differs by {gap(js(arms[first]) - js(arms[second]))}"

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
    if has("gdpo_fair_all", "sft_continued_all", "gdpo_all"):
        lines.append(
            "- Expected: so it is from SFT on all rows. Found: against SFT continued from there, "
            f"{against('gdpo_fair_all', 'sft_continued_all')}; against GDPO with p from there, "
            f"{against('gdpo_fair_all', 'gdpo_all')}."
        )
    if has("ipo", "dpo_0.1"):
        lines.append(
            "- Expected: IPO on sums sharpens less than DPO, its margin being bounded. Found: "
            f"{against('ipo', 'dpo_0.1')}."
        )
    return lines


def large_findings(part: dict[str, Any]) -> list[str]:
    """What was expected of many pairs, and the differences that judge it."""
    arms = part["arms"]
    lines = []
    for expected, pairs in (
        (
            "with many pairs SFT on all of them is close to GDPO",
            (("sft_all", "gdpo"), ("sft_continued_all", "gdpo_all")),
        ),
        ("SFT on the last row of a prompt is further from the group", (("sft_last", "sft_all"),)),
        (
            "GDPO that estimates p lies near SFT on all rows, and near GDPO with p",
            (
                ("gdpo_fair", "sft_continued"),
                ("gdpo_fair_all", "sft_continued_all"),
                ("gdpo_fair", "gdpo"),
                ("gdpo_fair_all", "gdpo_all"),
            ),
        ),
        (
            "DPO ends further from the group than GDPO",
            (("dpo_0.1", "gdpo"), ("dpo_0.1_all", "gdpo_all")),
        ),
        ("without its preference term GDPO is as well calibrated", (("kl_nll", "gdpo"),)),
    ):
        found = [
            f"{NAMES[first]} minus {NAMES[second]}: JS {gap(js(arms[first]) - js(arms[second]))}"
            for first, second in pairs
            if first in arms and second in arms
        ]
        if found:
            lines.append(f"- Expected: {expected}. Found: {'; '.join(found)}.")
    return lines


def review_findings(part: dict[str, Any]) -> list[str]:
    """How every arm stands to the predictor that knows no text, and GDPO to its controls."""
    arms, marginal = part["arms"], part["lines"]["marginal of the training snippets"]
    groups: dict[str, list[str]] = {"below": [], "above": [], "not told apart from": []}
    for name, seeds in arms.items():
        found = nested_interval(js(seeds))
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
            f"- GDPO minus {NAMES[name]}: {gap(js(arms['gdpo']) - js(arms[name]))}."
            for name in ("dpo_0.1", "sft_continued", "gdpo_fair", "kl_nll")
            if name in arms
        ]
    return lines
