"""The GDPO experiment: rows as arrays, the reference at the start, gates, and a whole small run."""

import json

import jax
import numpy as np
import pytest
import tiny_runs

from jaxllm.errors import InputError
from jaxllm.preference.evidence import OpinionEvidenceRun, gates, opinion_evidence
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
        ({"arms": ("ppo",)}, "'ppo' is not one of"),
        ({"seeds": (0,)}, "an interval needs two seeds"),
        ({"steps": 70}, "no multiples of every 50"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        OpinionEvidenceRun(**changes)


def test_a_small_run_writes_its_page(tmp_path):
    run = OpinionEvidenceRun(
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
        result = opinion_evidence(run, tmp_path)
    assert not result["passed"]  # DPO was not run.
    stored = json.loads((tmp_path / "gdpo.json").read_text())
    start, gdpo = stored["arms"]["sft_last"][0], stored["arms"]["gdpo"][0]
    # The second stage begins where the first one ended, and moves.
    assert gdpo["curve"][0]["js"] == pytest.approx(start["curve"][-1]["js"], abs=1e-6)
    assert gdpo["curve"][-1]["js"] != gdpo["curve"][0]["js"]
    # A start is its own reference.
    assert abs(start["belief_margin"]) < 1e-6 < abs(gdpo["text_margin"])
    page = (tmp_path / "gdpo.md").read_text()
    assert "FAIL" in page and "Not run: " in page and "--topics 3" in page
    assert (tmp_path / "gdpo.png").stat().st_size > 1000
    assert jax.tree.all(jax.tree.map(np.isfinite, stored["arms"]))
