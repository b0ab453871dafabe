"""The masked simulation keeps what the bucketed cache keeps, and budgets that depend on the input
keep their total; the protocols cut sequences where they say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import quick_compile

from jaxllm.errors import InputError
from jaxllm.kvcompress.bucketed_cache import bucketed_caches
from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.masked_cache import Choice, masked_cache
from jaxllm.kvcompress.plan import plan_of
from jaxllm.kvcompress.recall_protocols import (
    PROTOCOLS,
    PlanAsker,
    ask,
    measures,
    recall_examples,
)
from jaxllm.kvcompress.scorers import Accumulated, Recent, Window
from jaxllm.kvcompress.tasks import NeedleTask, ReasonNeedleTask, SetGetTask
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig

TASK = NeedleTask(facts=3, filler=6, keys=6, values=6)
CONFIG = DecoderConfig(
    vocab_size=TASK.vocab,
    dim=16,
    layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
    mlp=MlpConfig(hidden=16),
    init_std=0.4,
)
EVICTION = Eviction(window=4, scorer=Window(pool=3))


def choice(capacities, recent=False, adaptive=False, floor=0, sinks=0) -> Choice:
    table = jnp.asarray(capacities, jnp.int32)
    layers = len(table)
    return Choice(
        table,
        jnp.broadcast_to(jnp.asarray(recent), table.shape),
        jnp.full(layers, adaptive),
        jnp.full(layers, floor, jnp.int32),
        jnp.full(layers, sinks, jnp.int32),
    )


@pytest.fixture(scope="module")
def model():
    blueprint = decoder(CONFIG)
    with quick_compile():
        params, _ = jax.jit(blueprint.init)(jax.random.key(0))
        yield blueprint, params, PlanAsker(blueprint.build, CONFIG, EVICTION)


@pytest.mark.parametrize("recent", [False, True])
def test_the_simulation_equals_the_bucketed_cache(model, recent):
    blueprint, params, asker = model
    asked = ask(TASK, TASK.batch(0, 0, 2), "agnostic")
    capacities = np.array([[1, 6], [3, 2]])
    caches = asker.prefill(params, asked)
    sinks = 1 if recent else 0
    found = asker.answer(params, caches, asked, choice(capacities, recent, sinks=sinks))
    eviction = Eviction(4, sinks, Recent() if recent else Window(pool=3))
    plan = plan_of("test", capacities, 8, eviction)

    @jax.jit
    def real(params, prompt, rest):
        network = blueprint.build(params, {})
        layers, shape = network.unstack(), (len(rest), prompt.shape[1])
        held = bucketed_caches(plan, len(rest), 4, 8)
        before = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        _, held = network.step(layers, held, prompt, before)
        after = jnp.broadcast_to(shape[1] + jnp.arange(rest.shape[1]), rest.shape)
        hidden, _ = network.step(layers, held, rest, after)
        return jax.nn.log_softmax(network.logits(hidden[:, jnp.asarray(asked.picks)]))

    expected = real(params, np.repeat(asked.prompt, asked.repeat, axis=0), asked.rest)
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-5)


def test_adaptive_budgets_keep_their_total_and_floor(model):
    _, params, asker = model
    caches = asker.prefill(params, ask(TASK, TASK.batch(0, 1, 3), "agnostic"))
    for floor in (0, 2):
        kept = caches[0].compress(choice([[3, 3]], adaptive=True, floor=floor).layer(0))
        counts = np.asarray((kept.positions >= 0).sum(-1)) - EVICTION.window
        np.testing.assert_array_equal(counts.sum(-1), 6)
        assert counts.min() >= floor
    free = caches[0].compress(choice([[3, 3]], adaptive=True).layer(0))
    assert len(set(np.asarray((free.positions >= 0).sum(-1)).ravel().tolist())) > 1
    everything = caches[0].compress(choice([[99, 99]]).layer(0))
    np.testing.assert_array_equal(everything.positions, caches[0].positions)


def test_every_protocol_reads_the_full_cache_as_training_does(model):
    """With nothing dropped, the answers' log-probabilities are those of the uncached model."""
    blueprint, params, asker = model
    batch = TASK.batch(0, 2, 2)
    network = blueprint.build(params, {})
    traces = asker.traces
    for protocol in PROTOCOLS:
        asked = ask(TASK, batch, protocol)
        caches = asker.prefill(params, asked)
        full = asker.answer(params, caches, asked, choice([[99, 99]] * 2))
        # Whole token rows, as the protocol shows them to the model.
        prompt = np.repeat(asked.prompt, asked.repeat, axis=0)
        whole = np.concatenate([prompt[:, : -1 if asked.reread else None], asked.rest], axis=1)
        start = whole.shape[1] - asked.rest.shape[1]
        logits = network.logits(network.hidden(jnp.asarray(whole)))
        expected = jax.nn.log_softmax(logits)[:, start + np.asarray(asked.picks)]
        np.testing.assert_allclose(full.reshape(expected.shape), expected, atol=1e-4)
        small = asker.answer(params, caches, asked, choice([[1, 0], [0, 2]]))
        same, other = measures(full, full, asked), measures(small, full, asked)
        assert same.right.shape == (2, 3 if protocol != "multi_turn" else 2)
        assert np.abs(same.divergence).max() < 1e-6 and np.all(same.agreement == 1)
        assert other.divergence.min() >= -1e-6 and other.divergence.max() > 1e-3
    assert asker.traces == traces + 2  # One per protocol, "agnostic" was compiled before.


def test_answers_of_a_protocol_are_those_of_the_task():
    for task in (TASK, ReasonNeedleTask(facts=4, queries=3, filler=4)):
        batch = task.batch(0, 0, 2)
        for protocol in PROTOCOLS:
            asked = ask(task, batch, protocol)
            width = asked.answers.shape[2]
            starts = batch["query"][:, 1 if protocol == "multi_turn" else 0 :]
            for row in range(2):
                wanted = [batch["tokens"][row, at : at + width].tolist() for at in starts[row]]
                found = asked.answers.reshape(2, -1, width)[row].tolist()
                assert found == wanted


@pytest.mark.parametrize(
    "task",
    [TASK, ReasonNeedleTask(facts=4, queries=3, filler=4), SetGetTask(operations=20, keys=3)],
)
def test_examples_to_measure_heads_by_are_questions_of_the_task(task):
    batch = task.batch(0, 0, 3)
    for last in (False, True):
        for row, example in enumerate(recall_examples(task, batch, last=last)):
            tokens, at = batch["tokens"][row].tolist(), len(example.prompt_ids)
            asked = batch["query"][row][batch["query"][row] > 0]
            assert at == asked[-1 if last else 0]
            assert list(example.prompt_ids) == tokens[:at]
            start, end = example.span
            assert list(example.answer_ids) == tokens[start:end] == tokens[at : at + end - start]
            mark = {NeedleTask: 9, ReasonNeedleTask: 9, SetGetTask: 1}[type(task)]
            assert tokens[example.question_start] == mark
            assert (example.distractor is not None) == isinstance(task, ReasonNeedleTask)
            if example.distractor is not None:
                assert example.distractor != example.span
    if isinstance(task, ReasonNeedleTask):
        single = recall_examples(task, task.batch(0, 0, 3, single=True))
        assert all(example.distractor is None for example in single)


def test_scorers_that_need_more_queries_are_refused():
    with pytest.raises(InputError, match="Accumulated"):
        masked_cache(1, 2, 1, 8, 4, Eviction(window=4, scorer=Accumulated()))
