"""Real processes, stopped by SIGKILL, SIGTERM and Ctrl-C, give the numbers of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.parallel.sharding import leaf_paths
from jaxllm.training.checkpoint import finished_steps, read_newest

SCRIPT = Path(__file__).with_name("linear_job.py")


def start(*arguments):
    root = str(SCRIPT.parents[2])
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_step(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def stop_at(process, folder, step, number, pause):
    """Sends the signal `pause` seconds after `step` shows in the log; returns exit code, stdout."""
    deadline = time.monotonic() + 120
    while last_step(folder) < step and process.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.002)
    time.sleep(pause)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def without_timing(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("train/images_per_second", None)
    return rows


@pytest.mark.slow
def test_killed_terminated_and_interrupted_run_equals_uninterrupted_run(tmp_path):
    seed = time.time_ns()
    rng = random.Random(seed)
    steps = [rng.randint(2, 9), rng.randint(11, 18), rng.randint(20, 26)]
    story = f"seed {seed}: killed after {steps[0]}, stopped after {steps[1:]}"
    folder, whole = tmp_path / "stopped", tmp_path / "whole"

    code, _ = stop_at(
        start(folder, "--delay", 0.04), folder, steps[0], signal.SIGKILL, rng.uniform(0, 0.05)
    )
    assert code == -signal.SIGKILL, story

    for step, number in zip(steps[1:], (signal.SIGTERM, signal.SIGINT), strict=True):
        code, printed = stop_at(
            start(folder, "--delay", 0.04), folder, step, number, rng.uniform(0, 0.05)
        )
        assert code == 0, (story, printed)
        assert "stopped and saved at step" in printed and "same command resumes" in printed
        saved = finished_steps(folder / "checkpoints")[-1]
        assert step <= saved < 30, story
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["step"] == saved

    last = start(folder, whole)
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0, (story, out + err)

    for name in ("checkpoints", "best"):
        left, right = read_newest(folder / name), read_newest(whole / name)
        assert jax.tree.structure(left) == jax.tree.structure(right)
        assert finished_steps(folder / name)[-1] == finished_steps(whole / name)[-1]
        for (path, a), b in zip(leaf_paths(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{path}; {story}")
    assert {"params", "ema", "opt_state", "extra", "step"} <= set(left)
    assert without_timing(folder) == without_timing(whole), story
    logged = [row["step"] for row in without_timing(whole) if "train/loss" in row]
    assert logged == list(range(1, 31))
    assert [row["step"] for row in without_timing(whole) if "eval/norm" in row] == [
        7,
        14,
        21,
        28,
        30,
    ]
    assert not list((folder / "checkpoints").glob("*.tmp*"))
    ends = [json.loads((f / "summary.json").read_text()) for f in (folder, whole)]
    for end in ends:
        end["metrics"].pop("train/images_per_second")
    assert ends[0]["metrics"] == ends[1]["metrics"] and ends[0]["step"] == 30
