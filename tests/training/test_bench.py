"""The training benchmark compares losses before it times."""

from types import SimpleNamespace

import pytest
from tiny_runs import quick_compile

from jaxllm.errors import InputError
from jaxllm.models.bench_shapes import llama_shape
from jaxllm.training import bench


def test_all_sides_train_alike():
    pytest.importorskip("transformers")
    with quick_compile():
        found = bench.bench_train(
            repeats=2,
            batches=[2],
            threads=1,
            config=llama_shape(16, 1, 2, 24, 40),
            length=6,
            compiled_torch=False,
        )
    sides = [row["side"] for row in found["training"]]
    assert sides == ["jaxllm", "jaxllm, all logits at once", "torch eager"]
    assert found["training"][0]["jaxllm is faster by"] == 1
    errors = found["largest difference of the first 3 losses"]
    assert set(errors) == set(sides[1:]) and max(errors.values()) < 1e-5


def test_a_side_that_trains_otherwise_is_not_timed():
    sides = {
        "jaxllm": SimpleNamespace(losses=[3.0, 2.0]),
        "near": SimpleNamespace(losses=[3.0, 2.0005]),
    }
    assert bench.compare_losses(sides) == {"near": pytest.approx(5e-4)}
    sides["far"] = SimpleNamespace(losses=[3.0, float("nan")])
    with pytest.raises(InputError, match="far: losses .* differ from .*; not timed"):
        bench.compare_losses(sides)
