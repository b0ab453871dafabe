"""Rows of documents: by hand, against exhaustive properties, and what is refused."""

import numpy as np
import pytest

from jaxllm.data.packing import fill_row, plan_rows
from jaxllm.errors import InputError


def rows(plan):
    return [plan.row(i) for i in range(len(plan))]


def test_best_fit_by_hand():
    """Places 5, 2, 3, 6, 1 in rows of 7: 6+1, 5+2, 3. The piece of 1 goes where least is left."""
    plan = plan_rows([6, 3, 4, 7, 2], 7)
    assert rows(plan) == [[(3, 0, 6), (4, 0, 1)], [(0, 0, 5), (1, 0, 2)], [(2, 0, 3)]]
    assert plan.filled == 17 / 21


def test_sequential_by_hand():
    plan = plan_rows([6, 3, 4, 7, 2], 7, "sequential")
    assert rows(plan) == [
        [(0, 0, 5), (1, 0, 2)],
        [(2, 0, 3)],
        [(3, 0, 6), (4, 0, 1)],
    ]


def test_unpacked_by_hand_with_a_long_document():
    plan = plan_rows([3, 1, 0, 8], 3, "none")
    assert rows(plan) == [[(0, 0, 2)], [(3, 0, 3)], [(3, 3, 3)], [(3, 6, 1)]]


def test_arrays_of_a_row_by_hand():
    documents = [np.array([10, 11, 12]), np.array([20, 21, 22, 23, 24])]
    row = fill_row(
        [(1, 2, 2), (0, 0, 2)],
        6,
        lambda document, start, stop: documents[document][start:stop],
        lambda document, start, stop: np.arange(start, stop) * (0.5 if document else 1.0),
    )
    expected = {
        "tokens": [22, 23, 10, 11, 0, 0],
        "targets": [23, 24, 11, 12, 0, 0],
        "positions": [0, 1, 0, 1, 0, 0],
        "segment_ids": [1, 1, 2, 2, 0, 0],
        "weights": [1.5, 2.0, 1.0, 2.0, 0.0, 0.0],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(row[name], values)
        assert row[name].dtype == (np.float32 if name == "weights" else np.int32)


@pytest.mark.parametrize("packing", ["best_fit", "sequential", "none"])
def test_every_token_but_the_first_is_a_target_once(packing):
    lengths = np.random.default_rng(0).integers(0, 40, size=200)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    plan = plan_rows(lengths, 16, packing)
    seen = []
    for pieces in rows(plan):
        row = fill_row(pieces, 16, lambda d, a, b: np.arange(starts[d] + a, starts[d] + b) + 1)
        used = row["segment_ids"] > 0
        assert used.sum() == sum(piece[2] for piece in pieces) <= 16
        np.testing.assert_array_equal(row["targets"][used], row["tokens"][used] + 1)
        np.testing.assert_array_equal(row["weights"], used)
        assert not row["tokens"][~used].any() and not row["positions"][~used].any()
        seen += row["targets"][used].tolist()
    firsts = {int(start) + 1 for start, n in zip(starts, lengths, strict=False) if n}
    assert sorted(seen) == sorted(set(range(1, starts[-1] + 1)) - firsts)
    assert rows(plan_rows(lengths, 16, packing)) == rows(plan)


def test_best_fit_takes_the_tightest_row():
    """Against a search over all open rows."""
    lengths = np.random.default_rng(1).integers(2, 33, size=300)
    left = []
    for document in sorted(range(300), key=lambda d: -lengths[d]):
        places = lengths[document] - 1
        fitting = [room for room in left if room >= places]
        if fitting:
            left.remove(min(fitting))
            left.append(min(fitting) - places)
        else:
            left.append(32 - places)
    plan = plan_rows(lengths, 32)
    found = sorted(32 - sum(piece[2] for piece in row) for row in rows(plan))
    assert found == sorted(left)
    assert len(plan_rows(lengths, 32, "sequential")) > len(plan)


def test_refusals():
    with pytest.raises(InputError, match="row_length 0 must be at least 1"):
        plan_rows([3], 0)
    assert len(plan_rows([4], 3, long="refuse")) == 1
    with pytest.raises(InputError, match="a.jsonl:2 has 5 tokens, rows of 3 hold 4"):
        plan_rows([4, 5], 3, long="refuse", name=lambda document: f"a.jsonl:{document + 1}")
    assert len(plan_rows([], 3)) == 0 == len(plan_rows([1], 3))
