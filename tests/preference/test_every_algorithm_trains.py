"""Every kind of algorithm that takes records has a step, from the config to the update.

Those that read the same statistics differ in the loss only, so one of each kind is enough.
"""

import jax
import pytest
from tiny_preference import run_of, write_folder, write_rows

from jaxllm.preference import ALGORITHMS, ListStats, PairStats, PointStats, needs
from jaxllm.preference.job import preference_job

OFFLINE = {
    name: entry
    for name, entry in ALGORITHMS.items()
    if {PairStats, PointStats, ListStats} & {*entry.stats}
    and "rewards" not in needs(entry.config())
}
KINDS = {(entry.stats, needs(entry.config())): name for name, entry in OFFLINE.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("every"))
    base = [{"prompt": f"{n}?", "completions": [f"{n}", "b", "c"]} for n in range(4)]
    write_rows(root / "lists.jsonl", [{**row, "scores": [1, 0.5, 0]} for row in base])
    belief = {"belief": "1", "beliefs": ["1", "2"], "probabilities": [0.7, 0.3]}
    stated = [{"prompt": f"{n}?", "chosen": "1x", "rejected": f"1y{n}", **belief} for n in range(4)]
    write_rows(root / "beliefs.jsonl", stated)
    return root


@pytest.mark.parametrize("name", KINDS.values())
def test_the_step_of_every_kind(folder, tmp_path, name):
    entry = OFFLINE[name]
    wanted = needs(entry.config())
    file = "beliefs" if "beliefs" in wanted else "lists" if entry.stats[0] is ListStats else "pairs"
    data = {
        "file": str(folder / f"{file}.jsonl"),
        "unpair": "desirable" in wanted,
        "batch_size": 4,
    }
    job = preference_job(run_of(folder, entry.config(), data=data), tmp_path)
    state = jax.eval_shape(job.init, jax.random.key(0))
    new, metrics = jax.eval_shape(job.step, state, job.batches.batch(0), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == () and ("reference" in state.extra) == (
        "ref_logps" in wanted or "kl" in wanted
    )
