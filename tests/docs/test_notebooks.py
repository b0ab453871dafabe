"""Every notebook in colab/ runs from its first to its last cell, at the smallest size."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_runs

from jaxllm.cli.plan_worker import answer
from jaxllm.planning import plan

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def read(path):
    book = json.loads(path.read_text())
    return book, [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    book, cells = read(path)
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(cells)
    address = f"https://colab.research.google.com/github/jaxllm/jaxllm/blob/main/colab/{path.name}"
    assert cells[0][0] == "markdown" and cells[0][1].startswith("# ") and address in cells[0][1]
    assert cells[1][0] == "code" and "pip" in cells[1][1] and "JAXLLM_TINY" in cells[1][1]
    assert address in (ROOT / "README.md").read_text()
    for cell in book["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == (
            [],
            None,
        )
    text = "\n".join(source for kind, source in cells if kind == "markdown")
    for named in re.findall(r"`((?:tests|train|configs|docs)/[\w./]*)`", text):
        assert (ROOT / named).exists(), named


def run(name, folder, monkeypatch):
    """Executes the code cells in one namespace, as a kernel would, and returns it."""
    monkeypatch.setenv("JAXLLM_TINY", "1")
    monkeypatch.chdir(folder)
    space = {"__name__": "__main__"}
    _, cells = read(ROOT / "colab" / f"{name}.ipynb")
    with tiny_runs.small_programs():
        for number, (kind, source) in enumerate(cells):
            if kind == "code":
                exec(compile(source, f"{name}.ipynb cell {number}", "exec"), space)
    plt.close("all")
    return space


def test_every_notebook_is_run():
    source = Path(__file__).read_text()
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert f'run("{path.stem}"' in source, path.name


def test_dnd(tmp_path, monkeypatch):
    space = run("dnd", tmp_path, monkeypatch)
    assert space["drawn"].shape == (20, 16, 2) and np.isfinite(space["images"]).all()
    for name in ("reconstructions.png", "samples.png", "depths.png"):
        assert (tmp_path / "runs/dnd" / name).stat().st_size > 1000


def test_headkv(tmp_path, monkeypatch):
    space = run("headkv", tmp_path, monkeypatch)
    assert space["scores"].shape == (2, 8) and (space["scores"] > 0).any()
    assert space["sizes"]["HeadKV"] < space["sizes"]["full"]
    assert space["completion"].ids == space["written"]["full"].ids


def test_preference(tmp_path, monkeypatch):
    space = run("preference", tmp_path, monkeypatch)
    target, learnt = space["target"], space["learnt"]
    far = {name: np.abs(np.asarray(p) - target).sum(1).mean() for name, p in learnt.items()}
    assert far["GDPO"] < 0.05 < far["DPO"]  # In total variation, doubled.
    loss, margins = (space["curve"](name) for name in ("loss", "rewards/margins"))
    assert loss[1, 0] == pytest.approx(np.log(2), abs=1e-6) and margins[1, -1] > 0.01
    before, after = (space["written"][name] for name in ("before", "after"))
    assert len(before) == len(after) == 4 and before != after


def test_tpu_planning(tmp_path, monkeypatch):
    # The command has a process of its own for every plan; that it works is seen elsewhere.
    monkeypatch.setattr(plan, "ask", lambda module, request, topology: answer(request))
    space = run("tpu_planning", tmp_path, monkeypatch)
    assert space["found"]["fsdp 8"]["checks"] == {"gathers": "holds", "logits": "holds"}
    full, small = (space["decode"][name]["cache GiB a chip"] for name in ("full", "HeadKV"))
    assert 0 < small < full / 4
    assert "train/lm.py runs/plan/model.py" in (tmp_path / "runs/plan/launch/gcloud.sh").read_text()
