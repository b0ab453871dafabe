"""The experiment on HeadKV's central claim: at equal memory, head-level budgets keep more answers.

Section 4 of arXiv:2410.19258 at CPU scale: small decoders trained on two recall tasks with several
seeds, every method through one compiled program (`recall_protocols.py`), budgets matched in
entries and reported in bytes, what is tuned chosen on validation sequences, intervals by a
bootstrap over models and sequences. `evidence_checks.py` adds whether the heads that score high
are causes, repeated compression during long decoding, and the speed of the real caches.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.decoding.language_model import LanguageModel, load_language_model
from jaxllm.errors import InputError
from jaxllm.evals.statistics import nested_interval
from jaxllm.kvcompress.evidence_checks import causal_check, long_decode, step_times
from jaxllm.kvcompress.evidence_report import PAGE
from jaxllm.kvcompress.evidence_run import (
    HEADS,
    OWN_SETTINGS,
    PARTS,
    TASKS,
    TEST,
    VALIDATION,
    CacheEvidenceRun,
)
from jaxllm.kvcompress.measure import measure_heads
from jaxllm.kvcompress.recall import RecallRun, Task, export_recall, recall_job
from jaxllm.kvcompress.recall_methods import (
    CONTROLS,
    SCORED,
    Method,
    Space,
    candidates,
    main_estimator,
)
from jaxllm.kvcompress.recall_protocols import (
    Asked,
    Measures,
    PlanAsker,
    Protocol,
    ask,
    measures,
    recall_examples,
)
from jaxllm.kvcompress.tasks import ReasonNeedleTask
from jaxllm.training.loop import train
from jaxllm.training.run_folder import load_config, override, to_plain


def headkv_evidence(run: CacheEvidenceRun, folder: Path) -> dict[str, Any]:
    """Runs the parts and writes headkv.json, headkv.md and headkv.png to `folder`.

    Raises:
      InputError: A missing model, or parts to be kept that are not there or of other settings.
    """
    began = time.perf_counter()
    result = _kept(run, folder)
    before = result["seconds"]

    def save() -> None:
        result["seconds"] = round(before + time.perf_counter() - began, 1)
        PAGE.write(result, folder)

    if "compare" in run.parts:
        result["models"], result["settings"] = [], []
    if "causal" in run.parts:
        result["causal"] = []
    for name in run.tasks if {"compare", "causal"} & set(run.parts) else ():
        models = [trained_model(run, name, seed) for seed in run.seeds]
        scores = [
            _scores(result, model, name, seed, run)
            for model, seed in zip(models, run.seeds, strict=True)
        ]
        pairs = list(zip(models, scores, strict=True))
        compare = Comparison(run, name, pairs)
        for protocol in run.protocols if "compare" in run.parts else ():
            result["settings"] += compare(protocol)
            save()
        if "causal" in run.parts:
            result["causal"] += causal_check(run, name, pairs)
            save()
    if "long" in run.parts:
        models = [trained_model(run, "set_get", seed) for seed in run.long_seeds]
        result["long"] = long_decode(run, TASKS["set_get"], models)
        save()
    if "times" in run.parts:
        name, seed = run.tasks[-1], run.seeds[0]
        model = trained_model(run, name, seed)
        result["times"] = step_times(run, model, _scores(result, model, name, seed, run))
    save()
    return result


def _kept(run: CacheEvidenceRun, folder: Path) -> dict[str, Any]:
    """Returns empty results, or those of the folder if only some parts are run."""
    result = {} if set(run.parts) >= set(PARTS) else PAGE.kept(folder)
    if not result:
        empty: dict[str, Any] = {n: [] for n in ("models", "settings", "causal", "long", "times")}
        return {**PAGE.begin(run), "seconds": 0.0, **empty}
    made_now = [name for part in run.parts for name in OWN_SETTINGS.get(part, ())]
    free = ("parts", "models", "retrain", *made_now)
    config = to_plain(run)
    old, new = (
        {k: v for k, v in each.items() if k not in free} for each in (result["config"], config)
    )
    PAGE.check_kept(folder, old, new)
    result["config"] |= {name: config[name] for name in made_now}
    return result


def _scores(
    result: dict[str, Any], model: LanguageModel, name: str, seed: int, run: CacheEvidenceRun
) -> dict[str, np.ndarray]:
    """Returns a model's head scores, measured unless `result` has them, where they are kept."""
    for row in result["models"]:
        if (row["task"], row["seed"]) == (name, seed):
            return {k: np.asarray(v) for k, v in row.items() if k not in ("task", "seed")}
    found = head_scores(model, TASKS[name], run.examples)
    kept = {estimator: table.tolist() for estimator, table in found.items()}
    result["models"].append({"task": name, "seed": seed, **kept})
    return found


