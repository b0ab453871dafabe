"""The job that trains models on the memory tasks: data by step, its measure, its export."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import loop, quick_compile

from jaxllm.decoding.language_model import load_language_model
from jaxllm.errors import InputError
from jaxllm.kvcompress.recall import RecallRun, Stage, answers_right, export_recall, recall_job
from jaxllm.kvcompress.tasks import NeedleTask, ReasonNeedleTask, SetGetTask
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.training.loop import train

TASK = ReasonNeedleTask(facts=2, queries=1, filler=2, keys=3, values=3, ranks=2)


def tiny(task=TASK, **changes) -> RecallRun:
    model = DecoderConfig(
        vocab_size=task.vocab,
        dim=8,
        layers=1,
        attention=AttentionConfig(heads=2, kv_heads=1, head_dim=4),
        mlp=MlpConfig(hidden=8),
        tie_embeddings=True,
    )
    return RecallRun(model, task, batch_size=4, held_out=4, loop=loop(3), **changes)


def test_a_run_trains_reports_and_is_exported_for_model(tmp_path):
    shorter = dataclasses.replace(TASK, filler=0)
    run = tiny(curriculum=(Stage(shorter, 1, 1.0),))
    with quick_compile():
        result = train(recall_job(run), tmp_path / "run", devices=jax.devices()[:1])
    metrics = result.summary["metrics"]
    assert {"eval/accuracy", "eval/single_accuracy", "train/loss"} <= set(metrics)
    assert 0 <= metrics["eval/accuracy"] <= 1 and metrics["train/tokens"] > 0
    export_recall(run, result.state, tmp_path / "model")
    export_recall(run, result.state, tmp_path / "model")  # A finished run may be called again.
    model = load_language_model(tmp_path / "model")
    assert model.config.attention == run.model.attention
    kept = np.asarray(result.state.params["embed"].astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(np.asarray(model.params["embed"]), kept)
    start = dataclasses.replace(run, init_from=str(tmp_path / "model"))
    np.testing.assert_array_equal(np.asarray(recall_job(start).load(None)["embed"]), kept)
    wider = dataclasses.replace(start, model=dataclasses.replace(run.model, dim=12))
    with pytest.raises(InputError, match="dim is 8, this model has 12"):
        recall_job(wider).load(None)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(InputError, match="expected a new or an empty folder"):
        export_recall(run, result.state, tmp_path / "model")


def test_batches_follow_the_curriculum_and_the_seed():
    easier = dataclasses.replace(TASK, filler=0)
    run = tiny(curriculum=(Stage(easier, 1, 1.0), Stage(TASK, 2, 1.0)))
    batches = recall_job(run).batches

    def single(batch, task=TASK) -> list[bool]:
        whole = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
        assert whole.shape[1] == task.length
        pairs = whole[:, task.context + 1 : task.context + 3]
        return (pairs[:, 0] == pairs[:, 1]).tolist()

    assert all(single(batches.batch(0), easier)) and all(single(batches.batch(1)))
    assert not any(single(batches.batch(2)))
    np.testing.assert_array_equal(
        next(batches.iterate(2))["tokens"], TASK.batch(run.loop.seed, 2, 4)["tokens"][:, :-1]
    )
    other = dataclasses.replace(run, loop=loop(3, seed=5))
    assert not np.array_equal(
        recall_job(other).batches.batch(2)["tokens"], batches.batch(2)["tokens"]
    )
    mixed = recall_job(dataclasses.replace(tiny(single=0.5), loop=loop(12))).batches
    assert {all(single(mixed.source[step])) for step in range(12)} == {True, False}


def test_an_answer_is_right_when_all_its_tokens_are():
    batch = NeedleTask(facts=2, filler=0).batch(0, 0, 1)  # Queries at 10 and 14, two tokens each.
    np.testing.assert_array_equal(batch["query"], [[10, 14]])
    right = np.zeros((1, 15), bool)
    right[0, [9, 10, 13]] = True  # Row t - 1 predicts token t: both of the first, one of the other.
    np.testing.assert_array_equal(answers_right(right, batch), [True, False])
    padded = SetGetTask(operations=9, keys=2).batch(0, 0, 3)
    asked = int((padded["query"] > 0).sum())
    assert answers_right(np.ones((3, 26), bool), padded).shape == (asked,)


def test_bad_runs_are_refused():
    run = tiny()
    for changes, message in [
        ({"model": dataclasses.replace(run.model, vocab_size=3)}, "vocab_size 3"),
        ({"single": 1.5}, "single 1.5"),
        ({"curriculum": (Stage(TASK, 2), Stage(TASK, 1))}, "ascending"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"task": NeedleTask(facts=1, keys=1, values=7), "single": 0.5}, "NeedleTask"),
    ]:
        with pytest.raises(InputError, match=message):
            recall_job(dataclasses.replace(run, **changes))
