"""The HeadKV benchmark: all compressed sides agree, bytes are the plan's, faults are noticed."""

import numpy as np
import pytest
from tiny_runs import quick_compile

from jaxllm.errors import InputError
from jaxllm.kvcompress import bench

SHAPE = bench.HeadShape(
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_dim=8,
    prompt=64,
    budget=12,
    ring=12,
    window=4,
    steps=3,
)


def run():
    with quick_compile():
        return bench.bench_headkv(repeats=2, batches=[2], threads=1, shape=SHAPE)


def test_all_sides_attend_alike_and_bytes_are_checked(monkeypatch):
    pytest.importorskip("torch")
    found = run()
    rows = {row["side"]: row for row in found["attention of a decode step"]}
    assert list(rows) == ["headkv", "packed", "full", "torch, released layout"]
    assert found["largest difference of outputs"] < 1e-6
    assert found["traces"] == {"batch 2": {"headkv": 1, "full": 1}}
    counts = bench.make_plan(SHAPE).capacities + SHAPE.window
    assert rows["torch, released layout"]["MiB"] == 2 * 2 * 2 * counts.sum() * 8 * 4 / 2**20
    monkeypatch.setattr(bench.Plan, "nbytes", lambda *args: 1)
    with pytest.raises(InputError, match="its plan says 1; not timed"):
        run()


def test_the_full_side_attends_over_the_whole_prompt():
    (cache, _), (q, k, v) = bench.full_caches(SHAPE, 1), bench.new_token(SHAPE, 1)
    side = bench.CacheSide([cache], bench.dataclasses.replace(SHAPE, layers=1), 1)
    keys, values = (
        np.concatenate([x[:, :, :64], np.moveaxis(new, 1, 2)], axis=2).repeat(2, axis=1)
        for x, new in ((np.array(cache.keys), k), (np.array(cache.values), v))
    )
    with quick_compile():
        side()
    scores = np.einsum("bhd,bhsd->bhs", q[:, 0], keys) * 8**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(side.first_output[0, :, 0], expected, atol=1e-5)
