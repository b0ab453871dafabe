"""Checkpoints on disk: what damage is noticed, what is fallen back to, what is refused."""

import logging
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.errors import InputError
from jaxllm.training.checkpoint import (
    SUMS,
    Checkpoints,
    damage,
    finished_steps,
    newest_intact,
    read_newest,
)
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import new_state


def make_state(step, optimizer=None, width=64):
    params = {"w": jax.random.normal(jax.random.key(step), (width, 64)), "b": jnp.ones((3,))}
    optimizer = optimizer or make_optimizer(OptimizerConfig(), 10)
    state = new_state(params, optimizer, ema=True, extra={"empty": {}, "seen": jnp.arange(4)})
    return jax.tree.map(lambda x: x, state.__class__(**{**vars(state), "step": jnp.int32(step)}))


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three checkpoints of different steps, of which the newest two are kept."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=2, metadata={"identity": {"dim": 4}})
    for step in (5, 10, 15):
        checkpoints.save(make_state(step), step)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data) // 4, 3 * len(data) // 4)] ^= 0x10
    path.write_bytes(data)


def delete(folder):
    largest(folder).unlink()


def delete_sums(folder):
    (folder / SUMS).unlink()


def spoil_sums(folder):
    (folder / SUMS).write_text('{"state')


def other_sums(folder):
    (folder / SUMS).write_text("[]")


def test_newest_are_kept_and_restored_whole(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["10", "15"]
    state = make_state(15)
    checkpoints = Checkpoints(saved)
    assert_same(checkpoints.restore(abstract(state)), state)
    assert checkpoints.newest == 15
    checkpoints.save(make_state(99), 15)  # Restored a moment ago: nothing to do.
    checkpoints.close()
    np.testing.assert_array_equal(read_newest(saved)["params"]["w"], state.params["w"])


def test_no_checkpoint_at_all(tmp_path):
    assert Checkpoints(tmp_path / "new").restore(abstract(make_state(0))) is None
    with pytest.raises(InputError, match="no checkpoint; has the run saved yet"):
        read_newest(tmp_path / "absent")


@pytest.mark.parametrize("harm", [truncate, flip, delete, delete_sums, spoil_sums, other_sums])
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning_that_names_it(copy, harm, caplog):
    harm(copy / "15")
    assert damage(copy / "15") and damage(copy / "10") is None
    state = make_state(10)
    with caplog.at_level(logging.WARNING):
        restored = Checkpoints(copy).restore(abstract(state))
    assert_same(restored, state)
    assert f"{copy / '15'} is damaged" in caplog.text and f"{copy / '10'}" in caplog.text
    # The damaged one is out of the way of the run that redoes its steps.
    assert finished_steps(copy) == [10]


def test_reading_falls_back_too_but_deletes_nothing(copy):
    flip(copy / "15")
    assert int(read_newest(copy)["step"]) == 10
    assert finished_steps(copy) == [10, 15]


def test_all_damaged_is_one_line_and_deletes_nothing(copy):
    flip(copy / "15")
    delete(copy / "10")
    with pytest.raises(InputError) as error:
        Checkpoints(copy).restore(abstract(make_state(10)))
    text = str(error.value)
    assert "\n" not in text and str(copy) in text
    assert "15: state" in text and "is not what was written" in text and "is missing" in text
    assert finished_steps(copy) == [10, 15]


def test_leftovers_of_a_save_in_flight_are_ignored_by_readers_and_cleaned_by_runs(copy):
    shutil.copytree(copy / "15", copy / "20.tmp")
    shutil.copytree(copy / "15", copy / "20.tmp.orbax-checkpoint-tmp")
    shutil.copytree(copy / "10", copy / "5.deleted.tmp")
    assert finished_steps(copy) == [10, 15] and newest_intact(copy) == copy / "15"
    assert (copy / "20.tmp").exists()
    Checkpoints(copy).close()
    assert sorted(path.name for path in copy.iterdir()) == ["10", "15"]


@pytest.mark.parametrize(
    ("state", "difference"),
    [
        (make_state(15, width=32), r"ema/w is float32\[64, 64\] there and float32\[32, 64\] here"),
        (make_state(15, optax.sgd(0.1)), "opt_state/.* there and absent here"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_by_tensor_and_kept(copy, state, difference):
    with pytest.raises(InputError, match=f"15 does not fit this config: {difference}"):
        Checkpoints(copy).restore(abstract(state))
    assert finished_steps(copy) == [10, 15]


def test_an_optimizer_without_arrays_restores(tmp_path):
    state = make_state(3, optax.sgd(0.1))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 3, wait=True)
    assert_same(checkpoints.restore(abstract(state)), state)


def test_a_save_is_of_the_state_at_its_step_although_later_steps_take_its_buffers(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = make_state(1, width=4096)
    wanted = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 1)
    for _ in range(5):
        state = advance(state)
    checkpoints.close()
    np.testing.assert_array_equal(read_newest(tmp_path)["params"]["w"], wanted.params["w"])


def test_a_step_saved_again_replaces_what_an_earlier_run_left(copy):
    checkpoints = Checkpoints(copy, keep=1)
    checkpoints.save(make_state(16), 15, wait=True)
    np.testing.assert_array_equal(read_newest(copy)["params"]["w"], make_state(16).params["w"])
    assert finished_steps(copy) == [15]


def test_a_failed_save_surfaces_at_the_next_one_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxllm.training.checkpoint.checksums", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), 1)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(make_state(2), 2)
    assert finished_steps(tmp_path) == []


def test_a_relative_folder_is_read(saved, monkeypatch):
    # Orbax takes absolute paths only, and a run folder is usually given as `runs/NAME`.
    monkeypatch.chdir(saved.parent)
    assert int(read_newest(Path(saved.name))["step"]) == 15
