"""Training on preferences: start, layouts, devices, resuming, references, export."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from tiny_preference import (
    WORDS,
    assert_equal_trees,
    go,
    policy,
    run_of,
    write_folder,
    write_rows,
)

from jaxllm.cli.main import main as jaxllm
from jaxllm.data.text_tokenizers import byte_tokenizer
from jaxllm.decoding.language_model import load_language_model
from jaxllm.errors import InputError
from jaxllm.nn.lora import LoraConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import batch_sharding
from jaxllm.preference.config import PrecomputedReference
from jaxllm.preference.job import preference_job
from jaxllm.preference.log_probs import SlotShape
from jaxllm.preference.mixture import Part, WeightedSum
from jaxllm.preference.offline import open_files, open_rows
from jaxllm.preference.pairwise import IPO
from jaxllm.preference.pairwise_anchored import AOT, BCOPair
from jaxllm.preference.pointwise import BCO, KTO
from jaxllm.preference.policy import open_policy
from jaxllm.preference.reference_free import SLiC
from jaxllm.preference.step import PreferenceLoss, move_reference
from jaxllm.preference.wrappers import TRDPO
from jaxllm.training.state import new_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("preference"))


@pytest.fixture(scope="module")
def dpo(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dpo")
    data = {"validation_file": str(folder / "pairs.jsonl")}
    job, traces = preference_job(run_of(folder, steps=4, data=data), workdir), []

    def step(*arguments):
        traces.append(1)
        return job.step(*arguments)

    found = go(replace(job, step=step), workdir)
    assert len(traces) == 1  # Nothing recompiles.
    return workdir, *found


def test_dpo_starts_at_ln_2_and_learns_the_preference(dpo):
    _, result, rows = dpo
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["rewards/margins"] > 0.1 and rows[-1]["loss"] < rows[1]["loss"]
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen"} <= {
        *rows[0]
    }
    assert result.summary["metrics"]["eval/rewards/accuracies"] == 1
    assert result.summary["metrics"]["eval/examples"] == len(WORDS)


def test_slic_reads_targets_and_bco_density_ratios_of_their_records(folder, tmp_path):
    """The losses by hand from the log-probs of the first step, through the job's own batch."""
    pairs = [
        {"prompt": f"{word}:", "chosen": " good", "rejected": f" bad {n}", "target": " fine" * n}
        for n, word in enumerate(WORDS, 1)
    ]
    labels = [
        {"prompt": f"{word}:", "completion": " so", "label": n % 2, "density_ratio": n + 0.25}
        for n, word in enumerate(WORDS)
    ]
    found = {}
    for algorithm, rows in (
        (SLiC(regulariser="target"), pairs),
        (BCO(density_weights=True), labels),
    ):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        run = run_of(folder, algorithm, data={"file": file, "row_length": 48})
        policy = open_policy(run)
        opened = open_rows(run, policy, run.data.row_config(), open_files(run, run.data, policy)[0])
        kind = "pairs" if rows is pairs else "labels"
        loss = PreferenceLoss(algorithm, policy, SlotShape.of(opened), kind)
        params = {"policy": load_language_model(folder / "model").params}
        extra = {"reference": jax.tree.map(lambda x: 0.9 * x, params["policy"])}
        with tiny_runs.quick_compile():
            both = jax.jit(lambda *a, loss=loss: (loss.stats(*a), loss(*a)[0]))
            found[kind] = both(params, extra, opened.batch(range(8)))
    stats, loss = found["pairs"]
    hinge = np.maximum(0, 1 - stats.chosen.logps + stats.rejected.logps)
    assert loss == pytest.approx(float(np.mean(hinge - 0.1 * stats.target.logps)), rel=1e-5)
    assert stats.target.lengths.tolist() == [5 * n + 1 for n in range(1, 9)]
    stats, loss = found["labels"]
    rewards = 0.1 * np.asarray(stats.completions.log_ratio)
    good = np.arange(8) % 2 == 1
    signed = np.where(good, 1, -1) * (rewards - rewards.mean())
    weights = np.where(good, 1, np.clip(np.arange(8) + 0.25, 0.5, 10))
    assert loss == pytest.approx(float(np.mean(weights * np.log1p(np.exp(-signed)))), rel=1e-5)


def test_a_run_is_a_model_of_its_own(dpo, folder, tmp_path):
    """Its reference stays what the policy was."""
    workdir, result, _ = dpo
    start = load_language_model(folder / "model").params
    assert_equal_trees(result.state.extra["reference"], start)
    model = load_language_model(workdir)
    assert_equal_trees(model.params, policy(result))
    assert model.eos == (byte_tokenizer().eos,) and model.tokenizer is not None


COUPLED = WeightedSum((Part(BCOPair(shift="running")), Part(AOT(), 0.5)))


