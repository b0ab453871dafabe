"""The loop in one process: hooks, resuming on other meshes, bad values, speed discipline."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from linear_job import BATCH, Numbers, linear_job

from jaxllm.errors import InputError
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import batch_sharding, leaf_paths
from jaxllm.training import loop as training_loop
from jaxllm.training.checkpoint import finished_steps, read_newest
from jaxllm.training.job import LoopConfig
from jaxllm.training.log import Clock, goodput, read_metrics
from jaxllm.training.loop import TPU_OPTIONS, NonFiniteError, jit_step, stop_on_signal, train

ONE = MeshConfig(data=1)


def loop_config(steps, **changes):
    return LoopConfig(**{"steps": steps, "log_every": 1, "compile_cache": False, **changes})


def run_one(job, folder):
    return train(dataclasses.replace(job, mesh=ONE), folder, devices=jax.devices()[:1])


def losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


class Hooked:
    """Batches that call `hook(step)` before each one is handed out."""

    def __init__(self, batches, hook):
        self.batches, self.batch_size, self.hook = batches, batches.batch_size, hook
        self.sizes = batches.sizes

    def iterate(self, start):
        for step, batch in enumerate(self.batches.iterate(start), start):
            self.hook(step)
            yield batch


# -- hooks ---------------------------------------------------------------------------------------


def test_hooks_fire_once_at_their_steps_and_the_summary_tells_the_run(tmp_path, capsys):
    calls = Counter()

    def evaluate(state):
        calls["eval", int(state.step)] += 1
        return {"norm": jnp.sum(state.params["w"] ** 2)}

    def sample(state, path):
        calls[path.name, int(state.step)] += 1

    loop = loop_config(12, log_every=5, eval_every=4, sample_every=3, save_every=6, keep=9)
    job = linear_job(loop, evaluate=evaluate, sample=sample)
    result = run_one(job, tmp_path)
    expected = {("eval", step): 1 for step in (4, 8, 12)}
    expected |= {(f"step{step:07d}", step): 1 for step in (3, 6, 9, 12)}
    assert calls == expected
    assert finished_steps(tmp_path / "checkpoints") == [6, 12]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12, 12]
    assert result.finished and int(result.state.step) == 12

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == result.summary
    assert summary["metrics"]["train/loss"] == rows[-2]["train/loss"]
    assert summary["metrics"]["eval/norm"] == rows[-1]["eval/norm"]
    assert set(summary["seconds"]) == {"init", "compile", "data", "step", "eval", "checkpoint"}
    assert summary["seconds"]["compile"] > 0 and summary["device"] == "1 x cpu"
    assert sum(summary["goodput"].values()) == pytest.approx(1, abs=1e-3)
    assert {"python", "jax", "flax", "numpy"} <= set(summary["versions"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["job"] == "linear" and config["config"]["loop"]["eval_every"] == 4

    # Off a terminal: one dense line a log step.
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["5/12", "10/12", "12/12"]
    assert all("loss" in line and "images/s" in line and line.endswith("left") for line in lines)

    # Complete: the same call reports and does nothing again.
    again = run_one(job, tmp_path)
    assert calls == expected and again.summary == summary
    assert "already at step 12 of 12" in capsys.readouterr().out

    # Killed between the last checkpoint and the summary: what is missing is done.
    (tmp_path / "summary.json").unlink()
    calls.clear()
    assert run_one(job, tmp_path).summary["metrics"] == summary["metrics"]
    assert calls == {("step0000012", 12): 1}
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


def test_the_lowest_metric_keeps_its_checkpoint_also_across_a_restart(tmp_path):
    values = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 2.0, 12: 2.5}

    def best_after(steps):
        loop = loop_config(steps, eval_every=2, keep_best="score")
        job = linear_job(loop, evaluate=lambda state: {"score": values[int(state.step)]})
        run_one(job, tmp_path)
        return finished_steps(tmp_path / "best"), int(read_newest(tmp_path / "best")["step"])

    assert best_after(6) == ([4], 4)
    assert best_after(8) == ([4], 4)  # 3.5 is the lowest of the second run, not of both.
    assert best_after(12) == ([10], 10)


def test_keep_best_of_an_unknown_metric_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"keep_best 'eval/nll' is not one of \['eval/norm'\]"):
        run_one(linear_job(loop_config(2, keep_best="nll")), tmp_path)


# -- meshes --------------------------------------------------------------------------------------


def test_a_checkpoint_continues_on_any_number_of_devices(tmp_path):
    trunk = tmp_path / "trunk"
    before = linear_job(loop_config(4), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    # The schedule is constant, so the run of 4 steps is the start of the run of 8.
    state = train(before, trunk).state
    assert state.params["w"].sharding.shard_shape((8, 16)) == (4, 8)
    seen = {}
    meshes = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (1, 2, 4), (8, 1, 1)]
    for shape in meshes:
        folder = tmp_path / "-".join(map(str, shape))
        shutil.copytree(trunk, folder)
        job = linear_job(loop_config(8), mesh=MeshConfig(*shape))
        result = train(job, folder, devices=jax.devices()[: int(np.prod(shape))])
        moments = result.state.opt_state[1][0].mu["w"]
        for array in (result.state.params["w"], result.state.ema["w"], moments):
            assert array.sharding.shard_shape((8, 16)) == (8 // shape[1], 16 // shape[2])
        seen[shape] = losses(folder)
    assert list(seen[1, 1, 1]) == list(range(1, 9))
    for shape in meshes[1:]:
        for step, loss in seen[shape].items():
            np.testing.assert_allclose(loss, seen[1, 1, 1][step], rtol=1e-5, err_msg=f"{shape}")


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(tmp_path):
    job = linear_job(loop_config(2), mesh=MeshConfig(data=3))
    with pytest.raises(InputError, match="batch size 8 does not divide over data x fsdp = 3"):
        train(job, tmp_path, devices=jax.devices()[:3])


# -- non-finite values ---------------------------------------------------------------------------


def root_at_zero(x, broken):
    """A finite value with a slope of 1/2, or infinity where broken."""
    return jnp.sqrt(x - jax.lax.stop_gradient(x) + jnp.where(broken, 0.0, 1.0))


def test_a_nan_in_the_data_stops_the_run_and_is_never_saved(tmp_path):
    loop = loop_config(40, log_every=3, save_every=2, keep=9)
    clean = linear_job(loop).batches
    step_of = {int(i): s + 1 for s in range(5) for i in clean.batch(s)["index"]}
    row, bad_step = next((i, s) for i, s in step_of.items() if s == 4)
    job = linear_job(loop, source=Numbers(bad=row), sample=lambda state, path: None)
    with pytest.raises(NonFiniteError) as error:
        run_one(job, tmp_path)
    assert f"non-finite value at step {bad_step}, first in batch x; step 2 is saved" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    assert finished_steps(tmp_path / "checkpoints") == [2]
    tree = read_newest(tmp_path / "checkpoints")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    assert int(tree["step"]) == 2 and not (tmp_path / "summary.json").exists()

    # With good data the same command goes on from there.
    assert run_one(linear_job(loop_config(5)), tmp_path).finished


@pytest.mark.parametrize(
    ("spoil", "first"),
    [
        (lambda loss, w, step: jnp.where(step == 2, jnp.nan, loss), "loss"),
        (lambda loss, w, step: loss + root_at_zero(w[0, 0], step == 2), "gradient of w"),
    ],
)
def test_a_loss_that_breaks_is_named_and_nothing_is_saved_at_the_end(tmp_path, spoil, first):
    job = linear_job(loop_config(3, log_every=0), spoil=spoil)
    with pytest.raises(NonFiniteError, match=f"step 3, first in {first}; nothing was saved"):
        run_one(job, tmp_path)
    assert finished_steps(tmp_path / "checkpoints") == []
    assert not (tmp_path / "summary.json").exists()


def test_a_stopped_run_saves_nothing_when_its_state_is_bad(tmp_path):
    job = linear_job(loop_config(50, log_every=0), spoil=lambda loss, w, step: loss * jnp.nan)

    def stop(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    job = dataclasses.replace(job, batches=Hooked(job.batches, stop))
    with pytest.raises(NonFiniteError, match="step 1, first in loss"):
        run_one(job, tmp_path)
    assert finished_steps(tmp_path / "checkpoints") == []


# -- signals and errors --------------------------------------------------------------------------


def test_a_second_ctrl_c_interrupts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        assert not stop.requested(0)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(0)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_unreadable_record_ends_the_run_with_its_own_message(tmp_path):
    job = linear_job(loop_config(20, save_every=1), source=Numbers(broken=7))
    with pytest.raises(InputError) as error:
        run_one(job, tmp_path)
    assert str(error.value) == "numbers.jsonl:7: truncated"


# -- speed discipline ----------------------------------------------------------------------------


def test_one_trace_no_recompilation_no_copies_and_no_wait_between_log_steps(tmp_path, monkeypatch):
    compiled, waits, states = [], [], []

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for name in ("device_get", "block_until_ready"):
        original = getattr(jax, name)
        monkeypatch.setattr(
            jax, name, lambda x, name=name, original=original: (waits.append(name), original(x))[1]
        )

    def hook(step):
        if step == 7:  # Every kind of step has been seen once.
            compiled.clear()
            waits.clear()
            jax.config.update("jax_transfer_guard", "disallow")

    loop = loop_config(19, log_every=6, save_every=6, eval_every=4)
    job = linear_job(loop, evaluate=lambda state: (states.append(state), {"norm": 0.0})[1])
    step = chex.assert_max_traces(job.step, n=1)
    job = dataclasses.replace(job, step=step, batches=Hooked(job.batches, hook))
    try:
        run_one(job, tmp_path)
        assert compiled == []
        with pytest.raises(Exception, match="[Dd]isallowed"):
            jnp.ones(3) + np.ones(3)  # The guard was on.
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        jax.monitoring.unregister_event_duration_listener(listen)
    # A row fetches metrics and health, an evaluation and a checkpoint health: one evaluation at 8,
    # all at 12, one evaluation at 16, row and checkpoint at 18, all at 19, nothing in between.
    assert waits == ["device_get"] * (1 + 4 + 1 + 3 + 4)
    # The whole state of step 4 was donated to step 5.
    kept = [path for path, leaf in leaf_paths(states[0]) if not leaf.is_deleted()]
    assert kept == []


def test_every_second_of_a_run_is_in_its_bucket(tmp_path):
    """Sleeps in the data, an evaluation, a sample and the program's trace go where they belong."""

    def evaluate(state):
        time.sleep(0.3)
        return {"norm": 0.0}

    job = linear_job(loop_config(9, log_every=8), evaluate=evaluate)

    def step(*arguments):
        time.sleep(0.2)  # While tracing.
        return job.step(*arguments)

    def sample(state, path):
        time.sleep(0.1)

    slow = Hooked(job.batches, lambda step: time.sleep(0.03))
    begun = time.perf_counter()
    result = run_one(dataclasses.replace(job, step=step, sample=sample, batches=slow), tmp_path)
    wall = time.perf_counter() - begun
    seconds = result.summary["seconds"]
    assert -0.01 < wall - sum(seconds.values()) < 1  # Closing the logs and their thread.
    assert seconds["data"] >= 9 * 0.03 and seconds["compile"] >= 0.2 and seconds["eval"] >= 0.4
    total = sum(seconds.values())
    shares = {name: seconds[name] / total for name in ("init", "compile", "data", "step")}
    shares["checkpoint_eval"] = (seconds["checkpoint"] + seconds["eval"]) / total
    assert result.summary["goodput"] == pytest.approx(shares, abs=2e-3)
    # Speed counts data and steps, and nothing else.
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert 20 < rows[0]["train/images_per_second"] < BATCH / 0.03


