"""GDPO on real ratings: is a group's distribution over beliefs learned, and kept, by each loss?

Prompts are snippets of film reviews, beliefs are buckets of ratings, and the 15 to 29 raters of a
snippet are the group (`reviews.py`). A small pretrained decoder is first trained on the accepted
completions of all pairs, `b<name>sentence`, and every arm starts from there. What is asked of
snippets that no arm has seen: how far the model's distribution at the belief is from that of the
raters. Since these are few, even the distribution they were drawn from has a distance above 0 to
their shares; `lines` estimates it by drawing as many raters again from the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxllm.decoding.language_model import load_language_model
from jaxllm.errors import InputError
from jaxllm.evals.distributions import js_distance, js_distance_floor, kl_divergence, majority_bias
from jaxllm.preference.config import model_folder
from jaxllm.preference.distributional import GroupDistributionalPO
from jaxllm.preference.evidence_rows import RowScorer, RowTrainer, stacked
from jaxllm.preference.formats import BeliefPairs, Record
from jaxllm.preference.log_probs import SlotShape
from jaxllm.preference.options import Options
from jaxllm.preference.pairwise import DPO
from jaxllm.preference.pointwise import SFT
from jaxllm.preference.records import Example, encode_records
from jaxllm.preference.reviews import (
    BUCKETS,
    Snippet,
    Source,
    lexicon_score,
    load_snippets,
    review_records,
)
from jaxllm.preference.rows import PreferenceRows, RowConfig
from jaxllm.training.optimizer import OptimizerConfig

QUANTILES = 5
"""Parts into which snippets are cut by their lexicon score, for the predictor that reads words."""


@dataclass(frozen=True)
class ReviewArm:
    """What the second stage minimises, on which pairs, and whether it reads both completions."""

    options: Options
    belief_pairs: BeliefPairs = "conditioned"
    paired: bool = True
    estimated: bool = False
    """The target is the distribution that the snippet's own pairs show."""


REVIEW_ARMS: Mapping[str, ReviewArm] = {
    "sft_continued": ReviewArm(SFT(), paired=False),
    "dpo_0.1": ReviewArm(DPO(), "different"),
    "gdpo": ReviewArm(GroupDistributionalPO()),
    "kl_nll": ReviewArm(GroupDistributionalPO(preference_weight=0.0), paired=False),
    "bdpo": ReviewArm(GroupDistributionalPO(kl_weight=0.0, nll_weight=0.0)),
    "gdpo_fair": ReviewArm(GroupDistributionalPO(), estimated=True),
}


@dataclass(frozen=True)
class ReviewRun:
    """Sizes of the part on real ratings."""

    model: str = "bundled:stories260K"
    source: Source = "movie"
    arms: tuple[str, ...] = tuple(REVIEW_ARMS)
    train: int = 512
    """Snippets of the pairs."""
    test: int = 256
    """Other snippets, of the measures."""
    longest: int = 36
    """Tokens of a snippet; longer ones are left out."""
    reply: int = 20
    """Tokens of a sentence that a completion may hold."""
    pairs: int = 10
    """N: floor(N p_b) pairs accept belief b, for every snippet."""
    batch: int = 16
    sft_steps: int = 200
    steps: int = 75
    every: int = 25
    """Steps between two points of the curves."""
    sft_rate: float = 2e-3
    rate: float = 5e-4

    def __post_init__(self) -> None:
        for name in self.arms:
            if name not in REVIEW_ARMS:
                known = ", ".join(REVIEW_ARMS)
                raise InputError(f"reviews.arms: {name!r} is not one of {known}")
        if self.test < 2 or self.train < 1:
            raise InputError(
                f"reviews.train {self.train} and test {self.test}, expected 1 and 2 up"
            )
        if self.every < 1 or self.sft_steps % self.every or self.steps % self.every:
            raise InputError(
                f"reviews.sft_steps {self.sft_steps} and steps {self.steps} are no multiples of "
                f"every {self.every}"
            )