def trained_model(run: CacheEvidenceRun, name: str, seed: int) -> LanguageModel:
    """Returns the model of a task and seed, from `run.models` or trained now, in float32."""
    folder = Path(run.models) / f"{name}-{seed}"
    if run.retrain:
        workdir = Path("runs") / "headkv" / f"{name}-{seed}"
        config = override(
            load_config(Path("configs/kvcompress") / f"{name}.py"), ["--loop.seed", str(seed)]
        )
        if not isinstance(config, RecallRun):
            raise InputError(f"configs/kvcompress/{name}.py is not a RecallRun")
        if config.init_from is not None:  # `tasks` has needle first.
            start = Path("runs") / "headkv" / f"needle-{seed}" / "model"
            config = dataclasses.replace(config, init_from=str(start))
        folder = workdir / "model"
        shutil.rmtree(folder, ignore_errors=True)
        export_recall(config, train(recall_job(config), workdir).state, folder)
    return load_language_model(folder, dtype=jnp.float32)


def head_scores(model: LanguageModel, task: Task, count: int) -> dict[str, np.ndarray]:
    """Returns the mean scores [L, N] of each estimator that a needle task has examples for."""
    found: dict[str, np.ndarray] = {}
    reasons = isinstance(task, ReasonNeedleTask)
    options = {"single": True} if reasons else {}
    plain = recall_examples(task, task.batch(HEADS, 0, count, **options))
    for name in ("r", "er"):
        found[name] = measure_heads(model, plain, name, batch=32).runs.mean(axis=0)
    if reasons:
        pairs = recall_examples(task, task.batch(HEADS, 1, count))
        found["r2"] = measure_heads(model, pairs, "r2", batch=32).runs.mean(axis=0)
    return found


class _Split:
    """One model's sequences under one protocol, prefilled, with the full cache's answers."""

    def __init__(self, asker: PlanAsker, params: Any, asked: Asked, full: Method):
        self.asker, self.params, self.asked = asker, params, asked
        self.caches = asker.prefill(params, asked)
        self.full = asker.answer(params, self.caches, asked, full.choice())

    def __call__(self, method: Method) -> Measures:
        found = self.asker.answer(self.params, self.caches, self.asked, method.choice())
        return measures(found, self.full, self.asked)


