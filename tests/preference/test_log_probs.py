"""Statistics of every layout are the same, and those of a dense computation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxllm.errors import InputError
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.preference import log_probs
from jaxllm.preference.log_probs import (
    SlotShape,
    check_needs,
    row_hidden,
    slot_scores,
    statistics,
)
from jaxllm.preference.records import Belief, Example
from jaxllm.preference.rows import PreferenceRows, RowConfig

V = 23
CONFIG = DecoderConfig(
    vocab_size=V,
    dim=16,
    layers=2,
    attention=AttentionConfig(2, 1, 8),
    mlp=MlpConfig(24),
    init_std=0.4,
    logit_soft_cap=5.0,
)
NEED = (
    *("ref_logps", "token_logps", "ref_token_logps", "mask", "belief_span", "beliefs"),
    *("collision", "kl", "prompt_logps", "prompt_lengths"),
)
LAYOUTS = {
    "padded": RowConfig("padded", 4, 14),
    "packed": RowConfig("packed", 4, 16, 6),
    "shared_prompt": RowConfig("shared_prompt", 4, 26),
    "packed shared_prompt": RowConfig("shared_prompt", 4, 40, 3),
}
BLUEPRINT = decoder(CONFIG)


def examples(strings=False, count=4):
    rng = np.random.default_rng(1)

    def ids(low, high):
        return tuple(rng.integers(0, V, int(rng.integers(low, high))).tolist())

    beliefs = ((3, 5), (4,), (3, 6, 7)) if strings else ((3,), (4,), (5,))
    belief = Belief((0, 1), (0.5, 0.3, 0.2), beliefs)
    return [
        Example(ids(2, 6), (ids(2, 6), ids(2, 6)), belief=belief, identity=f"x:{i}")
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def params():
    init = jax.jit(BLUEPRINT.init)
    return init(jax.random.key(0))[0], init(jax.random.key(1))[0]


def stats_of(params, reference, batch, shape):
    model, other = BLUEPRINT.build(params, {}), BLUEPRINT.build(reference, {})
    hidden, ref_hidden = row_hidden(model, batch, shape), row_hidden(other, batch, shape)
    policy = slot_scores(model, hidden, batch, shape, NEED, (other, ref_hidden))
    ref = slot_scores(other, ref_hidden, batch, shape, NEED)
    return statistics("pairs", policy, ref, batch, shape)


def loss(params, reference, batch, shape):
    stats = stats_of(params, reference, batch, shape)
    parts = [stats.chosen.log_ratio, stats.rejected.logps**2, stats.chosen.kl * 3]
    parts += [stats.rejected.collision, stats.chosen.prompt_logps, stats.beliefs.log_probs[:, 0]]
    return sum(jnp.sum(jnp.where(batch["valid"], part, 0.0)) for part in parts), stats


def run(params, config, strings=False):
    rows = PreferenceRows(examples(strings), config)
    shape = SlotShape.of(rows)
    batch = rows.batch(range(4))
    with tiny_runs.quick_compile():
        return jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)(
            *params, batch, shape
        )


@jax.jit
def dense_rows(params, tokens):
    model = BLUEPRINT.build(params, {})
    return jax.nn.log_softmax(model.logits(model.hidden(tokens)))[0]


def dense(params, ids):
    """Log-softmax [T, V] of a plain forward pass."""
    padded = np.zeros((1, 12), int)
    padded[0, : len(ids)] = ids
    return np.asarray(dense_rows(params, padded))[: len(ids)]


def test_padded_statistics_are_those_of_a_dense_computation(params):
    _, stats = run(params, LAYOUTS["padded"])[0]
    for p, example in enumerate(examples()):
        start = len(example.prompt_ids) - 1
        for sequences, completion in zip(
            (stats.chosen, stats.rejected), example.completion_ids, strict=True
        ):
            ids = [*example.prompt_ids, *completion]
            policy, ref = (dense(tree, ids[:-1]) for tree in params)
            picked = policy[np.arange(len(ids) - 1), ids[1:]]
            own = picked[start:]
            assert sequences.lengths[p] == len(completion)
            np.testing.assert_allclose(sequences.logps[p], own.sum(), atol=1e-4)
            kept = np.asarray(sequences.token_logps[p])[np.asarray(sequences.mask[p])]
            np.testing.assert_allclose(kept, own, atol=1e-4)
            kl = (np.exp(ref) * (ref - policy))[start:].sum()
            np.testing.assert_allclose(sequences.kl[p], kl, atol=1e-4)
            squares = np.log((np.exp(policy) ** 2).sum(-1))[start:].sum()
            np.testing.assert_allclose(sequences.collision[p], squares, atol=1e-4)
        np.testing.assert_allclose(
            stats.rejected.ref_logps[p],
            ref[start:][np.arange(len(completion)), completion].sum(),
            atol=1e-4,
        )
        np.testing.assert_allclose(stats.chosen.prompt_logps[p], picked[:start].sum(), atol=1e-4)
        assert stats.chosen.prompt_lengths[p] == start
        np.testing.assert_allclose(stats.beliefs.log_probs[p], policy[start, 3:6], atol=1e-4)


@pytest.fixture(scope="module")
def padded(params):
    return {strings: run(params, LAYOUTS["padded"], strings) for strings in (False, True)}


@pytest.mark.parametrize(
    ("name", "strings"),
    [*itertools.product(list(LAYOUTS)[1:3], [False]), ("packed shared_prompt", True)],
)
def test_every_layout_gives_the_same_statistics_and_gradients(params, padded, name, strings):
    (expected, stats), gradients = padded[strings]
    (found, other), grads = run(params, LAYOUTS[name], strings)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for part, reference in zip(jax.tree.leaves(other), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(part, reference, atol=1e-4)
    for part, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(part, reference, atol=2e-3, rtol=1e-3)


def test_belief_strings_are_scored_after_the_prompt(params, padded):
    (_, stats), _ = padded[True]
    first = examples(strings=True)[0]
    for number, belief in enumerate(first.belief.ids):
        ids = [*first.prompt_ids, *belief]
        logps = dense(params[0], ids[:-1])[np.arange(len(ids) - 1), ids[1:]]
        own = logps[len(first.prompt_ids) - 1 :].sum()
        np.testing.assert_allclose(stats.beliefs.log_probs[0, number], own, atol=1e-4)


def largest_with_vocabulary(jaxpr):
    """The most elements of any array of a program that has an axis of V, parameters aside."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if V in shape and CONFIG.dim not in shape:
                largest = max(largest, int(np.prod(shape)))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_with_vocabulary(inner))
    return largest


