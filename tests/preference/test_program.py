"""What of a preference run is planned is what runs, and is known without records and weights."""

from dataclasses import replace

import jax
import pytest
from tiny_preference import MODEL, run_of, write_folder, write_rows

from jaxllm.errors import InputError
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.preference.config import (
    AutoReference,
    LexiconFeedback,
    OnPolicyData,
    PrecomputedReference,
)
from jaxllm.preference.distributional import GroupDistributionalPO
from jaxllm.preference.job import preference_job
from jaxllm.preference.listwise import PlackettLuceDPO
from jaxllm.preference.offline import open_files
from jaxllm.preference.pairwise import DPO
from jaxllm.preference.pairwise_tokens import LengthDesensitisedDPO
from jaxllm.preference.pointwise import BCO, KTO
from jaxllm.preference.policy import open_policy
from jaxllm.preference.program import planned_program
from jaxllm.preference.reference_free import SLiC
from jaxllm.training.loop import abstract_state

BELIEFS = [
    {
        "prompt": f"{word}:",
        "chosen": "1 <yes> it is",
        "rejected": "1 <yes> well",
        "belief": "1",
        "beliefs": ["0", "1", "2"],
        "probabilities": [0.25, 0.5, 0.25],
    }
    for word in ("sun", "rain", "fog", "ice")
]
PAIRS = [
    {"prompt": f"{word}:", "chosen": " good", "rejected": " bad"}
    for word in ("sun", "rain", "fog", "ice", "snow", "hail", "wind", "storm")
]
LISTS = [
    {"prompt": f"{word}:", "completions": [" a", " b", " c"], "scores": [0.0, 1.0, 2.0]}
    for word in ("sun", "rain", "fog", "ice")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("program"))
    write_rows(root / "pairs.jsonl", PAIRS)  # A margin would be an array more.
    write_rows(root / "beliefs.jsonl", BELIEFS)
    write_rows(root / "lists.jsonl", LISTS)
    write_rows(root / "targets.jsonl", [{**pair, "target": " fine"} for pair in PAIRS])
    labels = [{"prompt": f"{n}", "completion": "!", "label": n % 2} for n in range(8)]
    write_rows(root / "ratios.jsonl", [{**row, "density_ratio": 0.5} for row in labels])
    return root


def planned(run):
    """The plan of a run whose folder and file are not there."""
    model = replace(run.model, policy="missing", architecture=MODEL)
    return planned_program(replace(run, model=model, data=replace(run.data, file="missing")))[0]


def shapes(tree):
    return {name: (leaf.shape, leaf.dtype) for name, leaf in tree.items()}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (DPO(), {}),
        (DPO(), {"accumulate": 2, "data": {"layout": "packed", "rows": 8}}),
        (KTO(), {"data": {"layout": "shared_prompt", "unpair": True}}),
        (LengthDesensitisedDPO(), {"reference": PrecomputedReference()}),
        (GroupDistributionalPO(), {"data": {"file": "beliefs.jsonl", "max_beliefs": 3}}),
        (PlackettLuceDPO(), {"data": {"file": "lists.jsonl", "max_list": 3}}),
        (SLiC(regulariser="target"), {"data": {"file": "targets.jsonl"}}),
        (BCO(density_weights=True), {"data": {"file": "ratios.jsonl"}}),
    ],
    ids="padded packed mismatched precomputed beliefs lists targets ratios".split(),
)
def test_the_planned_batch_is_that_of_the_job(algorithm, options, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    data = dict(options.get("data", ()))
    if "file" in data:
        data["file"] = str(folder / data["file"])
    run = run_of(folder, algorithm, **{**options, "data": data})
    if any(part == "file" for part in data):
        run = replace(run, data=replace(run.data, batch_size=4))
    job, program = preference_job(run, tmp_path / "run"), planned(run)
    found, expected = shapes(program.batch), shapes(job.batches.batch(0))
    if "ref_token_logps" in expected:  # As long as the longest completion, at most the row.
        found.pop("ref_token_logps"), expected.pop("ref_token_logps")
    assert found == expected


def test_the_planned_step_is_that_of_the_job(folder, tmp_path):
    run = run_of(folder)
    job = preference_job(run, tmp_path / "run")
    # The job scores as many tokens of a row as its longest completion has, the plan as may be.
    longest = job.batches.source.completion_length
    program = planned(replace(run, data=replace(run.data, max_completion=longest)))

    def text(part, batch):
        state = jax.eval_shape(part.init, jax.random.key(0))
        return jax.jit(part.step).lower(state, batch, jax.random.key(0)).as_text()

    assert text(job, job.batches.batch(0)) == text(program, program.batch)


def test_a_reference_is_placed_as_the_policy(folder):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    wide = replace(MODEL, dim=1024, vocab_size=4096)  # Small arrays stay whole.
    run = run_of(folder, reference=AutoReference())
    model = replace(run.model, policy="missing", architecture=wide)
    state = abstract_state(planned_program(replace(run, model=model))[0], mesh)
    places = [
        jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
        for tree in (state.params["policy"], state.extra["reference"])
    ]
    assert places[0] == places[1]
    assert any(any(spec) for spec in jax.tree.leaves(places[0]))


def test_what_a_plan_cannot_know_is_asked_for(folder):
    for algorithm, key in ((GroupDistributionalPO(), "max_beliefs"), (PlackettLuceDPO(), "max_l")):
        with pytest.raises(InputError, match=f"data.{key}"):
            planned(run_of(folder, algorithm))
    with pytest.raises(InputError, match="no room for 2 branches"):
        planned(run_of(folder, data={"layout": "shared_prompt", "row_length": 1}))
    with pytest.raises(InputError, match="is not planned"):
        planned_program(replace(run_of(folder), data=OnPolicyData(), feedback=LexiconFeedback()))
    with pytest.raises(InputError, match="missing: no such folder"):
        planned_program(
            replace(run_of(folder), model=replace(run_of(folder).model, policy="missing"))
        )


def test_a_folder_of_another_architecture_is_refused(folder):
    run = run_of(folder)
    other = replace(run, model=replace(run.model, architecture=replace(MODEL, layers=2)))
    with pytest.raises(InputError, match=r"model.policy .*model has model.layers 1, this"):
        open_policy(other)
    same = replace(MODEL, remat="full", dropout=0.5)
    assert open_policy(replace(run, model=replace(run.model, architecture=same))).config.layers == 1


@pytest.mark.parametrize(
    ("file", "algorithm", "limit", "said"),
    [
        ("beliefs.jsonl", GroupDistributionalPO(), {"max_beliefs": 2}, "3 beliefs, .* allows 2"),
        ("lists.jsonl", PlackettLuceDPO(), {"max_list": 2}, "3 completions, .* allows 2"),
    ],
)
def test_records_with_more_than_was_planned_are_bad(folder, file, algorithm, limit, said):
    run = run_of(folder, algorithm, data={"file": str(folder / file), **limit})
    with pytest.raises(InputError, match=f"{file}:1: {said}"):
        open_files(run, run.data, open_policy(run))
