"""Reward models: they learn pairs, read the last token, and are feedback for others."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_preference import assert_equal_trees, loop, offline, run_of, write_folder, write_rows

from jaxllm.errors import InputError
from jaxllm.nn.lora import LoraConfig
from jaxllm.preference.config import RewardModelFeedback
from jaxllm.preference.examples import open_feedback
from jaxllm.preference.job import preference_job
from jaxllm.preference.offline import open_files
from jaxllm.preference.policy import open_policy
from jaxllm.preference.reward_job import reward_job
from jaxllm.preference.reward_model import BradleyTerry
from jaxllm.preference.reward_scorer import RewardRun, RewardScorer, RewardTrunk
from jaxllm.training.loop import train
from jaxllm.training.optimizer import OptimizerConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("reward"))
    # Told apart by their last letter alone.
    pairs = [
        {"prompt": f"{n}?", "chosen": f"{n % 3}a", "rejected": f"{n % 3}b", "margin": 1.5}
        for n in range(8)
    ]
    write_rows(root / "letters.jsonl", pairs)
    return root


def reward_run(folder, steps=6, **changes):
    data = offline(folder, file=str(folder / "letters.jsonl"), row_length=8)
    return RewardRun(
        **{
            "model": RewardTrunk(str(folder / "model")),
            "data": replace(data, validation_file=data.file),
            "algorithm": BradleyTerry(centre=0.01),
            "optimizer": OptimizerConfig(learning_rate=3e-2),
            "loop": loop(steps),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def trained(folder):
    workdir = folder / "trained"
    with tiny_runs.quick_compile():
        result = train(reward_job(reward_run(folder), workdir), workdir, devices=jax.devices()[:1])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return workdir, result, rows


def test_a_reward_model_starts_without_a_preference_and_learns_it(trained):
    _, result, rows = trained
    assert rows[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert result.summary["metrics"]["eval/rewards/accuracies"] == 1
    assert result.summary["metrics"]["eval/rewards/margins"] > 0.5


def test_the_finished_model_scores_texts_as_training_did(trained, folder):
    workdir, result, _ = trained
    scorer = RewardScorer(workdir)
    scores = scorer(["1?", "1?", "2?"], ["1a", "1b", "2a"])
    assert scores[0] > scores[1] + 0.3
    margins = [scorer([f"{n}?"] * 2, [f"{n % 3}a", f"{n % 3}b"]) for n in range(8)]
    expected = result.summary["metrics"]["eval/rewards/margins"]
    assert np.mean([a - b for a, b in margins]) == pytest.approx(expected, abs=1e-4)


def test_it_orders_pairs_as_feedback(trained, folder):
    """Records whose pairs are the wrong way round."""
    rows = [{"prompt": f"{n}?", "chosen": f"{n}b", "rejected": f"{n}a"} for n in range(3)]
    file = write_rows(folder / "wrong.jsonl", rows)
    run = run_of(folder, data={"file": file, "batch_size": 2})
    run = replace(run, feedback=RewardModelFeedback(str(trained[0])))
    examples, _ = open_files(run, run.data, open_policy(run))
    assert [bytes(e.completion_ids[0][:2]) for e in examples] == [b"0a", b"1a", b"2a"]
    assert all(e.margin > 0 for e in examples)


def test_adapters_and_margins_are_one_step_of_the_same_job(folder, tmp_path):
    """At reward 0 the loss with a margin of 1.5 is log(1 + e^1.5)."""
    run = reward_run(folder, model=RewardTrunk(str(folder / "model"), LoraConfig(2)))
    job = reward_job(replace(run, use_margin=True, algorithm=BradleyTerry()), tmp_path)
    with tiny_runs.quick_compile():
        state = jax.jit(job.init)(jax.random.key(0))
        new, metrics = jax.jit(job.step)(state, job.batches.batch(0), jax.random.key(0))
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(1.5)), rel=1e-5)
    assert_equal_trees(new.extra["base"], state.extra["base"])
    assert np.abs(new.params["head"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda f: RewardModelFeedback(""), "feedback.run is empty"),
        (lambda f: RewardModelFeedback(str(f / "none")), "none: no such folder"),
        (lambda f: RewardModelFeedback(str(f / "model")), "expected a 'reward_model' run"),
    ],
)
def test_folders_without_a_reward_model_are_named(folder, run, message):
    with pytest.raises(InputError, match=message):
        open_feedback(run(folder))


def test_margins_that_are_not_there_and_several_objectives_are_refused(folder, tmp_path):
    file = write_rows(folder / "plain.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    run = reward_run(folder, data=offline(folder, file=file, row_length=8), use_margin=True)
    with pytest.raises(InputError, match="plain.jsonl: use_margin needs a `margin`"):
        reward_job(run, tmp_path)
    with pytest.raises(InputError, match="one"):
        reward_job(replace(run, algorithm=BradleyTerry(weights=(1.0,))), tmp_path)
    run = run_of(folder, BradleyTerry())
    with pytest.raises(InputError, match="use train/reward.py"):
        preference_job(run, tmp_path)
