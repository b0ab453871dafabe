"""The smallest run of the HeadKV experiment, the methods at equal budgets, and the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_runs import quick_compile

from jaxllm.errors import InputError
from jaxllm.evals.statistics import nested_interval
from jaxllm.hub.hf_folder import save_decoder
from jaxllm.kvcompress import evidence, evidence_checks, evidence_run
from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.evidence import CacheEvidenceRun, headkv_evidence
from jaxllm.kvcompress.evidence_report import evidence_markdown
from jaxllm.kvcompress.measure import HeadScores
from jaxllm.kvcompress.recall_methods import METHODS, Space, candidates
from jaxllm.kvcompress.scorers import Window
from jaxllm.kvcompress.tasks import ReasonNeedleTask, SetGetTask
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.training.run_folder import load_config

ROOT = Path(__file__).parents[2]
TASKS = {
    "reason_needle": ReasonNeedleTask(facts=2, queries=1, filler=4, keys=2, values=2, ranks=2),
    "set_get": SetGetTask(operations=17, keys=2, values=2),
}
SPACE = Space(layers=3, kv_heads=2, cap=20, ring=8, eviction=Eviction(4, scorer=Window(pool=3)))
SCORES = {
    "r": np.array([[0, 0, 0, 0], [0.1, 0, 0, 0], [1, 0.8, 0, 0.2]]),
    "er": np.array([[0.1, 0, 0, 0], [0.1, 0.1, 0, 0], [0.9, 0.8, 0.1, 0.2]]),
    "r2": np.array([[0, 0, 0.1, 0], [0, 0, 0.7, 0.9], [0.3, 0.2, 0.1, 0.1]]),
}


def drawn_scores(model, examples, estimator, batch):
    """Takes the place of `measure_heads`, which test_measure.py tests and each call compiles."""
    config = model.config
    rng = np.random.default_rng(len(estimator))
    shape = (len(examples), config.layers, config.attention.heads)
    return HeadScores(rng.random(shape), np.ones(len(examples), bool))


def test_the_smallest_run_writes_its_page(tmp_path, monkeypatch):
    for module in (evidence, evidence_checks):
        monkeypatch.setattr(module, "TASKS", TASKS)
        monkeypatch.setattr(module, "measure_heads", drawn_scores)
    for name, task in TASKS.items():
        config = DecoderConfig(
            vocab_size=task.vocab,
            dim=8,
            layers=1,
            attention=AttentionConfig(heads=4, kv_heads=2, head_dim=4),
            mlp=MlpConfig(hidden=8),
            init_std=0.3,
        )
        for seed in (0, 1):
            params, _ = decoder(config).init(jax.random.key(seed))
            save_decoder(tmp_path / "models" / f"{name}-{seed}", config, params)
    run = CacheEvidenceRun(
        models=str(tmp_path / "models"),
        tasks=("reason_needle",),
        seeds=(0, 1),
        protocols=("agnostic",),
        budgets=(2,),
        methods=("full", "uniform", "r2", "random"),
        betas=(1.1, 5.0),
        draws=2,
        sequences=3,
        validation=2,
        examples=4,
        zeroed=(1,),
        zero_draws=2,
        long_seeds=(0, 1),
        long_budgets=(2,),
        timed_length=12,
        timed_budget=3,
    )
    with quick_compile():
        result = headkv_evidence(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "headkv.json").read_text())["seconds"] > 0
    assert (tmp_path / "out" / "headkv.png").stat().st_size > 5000
    rows = {row["method"]: row for row in result["settings"]}
    assert list(rows) == ["full", "uniform", "r2", "random"]
    assert {rows[name]["entries"] for name in ("uniform", "r2", "random")} == {4}
    assert rows["full"]["divergence"] < 1e-6 and rows["full"]["agreement"] == 1
    assert rows["r2"]["behind"] == [0, 0, 0] and rows["r2"]["option"] == rows["random"]["option"]
    assert rows["uniform"]["bytes"] == rows["r2"]["bytes"] and len(rows["r2"]["by_model"]) == 2
    gap = np.mean(rows["r2"]["by_model"]) - np.mean(rows["uniform"]["by_model"])
    assert rows["uniform"]["behind"][0] == pytest.approx(gap)
    assert {row["estimator"] for row in result["causal"]} == {"r", "er", "r2"}
    assert all(0 <= np.mean(row["worse"]) <= 1 for row in result["causal"])
    modes = [(row["method"], row["mode"]) for row in result["long"]]
    assert modes == [
        ("full", "prompt only"),
        ("uniform", "every"),
        ("uniform", "prompt only"),
        ("random", "every"),
    ]
    for row in result["times"]:
        assert row["traces"] == 1 and row["microseconds"] > 0
        assert row["bytes"] == row["planned_bytes"]
    kept = dataclasses.replace(run, parts=("times",), timed_budget=7)
    monkeypatch.setattr(evidence, "step_times", lambda *_: [])
    later = headkv_evidence(kept, tmp_path / "out")
    assert later["settings"] == result["settings"] and later["config"]["timed_budget"] == 7
    with pytest.raises(InputError, match=r"config.timed_budget 7, this run has 64"):
        headkv_evidence(
            dataclasses.replace(kept, parts=("long",), timed_budget=64), tmp_path / "out"
        )
    with pytest.raises(InputError, match="made with config.window 4, this run has 5"):
        headkv_evidence(dataclasses.replace(kept, window=5), tmp_path / "out")
    evidence.PAGE.write(result, tmp_path / "out")
    page = (tmp_path / "out" / "headkv.md").read_text()
    assert page == evidence_markdown(result)
    for part in ("compressed before any question", "long decoding", "Decode steps", "as bad"):
        assert part in page


def test_retraining_takes_the_configs_and_the_needle_model_of_the_seed(tmp_path, monkeypatch):
    seen = []

    def trained(job, workdir):
        seen.append((job.config, workdir))
        return SimpleNamespace(state=None)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evidence, "load_config", lambda path: load_config(ROOT / path))
    monkeypatch.setattr(evidence, "train", trained)
    monkeypatch.setattr(evidence, "export_recall", lambda config, state, folder: None)
    monkeypatch.setattr(evidence, "load_language_model", lambda folder, dtype: folder)
    found = evidence.trained_model(CacheEvidenceRun(retrain=True), "needle", 2)
    assert found == Path("runs/headkv/needle-2/model")
    evidence.trained_model(CacheEvidenceRun(retrain=True), "reason_needle", 2)
    evidence.trained_model(CacheEvidenceRun(retrain=True), "set_get", 2)
    configs = [config for config, _ in seen]
    assert [config.loop.seed for config in configs] == [2, 2, 2]
    assert [config.init_from for config in configs] == [None, str(found), None]
    # The experiment asks what the models were trained on; the weights of a loss are no part of it.
    for config, task in zip(configs, evidence_run.TASKS.values(), strict=True):
        assert vars(config.task) | {"filler_weight": 0} == vars(task) | {"filler_weight": 0}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [1, 7])
def test_methods_keep_the_same_number_of_entries(name, budget):
    for method in candidates(name, SPACE, budget, SCORES, (1.01, 2.0)):
        total = budget * SPACE.heads
        assert method.capacities.shape == (3, 2) and method.capacities.max() <= SPACE.cap
        if name == "full":
            assert method.plan(SPACE).eviction is None
            continue
        assert method.capacities.sum() == total or (
            name == "duo" and total - SPACE.heads < method.capacities.sum() <= total
        )
        assert (method.plan(SPACE).capacities == method.capacities).all()
        assert method.recent.any() == (name in ("streaming", "duo"))


def test_head_level_methods_follow_their_scores():
    def table(name, budget=4, betas=(1.01,)):
        return candidates(name, SPACE, budget, SCORES, betas)[0].capacities

    assert table("r2")[1, 1] == table("r2").max() > table("r2")[2, 0] > table("r2")[0, 1]
    assert table("r")[2, 0] == table("r").max() and table("r")[1, 1] < table("r2")[1, 1]
    assert table("inverted")[1, 1] == table("inverted").min()
    assert np.ptp(table("layer_mean"), axis=1).max() <= 1 and table("layer_mean")[1].sum() > 8
    flat = candidates("r2", SPACE, 4, SCORES, (1.01, 5.0))
    assert np.ptp(flat[1].capacities) < np.ptp(flat[0].capacities)
    whole = candidates("duo", SPACE, 7, SCORES, ())  # 42 entries: none, one or two heads of 20.
    assert [method.option for method in whole] == [0, 1, 2]
    assert whole[2].capacities.tolist() == [[0, 0], [0, 20], [20, 0]]
    assert not whole[2].recent[1, 1] and whole[2].recent[0, 0]


def test_the_page_counts_what_the_intervals_say():
    def row(method, budget, behind):
        return {
            "task": "needle",
            "protocol": "aware",
            "budget": budget,
            "method": method,
            "option": None,
            "accuracy": [0.5, 0.4, 0.6],
            "divergence": 0.1,
            "agreement": 0.9,
            "bytes": 10,
            "behind": behind,
        }

    settings = [
        *(row("er", b, [0, 0, 0]) for b in (1, 2, 4)),
        row("uniform", 1, [0.3, 0.2, 0.4]),
        row("uniform", 2, [0.01, -0.1, 0.1]),
        row("uniform", 4, [-0.3, -0.4, -0.2]),
    ]
    config = {"seeds": [0, 1], "sequences": 2, "validation": 2, "examples": 2, "window": 4}
    empty = {"causal": [], "long": [], "times": [], "models": []}
    page = evidence_markdown(
        {"config": config, "seconds": 1.0, "device": "cpu", "settings": settings, **empty}
    )
    assert "| needle | uniform (SnapKV) | 1 | 1 | 1 | -0.300 | +0.300 |" in page
    assert "b = 4: uniform (SnapKV) is ahead by 0.300 [0.200, 0.400]" in page
    assert "Decode steps" not in page and "long decoding" not in page


def test_nested_intervals_widen_with_the_groups():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 200))
    alike = nested_interval(noise)
    apart = nested_interval(noise + np.array([[-1.0], [0.0], [1.0]]))
    assert alike.low < alike.mean < alike.high and alike.n == 600
    assert apart.mean == pytest.approx(alike.mean)
    assert apart.high - apart.low > 4 * (alike.high - alike.low)
    constant = nested_interval(np.full((2, 3), 0.25))
    assert (constant.low, constant.high) == (0.25, 0.25)
    for values in (np.zeros(3), np.full((2, 2), np.nan), np.zeros((2, 0))):
        with pytest.raises(InputError, match="groups, members"):
            nested_interval(values)


def test_bad_runs_are_refused():
    for changes, message in [
        ({"seeds": (0,)}, "two seeds and two sequences"),
        ({"tasks": ("other",)}, "tasks: 'other'"),
        ({"methods": ("full", "r2")}, "full and uniform"),
        ({"betas": ()}, "betas"),
    ]:
        with pytest.raises(InputError, match=message):
            CacheEvidenceRun(**changes)
