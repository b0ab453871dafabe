"""Bad input of preference runs: one line, exit code 2, through the real script."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import jax
import pytest
import tiny_runs
from tiny_preference import MODEL, write_folder, write_model, write_rows

from jaxllm.models.decoder import DecoderConfig
from jaxllm.training import loop

ROOT = Path(__file__).parents[2]
GOOD = {"prompt": "a:", "chosen": " b", "rejected": " c"}
BELIEF = {"belief": "1", "beliefs": ["1", "2"], "prompt": "q", "chosen": "1x", "rejected": "1y"}
CONFIG = """
from jaxllm.preference.config import ModelConfig, OfflineData, PreferenceRun
from jaxllm.training.job import LoopConfig

def get_config():
    return PreferenceRun(
        ModelConfig({model!r}),
        OfflineData({file!r}, batch_size=2, row_length=16),
        loop=LoopConfig(steps=1, log_every=1, compile_cache=False),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("bad"))
    write_model(root / "wider", DecoderConfig(**{**vars(MODEL), "vocab_size": 300}))
    return root


@pytest.fixture
def start(folder, tmp_path, monkeypatch, capsys):
    """Runs the script on rows with overrides; returns its exit code and its errors."""
    monkeypatch.setattr(loop, "train", partial(loop.train, devices=jax.devices()[:1]))

    def run(rows, *overrides):
        config = tmp_path / "config.py"
        file = write_rows(tmp_path / "rows.jsonl", rows)
        config.write_text(CONFIG.format(model=str(folder / "model"), file=file))
        workdir = tmp_path / "run"
        arguments = ["preference.py", str(config), "--workdir", str(workdir), *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end, tiny_runs.quick_compile():
            runpy.run_path(str(ROOT / "train" / "preference.py"), run_name="__main__")
        assert end.value.code == 0 or not workdir.exists()
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "rejected": " b"}, "chosen and rejected are equal"),
        ({**GOOD, "rejected": ""}, "a response is empty"),
        ({"prompt": "a:", "chosen": " b"}, "field `rejected` is missing"),
        ({"prompt": "a:", "completion": " b", "label": 2}, "`label` is 2"),
        ({**BELIEF, "probabilities": [0.5, 0.2]}, "sum to 0.7"),
        ({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [999]}, "token id 999 is outside"),
        ({**GOOD, "prompt": "a long prompt of many words"}, "fills max_length 17"),
    ],
)
def test_a_bad_record_is_one_line_with_its_place(start, row, message):
    code, error = start([GOOD, row])
    assert code == 2 and len(error.splitlines()) == 1
    assert error.startswith("error: ") and "rows.jsonl:2: " in error and message in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--algorithm.kind", "ppp"], "algorithm 'ppp' is not known; near it:"),
        (["--algorithm.kind", "simpo", "--algorithm.alpha", "1"], "unknown key --algorithm.alpha"),
        (["--algorithm.beta", "0"], "DPO.beta is 0.0, expected above 0"),
        (["--algorithm.kind", "kto"], "data.unpair True makes two"),
        (["--algorithm.kind", "pl_dpo"], "takes lists with scores, found pairs"),
        (["--algorithm.kind", "gdpo"], "needs a stated belief"),
        (["--algorithm.kind", "modpo"], "a `margin` in every record"),
        (["--algorithm.kind", "grpo"], "data must be on-policy"),
        (["--data.file", "none.jsonl"], "none.jsonl: no such file"),
        (["--model.policy", "none"], "none: no such folder"),
        (["--model.policy", "bundled:none"], "none"),
        (["--optimizer.accumulate", "4"], "multiples of optimizer.accumulate 4"),
    ],
)
def test_a_bad_part_is_one_line(start, overrides, message):
    code, error = start([GOOD, {**GOOD, "prompt": "b:"}], *overrides)
    assert code == 2 and len(error.splitlines()) == 1, error
    assert message in error


def test_a_reference_of_another_vocabulary_is_refused(start, folder):
    overrides = ["--model.reference.kind", "FrozenReference"]
    code, error = start([GOOD], *overrides, "--model.reference.folder", str(folder / "wider"))
    assert code == 2
    assert "has another vocabulary: 300 ids, the policy" in error and "has 259 ids" in error


def test_bad_records_that_are_skipped_are_counted_and_listed(start, tmp_path, caplog):
    bad = [{**GOOD, "rejected": ""}, {"prompt": "x"}]
    rows = [GOOD, *bad, {**GOOD, "prompt": "b:"}]
    code, _ = start(rows, "--data.skip-bad", "True")
    assert code == 0
    assert "2 records are left out: " in caplog.text
    assert "rows.jsonl:2: a response is empty" in caplog.text and "rows.jsonl:3: " in caplog.text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 1
