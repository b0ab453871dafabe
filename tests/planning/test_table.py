"""The page of plans: its table is that of the results beside it, and its commands are those."""

import json
from pathlib import Path

import pytest

from jaxllm.errors import InputError
from jaxllm.planning.table import BEGIN, END, commands, seconds, with_table
from jaxllm.planning.topologies import find_topology
from jaxllm.training.run_folder import load_config

DOCS = Path(__file__).parents[2] / "docs"
ONE = {
    "command": "jaxllm plan configs/a/b.py --topology v5e:2x2 --decode 4096 --kv k:budget=8",
    "config": "configs/a/b.py",
    "topology": "v5e:2x2",
    "chips": 4,
    "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
    "peak GiB per chip": 3.25,
    "HBM GiB per chip": 16.0,
    "step seconds": {"best": 0.0123, "worst": 1.5},
    "bound by": "memory",
    "attention": "plain XLA",
    "collectives": [],
    "checks": {"gathers": "holds", "kernel": "plain XLA"},
    "compile seconds": 12.4,
}


def test_a_row_by_hand():
    page = with_table(f"top\n{BEGIN}\nold\n{END}\nbottom\n", [ONE, {**ONE, "only memory": "why"}])
    lines = page.splitlines()
    assert (lines[0], lines[-1]) == ("top", "bottom") and "old" not in page
    assert lines[4] == (
        "| b, decode step, 1 x 4,096 held, cache `k:budget=8` | v5e:2x2 (4) | 1 x 4 x 1 "
        "| 3.25 of 16 | 12.3 ms to 1.50 s | memory | - | - | XLA | not kernel | 12 |"
    )
    assert "* b, decode step, 1 x 4,096 held, cache `k:budget=8`, kernel: plain XLA" in lines
    assert lines[5].count("|") == lines[2].count("|") and seconds(0.00012) == "0.12 ms"
    with pytest.raises(InputError, match="one"):
        commands("no table")


def test_the_committed_page_is_made_of_the_committed_results():
    page, results = (DOCS / "tpu.md").read_text(), json.loads((DOCS / "tpu_plans.json").read_text())
    assert with_table(page, results) == page
    assert [one["command"] for one in results] == commands(page)
    for one in results:
        assert find_topology(one["topology"]).chips == one["chips"]
        assert load_config(DOCS.parent / one["config"]) is not None
