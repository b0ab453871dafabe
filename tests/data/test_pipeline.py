"""The input pipeline: order, hosts, resuming, errors, threads."""

import threading

import numpy as np
import pytest

from jaxllm.data.pipeline import Batches, padded_batches, stack_examples
from jaxllm.errors import InputError


class Rows:
    def __init__(self, count, broken=None):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.broken:
            raise InputError(f"rows.jsonl:{index}: truncated record")
        return {"row": np.int32(index)}


def draw(example, rng):
    return {**example, "draw": rng.integers(1 << 30)}


def rows(batches, steps):
    return np.concatenate([batches.batch(step)["row"] for step in range(steps)])


def test_every_epoch_is_a_permutation_of_its_own():
    # 7 rows in batches of 4: batches span epochs and no row is dropped.
    epochs = rows(Batches(Rows(7), 4, seed=3), 7).reshape(4, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_function_of_seed_and_step_only():
    first, again, other = (Batches(Rows(50), 5, seed=seed, transform=draw) for seed in (1, 1, 2))
    wanted = [first.batch(step) for step in range(12)]
    for step in (11, 3, 7):  # In any order of asking.
        for name in ("row", "draw"):
            np.testing.assert_array_equal(again.batch(step)[name], wanted[step][name])
    assert (rows(first, 10) != rows(other, 10)).any()
    # Draws differ by position: a row gets another one in its next epoch.
    draws = {int(d) for step in range(12) for d in first.batch(step)["draw"]}
    assert len(draws) == 60
    # The source's size and the batch size do not enter a row's place in the stream.
    np.testing.assert_array_equal(rows(Batches(Rows(50), 10, seed=1), 6), rows(first, 12))


@pytest.mark.parametrize("hosts", [2, 3])
def test_rows_of_a_step_do_not_depend_on_the_number_of_hosts(hosts):
    """Host h reads rows h B/n to (h + 1) B/n of each global batch, transformed alike."""
    whole = Batches(Rows(10), 6, seed=5, transform=draw)
    parts = [Batches(Rows(10), 6, seed=5, transform=draw, hosts=(h, hosts)) for h in range(hosts)]
    for step in range(6):
        batches = [part.batch(step) for part in parts]
        for name in ("row", "draw"):
            joined = np.concatenate([batch[name] for batch in batches])
            np.testing.assert_array_equal(joined, whole.batch(step)[name])


@pytest.mark.parametrize("start", [0, 1, 9])
def test_iterating_from_a_step_equals_asking_for_it(start):
    batches = Batches(Rows(10), 4, seed=2, transform=draw, hosts=(1, 2))
    iterator = batches.iterate(start)
    for step in range(start, start + 6):
        got, wanted = next(iterator), batches.batch(step)
        assert got.keys() == wanted.keys() and len(got["row"]) == 2
        for name in wanted:
            np.testing.assert_array_equal(got[name], wanted[name])
    iterator.close()


@pytest.mark.parametrize("transform", [None, draw])
def test_an_error_in_a_source_arrives_as_itself(transform):
    batches = Batches(Rows(10, broken=7), 4, transform=transform)
    with pytest.raises(InputError) as error:
        for _ in batches.iterate():
            pass
    assert type(error.value) is InputError
    assert str(error.value) == "rows.jsonl:7: truncated record"


def test_prefetch_threads_end_with_the_iterator():
    before = set(threading.enumerate())
    iterator = Batches(Rows(1000), 2, threads=3).iterate()
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(source=Rows(0), batch_size=2), "the training data has no examples"),
        (dict(source=Rows(3), batch_size=0), "batch size 0 is not a positive multiple of 1"),
        (dict(source=Rows(3), batch_size=3, hosts=(0, 2)), "batch size 3 is not .* of 2 hosts"),
    ],
)
def test_impossible_streams_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Batches(**arguments)


def test_finite_batches():
    arrays = stack_examples(Rows(5))
    assert arrays["row"].tolist() == [0, 1, 2, 3, 4]
    assert stack_examples(Rows(5), [4, 1])["row"].tolist() == [4, 1]
    found = [(batch["row"].tolist(), real) for batch, real in padded_batches(arrays, 2)]
    assert found == [([0, 1], 2), ([2, 3], 2), ([4, 0], 1)]
