"""Real processes, stopped by SIGKILL, SIGTERM and Ctrl-C, give the numbers of one that was not."""

import json
import random
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.parallel.sharding import leaf_paths
from jaxllm.training.checkpoint import finished_steps, read_newest

SCRIPT = Path(__file__).with_name("linear_job.py")


def reach(child, step):
    """Waits until this process, not one before it, has shown `step`."""
    deadline = time.monotonic() + 120
    while not any(int(shown) >= step for shown in re.findall(r"linear (\d+)/", child.printed)):
        assert child.poll() is None and time.monotonic() < deadline, child.printed
        time.sleep(0.002)


def without_timing(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("train/images_per_second", None)
    return rows


@pytest.mark.slow
def test_killed_terminated_and_interrupted_run_equals_uninterrupted_run(tmp_path, nursery):
    seed = time.time_ns()
    rng = random.Random(seed)
    steps = [rng.randint(2, 9), rng.randint(11, 18), rng.randint(20, 26)]
    story = f"seed {seed}: killed after {steps[0]}, stopped after {steps[1:]}"
    folder, whole = tmp_path / "stopped", tmp_path / "whole"

    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for step, number in zip(steps, signals, strict=True):
        child = nursery.start(SCRIPT, folder, "--delay", 0.04, log=tmp_path / "printed")
        reach(child, step)
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(number)
        code = child.wait(120)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL, story
            continue
        assert code == 0, (story, child.printed)
        saved = finished_steps(folder / "checkpoints")[-1]
        assert step <= saved < 30, story
        resume = f"linear: stopped and saved at step {saved}; the same command resumes\n"
        assert child.printed.endswith(resume)
        assert json.loads((folder / "summary.json").read_text())["step"] == saved

    last = nursery.start(SCRIPT, folder, whole, log=tmp_path / "printed")
    assert last.wait(120) == 0, (story, last.printed)

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
