"""The token tasks: layout, spans that hold the answer, and what a perfect memory would score."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.kvcompress.tasks import NeedleTask, ReasonNeedleTask, SetGetTask

TASKS = [NeedleTask(), ReasonNeedleTask(), SetGetTask(operations=60)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_every_answer_is_a_copy_of_its_span(task):
    batch = task.batch(0, 3, 8)
    tokens = batch["tokens"]
    assert tokens.shape == (8, task.length) and tokens.dtype == np.int32
    assert tokens.min() >= 0 and tokens.max() < task.vocab
    counted = 0
    for row in range(8):
        for at, (start, end) in zip(batch["query"][row], batch["span"][row], strict=True):
            if at < 0:
                continue
            answer = slice(at, at + end - start)
            assert end <= at and np.all(batch["answer"][row, answer])
            np.testing.assert_array_equal(tokens[row, answer], tokens[row, start:end])
            counted += end - start
    assert counted == batch["answer"].sum() > 0
    assert np.all(batch["weights"][batch["answer"]] == 1)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_batches_are_fixed_by_seed_and_step(task):
    first, again = task.batch(1, 5, 4), task.batch(1, 5, 4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    np.testing.assert_array_equal(task.batch(1, 5, 2)["tokens"], first["tokens"][:2])
    assert not np.array_equal(first["tokens"], task.batch(1, 6, 4)["tokens"])
    assert not np.array_equal(first["tokens"], task.batch(2, 5, 4)["tokens"])


def test_the_needle_task_has_the_layout_of_the_pilot():
    """Sequence 64: six facts of four, 16 filler tokens, six queries of four."""
    task = NeedleTask()
    assert (task.length, task.context, task.vocab) == (64, 40, 42)
    batch = task.batch(0, 0, 50)
    tokens, weights = batch["tokens"], batch["weights"]
    context = tokens[:, :40]
    assert np.all((context == 8).sum(1) == 6) and np.all(tokens[:, 40::4] == 9)
    filler = context < 8
    assert np.all(filler.sum(1) == 16) and np.all(weights[:, :40][filler] == np.float32(0.3))
    assert np.all(weights[:, :40][~filler] == 0)
    np.testing.assert_array_equal(batch["query"], np.tile(np.arange(42, 64, 4), (50, 1)))
    # Noise 0.2 over 8 symbols leaves 0.8 + 0.2/8 of the steps regular.
    row = NeedleTask(facts=1, filler=20_000).batch(0, 0, 1)["tokens"][0]
    filler = row[row < 8]
    assert abs(np.mean(np.diff(filler) % 8 == 1) - 0.825) < 0.01


def test_the_reasoning_task_answers_with_the_higher_rank():
    task = ReasonNeedleTask()
    first_key, first_rank = 10, 26
    for single in (False, True):
        batch = task.batch(0, 0, 20, single=single)
        for row in range(20):
            tokens = batch["tokens"][row]
            facts = {
                tokens[i + 1]: (tokens[i + 2], tokens[i + 3]) for i in np.flatnonzero(tokens == 8)
            }
            assert len(facts) == 6 and all(k >= first_key for k in facts)
            assert len({rank for rank, _ in facts.values()}) == 6
            assert min(rank for rank, _ in facts.values()) >= first_rank
            for place, at in enumerate(batch["query"][row]):
                assert tokens[at - 3] == 9
                pair = tokens[at - 2 : at]
                assert (pair[0] == pair[1]) == single
                assert tokens[at] == max(facts[k] for k in pair)[1]
                low = batch["distractor"][row, place, 0]
                assert tokens[low] == min(facts[k] for k in pair)[1]
                assert single or low != batch["span"][row, place, 0]


def test_set_and_get_remember_the_last_value():
    task = SetGetTask(operations=200, keys=5)
    batch = task.batch(0, 0, 4)
    for row in range(4):
        memory, gets = {}, 0
        operations = batch["tokens"][row].reshape(-1, 3)
        assert sorted(operations[:5, 1]) == [2, 3, 4, 5, 6]
        for number, (kind, key, value) in enumerate(operations):
            if kind == 1:
                assert memory[key] == value
                assert batch["query"][row, gets] == 3 * number + 2
                gets += 1
            memory[key] = value
        assert np.all(batch["query"][row, gets:] == -1) and np.all(batch["span"][row, gets:] == -1)
        assert abs(gets / 195 - 0.5) < 0.15


def test_bad_tasks_are_refused():
    for make, message in [
        (lambda: NeedleTask(facts=17), "17 facts of 16 keys"),
        (lambda: NeedleTask(values=0), "values"),
        (lambda: ReasonNeedleTask(facts=9), "9 facts"),
        (lambda: ReasonNeedleTask(facts=3, queries=4), "4 queries"),
        (lambda: SetGetTask(operations=8), "8 operations"),
        (lambda: SetGetTask(gets=1.0), "1.0 gets"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
