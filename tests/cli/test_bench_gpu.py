"""The GPU benchmark on a CPU with tiny shapes: the same code, another device and other peaks."""

import functools
import pickle

import numpy as np
import pytest
from tiny_runs import quick_compile

from jaxllm.cli import bench_gpu
from jaxllm.cli.main import main
from jaxllm.errors import InputError
from jaxllm.evals.apart import SideFailed
from jaxllm.images.bench import random_params
from jaxllm.kvcompress.bench_gpu import our_side
from jaxllm.models.bench_shapes import DND_XL, LLAMA_1B, llama_shape
from jaxllm.models.code_model import code_model
from jaxllm.models.decoder import decoder
from jaxllm.models.dnd import DnDConfig
from jaxllm.planning.cards import Card
from jaxllm.training import bench_gpu as training
from jaxllm.training.bench_gpu import COMPILED, LARGEST_ERROR, Found, Timed, Trained, bench_steps

CARD = Card("a card", 1e12, 1e11)
CODES = DnDConfig(
    codebook_size=11, grid=(2, 3), depth=2, num_classes=3, layers=2, heads=2, dim=16,
    head_layers=(0, 1), class_dropout=0.0, dropout=0.0,
)  # fmt: skip
TEXT = llama_shape(16, 2, 4, 24, 40, kv_heads=2)


def here(function, *args, environment):
    """Runs a side in this process, where a compiler of C++ is not to be waited for."""
    if getattr(function, "args", ())[-1:] == (True,):
        raise SideFailed("no compiler")
    return function(*args)


def test_both_models_train_as_in_torch(monkeypatch):
    pytest.importorskip("transformers")
    # The losses of this one are compared in tests/training; compiling it once is enough.
    asked = []

    def our_step(config, params, ids, loss_fn, dtype):
        asked.append(dtype)
        return torch_step(llama_model(config, params, 1), ids)

    llama_model = pytest.importorskip("jaxllm.hub.bench_torch").llama_model
    torch_step = pytest.importorskip("jaxllm.training.bench_torch").TorchStep
    monkeypatch.setattr(training, "our_step", our_step)
    monkeypatch.setattr(training, "fresh_params", functools.cache(training.fresh_params))
    with quick_compile():
        found = bench_gpu.train(
            CARD, 2, [2], 1, ["dnd", "llama"],
            code_config=CODES, text_config=TEXT, length=6, device="cpu",
            precision="float32", run=here,
        )  # fmt: skip
    assert asked == [np.float32]
    names = ["DnD-XL, 2 x 6", "Llama 1.1B, 2 x 6"]
    sides = [(name, side) for name in names for side in ("jaxllm", "torch eager")]
    assert [(row["model"], row["side"]) for row in found.rows] == sides
    assert set(found.errors) == {f"{name} torch eager" for name in names}
    assert max(found.errors.values()) < 1e-5
    assert found.left_out == [
        {"what": name, "side": COMPILED, "reason": "no compiler"} for name in names
    ]
    # 3 passes x 12 tokens x (2 x weights + 2 x T N H a layer).
    weights = 2 * (16 * 4 * (2 * 4 + 2 * 2) + 3 * 16 * 24) + 16 * 40
    row = found.rows[2]
    flops = 3 * 12 * (2 * weights + 2 * 2 * 6 * 16)
    assert row["MFU"] == pytest.approx(flops / (row["ms per step"] / 1e3 * 1e12))
    assert row["positions/s"] == pytest.approx(12e3 / row["ms per step"])


def test_half_precision_keeps_float32_parameters():
    torch = pytest.importorskip("torch")
    from jaxllm.images.bench_train_torch import CodeLoss
    from jaxllm.training.bench_torch import TorchUpdates

    batch = [torch.arange(24).reshape(2, 6, 2) % 11, torch.arange(2)]
    losses, params = [], random_params(CODES)
    for half in (False, True):
        step = TorchUpdates(CodeLoss(params, CODES), batch, half=half)
        for _ in range(3):
            step()
        losses.append(step.losses)
        assert {p.dtype for p in step.module.parameters()} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], abs=LARGEST_ERROR)
    assert losses[0] != losses[1]


