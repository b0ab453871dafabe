"""Completions sampled by two processes, each its half, train as those of one process do."""

from collections import Counter
from pathlib import Path

import on_policy_runs
import pytest
import tiny_runs
from tiny_preference import go, write_folder, write_rows

from jaxllm.data.records import read_jsonl
from jaxllm.preference.job import preference_job
from jaxllm.training.log import read_metrics

SCRIPT = Path(on_policy_runs.__file__)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, nursery):
    """Base folder, and what the two processes printed."""
    base = tmp_path_factory.mktemp("on_policy")
    write_folder(base)
    write_rows(base / "prompts.jsonl", [{"prompt": f"{n}?"} for n in range(10)])
    children = nursery.start_together(
        2,
        SCRIPT,
        base,
        base / "two",
        logs=base / "two",
        environment=lambda number: {"JUDGED": base / f"judged{number}"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGED", str(base / "judged"))
        every_step, once = on_policy_runs.runs(base)
        go(every_step, base / "one" / "grpo", devices=2)
        with tiny_runs.quick_compile():
            preference_job(once, base / "one" / "dpo")
    codes = [child.wait(240) for child in children]
    assert codes == [0, 0], [child.log.read_text() for child in children]
    return base, [child.printed for child in children]


def test_two_processes_give_the_numbers_of_one(trained):
    one, two = (read_metrics(trained[0] / count / "grpo/metrics.jsonl") for count in ("one", "two"))
    assert len(one) == len(two) >= 2
    for row, wanted in zip(two, one, strict=True):
        row, wanted = ({k: v for k, v in r.items() if "per_second" not in k} for r in (row, wanted))
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_what_is_sampled_does_not_depend_on_the_processes(trained):
    for path in ("grpo/samples/step0000003.jsonl", "dpo/samples.jsonl"):
        one, two = (read_jsonl(trained[0] / count / path) for count in ("one", "two"))
        assert one == two and len(one) >= 2


def test_each_process_judges_its_half(trained):
    base = trained[0]
    first, second, one = (
        Counter((base / name).read_text().split()) for name in ("judged0", "judged1", "judged")
    )
    assert first.total() == second.total() == one.total() / 2
    assert first + second == one


def test_the_first_process_alone_speaks(trained):
    first, second = trained[1]
    assert "sampling 4 completions of 10 prompts" in first and second == ""
