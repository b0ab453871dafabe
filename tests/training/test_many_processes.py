"""One run of the linear job on four processes, then two, then one: stopped, killed, gone on.

All tests look at the same story. Four processes of two devices, two slices: SIGTERM to one of them
stops all. Two processes, `tensor` across both, go on until one is killed; the same command goes on
to the end. One process goes on from there. Beside it, one process of eight devices did it all at
once, and in another folder one of two processes could not read a record.
"""

import dataclasses
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import recorded_linear
import tiny_runs
from linear_job import BATCH
from recorded_linear import ROWS, get_config, recorded_job

from jaxllm.data.pipeline import Batches
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.training.checkpoint import finished_steps
from jaxllm.training.log import read_metrics
from jaxllm.training.loop import train
from jaxllm.training.run_folder import read_json

SCRIPT = Path(recorded_linear.__file__)
STEPS, AFTERWARDS = 22, 24
AHEAD = 14  # Steps that may be read before they are taken.
DELAY = 0.03

pytestmark = pytest.mark.slow


class Processes:
    """The processes of one run in `folder`, each noting what it reads."""

    def __init__(self, nursery, count, folder, logs, *arguments, fail=None):
        self.folder, self.reads = folder, [logs.with_suffix(f".reads{n}") for n in range(count)]
        self.running = nursery.start_together(
            count,
            SCRIPT,
            *arguments,
            "--workdir",
            folder,
            logs=logs,
            environment=lambda number: {
                "READS": self.reads[number],
                "DELAY": DELAY,
                "FAIL_AT": 9 if number == fail else 0,
            },
        )

    def reach(self, step):
        """Waits until the run has logged `step`."""
        deadline = time.monotonic() + 150
        while not any(row["step"] >= step for row in self.rows()):
            assert all(process.poll() is None for process in self.running), self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.01)

    def rows(self):
        path = self.folder / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def codes(self):
        """Waits for all and returns their exit codes."""
        return [process.wait(120) for process in self.running]

    def said(self, number):
        """What one process printed."""
        return self.running[number].printed

    def printed(self):
        return "\n".join(f"== {process.log}\n{process.log.read_text()}" for process in self.running)

    def end(self):
        for process in self.running:
            process.end()


@dataclasses.dataclass
class Story:
    """What the tests look at: groups of processes, their exit codes, and what they left."""

    folder: Path
    four: Processes
    killed: Processes
    failed: Processes
    restarted: Processes
    codes: dict
    """Group -> exit codes."""
    stopped: int
    """The step at which the four stopped."""
    kill_seconds: float
    """From the kill of one process to the end of the other."""
    rows: list
    whole: list


@pytest.fixture(scope="module")
def story(tmp_path_factory, nursery):
    base = tmp_path_factory.mktemp("processes")
    steps = ["--loop.steps", STEPS]
    across = [*steps, "--mesh.data", 1, "--mesh.tensor", -1, "--mesh.lost-after", 10]
    folder, groups, codes = base / "run", {}, {}

    def start(count, name, folder, *arguments, **more):
        groups[name] = Processes(nursery, count, folder, base / name, *arguments, **more)
        return groups[name]

    try:
        sliced = ("--mesh.data", 2, "--mesh.fsdp", 4, "--mesh.slices", 2)
        four = start(4, "four", folder, *steps, *sliced)
        four.reach(4)
        four.running[2].send_signal(signal.SIGTERM)
        codes["four"] = four.codes()
        stopped = finished_steps(folder / "checkpoints")[-1]

        failed = start(2, "failed", base / "other", *across, fail=1)
        killed = start(2, "killed", folder, *across)
        killed.reach(stopped + 4)
        killed.running[1].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        codes["killed"] = killed.codes()
        seconds = time.monotonic() - begun
        codes["failed"] = failed.codes()
        codes["restarted"] = start(2, "restarted", folder, *across).codes()
        assert codes["restarted"] == [0, 0], groups["restarted"].printed()
    finally:
        for group in groups.values():
            group.end()

    config = get_config()
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=AFTERWARDS))
    with tiny_runs.quick_compile():
        for path, mesh, devices in (
            (folder, MeshConfig(data=1), 1),
            (base / "whole", MeshConfig(data=2, fsdp=4), 8),
        ):
            job = recorded_job(dataclasses.replace(config, mesh=mesh))
            train(job, path, devices=jax.devices()[:devices])
    rows, whole = (read_metrics(path / "metrics.jsonl") for path in (folder, base / "whole"))
    return Story(
        folder,
        **groups,
        codes=codes,
        stopped=stopped,
        kill_seconds=seconds,
        rows=rows,
        whole=whole,
    )