def fake(side_seconds, losses=(3.0, 2.0, 1.0)):
    phases = [{"step": side_seconds}] * 3
    return lambda *options: Timed(list(losses), phases, side_seconds + 5)


def steps(ours, theirs, name="Llama"):
    return bench_steps([Trained(name, ours, theirs, 100, 4e11)], CARD, 3, call)


def call(function, *args, environment):
    return function(*args)


def test_utilisation_ratios_and_goals():
    found = steps(fake(0.5), fake(0.6))
    ours, eager, compiled = found.rows
    assert ours["MFU"] == pytest.approx(0.8) and ours["compile s"] == pytest.approx(5)
    assert compiled["jaxllm is faster by"] == eager["jaxllm is faster by"] == pytest.approx(1.2)
    result = bench_gpu.report(CARD, 3, found, Found([], {}, []))
    assert [(g["found"], g["met"]) for g in result["goals"][:2]] == [
        (pytest.approx(0.8), True),
        (pytest.approx(1.2), True),
    ]
    slower = bench_gpu.training_goals(steps(fake(1.0), fake(0.5)).rows)
    assert [g["met"] for g in slower] == [False, False]
    assert [g["met"] for g in bench_gpu.training_goals([])] == [None, None]


def test_sides_that_differ_or_fail():
    with pytest.raises(InputError, match="torch eager: losses .* not timed"):
        steps(fake(1.0), fake(1.0, (3.0, 2.0, 1.2)))

    def full(*options):
        raise SideFailed("RESOURCE_EXHAUSTED: Out of memory")

    def broken(*options):
        raise SideFailed("TypeError: a bug")

    left = steps(full, fake(1.0))
    assert left.rows == [] and left.left_out[0]["reason"].startswith("RESOURCE_EXHAUSTED")
    assert [row["side"] for row in steps(fake(1.0), broken).rows] == ["jaxllm"]
    with pytest.raises(SideFailed, match="a bug"):
        steps(broken, fake(1.0))


def test_sizes_of_the_models():
    assert decoder(LLAMA_1B).parameter_count == 1_100_048_384
    assert 0.7e9 < code_model(DND_XL).parameter_count < 0.9e9


def test_without_a_gpu_there_is_one_line(capsys, tmp_path):
    page = tmp_path / "page.md"
    assert main(["bench", "gpu", "--output", str(page)]) == 2
    assert capsys.readouterr().err == (
        "error: bench gpu needs an NVIDIA GPU; JAX sees only cpu "
        '(extra: pip install "jaxllm[gpu]")\n'
    )
    assert not page.exists()
    assert main(["bench", "dnd", "--peak-tflops", "3"]) == 2
    assert "--peak-tflops is not an option of bench dnd" in capsys.readouterr().err


def test_the_command_reaches_the_parts(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_gpu, "gpu_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(bench_gpu, "bench_steps", lambda models, *rest: asked.extend(models))
    monkeypatch.setattr(bench_gpu, "report", lambda *args: {"asked": len(asked)})
    decoded = []
    monkeypatch.setattr(bench_gpu, "bench_decoding", lambda *args, **options: decoded.append(args))
    assert bench_gpu.bench_gpu(repeats=1, batches=[], threads=1) == {"asked": 2}
    assert [model.name for model in asked] == ["DnD-XL, 64 x 256", "Llama 1.1B, 8 x 2048"]
    ((setting, card),) = decoded
    assert len(setting.points) == 12 and (128, 32768) in setting.points
    assert card.name == "NVIDIA L4"
    sides = [part for model in asked for part in (model.ours, model.theirs)]
    for side in (*sides, functools.partial(our_side, setting, "full")):  # As a process gets it.
        assert pickle.loads(pickle.dumps(side)).args == side.args
    assert main(["bench", "gpu", "--parts", "llama", "--batch", "2", "4"]) == 0
    assert [model.name for model in asked[2:]] == ["Llama 1.1B, 2 x 2048", "Llama 1.1B, 4 x 2048"]
    assert len(decoded) == 1