def test_logits_of_all_tokens_never_exist(params, monkeypatch):
    """Neither forward nor backward, whatever is asked for."""
    rows = PreferenceRows(examples(), LAYOUTS["padded"])
    shape, batch = SlotShape.of(rows), rows.batch(range(4))
    tokens = batch["tokens"].size

    def largest():
        gradient = jax.grad(lambda p: loss(p, params[1], batch, shape)[0])
        return largest_with_vocabulary(jax.make_jaxpr(gradient)(params[0]).jaxpr)

    assert largest() >= tokens * V  # All in one chunk: what the measure finds.
    monkeypatch.setattr(log_probs, "CHUNK", 8)
    assert 8 * V <= largest() < tokens * V / 4


def test_branches_in_rows_longer_than_a_window_are_refused(params):
    windowed = decoder(DecoderConfig(**{**vars(CONFIG), "windows": (8,)}))
    rows = PreferenceRows(examples(), LAYOUTS["shared_prompt"])
    with pytest.raises(InputError, match="window of 8"):
        row_hidden(windowed.build(params[0], {}), rows.batch(range(4)), SlotShape.of(rows))


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ("desirable", "`label` of 0 or 1"),
        ("beliefs", "`probabilities`"),
        ("density_ratio", "a `density_ratio` in every record"),
        ("target", "a `target` in every record"),
        ("mismatched", "do not have"),
    ],
)
def test_what_the_examples_do_not_have_is_named(need, message):
    rows = PreferenceRows([Example((1, 2), ((3,), (4,)))], RowConfig("padded", 1, 4))
    with pytest.raises(InputError, match=message):
        check_needs([need], SlotShape.of(rows), rows.batch([0]).keys())
