"""The experiment on GDPO's central claim: DPO sharpens a group's beliefs, GDPO keeps them.

Section 5 of arXiv:2412.20299 at CPU scale, on the synthetic world of `opinions.py`, where the
group's distribution and the belief of every answer are known. All arms start from the same
supervised model, see the same rows in the same order and take as many steps. Controls say what the
claim rests on: supervised training on all rows, the belief terms alone, the preference term alone,
and GDPO with the distribution that the rows themselves show (fair information). Then the arms that
the claim rests on again with ten times the pairs. The part on real ratings is
`evidence_reviews.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.evals.distributions import (
    entropy_ratio,
    js_distance,
    js_distance_floor,
    kl_divergence,
    majority_bias,
    minority_recall,
)
from jaxllm.preference.belief_metrics import (
    belief_preference_consistency,
    class_belief_consistency,
)
from jaxllm.preference.distributional import GroupDistributionalPO, dpo_optimum
from jaxllm.preference.evidence_report import PAGE
from jaxllm.preference.evidence_reviews import ReviewRun, review_evidence
from jaxllm.preference.evidence_training import (
    OpinionTrainer,
    Rejected,
    RowSource,
    Table,
    Words,
    no_reference,
    resized,
    small_decoder,
)
from jaxllm.preference.mixture import WeightedSum
from jaxllm.preference.opinions import OpinionWorld, option_beliefs, verdicts
from jaxllm.preference.options import Options
from jaxllm.preference.pairwise import DPO, IPO
from jaxllm.preference.pointwise import KTO, SFT
from jaxllm.training.evidence import check_curve, check_interval, check_names


@dataclass(frozen=True)
class Arm:
    """What the second stage minimises, and on which rows."""

    options: Options
    rejected: Rejected = "conditioned"
    estimated: bool = False
    """The target is the distribution that the prompt's own rows show."""
    start: str = "sft_last"
    """The supervised model that it begins with, which is its reference too."""


ARMS: Mapping[str, Arm] = {
    "dpo_0.1": Arm(DPO(), "different"),
    "gdpo": Arm(GroupDistributionalPO()),
    "gdpo_fair": Arm(GroupDistributionalPO(), estimated=True),
    "kl_nll": Arm(GroupDistributionalPO(preference_weight=0.0)),
    "bdpo": Arm(GroupDistributionalPO(kl_weight=0.0, nll_weight=0.0)),
    "sft_continued": Arm(SFT()),
    "dpo_1": Arm(DPO(1.0), "different"),
    "kl": Arm(GroupDistributionalPO(nll_weight=0.0, preference_weight=0.0)),
    "nll_bdpo": Arm(GroupDistributionalPO(kl_weight=0.0)),
    "dpo_0.05": Arm(DPO(0.05), "different"),
    "dpo_0.5": Arm(DPO(0.5), "different"),
    "dpo_nll": Arm(WeightedSum(), "different"),
    "ipo": Arm(IPO(average="sum"), "different"),
    "kto": Arm(KTO(), "different"),
    "dpo_0.1_all": Arm(DPO(), "different", start="sft_all"),
    "dpo_1_all": Arm(DPO(1.0), "different", start="sft_all"),
    "gdpo_all": Arm(GroupDistributionalPO(), start="sft_all"),
    "gdpo_fair_all": Arm(GroupDistributionalPO(), estimated=True, start="sft_all"),
    "sft_continued_all": Arm(SFT(), start="sft_all"),
}
"""The gated arms come first."""
LARGE_ARMS = (
    *("dpo_0.1", "gdpo", "gdpo_fair", "kl_nll", "bdpo", "sft_continued"),
    *("dpo_0.1_all", "gdpo_all", "gdpo_fair_all", "sft_continued_all"),
)
PARTS = ("opinions", "large", "reviews")
STARTS = {"sft_last": True, "sft_all": False}
"""Supervised models, and whether they see only the last row of each prompt, as released."""