def losses(rows):
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


class Rows:
    """As many examples as the data has rows; each is its own number."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"row": np.int64(index)}


def read_by(processes, number):
    return set(map(int, processes.reads[number].read_text().split()))


def share(first, last, hosts):
    """The rows of steps `first` to `last` of one of several readers."""
    batches = Batches(Rows(), BATCH, hosts=hosts)
    return {int(row) for step in range(first, last) for row in batches.batch(step)["row"]}


def test_a_signal_to_one_process_stops_all_at_one_step(story):
    assert story.codes["four"] == [0] * 4, story.four.printed()
    assert 4 <= story.stopped < STEPS
    last = f"stopped and saved at step {story.stopped}; the same command resumes\n"
    assert story.four.said(0).endswith(last)


def test_only_the_first_process_speaks(story):
    for group, count in ((story.four, 4), (story.restarted, 2)):
        assert "linear" in group.said(0)
        assert [group.said(number) for number in range(1, count)] == [""] * (count - 1)


def test_every_process_writes_its_part_of_a_checkpoint(story):
    for step, count in ((story.stopped, 4), (STEPS, 2)):
        parts = (story.folder / f"checkpoints/{step}/state").glob("ocdbt.process_*/d/*")
        assert {path.parts[-3] for path in parts} == {f"ocdbt.process_{n}" for n in range(count)}
    assert not list(story.folder.glob("checkpoints/*.tmp*"))


def test_four_processes_of_two_devices_give_the_losses_of_one_with_eight(story):
    got, wanted = losses(story.rows), losses(story.whole)
    for step in range(1, story.stopped + 1):
        assert got[step] == pytest.approx(wanted[step], rel=1e-6), step


def test_every_process_reads_its_own_quarter(story):
    assert ROWS > (story.stopped + AHEAD) * BATCH  # In the first epoch.
    taken = [read_by(story.four, number) for number in range(4)]
    assert sum(map(len, taken)) == len(set().union(*taken))
    for number, rows in enumerate(taken):
        assert rows >= share(0, story.stopped, (number, 4))
        assert rows <= share(0, story.stopped + AHEAD, (number, 4))


def test_processes_that_share_an_example_read_the_same(story):
    for number in range(2):
        rows = read_by(story.killed, number)
        assert rows >= share(story.stopped, story.stopped + 4, (0, 1))
        assert rows <= share(story.stopped, STEPS + AHEAD, (0, 1))


def test_the_death_of_one_process_ends_the_other_with_a_reason(story):
    survivor, victim = story.codes["killed"]
    assert victim == -signal.SIGKILL and survivor != 0, story.killed.printed()
    assert story.kill_seconds < 30
    # The runtime may say much more, before this line or while others are waited for.
    (line,) = [line for line in story.killed.said(0).splitlines() if line.startswith("error: ")]
    # A collective that fails at once, or a missed heartbeat, at which the runtime aborts.
    assert line.startswith("error: process 0 of 2 ") and " lost another process" in line
    assert line.endswith("the same command resumes")


def test_an_error_in_one_process_ends_both_with_its_reason(story):
    assert story.codes["failed"] == [2, 2], story.failed.printed()
    assert story.failed.said(1) == "error: numbers.jsonl:9: truncated\n"
    assert story.failed.said(0).splitlines()[-1] == (
        "error: process 1 of 2 failed (numbers.jsonl:9: truncated); process 0 ends with it, the "
        "same command resumes"
    )
    first, second = (process.log.stat().st_mtime for process in story.failed.running)
    assert abs(first - second) < 10


def test_stopped_killed_and_on_one_device_the_run_has_the_numbers_of_one_go(story):
    assert sorted(losses(story.rows)) == list(range(1, AFTERWARDS + 1))
    evaluated = [row for row in story.rows if row["step"] == STEPS and "eval/norm" in row]
    assert len(evaluated) == 1  # At the end of the two processes, which one process has not.
    rows = [row for row in story.rows if row not in evaluated]
    for row, wanted in zip(rows, story.whole, strict=True):
        row, wanted = ({**r, "train/images_per_second": 0} for r in (row, wanted))
        assert row == pytest.approx(wanted, rel=2e-5)
    assert read_json(story.folder / "summary.json")["device"] == "1 x cpu"
