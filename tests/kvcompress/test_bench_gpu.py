"""Decoding against the memory's bandwidth: sides agree, bytes are counted, points are left out."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny_runs import quick_compile

from jaxllm.decoding.text import CHUNK
from jaxllm.errors import InputError
from jaxllm.evals.apart import SideFailed
from jaxllm.kvcompress import bench_gpu
from jaxllm.models.bench_shapes import llama_shape
from jaxllm.planning.cards import Card
from jaxllm.training.bench_gpu import COMPILED

CARD = Card("a card", 1e12, 1e11)
TEXT = llama_shape(16, 1, 4, 24, 40, kv_heads=1)
SETTING = bench_gpu.DecodeSetting(TEXT, ((2, 32),), 2, "float32", budget=12, checked_prompt=32)


CHUNKED = dataclasses.replace(SETTING, prefill_tokens=32)


FRESH = functools.cache(bench_gpu.fresh_params)


@pytest.fixture(autouse=True)
def _made_once(monkeypatch):
    monkeypatch.setattr(bench_gpu, "fresh_params", FRESH)


def here(function, *args, environment):
    """Runs a side in this process; PyTorch without its compiler, which wants one for C++.

    Of full caches only the comparison runs: how they are timed does not differ from HeadKV.
    """
    if function.args[1] == "full":
        decoded = bench_gpu.our_side(dataclasses.replace(SETTING, points=()), "full")
        return dataclasses.replace(decoded, rates=[bench_gpu.Rates((0.1, 0.3), CHUNK)])
    if function.func is bench_gpu.their_side:
        return bench_gpu.their_side(CHUNKED, *function.args[1:-1], False)
    return function(*args)


def test_three_sides_agree_and_are_timed():
    pytest.importorskip("transformers")
    with quick_compile():
        found = bench_gpu.bench_decoding(SETTING, CARD, "cpu", 1, here)
    full, headkv, torch = found.rows
    assert [r["side"] for r in found.rows] == ["jaxllm, full", "jaxllm, headkv", COMPILED]
    assert max(found.errors.values()) < 1e-5 and len(found.errors) == 2
    assert found.left_out == []
    assert full["times jaxllm, full"] == torch["times torch compiled"] == 1
    assert headkv["GB per token of all rows"] < full["GB per token of all rows"]
    # All weights but the embedding table; a row's 32 prompt tokens, those of the first run, which
    # is not timed, and half of those of two more runs; keys and values of a head of 4 dims.
    weights = 16 * 4 * (2 * 4 + 2 * 1) + 3 * 16 * 24 + 3 * 16 + 16 * 40
    entries = 32 + CHUNK + (2 * CHUNK + 1) / 2
    moved = 4 * (weights + 2 * entries * 2 * 4)
    assert full["GB per token of all rows"] == pytest.approx(moved / 1e9)
    assert full["tokens/s"] == pytest.approx(2 * CHUNK / 0.2)
    assert full["share of bandwidth"] == pytest.approx(moved / (0.2 / CHUNK) / 1e11)


def test_bytes_of_a_plan():
    shape = llama_shape(16, 3, 4, 24, 40, kv_heads=2)
    setting = bench_gpu.DecodeSetting(shape, (), 5, budget=12)
    kept = bench_gpu.headkv(setting, 64).capacities.sum()
    # Of each of 6 heads the window of 8 and half of a run of 24, in bfloat16 of 4 dims.
    entries = kept + 6 * (8 + 12.5)
    assert bench_gpu.cache_bytes(setting, "headkv", 64, 24) == 2 * entries * 4 * 2
    everything = dataclasses.replace(setting, budget=64)
    found = bench_gpu.cache_bytes(everything, "headkv", 64, 24)
    assert found <= 2 * 6 * (64 + 12.5) * 4 * 2  # No more than the prompt has.


def fakes(**changes):
    def run(function, *args, environment):
        side = "torch" if function.func is bench_gpu.their_side else function.args[1]
        rates, logits = changes.get(side, (bench_gpu.Rates((0.5, 1.0, 2.0), 24), 1.0))
        if isinstance(rates, Exception):
            raise rates
        return bench_gpu.Decoded([rates], np.full((1, 2, 3), logits))

    return bench_gpu.bench_decoding(SETTING, CARD, run=run)


def test_points_and_sides_without_memory_are_listed():
    found = fakes(
        full=(bench_gpu.Rates((), 0, "needs 90.0 GiB"), 1.0), torch=(SideFailed("no CUDA"), 0.0)
    )
    (row,) = found.rows
    assert row["side"] == "jaxllm, headkv" and row["tokens/s"] == pytest.approx(2 / (1 / 24))
    assert row["times torch compiled"] is row["times jaxllm, full"] is None
    what = "decode, batch 2, prompt 32"
    assert found.left_out == [
        {"what": "decode", "side": COMPILED, "reason": "no CUDA"},
        {"what": what, "side": "jaxllm, full", "reason": "needs 90.0 GiB"},
    ]


def test_sides_that_differ_are_refused():
    rates = bench_gpu.Rates((1.0,), 24)
    assert fakes(torch=(rates, 1.04)).errors[f"decode {COMPILED}"] == pytest.approx(0.04)
    with pytest.raises(InputError, match="torch compiled: logits differ from .* by 6.0%"):
        fakes(torch=(rates, 1.06))
    with pytest.raises(SideFailed, match="a bug"):
        fakes(headkv=(SideFailed("a bug"), 0.0))


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(bench_gpu, "memory_limit", lambda: 1000)
    monkeypatch.setattr(bench_gpu, "_forced", lambda *args: np.zeros((1, 1, 1)))
    (rates,) = bench_gpu.our_side(SETTING, "full").rates
    assert rates.seconds == () and rates.reason.startswith("needs 0.0 GiB without activations")


def test_prompts_run_in_chunks_of_a_power_of_two():
    assert bench_gpu.DecodeSetting(TEXT, (), 1).chunk(1, 32768) == 32768
    assert bench_gpu.DecodeSetting(TEXT, (), 1).chunk(128, 8192) == 1024
    assert bench_gpu.DecodeSetting(TEXT, (), 1).chunk(24, 8192) == 4096
    assert CHUNKED.chunk(2, 32) == 16
