"""metrics.jsonl, trackers and the progress line."""

import json
import sys
import types

import pytest

from jaxllm.errors import InputError
from jaxllm.training.log import MetricsLog, Progress, read_metrics

ROWS = [{"step": 5, "train/loss": 2.5}, {"step": 10, "train/loss": 1.25}]


def write_rows(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_rows_are_appended_rounded_to_seven_digits_and_null_where_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, {"loss": 1 / 3, "bad": float("nan"), "huge": float("inf")})
    log.write(2, {"loss": 0.25})
    assert path.read_text() == (
        '{"step": 1, "loss": 0.3333333, "bad": null, "huge": null}\n{"step": 2, "loss": 0.25}\n'
    )
    assert log.newest() == {"loss": 0.25, "bad": None, "huge": None}
    assert read_metrics(path) == log.rows


@pytest.mark.parametrize(
    "torn", ['{"step": 15, "train/lo', "{", '{"step": 15, "train/loss": 1.0}', ""]
)
def test_resuming_cuts_later_steps_and_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [*ROWS, {"step": 12, "eval/nll": 3.0}], torn)
    log = MetricsLog(path, resume_step=10)
    assert log.rows == ROWS and read_metrics(path) == ROWS
    log.write(11, {"train/loss": 1.0})
    assert [row["step"] for row in read_metrics(path)] == [5, 10, 11]
    assert path.read_text().endswith("\n")


def test_a_process_that_does_not_write_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, ROWS)
    log = MetricsLog(path, resume_step=5, enabled=False, trackers=["nonsense"])
    log.write(6, {"loss": 1.0})
    assert read_metrics(path) == ROWS and [row["step"] for row in log.rows] == [5, 6]


@pytest.mark.parametrize(
    "bad", ['{"step": 7, "train/lo', "[1, 2]", '{"loss": 1.0}', '{"step": "7"}', "", "\x00\x00"]
)
def test_a_corrupt_middle_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + bad + "\n" + json.dumps(ROWS[1]) + "\n")
    for read in (read_metrics, lambda p: MetricsLog(p, resume_step=10)):
        with pytest.raises(InputError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}:2: expected a JSON object with a step, found")
        assert "\n" not in str(error.value)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics.jsonl: no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_unknown_tracker_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(InputError, match="'tensorbord' is not one of tensorboard, wandb; did you"):
        MetricsLog(tmp_path / "metrics.jsonl", trackers=["tensorbord"])


@pytest.mark.parametrize(
    ("tracker", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"'{tracker}' needs: pip install jaxllm\[logging\]"):
        MetricsLog(tmp_path / "metrics.jsonl", trackers=[tracker])


def test_trackers_get_every_row(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder):
            calls.append(("open", folder))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("close")

    class Session:
        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finish")

    def init(**settings):
        assert settings["dir"] == str(tmp_path) and settings["resume"] == "allow"
        return Session()

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers=["tensorboard", "wandb"])
    log.write(3, {"loss": 0.5})
    log.close()
    assert calls == [
        ("open", str(tmp_path / "tensorboard")),
        ("loss", 0.5, 3),
        ({"loss": 0.5}, 3),
        "close",
        "finish",
    ]


def test_the_progress_line(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("jaxllm.training.log.time.perf_counter", lambda: now[0])
    progress = Progress("dnd", total=200, start=50, unit="images")
    now[0] += 30.0  # 50 steps in 30 s: the other 100 take 60 s.
    progress.update(100, 1.23456, 512.4)
    progress.close()
    assert capsys.readouterr().out == "dnd 100/200 50% loss 1.2346 512 images/s 1:00 left\n"
    Progress("dnd", 200, 0, "images", enabled=False).update(1, 1.0, 1.0)
    assert capsys.readouterr().out == ""
