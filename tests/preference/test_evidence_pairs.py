"""The experiment on all pair losses, with a model of bytes and a rule of letters."""

import json

import numpy as np
import pytest
import tiny_preference
import tiny_runs

from jaxllm.errors import InputError
from jaxllm.preference.evidence_pairs import ARMS, PairEvidenceRun, pair_evidence, summary


def test_every_pair_loss_is_there():
    assert {"dpo", "simpo", "tdpo2", "wpo", "tr_dpo", "ld_dpo", "mpo"} <= set(ARMS)
    assert not {"modpo", "kto", "ppo"} & set(ARMS)
    with pytest.raises(InputError, match="'modpo' is not one of .*: it needs the scores"):
        PairEvidenceRun(algorithms=("modpo",))
    with pytest.raises(InputError, match="an interval needs two seeds"):
        PairEvidenceRun(seeds=(0,))


def test_summaries_pair_seeds_and_members():
    before = [{"reward": np.array([0.0, 1.0])}, {"reward": np.array([1.0, 2.0, 3.0])}]
    after = [{"reward": np.array([1.0, 2.0])}, {"reward": np.array([2.0, 3.0, 9.0])}]
    found = summary(after, before)
    assert found["gain"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "by_seed": [1.0, 1.0]}
    assert found["reward"]["by_seed"] == [1.5, 2.5]


def test_a_small_run_writes_its_page(tmp_path, monkeypatch):
    rule = tiny_preference.low_letters
    monkeypatch.setattr("jaxllm.preference.evidence_pairs.lexicon_reward", rule)
    tiny_preference.write_model(tmp_path / "model")
    run = PairEvidenceRun(
        model=str(tmp_path / "model"),
        seeds=(0, 1),
        algorithms=("dpo",),
        prompts=6,
        samples=3,
        held_out=4,
        test_samples=2,
        max_prompt=6,
        max_new_tokens=5,
        batch=2,
        steps=3,
        rate=1e-2,
    )
    with tiny_runs.quick_compile():
        pair_evidence(run, tmp_path)
    stored = json.loads((tmp_path / "preference.json").read_text())
    start = stored["start"]
    assert start["gain"]["mean"] == start["margin"]["mean"] == 0
    assert start["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    for arm in stored["arms"].values():
        measures = arm["measures"]
        assert measures["kl"]["mean"] > 1e-4
        difference = measures["chosen"]["mean"] - measures["rejected"]["mean"]
        assert measures["margin"]["mean"] == pytest.approx(difference, abs=1e-4)
        seen = measures["chosen_seen"]["by_seed"]
        assert len(seen) == 2 and seen[0] != seen[1]
    page = (tmp_path / "preference.md").read_text()
    assert "| `dpo` |" in page and "--max-new-tokens 5" in page and "`modpo` (needs" in page
    assert (tmp_path / "preference.png").stat().st_size > 1000