def review_evidence(
    run: ReviewRun, seeds: tuple[int, ...], save: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Returns curves and measures of every arm by seed, and distances of known predictors.

    `save` gets the result after every arm.
    """
    world = _ReviewWorld(run)
    studies = [_ReviewStudy(world, seed) for seed in seeds]
    result: dict[str, Any] = {
        "parameters": world.blueprint.parameter_count,
        "snippets": len(world.snippets),
        "raters": [int(f([len(s.ratings) for s in world.snippets])) for f in (np.min, np.max)],
        "pairs": [study.count for study in studies],
        "lines": _mean_lines([study.lines() for study in studies]),
        "arms": {},
    }
    for name in ("sft_all", *run.arms):
        result["arms"][name] = [study(name) for study in studies]
        last = " ".join(f"{np.mean(one['js']):.3f}" for one in result["arms"][name])
        print(f"reviews, {name}: JS distance {last}", flush=True)
        if save is not None:
            save(result)
    return result


class _ReviewWorld:
    """The model, its tokenizer, the snippets that fit, and compiled functions for all seeds."""

    def __init__(self, run: ReviewRun):
        self.run = run
        model = load_language_model(model_folder(run.model))
        self.params, self.blueprint = model.params, model.blueprint
        self.tokenizer = model.need_tokenizer("snippets")
        found = {snippet.text: snippet for snippet in load_snippets(run.source)}
        self.sizes = {text: len(self.tokenizer.encode(text)) for text in found}
        self.snippets = [s for s in found.values() if self.sizes[s.text] <= run.longest]
        if len(self.snippets) < run.train + run.test:
            raise InputError(
                f"reviews.train {run.train} and test {run.test}: {len(self.snippets)} snippets "
                f"have at most {run.longest} tokens"
            )
        names = (f"{number}<{name}>" for number, name in enumerate(BUCKETS, 1))
        belief = max(len(self.tokenizer.encode(name)) for name in names)
        marks = len(self.tokenizer.encode("<Q><A>", bos=self.tokenizer.adds_bos))
        # A token more for each join of texts, and the end mark.
        self.completion = belief + run.reply + 3
        self.length = marks + run.longest + 2 + self.completion
        self._trainers: dict[Any, RowTrainer] = {}
        self.scorer = RowScorer(self.blueprint, self.shape(2))

    def shape(self, completions: int) -> SlotShape:
        """Of batches of one or two completions per example."""
        return SlotShape("padded", completions, completions, self.completion)

    def rows(self, examples: list[Example]) -> PreferenceRows:
        """Examples as rows; all batches have one length."""
        return PreferenceRows(examples, RowConfig("padded", self.run.batch, self.length))

    def trainer(self, options: Options, paired: bool, rate: float) -> RowTrainer:
        """Returns what takes the steps of an algorithm, the same for all seeds."""
        key = (options, paired, rate)
        if key not in self._trainers:
            shape, kind = self.shape(1 + paired), "pairs" if paired else "labels"
            optimizer = OptimizerConfig(learning_rate=rate, beta2=0.999)
            self._trainers[key] = RowTrainer(
                self.run.model,
                options,
                shape,
                kind,  # type: ignore[arg-type]
                optimizer,
            )
        return self._trainers[key]


class _ReviewStudy:
    """The pairs of one seed, the supervised start, and the arms that begin there."""

    def __init__(self, world: _ReviewWorld, seed: int):
        run = world.run
        self.world, self.seed = world, seed
        order = np.random.default_rng((seed, 5)).permutation(len(world.snippets))
        self.train = [world.snippets[i] for i in order[run.test :][: run.train]]
        self.test = [world.snippets[i] for i in order[: run.test]]
        self.targets = np.stack([snippet.beliefs for snippet in self.test])
        self.rows = {
            pairs: self._examples(self.train, pairs) for pairs in ("conditioned", "different")
        }
        self.count = len(self.rows["conditioned"])
        self.held = world.rows(self._one_each(self._examples(self.test, "conditioned")))
        self.start: Any = None
        self.start_logps: Any = None

    def __call__(self, name: str) -> dict[str, Any]:
        """Trains an arm, or the supervised start (`sft_all`), with its curve and measures."""
        run = self.world.run
        found: dict[str, Any] = {}
        if name == "sft_all":
            arm, params = ReviewArm(SFT(), paired=False), self.world.params
            params, curve = self._fit(arm, params, run.sft_steps, run.sft_rate)
            self.start = params
            self.start_logps = self.world.scorer.logps(params, self.held)
        else:
            params, curve = self._fit(REVIEW_ARMS[name], self.start, run.steps, run.rate)
            found["start"] = "sft_all"
        return {**found, "curve": curve, **self._measures(params)}

    def lines(self) -> dict[str, float]:
        """Mean JS distance of predictors that are not models to the raters of the test snippets."""
        known = np.stack([snippet.beliefs for snippet in self.train])
        p, bins = self.targets, _lexicon_bins(self.train, self.test)
        by_words = np.stack(
            [
                known[bins[0] == b].mean(0) if (bins[0] == b).any() else known.mean(0)
                for b in bins[1]
            ]
        )
        floor = [
            js_distance_floor(snippet.beliefs, len(snippet.ratings), draws=200)
            for snippet in self.test
        ]
        return {
            "uniform": float(js_distance(p, np.full_like(p, 1 / len(BUCKETS))).mean()),
            "marginal of the training snippets": float(
                js_distance(p, np.broadcast_to(known.mean(0), p.shape)).mean()
            ),
            "marginal of the same fifth by lexicon score": float(js_distance(p, by_words).mean()),
            "majority bucket of each snippet": float(
                js_distance(p, np.eye(p.shape[1])[p.argmax(-1)]).mean()
            ),
            "as many raters drawn again": float(np.mean(floor)),
        }

    def _examples(self, snippets: list[Snippet], pairs: BeliefPairs) -> list[Example]:
        """Pairs on snippets, with sentences of the training snippets that are short enough."""
        world, run = self.world, self.world.run
        replies = [s for s in self.train if world.sizes[s.text] <= run.reply]
        records: list[Record] = review_records(
            snippets, pairs=run.pairs, seed=self.seed, belief_pairs=pairs, replies=replies
        )
        return list(encode_records(records, world.tokenizer, name=f"seed {self.seed}"))

    def _one_each(self, examples: list[Example]) -> list[Example]:
        """One pair of each prompt, drawn evenly."""
        by_prompt: dict[tuple[int, ...], list[Example]] = {}
        for example in examples:
            by_prompt.setdefault(example.prompt_ids, []).append(example)
        if len(by_prompt) != len(self.test):
            raise InputError(f"{len(by_prompt)} prompts of {len(self.test)} test snippets differ")
        rng = np.random.default_rng((self.seed, 6))
        return [rows[int(rng.integers(len(rows)))] for rows in by_prompt.values()]

    def _fit(
        self, arm: ReviewArm, start: Any, steps: int, rate: float
    ) -> tuple[Any, list[dict[str, float]]]:
        run, examples = self.world.run, self.rows[arm.belief_pairs]
        if not arm.paired:
            examples = [replace(e, completion_ids=e.completion_ids[:1]) for e in examples]
        if arm.estimated:
            examples = [_estimated(example, run.pairs) for example in examples]
        rows = self.world.rows(examples)
        trainer = self.world.trainer(arm.options, arm.paired, rate)
        rng = np.random.default_rng((self.seed, 7))  # The same rows for all arms.
        state = trainer.start(start)
        curve = [self._point(state.params["policy"], 0)]
        for done in range(run.every, steps + 1, run.every):
            picked = rng.integers(len(rows), size=(run.every, run.batch))
            state = trainer(state, stacked(rows, picked))
            curve.append(self._point(state.params["policy"], done))
        return state.params["policy"], curve

    def _beliefs(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """Distributions [n, M] at the belief of the test snippets, and the mass of all [n]."""
        found = np.exp(self.world.scorer.beliefs(params, self.held).astype(np.float64))
        mass = found.sum(-1)
        return found / mass[:, None], mass

    def _point(self, params: Any, step: int) -> dict[str, float]:
        q, mass = self._beliefs(params)
        return {
            "step": step,
            "js": float(js_distance(self.targets, q).mean()),
            "mass": float(mass.mean()),
        }

    def _measures(self, params: Any) -> dict[str, Any]:
        p, (q, mass) = self.targets, self._beliefs(params)
        ratios = self.world.scorer.logps(params, self.held) - self.start_logps
        margin = ratios[:, 0] - ratios[:, 1]
        return {
            "js": js_distance(p, q).tolist(),
            "kl": float(np.mean(kl_divergence(p, q))),
            "bias": float(majority_bias(p, q).mean()),
            "mass": float(mass.mean()),
            "margin": float(margin.mean()),
            "accuracy": float((margin > 0).mean()),
        }


def _estimated(example: Example, pairs: int) -> Example:
    """The example with the shares of its prompt's accepted beliefs as target."""
    belief = example.belief
    if belief is None:
        raise InputError(f"{example.identity}: states no belief")
    counts = np.floor(pairs * np.asarray(belief.target) + 1e-9)
    return replace(example, belief=replace(belief, target=tuple(counts / counts.sum())))


def _lexicon_bins(*groups: list[Snippet]) -> list[np.ndarray]:
    """The part by lexicon score of every snippet; cut at the quantiles of the first group."""
    scores = [np.asarray([lexicon_score(s.text) for s in group]) for group in groups]
    cuts = np.quantile(scores[0], np.arange(1, QUANTILES) / QUANTILES)
    return [np.searchsorted(cuts, found) for found in scores]


def _mean_lines(lines: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in lines])) for name in lines[0]}