def test_the_clock_books_every_moment_once():
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    clock = Clock(lambda: next(times))
    assert clock.enter("step") == "init"  # 0 to 1
    with clock.during("data"):  # 1 to 3 is step's
        assert clock.enter("compile") == "data"  # 3 to 6
    # 6 to 10 is compile's; the body is left for step, as it was found.
    seconds = clock.read()  # 10 to 15
    assert seconds == {"init": 1, "step": 7, "data": 3, "compile": 4, "eval": 0, "checkpoint": 0}
    assert clock.total("step", "data") == 16
    shares = {"init": 1, "compile": 4, "data": 3, "step": 7, "checkpoint_eval": 0}
    assert goodput(seconds) == {name: value / 15 for name, value in shares.items()}


def test_only_tpu_s_compiler_is_given_its_options(monkeypatch):
    """The CPU's knows none of them: it compiles the step without, and refuses it with them."""
    mesh = make_mesh(ONE, jax.devices()[:1])

    def compiled():
        step = jit_step(
            lambda state, batch, key: (state + jnp.sum(batch), {}),
            NamedSharding(mesh, P()),
            batch_sharding(mesh),
        )
        return step.lower(jnp.zeros(()), jnp.zeros(2), jax.random.key(0)).compile()

    with jax.set_mesh(mesh):
        assert compiled() is not None
        monkeypatch.setattr(training_loop, "target_platform", lambda: "tpu")
        with pytest.raises(jax.errors.JaxRuntimeError, match="|".join(TPU_OPTIONS)):
            compiled()


def test_profiler_and_compile_cache_leave_their_files(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    settings = ("jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir")
    saved = {name: getattr(jax.config, name) for name in settings}
    jax.config.update(settings[0], 0.0)
    jax.config.update(settings[1], None)
    try:
        run_one(linear_job(loop_config(4, profile=(2, 3), compile_cache=True)), tmp_path / "run")
    finally:
        for name, value in saved.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert any((tmp_path / "cache" / "xla").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_every": -1}, "loop.save_every -1"),
        ({"keep": 0}, "loop.keep 0"),
        ({"profile": (5, 2)}, r"loop.profile \(5, 2\)"),
    ],
)
def test_impossible_loops_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        LoopConfig(**changes)
