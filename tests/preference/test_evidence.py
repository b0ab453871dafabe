"""The GDPO experiment: rows as arrays, the reference at the start, gates, and whole small runs."""

import json
from copy import deepcopy
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_preference
import tiny_runs

from jaxllm.errors import InputError
from jaxllm.preference import evidence
from jaxllm.preference.evidence import OpinionEvidenceRun, gates, gdpo_evidence
from jaxllm.preference.evidence_reviews import ReviewRun, review_evidence
from jaxllm.preference.evidence_training import PROMPT, Words
from jaxllm.preference.opinions import OpinionWorld


def arm(*distances):
    return [{"js": [distance, distance]} for distance in distances]


def test_gates_ask_every_seed_and_do_not_pass_without_their_arms():
    good = {"dpo_0.1": arm(0.3, 0.2), "gdpo": arm(0.1, 0.1), "sft_last": arm(0.1, 0.095)}
    assert [gate["passed"] for gate in gates(good)] == [True, True]
    assert [gate["passed"] for gate in gates({**good, "dpo_0.1": arm(0.3, 0.14)})] == [False, True]
    assert [gate["passed"] for gate in gates({**good, "sft_last": arm(0.1, 0.08)})] == [True, False]
    assert not any(gate["passed"] for gate in gates({"gdpo": good["gdpo"]}))


def test_rows_as_arrays():
    world = OpinionWorld(0, 4)
    words, rows = Words(world), world.rows("train")
    table = words.table(rows)
    chosen, conditioned = table.tokens["chosen"], table.tokens["conditioned"]
    np.testing.assert_array_equal(chosen[:, : PROMPT + 4], conditioned[:, : PROMPT + 4])
    assert (chosen[:, PROMPT] != table.tokens["different"][:, PROMPT]).all()
    text = " ".join(words.words[token] for token in chosen[0])
    assert text.endswith(f"> {rows[0]['accept_response']} <eos>")
    np.testing.assert_allclose(table.estimated.sum(-1), 1, rtol=1e-6)
    assert len(table.last) == len({row["prompt"] for row in rows})
    assert table.last[-1] == len(rows) - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("ppo",)}, "arms: 'ppo' is not one of"),
        ({"large_arms": ("ppo",)}, "large_arms: 'ppo' is not one of"),
        ({"seeds": (0,)}, "an interval needs two seeds"),
        ({"steps": 70}, "no multiples of every 50"),
        ({"parts": ("films",)}, "'films' is not one of opinions, large, reviews"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        OpinionEvidenceRun(**changes)


def test_a_small_run_writes_its_page(tmp_path, monkeypatch):
    run = OpinionEvidenceRun(
        parts=("opinions",),
        seeds=(0, 1),
        arms=("gdpo",),
        topics=3,
        pairs=4,
        width=16,
        layers=1,
        batch=4,
        sft_steps=2,
        steps=2,
        every=2,
        test_rows=8,
        samples=2,
    )
    with tiny_runs.quick_compile():
        result = gdpo_evidence(run, tmp_path)
    assert not result["passed"]  # DPO was not run.
    stored = json.loads((tmp_path / "gdpo.json").read_text())
    whole = deepcopy(stored["opinions"])
    arms = stored["opinions"]["arms"]
    start, gdpo = arms["sft_last"][0], arms["gdpo"][0]
    # The second stage begins where the first one ended, and moves.
    assert gdpo["curve"][0]["js"] == pytest.approx(start["curve"][-1]["js"], abs=1e-6)
    assert gdpo["curve"][-1]["js"] != gdpo["curve"][0]["js"]
    # A start is its own reference.
    assert abs(start["belief_margin"]) < 1e-6 < abs(gdpo["text_margin"])
    page = (tmp_path / "gdpo.md").read_text()
    assert "FAIL" in page and "Not run: " in page and "--topics 3" in page
    assert (tmp_path / "gdpo.png").stat().st_size > 1000
    assert gdpo.pop("start") == "sft_last"
    assert jax.tree.all(jax.tree.map(np.isfinite, [start, gdpo]))
    with pytest.raises(InputError, match="opinions was made with config.batch 4, this run has 8"):
        gdpo_evidence(replace(run, parts=("reviews",), batch=8), tmp_path)

    def larger(run):
        arms = {**stored["opinions"]["arms"], "gdpo_all": [{**gdpo, "start": "sft_all"}] * 2}
        arms = {name: arms[name] for name in ("sft_last", "sft_all", *run.arms)}
        return {**stored["opinions"], "arms": arms, "rows": [run.pairs] * 2}

    monkeypatch.setattr(evidence, "opinion_evidence", larger)
    run = replace(run, parts=("large",), large_arms=("gdpo", "gdpo_all"))
    found = gdpo_evidence(run, tmp_path)
    assert found["opinions"] == whole and found["large"]["rows"] == [100, 100]
    page = (tmp_path / "gdpo.md").read_text()
    assert "## The same world with N = 100" in page and "| JS, N = 4 |" in page
    # Parts that are kept must have this run's settings; those of parts run anew are free.
    assert gdpo_evidence(replace(run, large_pairs=8), tmp_path)["large"]["rows"] == [8, 8]
    message = "part large was made with config.large_pairs 8, this run has 7"
    with pytest.raises(InputError, match=message):
        gdpo_evidence(replace(run, parts=("reviews",), large_pairs=7), tmp_path)


def test_real_ratings(tmp_path):
    config = replace(tiny_preference.MODEL, max_positions=128)
    tiny_preference.write_model(tmp_path / "model", config)
    run = ReviewRun(
        model=str(tmp_path / "model"),
        source="amazon",
        arms=("sft_continued", "gdpo"),
        train=80,
        test=12,
        longest=40,
        reply=40,
        pairs=4,
        batch=4,
        sft_steps=2,
        steps=2,
        every=1,
        rate=1e-3,
    )
    with tiny_runs.quick_compile():
        found = review_evidence(run, (0, 1))
    arms, lines = found["arms"], found["lines"]
    for name, seeds in arms.items():
        assert all(len(one["js"]) == 12 and len(one["curve"]) == 3 for one in seeds), name
        assert all(0 < one["mass"] < 1 and np.isfinite(one["kl"]) for one in seeds), name
        if name != "sft_all":  # All begin where the supervised model ended, and move.
            assert seeds[0]["curve"][0]["js"] == arms["sft_all"][0]["curve"][-1]["js"]
            assert seeds[0]["curve"][-1]["js"] != seeds[0]["curve"][0]["js"]
    assert arms["sft_all"][0]["margin"] == 0 != arms["gdpo"][0]["margin"]
    # Seeds draw other snippets; raters drawn again are nearer than any other predictor.
    assert arms["gdpo"][0]["js"] != arms["gdpo"][1]["js"]
    assert min(lines.values()) == lines["as many raters drawn again"] > 0
