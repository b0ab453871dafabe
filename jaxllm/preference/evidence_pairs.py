"""One table of all pair losses: the same start, pairs and budget, judged by the lexicon.

A small language model writes completions of the first words of film reviews; a lexicon scores them,
the best and the worst of a prompt make a pair, and every algorithm takes the same number of steps
on the same batches of these pairs. What is asked afterwards: how much better samples score, how far
the policy has gone from where it started, and whether the chosen completions became less likely,
which most losses allow because they read differences only.

Every algorithm runs with its default options or those of `ARMS`, at one learning rate: the table
says what these settings do here, not which algorithm is best.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.decoding.language_model import load_language_model
from jaxllm.errors import InputError
from jaxllm.evals.statistics import nested_interval
from jaxllm.preference.config import ModelConfig, NoReference, OnPolicyData
from jaxllm.preference.evidence_pairs_report import PAGE
from jaxllm.preference.evidence_rows import RowScorer, RowTrainer, stacked
from jaxllm.preference.feedback import Rule
from jaxllm.preference.mixture import preset
from jaxllm.preference.options import Options
from jaxllm.preference.pairwise import FDPO, GPO
from jaxllm.preference.policy import policy_of
from jaxllm.preference.records import Example
from jaxllm.preference.registry import ALGORITHMS
from jaxllm.preference.reviews import lexicon_reward
from jaxllm.preference.rollout_job import row_config, slot_shape
from jaxllm.preference.rollouts import Rollouts, Sampled, read_prompts, sampled_examples
from jaxllm.preference.rows import PreferenceRows, RowConfig
from jaxllm.preference.statistics import PairStats
from jaxllm.preference.wrappers import TRDPO
from jaxllm.training.evidence import check_interval, check_names
from jaxllm.training.optimizer import OptimizerConfig

LEFT_OUT: Mapping[str, str] = {
    "modpo": "needs the scores of a second objective",
    "group_distributional_po": "needs beliefs; see gdpo.md",
}
"""Algorithms on pairs that these pairs cannot train, and why."""
_OWN: dict[str, Options] = {
    # Their defaults are DPO itself, or a reference that does not move in so few steps.
    "f_dpo": FDPO(divergence="js"),
    "gpo": GPO(function="exponential"),
    "tr_dpo": TRDPO(every=8),
}
ARMS: Mapping[str, Options] = {
    **{
        name: _OWN.get(name, entry.config())
        for name, entry in ALGORITHMS.items()
        if PairStats in entry.stats and name not in LEFT_OUT
    },
    "ipo_sum": preset("ipo_sum"),
    "mpo": preset("mpo"),
}
SEED_STEPS, TEST_STEP = 1 << 16, 1 << 15
"""Draws depend on a step's number: every seed has steps of its own, the later half for tests."""
TEST_BATCH = 16


