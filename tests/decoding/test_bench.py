"""The decoding benchmark compares before it times, and reports every side."""

import numpy as np
import pytest
from tiny_runs import quick_compile

from jaxllm.decoding import bench
from jaxllm.errors import InputError
from jaxllm.models.bench_shapes import llama_shape

TINY = {"tiny": llama_shape(16, 1, 2, 24, 40)}


def run(**options):
    with quick_compile():
        return bench.bench_decode(
            repeats=2, batches=[2], threads=1, shapes=TINY, prompt=5, new_tokens=3, **options
        )


def test_both_sides_draw_the_same_tokens():
    pytest.importorskip("transformers")
    found = run(compiled_torch=False)
    ours, plain, theirs = found["decoding"]
    sides = ("jaxllm", "plain jax", "torch eager")
    assert (ours["side"], plain["side"], theirs["side"]) == sides
    assert ours["decode: jaxllm is faster by"] == 1
    assert theirs["decode: jaxllm is faster by"] > 0
    agree = {"tiny batch 2 plain jax": 1.0, "tiny batch 2 torch eager": 1.0}
    assert found["share of tokens before the first that differs from ours"] == agree
    assert found["largest logit difference to transformers"]["tiny"] < 1e-5
    assert found["traces of the decode loop per batch size"] == {"tiny": 1}


def test_a_model_that_differs_is_not_timed(monkeypatch):
    torch_side = pytest.importorskip("jaxllm.hub.bench_torch")
    exact = torch_side.prompt_logits
    monkeypatch.setattr(
        torch_side, "prompt_logits", lambda model, ids: exact(model, ids) + np.float32(0.01)
    )
    with pytest.raises(InputError, match="logits differ from transformers by 1.0e-02"):
        run()


def test_without_torch_our_side_is_timed_alone(monkeypatch):
    monkeypatch.setattr(bench, "_torch_model", lambda *args: None)
    found = run()
    assert [row["side"] for row in found["decoding"]] == ["jaxllm", "plain jax"]
    assert found["largest logit difference to transformers"] is None