def assert_equal_runs(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"examples_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), name


def test_the_kl_of_kto_is_over_the_batch_on_all_devices(folder, tmp_path):
    run = run_of(folder, KTO(), data={"unpair": True})
    one, first = go(run, tmp_path / "one")
    many, second = go(run, tmp_path / "many", devices=8)
    assert_equal_runs(first, second)
    assert_equal_trees(policy(many), policy(one), atol=2e-4)


def test_losses_that_couple_rows_are_the_same_on_eight_devices(folder, tmp_path):
    run = run_of(folder, COUPLED, data={"batch_size": 16})
    policy, config = open_policy(run), run.data.row_config()
    rows = open_rows(run, policy, config, open_files(run, run.data, policy)[0])
    loss = PreferenceLoss(COUPLED, policy, SlotShape.of(rows), "pairs")
    params, extra = policy.init(jax.random.key(0))
    extra["reference"] = jax.tree.map(lambda x: 0.9 * x, params["policy"])
    extra["running"] = {"mean": jnp.float32(0.3), "count": jnp.float32(5)}
    batch, mesh = rows.batch(range(len(WORDS))), make_mesh()
    with tiny_runs.quick_compile():
        one = jax.jit(loss)(params, extra, batch)
        with jax.set_mesh(mesh):
            spread = jax.jit(loss, in_shardings=(None, None, batch_sharding(mesh)))
            many = spread(params, extra, batch)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    """A run with what a state may carry: adapters, accumulation, a running mean."""
    data = {"layout": "shared_prompt", "row_length": 40}
    run = run_of(folder, COUPLED, accumulate=2, lora=LoraConfig(2), data=data)
    workdir = tmp_path_factory.mktemp("adapted")
    return run, workdir, *go(run, workdir)


def test_a_stopped_run_resumes_to_the_same_bits(adapted, tmp_path):
    run, _, whole, rows = adapted
    assert int(whole.state.extra["running"]["count"]) == 2 * 2 * len(WORDS)
    go(replace(run, loop=replace(run.loop, steps=1)), tmp_path)
    found, other = go(run, tmp_path)
    assert_equal_trees(found.state, whole.state, rtol=0)
    assert [row["loss"] for row in other] == [row["loss"] for row in rows]


def test_adapters_alone_are_trained_and_export_merged(adapted, folder, tmp_path):
    _, workdir, result, rows = adapted
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    start = load_language_model(folder / "model").params
    assert_equal_trees(result.state.extra["base"], start)
    assert "reference" not in result.state.extra
    merged = load_language_model(workdir).params
    assert np.abs(merged["layers"]["mlp"]["up"] - start["layers"]["mlp"]["up"]).max() > 1e-3
    np.testing.assert_array_equal(merged["embed"], start["embed"])
    target = tmp_path / "exported"
    assert jaxllm(["convert", str(workdir), "--to", "hf", str(target)]) == 0
    assert_equal_trees(load_language_model(target).params, merged, atol=1e-6)


def test_a_precomputed_reference_is_cached_and_trains_alike(folder, tmp_path, dpo, capsys):
    reference = PrecomputedReference(cache=str(tmp_path / "cache"))
    run = run_of(folder, steps=4, reference=reference)
    result, rows = go(run, tmp_path / "first")
    assert "computed the reference's log-probs of 8" in capsys.readouterr().out
    assert_equal_trees(policy(result), policy(dpo[1]), atol=2e-4)
    assert not result.state.extra
    preference_job(replace(run, algorithm=IPO()), tmp_path / "second")
    assert "computed" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1
    preference_job(run_of(folder, data={"max_completion": 3}, reference=reference), tmp_path / "x")
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


def test_moving_references_follow_the_policy(folder):
    policy = open_policy(run_of(folder, TRDPO(alpha=0.25, every=2)))
    assert policy.keeps_reference and policy.starts_equal
    state = new_state({"policy": jnp.ones(3)}, optax.sgd(0.1), ema=False)
    state = replace(state, extra={"reference": jnp.zeros(3)})
    for step, expected in ((1, 0.0), (2, 0.25), (3, 0.25), (4, 0.25 + 0.75 * 0.25)):
        state = move_reference(policy, replace(state, step=jnp.int32(step)))
        np.testing.assert_allclose(state.extra["reference"], expected)


def test_a_start_at_which_policy_and_reference_differ_is_refused(folder, tmp_path):
    reference = PrecomputedReference(cache=str(tmp_path / "cache"))
    preference_job(run_of(folder, reference=reference), tmp_path / "first")
    (path,) = (tmp_path / "cache").glob("*.npz")
    with np.load(path) as stored:
        changed = stored["ref_logps"] + 0.1
    with path.open("wb") as file:
        np.savez(file, ref_logps=changed)
    run = run_of(folder, reference=reference)
    with pytest.raises(InputError, match="differ by 0.0.* nats per token before the first step"):
        go(run, tmp_path / "run")
    assert (
        preference_job(
            replace(run, model=replace(run.model, check_start=False)), tmp_path / "run"
        ).check_start
        is None
    )