@dataclass(frozen=True)
class OpinionEvidenceRun:
    """Sizes of the experiment."""

    parts: tuple[str, ...] = PARTS
    """What is run; the others are kept from the results that the folder holds."""
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(ARMS)
    topics: int = 48
    pairs: int = 10
    """N: floor(N p_b) rows accept belief b, for every prompt."""
    width: int = 64
    layers: int = 2
    batch: int = 64
    sft_steps: int = 1500
    steps: int = 800
    every: int = 50
    """Steps between two points of the curves."""
    sft_rate: float = 1e-3
    rate: float = 1e-4
    test_rows: int = 128
    samples: int = 8
    """Sampled responses of each test prompt."""
    large_pairs: int = 100
    """N of the part `large`; all its other sizes are those above."""
    large_arms: tuple[str, ...] = LARGE_ARMS
    reviews: ReviewRun = ReviewRun()
    """The part on real ratings."""

    def __post_init__(self) -> None:
        check_names("parts", self.parts, PARTS)
        check_names("arms", self.arms, ARMS)
        check_names("large_arms", self.large_arms, ARMS)
        check_interval(self.seeds, topics=self.topics)
        check_curve(self.every, sft_steps=self.sft_steps, steps=self.steps)


def gdpo_evidence(run: OpinionEvidenceRun, folder: Path) -> dict[str, Any]:
    """Runs the parts and writes gdpo.json, gdpo.md and gdpo.png to `folder`.

    Raises:
      InputError: A part to be kept that was made with other settings.
    """
    result = _kept(run, folder)
    for name in run.parts:
        # Of all threads, and whatever else the machine did meanwhile.
        began = time.process_time()

        def save(found: dict[str, Any], name: str = name, began: float = began) -> None:
            result[name] = {**found, "cpu_seconds": round(time.process_time() - began, 1)}
            PAGE.write(result, folder)

        if name == "opinions":
            found = opinion_evidence(run)
            save({**found, "gates": gates(found["arms"])})
        elif name == "large":
            save(opinion_evidence(replace(run, pairs=run.large_pairs, arms=run.large_arms)))
        else:
            review_evidence(run.reviews, run.seeds, save)
    # A part that was never run does not pass; only the one with few pairs has criteria.
    gates_met = result.get("opinions", {}).get("gates", [])
    result["passed"] = bool(gates_met) and all(gate["passed"] for gate in gates_met)
    PAGE.write(result, folder)
    return result


def _kept(run: OpinionEvidenceRun, folder: Path) -> dict[str, Any]:
    """The parts that the folder holds, where they are not run now, under this run's settings."""
    # Whichever parts are run last, one command makes the whole page.
    fresh = PAGE.begin(replace(run, parts=PARTS))
    del fresh["config"]["parts"]
    others = [name for name in PARTS if name not in run.parts]
    old = PAGE.kept(folder) if others else {}
    kept = [name for name in others if name in old]
    for name in kept:
        before, now = (_settings(name, config) for config in (old["config"], fresh["config"]))
        PAGE.check_kept(folder, before, now, f"part {name}")
    return {**fresh, **{name: old[name] for name in kept}}