class Comparison:
    """All methods on one task."""

    def __init__(
        self,
        run: CacheEvidenceRun,
        name: str,
        models: Sequence[tuple[LanguageModel, dict[str, np.ndarray]]],
    ):
        self.run, self.name, self.task, self.models = run, name, TASKS[name], models
        first = models[0][0]
        self.config = first.config
        self.asker = PlanAsker(first.blueprint.build, self.config, run.eviction)

    def __call__(self, protocol: Protocol) -> list[dict[str, Any]]:
        """Returns one row per budget and method."""
        run, task = self.run, self.task
        asked = [
            ask(task, task.batch(seed, 0, count), protocol)
            for seed, count in ((VALIDATION, run.validation), (TEST, run.sequences))
        ]
        heads = self.config.attention
        space = Space(
            layers=self.config.layers,
            kv_heads=heads.kv_heads,
            cap=asked[0].prompt.shape[1] - run.window,
            ring=max(2 * run.window, run.window + asked[0].rest.shape[1]),
            eviction=run.eviction,
        )
        full = candidates("full", space, 1, {}, ())[0]
        splits = [
            [_Split(self.asker, model.params, part, full) for model, _ in self.models]
            for part in asked
        ]
        rows = []
        for budget in run.budgets:
            part = self._budget(space, budget, *splits)
            for row in part:
                row |= {"task": self.name, "protocol": protocol, "budget": budget}
            rows += part
            best = max(part[1:], key=lambda row: row["accuracy"][0])
            print(f"{self.name} {protocol} b={budget}: best {best['method']}", flush=True)
        return rows

    def _budget(
        self, space: Space, budget: int, validation: list[_Split], test: list[_Split]
    ) -> list[dict[str, Any]]:
        run, rows = self.run, []
        estimators = self.models[0][1]
        main = main_estimator(estimators)
        chosen: dict[str, float | None] = {}
        found: dict[str, np.ndarray] = {}
        wanted = [m for m in run.methods if m not in ("r", "er", "r2") or m in estimators]
        wanted.sort(key=lambda name: name in CONTROLS)  # They take the beta of the real scores.
        for name in wanted:
            own = [
                candidates(name, space, budget, scores, self._betas(name, chosen.get(main)))
                for _, scores in self.models
            ]
            best = self._tuned(own, validation)
            chosen[name] = own[0][best].option
            draws = []
            for draw in range(run.draws if name in ("random", "shuffled") else 1):
                if draw:
                    betas = self._betas(name, chosen.get(main))
                    own = [
                        candidates(name, space, budget, scores, betas, seed=draw)
                        for _, scores in self.models
                    ]
                draws.append([split(m[best]) for split, m in zip(test, own, strict=True)])
            rows.append(self._row(name, own[0][best], space, draws))
            # [models, sequences]: what is resampled together.
            found[name] = _field(draws, "right").mean(axis=-1)
        reference = found.get(main, found["uniform"])
        for row in rows:
            gap = nested_interval(reference - found[row["method"]])
            row["behind"] = [gap.mean, gap.low, gap.high]
        return rows

    def _betas(self, name: str, main: float | None) -> tuple[float, ...]:
        if name in SCORED:
            return self.run.betas
        return self.run.betas[:1] if main is None else (main,)

    def _tuned(self, own: list[list[Method]], validation: list[_Split]) -> int:
        """The option with the highest accuracy over all models; of equals the lowest divergence."""
        if len(own[0]) == 1:
            return 0

        def quality(number: int) -> tuple[float, float]:
            parts = [s(m[number]) for s, m in zip(validation, own, strict=True)]
            right = float(np.mean([part.right.mean() for part in parts]))
            return round(right, 6), -float(np.mean([part.divergence.mean() for part in parts]))

        return max(range(len(own[0])), key=quality)

    def _row(
        self, name: str, method: Method, space: Space, draws: list[list[Measures]]
    ) -> dict[str, Any]:
        right = _field(draws, "right").mean(axis=-1)
        interval = nested_interval(right)
        heads = self.config.attention
        return {
            "method": name,
            "option": method.option,
            "accuracy": [interval.mean, interval.low, interval.high],
            "by_model": right.mean(axis=-1).tolist(),
            "divergence": float(_field(draws, "divergence").mean()),
            "agreement": float(_field(draws, "agreement").mean()),
            "entries": int(method.capacities.sum()),
            "largest_head": int(method.capacities.max()),
            "bytes": method.plan(space).nbytes(1, heads.heads, heads.head_dim, 4),
        }


def _field(draws: list[list[Measures]], name: str) -> np.ndarray:
    """Returns a measure [models, sequences, answers], the mean over draws."""
    table = [[getattr(part, name) for part in models] for models in draws]
    return np.mean(np.asarray(table), axis=0)
