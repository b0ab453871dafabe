"""The preference benchmark compares losses before it times."""

import importlib.util
import math

import pytest
from tiny_runs import quick_compile

from jaxllm.models.bench_shapes import llama_shape
from jaxllm.preference import bench


def test_all_sides_train_alike():
    pytest.importorskip("transformers")
    with quick_compile():
        found = bench.bench_preference(
            repeats=2,
            batches=[3],
            threads=1,
            config=llama_shape(16, 1, 2, 24, 40),
            length=12,
            memory_tokens=16384,
        )
    sides = [row["side"] for row in found["dpo"]]
    others = [bench.TORCH, bench.TRL][: 1 + (importlib.util.find_spec("trl") is not None)]
    assert sides[0] == "jaxllm" and sides[3:] == others
    assert found["dpo"][0]["jaxllm is faster by"] == 1
    errors = found["largest difference of the first 3 losses"]
    assert set(errors) == set(sides[1:]) and max(errors.values()) < 1e-6
    chunked, full = found["log-probs and their gradient"]
    # At least one float32 array of all logits.
    assert full["temporary MB"] >= 16384 * 40 * 4 / 1e6
    of_all = chunked["temporary MB"] / full["temporary MB"]
    assert chunked["of all at once"] == pytest.approx(of_all, rel=1e-12)
    assert of_all < 1


def test_the_steps_move_the_policy_away_from_ln_2():
    pairs = bench.random_pairs(2, 8, 40)
    with quick_compile():
        params, _ = bench.decoder(llama_shape(16, 1, 2, 24, 40)).init(bench.jax.random.key(0))
        step = bench.our_step(llama_shape(16, 1, 2, 24, 40), params, pairs)
        for _ in range(3):
            step()
    assert step.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert step.losses[0] > step.losses[1] > step.losses[2]


def test_pairs_fill_the_length_and_differ_in_it():
    pairs = bench.random_pairs(8, 32, 100)
    sizes = [len(ids) for pair in pairs for ids in pair.completion_ids]
    assert all(len(pair.prompt_ids) == 16 for pair in pairs)
    assert max(sizes) == sizes[0] == 16 and min(sizes) >= 8 and len(set(sizes)) > 2
    assert bench.rows_of(pairs, "padded").config.row_length == 31