def _settings(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a part's results depend on."""
    if part == "reviews":
        return {name: config[name] for name in ("seeds", "reviews")}
    others = {"opinions": ("large_pairs", "large_arms"), "large": ("pairs", "arms")}[part]
    return {k: value for k, value in config.items() if k not in ("reviews", *others)}


def opinion_evidence(run: OpinionEvidenceRun) -> dict[str, Any]:
    """Trains every arm with every seed on the world of opinions."""
    began = time.perf_counter()
    worlds = [OpinionWorld(seed, run.topics) for seed in run.seeds]
    words = Words(worlds[0])
    trainer = OpinionTrainer(small_decoder(len(words.words), run.width, run.layers), words)
    studies = [
        SeedStudy(run, trainer, world, seed) for world, seed in zip(worlds, run.seeds, strict=True)
    ]
    result: dict[str, Any] = {
        "parameters": trainer.blueprint.parameter_count,
        "rows": [len(study.train.target) for study in studies],
        "lines": _lines([_targets(world) for world in worlds], run.samples),
        "arms": {},
    }
    for name in (*STARTS, *run.arms):
        result["arms"][name] = [study(name) for study in studies]
        last = " ".join(f"{np.mean(arm['js']):.3f}" for arm in result["arms"][name])
        print(f"{name}: JS distance {last} ({time.perf_counter() - began:.0f} s)", flush=True)
    return result


def gates(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two criteria fixed in advance, on every seed at the end of training.

    A criterion whose arms were not run does not pass.
    """
    ends = {name: [float(np.mean(one["js"])) for one in found] for name, found in arms.items()}
    found = []
    for text, first, second, bound in (
        ("JS(DPO 0.1) - JS(GDPO) > 0.05", "dpo_0.1", "gdpo", 0.05),
        ("JS(SFT-last) - JS(GDPO) > -0.01", "sft_last", "gdpo", -0.01),
    ):
        pairs = zip(ends.get(first, []), ends.get(second, []), strict=False)
        gaps = [a - b for a, b in pairs]
        passed = bool(gaps) and min(gaps) > bound
        found.append({"criterion": text, "by_seed": gaps, "passed": passed})
    return found


class SeedStudy:
    """The rows of one world, its supervised models, and the arms that start from them."""

    def __init__(
        self, run: OpinionEvidenceRun, trainer: OpinionTrainer, world: OpinionWorld, seed: int
    ):
        self.run, self.trainer, self.seed = run, trainer, seed
        words = trainer.words
        self.train = words.table(world.rows("train", run.pairs))
        self.eval = resized(words.table(world.rows("eval", run.pairs)), run.test_rows)
        self.test = resized(words.table(world.rows("test", run.pairs)), run.test_rows)
        self.prompts, self.targets = words.prompts(world.splits["test"]), _targets(world)
        self.starts: dict[str, Any] = {}
        self.references: dict[tuple[str, str], dict[str, np.ndarray]] = {}

    def __call__(self, name: str) -> dict[str, Any]:
        """Trains an arm, or a supervised start; returns its curve and its measures at the end."""
        run = self.run
        if name in STARTS:
            params = self.trainer.init(jax.random.key(self.seed))
            source = RowSource.of(
                self.train, "conditioned", no_reference(self.train), last=STARTS[name]
            )
            held = RowSource.of(self.eval, "conditioned", no_reference(self.eval))
            params, curve = self._fit(params, source, held, SFT(), run.sft_steps, run.sft_rate)
            self.starts[name] = params
            return {"curve": curve, **self._measures(params, params)}
        arm = ARMS[name]
        start = self.starts[arm.start]
        source, held = (
            RowSource.of(
                table,
                arm.rejected,
                self._reference(arm.start, key, table),
                estimated=arm.estimated,
            )
            for key, table in (("train", self.train), ("eval", self.eval))
        )
        params, curve = self._fit(start, source, held, arm.options, run.steps, run.rate)
        return {"start": arm.start, "curve": curve, **self._measures(params, start)}

    def _reference(self, start: str, key: str, table: Table) -> dict[str, np.ndarray]:
        if (start, key) not in self.references:
            self.references[start, key] = {
                name: self.trainer.reference_logps(self.starts[start], tokens)
                for name, tokens in table.tokens.items()
            }
        return self.references[start, key]

    def _fit(
        self,
        start: Any,
        source: RowSource,
        held: RowSource,
        options: Options,
        steps: int,
        rate: Any,
    ) -> tuple[Any, list[dict[str, float]]]:
        """Trains from `start`, which is also the reference; returns the parameters and a curve."""
        run, trainer = self.run, self.trainer
        rng = np.random.default_rng((self.seed, 3))
        # A copy, since training gives its arrays away.
        params = jax.tree.map(jnp.copy, start)
        state = trainer.optimiser.init(params)
        curve = [self._point(params, start, held, options, 0)]
        for done in range(run.every, steps + 1, run.every):
            batches = source.batches(rng, run.every, run.batch)
            params, state, _ = trainer.steps(
                params, state, start, batches, jnp.float32(rate), options=options
            )
            curve.append(self._point(params, start, held, options, done))
        return params, curve

    def _point(
        self, params: Any, ref: Any, held: RowSource, options: Options, step: int
    ) -> dict[str, float]:
        q, mass = self._beliefs(params)
        return {
            "step": step,
            "loss": float(self.trainer.loss(params, ref, held.arrays, options=options)),
            "js": float(js_distance(self.targets, q).mean()),
            "bias": float(majority_bias(self.targets, q).mean()),
            "mass": float(mass.mean()),
        }

    def _beliefs(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """Distributions [P, M] of the test prompts, and the mass of all beliefs [P]."""
        found = np.exp(np.asarray(self.trainer.believe(params, self.prompts), np.float64))
        mass = found.sum(-1)
        return found / mass[:, None], mass

    def _measures(self, params: Any, ref: Any) -> dict[str, Any]:
        """Measures at the end; distances for every topic, the rest as means."""
        p, (q, mass) = self.targets, self._beliefs(params)
        rng = np.random.default_rng((self.seed, 4))
        few, many = (
            js_distance(p, np.stack([rng.multinomial(n, row) for row in q]) / n)
            for n in (self.run.samples, 64)
        )
        many_prompts = np.repeat(self.prompts, self.run.samples, axis=0)
        texts = self.trainer.texts(params, many_prompts, jax.random.key(self.seed))
        consistent = belief_preference_consistency(verdicts(texts))[0]
        return {
            "js": js_distance(p, q).tolist(),
            "js_few": float(few.mean()),
            "js_64": float(many.mean()),
            "kl": float(np.mean(kl_divergence(p, q))),
            "bias": float(majority_bias(p, q).mean()),
            "minority": float(np.nanmean(minority_recall(p, q))),
            "entropy": float(np.nanmean(entropy_ratio(p, q))),
            "mass": float(mass.mean()),
            "cbc": class_belief_consistency(texts, option_beliefs()).mean,
            "bpc": consistent.mean,
            **self.trainer.pair_measures(params, ref, self.test),
        }


def _targets(world: OpinionWorld) -> np.ndarray:
    """The groups' distributions of the test prompts, float64 [P, M]."""
    found = [world.topics[prompt.topic].probabilities for prompt in world.splits["test"]]
    return np.asarray(found, np.float64)


def _lines(targets: list[np.ndarray], samples: int) -> dict[str, float]:
    """JS distances of known distributions: what the numbers of the arms lie between."""
    p = np.concatenate(targets)
    allowed = p > 0
    best = np.eye(p.shape[1])[p.argmax(-1)]

    def converged(beta: float) -> float:
        # Of the topic's own options: the others have no probability in target and reference.
        found = [
            js_distance(row[row > 0], dpo_optimum(row[row > 0], row[row > 0], beta)) for row in p
        ]
        return float(np.mean(found))

    return {
        "uniform over the topic's options": float(
            js_distance(p, allowed / allowed.sum(-1, keepdims=True)).mean()
        ),
        "majority only": float(js_distance(p, best).mean()),
        "optimum of DPO, beta 0.1, reference p": converged(0.1),
        "optimum of DPO, beta 1, reference p": converged(1.0),
        f"perfect model, {samples} samples": _floor(p, samples),
        "perfect model, 64 samples": _floor(p, 64),
    }


def _floor(targets: np.ndarray, samples: int) -> float:
    return float(np.mean([js_distance_floor(row, samples, draws=200) for row in targets]))