@dataclass(frozen=True)
class PairEvidenceRun:
    """Sizes of the experiment."""

    model: str = "bundled:stories260K"
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of what is sampled, and of the order of the pairs."""
    algorithms: tuple[str, ...] = tuple(ARMS)
    prompts: int = 256
    samples: int = 8
    """Completions of a training prompt, the best and the worst of which make its pair."""
    held_out: int = 64
    """Prompts of the measures."""
    test_samples: int = 4
    """Completions of each of them that are scored."""
    max_prompt: int = 12
    max_new_tokens: int = 32
    batch: int = 16
    """Pairs per step."""
    steps: int = 32
    rate: float = 3e-4

    def __post_init__(self) -> None:
        check_names("algorithms", self.algorithms, ARMS, LEFT_OUT)
        check_interval(self.seeds, held_out=self.held_out)
        for name in ("prompts", "test_samples", "steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be at least 1")

    def data(self, samples: int) -> OnPolicyData:
        """How completions are drawn."""
        return OnPolicyData(
            max_prompts=self.prompts + self.held_out,
            refresh="once",
            samples=samples,
            select="best_of_n",
            max_prompt=self.max_prompt,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch,
        )


def pair_evidence(run: PairEvidenceRun, folder: Path) -> dict[str, Any]:
    """Trains every algorithm with every seed; writes preference.{json,md,png} to `folder`."""
    began = time.perf_counter()
    world = _World(run)
    seeds = [_Seed(world, seed) for seed in run.seeds]
    before = [seed.measures(world.params) for seed in seeds]
    result: dict[str, Any] = {
        **PAGE.begin(run),
        "pairs": [len(seed.pairs) for seed in seeds],
        "pair_scores": [seed.pair_scores for seed in seeds],
        "left_out": dict(LEFT_OUT),
        "start": summary(before, before),
        "arms": {},
    }
    for name in run.algorithms:
        trainer = world.trainer(ARMS[name])
        found = []
        for seed in seeds:
            state = trainer(trainer.start(world.params), seed.batches)
            found.append(seed.measures(state.params["policy"]))
        result["arms"][name] = {
            "options": repr(ARMS[name]),
            "measures": summary(found, before),
        }
        result["seconds"] = round(time.perf_counter() - began, 1)
        row = result["arms"][name]["measures"]
        print(
            f"{name}: reward {row['gain']['mean']:+.3f}, KL {row['kl']['mean']:.2f}, "
            f"chosen {row['chosen']['mean']:+.2f} ({result['seconds']:.0f} s)",
            flush=True,
        )
        PAGE.write(result, folder)
    return result


def summary(
    found: Sequence[Mapping[str, np.ndarray]], before: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """Every measure [seeds, members] as its mean, interval and means by seed; `gain` added."""
    # Seeds may have a different number of pairs, since pairs of equal scores are left out.
    tables = {name: _cut([one[name] for one in found]) for name in found[0]}
    tables["gain"] = tables["reward"] - _cut([one["reward"] for one in before])
    rows = {}
    for name, table in tables.items():
        whole = nested_interval(table)
        rows[name] = {
            "mean": whole.mean,
            "low": whole.low,
            "high": whole.high,
            "by_seed": table.mean(axis=1).tolist(),
        }
    return rows


def _cut(rows: Sequence[np.ndarray]) -> np.ndarray:
    least = min(map(len, rows))
    return np.stack([row[:least] for row in rows]).astype(np.float64)


class _World:
    """The start, its sampler, and the compiled functions that all seeds share."""

    def __init__(self, run: PairEvidenceRun):
        self.run = run
        self.policy = policy_of(ModelConfig(run.model), NoReference(), "float32")
        model = load_language_model(self.policy.folder)
        self.params = model.params
        prompts = read_prompts(run.data(run.samples), model)
        if len(prompts) < run.prompts + run.held_out:
            raise InputError(
                f"{run.prompts} and {run.held_out} prompts, there are {len(prompts)} in all"
            )
        order = np.random.default_rng(0).permutation(len(prompts))
        self.test = [prompts[i] for i in order[: run.held_out]]
        self.train = [prompts[i] for i in order[run.held_out :]]
        pairs, single = run.data(run.samples), run.data(run.test_samples)
        self.train_rows = row_config(pairs, "pairs")
        self.test_rows = RowConfig("padded", TEST_BATCH, self.train_rows.row_length)
        self.pair_shape = slot_shape(pairs, "pairs", mismatched=False)
        self.score_pairs = RowScorer(self.policy.blueprint, self.pair_shape)
        # One sampler each for all seeds and algorithms, so that it is compiled once.
        self.sampler, self.tester = (
            Rollouts(self.policy, data, Rule(lexicon_reward), seed=0) for data in (pairs, single)
        )
        self.score_samples = RowScorer(
            self.policy.blueprint, slot_shape(single, "completions", mismatched=False)
        )

    def trainer(self, options: Options) -> RowTrainer:
        """Returns what takes the steps of an algorithm."""
        optimizer = OptimizerConfig(learning_rate=self.run.rate, beta2=0.999)
        return RowTrainer(self.run.model, options, self.pair_shape, "pairs", optimizer)


class _Seed:
    """Pairs sampled with one seed, batches of them, and the measures."""

    def __init__(self, world: _World, seed: int):
        run = world.run
        self.world = world
        self.first_step = seed * SEED_STEPS
        data = run.data(run.samples)
        drawn, held = (
            world.sampler.many(world.params, prompts, self.first_step + step)
            for prompts, step in ((world.train, 0), (world.test, TEST_STEP))
        )
        self.pairs, self.held = (
            sampled_examples(part, data, "pairs", seed) for part in (drawn, held)
        )
        if not self.pairs or not self.held:
            raise InputError(f"seed {seed}: no two completions of a prompt score differently")
        self.pair_scores = {"all": float(drawn.scores.mean()), **_ends(drawn)}
        rows = PreferenceRows(self.pairs, world.train_rows)
        rng = np.random.default_rng((seed, 1))
        # As few repeats as can be: one random order of all pairs after the other.
        orders = -(-run.steps * run.batch // len(self.pairs))
        order = np.concatenate([rng.permutation(len(self.pairs)) for _ in range(orders)])
        self.batches = stacked(rows, order[: run.steps * run.batch].reshape(run.steps, run.batch))
        # As many training pairs as there are held-out ones.
        self.seen = PreferenceRows(self.pairs[: len(self.held)], world.test_rows)
        self.unseen = PreferenceRows(self.held, world.test_rows)
        self.before = [
            world.score_pairs.logps(world.params, part) for part in (self.seen, self.unseen)
        ]

    def measures(self, params: Any) -> dict[str, np.ndarray]:
        """Measures by pair or by prompt, log-ratios in nats.

        `margin`, `accuracy`: of held-out pairs, whose difference of log-ratios this is and whether
        it is above 0. `chosen`, `rejected`: log-ratios of both; `chosen_seen` of training pairs.
        `reward`: mean score of the samples of each held-out prompt; `kl`: of policy to start over
        these; `fluency`: log p per token of these samples under the start; `length` in tokens.
        """
        seen, unseen = (
            world_scores - start
            for world_scores, start in zip(
                (self.world.score_pairs.logps(params, part) for part in (self.seen, self.unseen)),
                self.before,
                strict=True,
            )
        )
        margin = unseen[:, 0] - unseen[:, 1]
        return {
            "margin": margin,
            "accuracy": (margin > 0).astype(np.float64),
            "chosen": unseen[:, 0],
            "rejected": unseen[:, 1],
            "chosen_seen": seen[:, 0],
            **self._samples(params),
        }

    def _samples(self, params: Any) -> dict[str, np.ndarray]:
        world = self.world
        sampled = world.tester.many(params, world.test, self.first_step + TEST_STEP)
        examples = [
            Example(prompt, (tuple(completion.ids),))
            for prompt, row in zip(sampled.prompts, sampled.completions, strict=True)
            for completion in row
        ]
        rows = PreferenceRows(examples, world.test_rows)
        lengths = np.asarray([len(example.completion_ids[0]) for example in examples])
        divergence = world.score_samples.divergence(params, world.params, rows)[:, 0]
        start = world.score_samples.logps(world.params, rows)[:, 0] / lengths
        by_prompt = (len(sampled.prompts), -1)
        return {
            "reward": sampled.scores.mean(axis=1),
            "kl": divergence.reshape(by_prompt).mean(axis=1),
            "fluency": start.reshape(by_prompt).mean(axis=1),
            "length": lengths.reshape(by_prompt).mean(axis=1),
        }


def _ends(sampled: Sampled) -> dict[str, float]:
    return {
        "best": float(sampled.scores.max(axis=1).mean()),
        "worst": float(sampled.scores.min(axis=1).mean()),
    }
