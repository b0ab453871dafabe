"""The page of the pair losses: every sentence with a number is computed from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from jaxllm.training.run_folder import write_json, write_text

_COLUMNS = {
    "gain": ("gain of reward", 3),
    "kl": ("KL to the start", 2),
    "margin": ("margin", 2),
    "accuracy": ("accuracy", 2),
    "chosen": ("chosen, held out", 2),
    "chosen_seen": ("chosen, trained on", 2),
    "rejected": ("rejected, held out", 2),
    "fluency": ("log p of samples under the start", 2),
}


def write_pairs_report(result: dict[str, Any], folder: Path) -> None:
    """Writes preference.json, preference.md and preference.png to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preference.json", result)
    write_text(folder / "preference.md", pairs_markdown(result))
    plot_pairs(result, folder / "preference.png")


def pairs_markdown(result: dict[str, Any]) -> str:
    """The page."""
    config, arms, start = result["config"], result["arms"], result["start"]
    scores = result["pair_scores"]
    best, worst, mean = (
        sum(one[name] for one in scores) / len(scores) for name in ("best", "worst", "all")
    )
    lines = [
        "# All pair losses from the same start\n",
        f"`{result['command']}` made this page in {result['seconds']:.0f} s on "
        f"{result['device']}, jax {result['versions']['jax']}.\n",
        f"{config['model']} writes {config['samples']} completions of up to "
        f"{config['max_new_tokens']} tokens of each of {config['prompts']} prompts, the first "
        "words of film reviews; a lexicon scores them (mean valence of the words, -4 to 4: "
        f"{mean:.3f} on average, best of a prompt {best:.3f}, worst {worst:.3f}), and best and "
        "worst make a pair. "
        f"Every algorithm takes {config['steps']} steps of {config['batch']} pairs at the rate "
        f"{config['rate']:g} (AdamW, gradient norm at most 1), with its default options or those "
        "stated below, on the same batches; seeds "
        f"{', '.join(map(str, config['seeds']))} draw the samples and the order. Measured on "
        f"{config['held_out']} other prompts: 95 % intervals of a bootstrap over seeds and prompts "
        "or pairs, rough with this few seeds.\n",
        f"Before training, samples score {_cell(start['reward'], 3)} and have "
        f"{start['fluency']['mean']:.2f} nats of log p per token.\n",
        "![overview](preference.png)\n",
        "## By gain of reward\n",
        f"| algorithm | {' | '.join(head for head, _ in _COLUMNS.values())} |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]
    for name in _ranked(arms):
        found = arms[name]["measures"]
        cells = [_cell(found[key], digits) for key, (_, digits) in _COLUMNS.items()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += [
        "\nGain of reward: of samples at temperature 1, against the start's of the same prompts. "
        "KL: of policy to start, in nats per completion, over these samples and the whole "
        "vocabulary. Margin: log-ratio of chosen minus rejected, in nats, unscaled; accuracy: "
        "share of margins above 0. Chosen and rejected: their log-ratios; below 0 the completion "
        "is less likely than before. Log p of samples under the start, per token: how far the "
        "text is from what the start would write.\n",
        "## What the table says\n",
        *_findings(result),
        "\n## Settings\n",
        "| algorithm | options |",
        "|---|---|",
        *(f"| `{name}` | `{arm['options']}` |" for name, arm in arms.items()),
        "\n## Limits\n",
        "One small model, one cheap reward that counts words, one rate for all: losses whose scale "
        "or options want another rate or more steps stand worse than they could, and a high gain "
        "at a high KL is bought with the text. Gains at different KL do not compare algorithms; "
        "the picture shows both. No number is a paper's.",
    ]
    if result["left_out"]:
        reasons = (f"`{name}` ({reason})" for name, reason in result["left_out"].items())
        lines.append(f"\nNot in the table: {', '.join(reasons)}.")
    return "\n".join(lines) + "\n"


def _findings(result: dict[str, Any]) -> list[str]:
    arms, start = result["arms"], result["start"]

    def names(test: Any) -> str:
        found = [f"`{name}`" for name in _ranked(arms) if test(arms[name]["measures"])]
        return f"{len(found)} of {len(arms)}: {', '.join(found) or 'none'}"

    return [
        f"- Gain of reward with an interval above 0, {names(lambda m: m['gain']['low'] > 0)}.",
        f"- Gain with an interval below 0, {names(lambda m: m['gain']['high'] < 0)}.",
        "- The chosen completions of training pairs became less likely (interval below 0), "
        f"{names(lambda m: m['chosen_seen']['high'] < 0)}.",
        "- They became more likely (interval above 0), "
        f"{names(lambda m: m['chosen_seen']['low'] > 0)}.",
        "- Accuracy on held-out pairs with an interval above one half, "
        f"{names(lambda m: m['accuracy']['low'] > 0.5)}.",
        "- Samples less likely under the start than the start's own by more than half a nat per "
        "token, "
        f"{names(lambda m: m['fluency']['mean'] < start['fluency']['mean'] - 0.5)}.",
    ]


def _ranked(arms: dict[str, Any]) -> list[str]:
    return sorted(arms, key=lambda name: -arms[name]["measures"]["gain"]["mean"])


def _cell(row: dict[str, Any], digits: int) -> str:
    return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def plot_pairs(result: dict[str, Any], path: Path) -> None:
    """Draws gain of reward over KL, and log-ratios of chosen and rejected completions."""
    arms = result["arms"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 7))
    for place, name in enumerate(_ranked(arms)):
        found = arms[name]["measures"]
        x, y = found["kl"]["mean"], found["gain"]
        left.errorbar(
            x, y["mean"], [[y["mean"] - y["low"]], [y["high"] - y["mean"]]], fmt="o", ms=4, lw=0.6
        )
        left.annotate(name, (x, y["mean"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
        right.plot(found["chosen_seen"]["mean"], -place, "o", color="C2", ms=4)
        right.plot(found["chosen"]["mean"], -place, "o", color="C0", ms=4)
        right.plot(found["rejected"]["mean"], -place, "x", color="C3", ms=4)
    left.axhline(0, color="grey", lw=0.8)
    left.set(xscale="log", xlabel="KL of policy to start, nats per completion")
    left.set_title("gain of reward")
    right.axvline(0, color="grey", lw=0.8)
    right.set_yticks([-place for place in range(len(arms))], _ranked(arms), fontsize=7)
    right.set(xscale="symlog", xlabel="log-ratio to the start, nats")
    right.set_title("completions after training, by gain of reward")
    right.legend(["chosen, trained on", "chosen, held out", "rejected, held out"], fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
