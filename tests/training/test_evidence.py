"""What pages of evidence share: three files, the command, kept parts, checks of a run."""

import json
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import pytest

from jaxllm.errors import InputError
from jaxllm.training.evidence import EvidencePage, check_curve, check_interval, check_names


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Run:
    seeds: tuple[int, ...] = (0, 1)
    test_rows: int = 3
    inner: Inner = Inner()


def draw(result):
    return plt.figure() if result["config"]["test_rows"] == 3 else None


PAGE = EvidencePage("tiny", lambda result: f"{result['command']} on {result['device']}\n", draw)


def test_a_page_names_what_differs_from_the_defaults(tmp_path):
    open_before = plt.get_fignums()
    PAGE.write(PAGE.begin(Run()), tmp_path / "drawn")
    assert plt.get_fignums() == open_before
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "tiny.json",
        "tiny.md",
        "tiny.png",
    }
    changed = Run(seeds=(4, 5), test_rows=9, inner=Inner(0.25))
    command = "make evidence NAME=tiny EVIDENCE_ARGS='--seeds 4 5 --test-rows 9 --inner.rate 0.25'"
    PAGE.write(PAGE.begin(changed), tmp_path)
    assert (tmp_path / "tiny.md").read_text() == f"{command} on cpu\n"
    assert not (tmp_path / "tiny.png").exists()
    stored = json.loads((tmp_path / "tiny.json").read_text())
    assert PAGE.kept(tmp_path) == stored and stored["config"]["inner"] == {"rate": 0.25}
    assert PAGE.kept(tmp_path / "other") == {}
    assert PAGE.command(Run()) == "make evidence NAME=tiny"


def test_parts_of_other_settings_are_not_kept(tmp_path):
    before, now = (PAGE.begin(run)["config"] for run in (Run(), replace(Run(), inner=Inner(1.0))))
    PAGE.check_kept(tmp_path, before, before)
    with pytest.raises(InputError, match=r"config\.inner\.rate 0\.5, this run has 1\.0; .* all of"):
        PAGE.check_kept(tmp_path, before, now)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_interval((0,)), r"seeds \(0,\): an interval needs two seeds$"),
        (lambda: check_interval((0, 1), topics=1), "topics 1: .* two seeds and two topics"),
        (lambda: check_names("parts", ("a", "c"), ("a", "b")), "parts: 'c' is not one of a, b$"),
        (lambda: check_names("parts", ("c",), ("a",), {"c": "is slow"}), "of a: it is slow"),
        (lambda: check_curve(0, steps=4), "steps 4 are no multiples of every 0"),
        (lambda: check_curve(4, "x.", a=8, b=6), r"x\.a 8 and x\.b 6 are .* of x\.every 4"),
    ],
)
def test_bad_sizes_are_refused(check, message):
    check_interval((0, 1), topics=2)
    check_names("parts", ("b", "a"), ("a", "b"))
    check_curve(4, a=8, b=4)
    with pytest.raises(InputError, match=message):
        check()
