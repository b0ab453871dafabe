"""The command, its refusals in one line, and the search for what fits."""

import json

import pytest

from jaxllm.cli.main import main
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.planning import plan, worker
from jaxllm.planning.plan import (
    Knobs,
    Request,
    candidates,
    search,
    smallest_that_holds,
    what_fits,
)
from jaxllm.planning.roofline import roofline
from jaxllm.planning.topologies import GIB, find_topology

TOPOLOGY = find_topology("v5e:4x4")
CONFIG = """
from jaxllm.data.text import TextDataConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.training.language_model import LanguageModelRun


def get_config():
    return LanguageModelRun(
        model=DecoderConfig(2048, 128, 2, AttentionConfig(4, 2, 64), MlpConfig(256), remat="full"),
        data=TextDataConfig(file="missing.txt", row_length=512, batch_size=8),
        mesh=MeshConfig(1, -1, 2),
    )
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "small.py"
    path.write_text(CONFIG)
    return str(path)


def figures(fits, peak, **changes):
    plain = {
        "program": "training step",
        "mesh": {"data": 16, "fsdp": 1, "tensor": 1},
        "parts": {"parameters": 8.0 * GIB, "optimizer": 16.0 * GIB},
        "memory": {"fits": fits, "peak": peak * GIB, "limit": 15.75 * GIB},
        "flops": {"products": 197e12, "kernels": 0.0},
        "memory_bytes": 819e9 / 2,
        "collectives": [{"seconds": 0.25}],
        "model_flops": 0.75 * 16 * 197e12,
        "tokens": 100,
    }
    return plain | changes


def test_the_roofline_of_one_second():
    bounds = roofline(figures(True, 10.0), TOPOLOGY)
    assert (bounds.compute, bounds.memory, bounds.links) == pytest.approx((1.0, 0.5, 0.25))
    assert (bounds.best, bounds.worst, bounds.bound) == pytest.approx((1.0, 1.75, "compute"))
    assert bounds.mfu == pytest.approx(0.75) and bounds.compute_share == pytest.approx(0.75)
    assert roofline(figures(True, 1.0), find_topology("cpu:8")) is None


def test_what_is_tried_shards_first_and_keeps_the_batch_whole():
    tried = [" ".join(c) for c in candidates(Knobs(32, MeshConfig(), 1, "none"), TOPOLOGY)]
    assert tried[0] == "--mesh.data 1 --mesh.fsdp 16"
    assert tried[1] == "--mesh.data 1 --mesh.fsdp 16 --model.remat full"
    assert tried[2].endswith("--optimizer.accumulate 2")  # 32 rows: one a chip from here on
    assert not any("accumulate 4" in changes for changes in tried)
    assert tried[3].startswith("--mesh.data 1 --mesh.fsdp 8 --mesh.tensor 2")
    assert len(set(tried)) == len(tried)


def test_the_first_that_fits_is_named(monkeypatch):
    asked = []

    def ask(module, request, topology):
        asked.append(request["overrides"])
        fits = "full" in request["overrides"]
        return figures(fits, 12.0 if fits else 24.5, parts={"optimizer": 8.0 * GIB})

    monkeypatch.setattr(plan, "ask", ask)
    request, knobs = Request("worker", "c.py", ("--loop.seed", "1")), Knobs(32, MeshConfig(), 1, "")
    small = {"parts": {"parameters": 4.0 * GIB, "optimizer": 8.0 * GIB}}
    changes, found = what_fits(request, TOPOLOGY, knobs, figures(False, 24.5, **small))
    assert changes[-2:] == ("--model.remat", "full") and found["memory"]["peak"] == 12 * GIB
    assert asked[0][:2] == ["--loop.seed", "1"] and len(asked) == 2
    line = plan.too_large(figures(False, 24.5), TOPOLOGY)
    assert "24.50 GiB a chip of 15.75, 8.75 too much (optimizer 16.00, parameters 8.00)" in line
    rows = search(request, TOPOLOGY, knobs, request.ask(TOPOLOGY))
    assert [row["fits"] for row in rows[:3]] == ["no", "no", "yes"]
    assert rows[2]["GiB per chip"] == 12 and rows[2]["bound by"] == "compute"


def test_micro_batches_that_cannot_be_enough_are_not_compiled(monkeypatch):
    """12 GiB are held and 12.5 shrink with the rows, of 15.75: four parts may do, two cannot."""
    asked = []

    def ask(module, request, topology):
        asked.append(request["overrides"])
        return figures(len(asked) == 2, 15.0, **held)

    held = {"parts": {"parameters": 4.0 * GIB, "optimizer": 8.0 * GIB}}
    monkeypatch.setattr(plan, "ask", ask)
    request = Request("worker", "c.py", ())
    knobs = Knobs(128, MeshConfig(1, 16), 1, "full")
    changes, _ = what_fits(request, TOPOLOGY, knobs, figures(False, 24.5, **held))
    assert [words[-1] for words in asked] == ["4", "8"] and changes[-1] == "8"
    assert what_fits(request, TOPOLOGY, knobs, figures(False, 24.5, **held), limit=1) is None


def test_a_state_that_is_too_large_names_the_slice_that_holds_it():
    """24 GiB on each of 16 chips, divided over all of them already, are 384."""
    divided = figures(False, 24.0, mesh={"data": 1, "fsdp": 8, "tensor": 2})
    assert smallest_that_holds(divided, TOPOLOGY) == "v5e:4x8"
    assert smallest_that_holds(figures(False, 24.0), TOPOLOGY) is None  # Each holds all of it.
    assert smallest_that_holds(divided, find_topology("cpu:8")) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5e:4x5"], "near it: v5e:4x8, v5e:4x4"),
        (["--topology", "cpu:8", "--mesh.data", "4", "--mesh.fsdp", "4"], "does not fit 8 devices"),
        (["--topology", "cpu:8", "--model.layer", "4"], "layers"),
        (["--topology", "v5e:2x2"], "pip install 'jaxllm[tpu]'"),
    ],
)
def test_bad_input_is_one_line(config, arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(worker, "has_libtpu", lambda: False)
    assert main(["plan", config, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_plan_on_eight_cpu_devices(config, tmp_path, capsys):
    """The child process has as many devices as are asked for, whatever this one has."""
    picture = tmp_path / "plan.png"
    arguments = ["--topology", "cpu:4", "--json", "--picture", str(picture)]
    assert main(["plan", config, *arguments, "--model.layers", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2} and found["fits"]
    layer = 128 * 64 * (2 * 4 + 2 * 2) + 3 * 128 * 256
    forward = 8 * 512 * (2 * (3 * layer + 128 * 2048) + 3 * 2 * 512 * 4 * 64)
    assert found["TFLOP per chip"]["by formula"] == pytest.approx(3 * forward / 4e12)
    assert {row["part"] for row in found["memory"]} >= {"parameters", "optimizer", "temporaries"}
    assert picture.stat().st_size > 1000
    # What the process refuses comes back as one line.
    assert main(["plan", config, "--topology", "cpu:4", "--data.batch-size", "7"]) == 2
    assert "batch size 7 does not divide over data x fsdp = 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_on_four_tpu_chips(config, capsys):
    """The kernel is there, the loss never leaves its tokens, and nothing gathers two layers."""
    pytest.importorskip("libtpu")
    assert main(["plan", config, "--topology", "v5e:2x2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in found["attention"]
    assert 0 < found["peak GiB per chip"] < found["HBM GiB per chip"]
    assert found["largest all-gather MiB"] <= found["largest layer MiB"]
    # A chip has 2,048 tokens and half of 2,048 ids: logits of 1,024 tokens are the largest array.
    assert found["largest array MiB"] == 1024 * 1024 * 4 / 1024**2, found["largest array"]
    assert found["step seconds"]["best"] > 0 and 0 < found["MFU at best"] < 1
    products = found["TFLOP per chip"]
    executed = products["compiled products"] + products["kernels"]
    assert products["by formula"] < executed < 1.5 * products["by formula"]
    assert {row["axes"] for row in found["collectives"]} >= {"fsdp", "tensor"}
