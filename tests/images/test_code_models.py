"""Code-model losses, the scorer, the check against a code cache, and best-of-n."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_code_models import CASES, apply, random_model, some_codes, tiny_blueprint

from jaxllm.decoding.code_stacks import CodeSampler, SamplingConfig
from jaxllm.errors import InputError
from jaxllm.images.code_models import (
    CodeScorer,
    check_codes,
    code_log_probs,
    code_loss,
    depth_metrics,
)
from jaxllm.images.config import CodeModelRun, RQTransformerRun
from jaxllm.images.sample import Generator

SMALL = dataclasses.replace(
    CASES["dnd"], codebook_size=5, grid=(1, 2), depth=2, layers=2, dropout=0.0, class_dropout=0.25
)


def test_depth_metrics_by_hand():
    log_probs = -jnp.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    correct = jnp.array([[[1, 0], [1, 1]], [[1, 0], [0, 0]]], bool)
    found = {name: float(value) for name, value in depth_metrics(log_probs, correct).items()}
    # Sums over the two cells, means over the two images.
    assert found == {
        "nll": 18.0,
        "nll_depth1": 8.0,
        "nll_depth2": 10.0,
        "accuracy_depth1": 0.75,
        "accuracy_depth2": 0.25,
    }


def test_the_loss_weighs_depths_equally_and_drops_the_class_at_its_rate():
    blueprint, params, extra = random_model(SMALL)
    codes, classes = some_codes(SMALL, batch=1)
    keys = jax.random.split(jax.random.key(0), 400)

    @jax.jit
    def losses(params):
        model = blueprint.build(params, extra)
        batch = {"codes": jnp.asarray(codes), "label": jnp.asarray(classes)}
        return jax.vmap(lambda key: code_loss(model, batch, key)[0])(keys)

    found = np.asarray(losses(params))
    _, conditional = apply(blueprint, params, extra, codes, classes)
    _, unconditional = apply(blueprint, params, extra, codes, np.full(1, SMALL.null_class))
    kinds = [-np.mean(x) for x in (conditional, unconditional)]
    assert abs(kinds[0] - kinds[1]) > 0.01
    nearest = np.argmin(np.abs(found[:, None] - kinds), axis=1)
    np.testing.assert_allclose(found, np.take(kinds, nearest), atol=1e-5)
    # Four standard errors of a quarter.
    assert abs(nearest.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)


def test_dropout_needs_a_rate_and_a_key():
    config = dataclasses.replace(SMALL, dropout=0.5)
    _, params, extra = random_model(SMALL)
    codes, classes = some_codes(SMALL, batch=1)

    @jax.jit
    def run(key):
        with_key = code_log_probs(
            tiny_blueprint(config).build(params, extra), codes, classes, key=key
        )
        return with_key[0]

    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    _, without = apply(tiny_blueprint(config), params, extra, codes, classes)
    _, plain = apply(tiny_blueprint(SMALL), params, extra, codes, classes)
    np.testing.assert_allclose(without, plain, atol=1e-6)
    assert np.abs(first - without).max() > 0.01 and np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("name", ["dnd", "rq"])
def test_the_scorer_pads_and_chunks_without_effect(name):
    blueprint, params, extra = random_model(CASES[name])
    codes, classes = some_codes(CASES[name], batch=70)  # One full batch of 64 and a rest.
    classes[-1] = CASES[name].null_class  # May be scored, unlike sampled.
    scorer = CodeScorer(blueprint.build)
    log_probs, correct = scorer(params, extra, codes, classes)
    assert scorer._run._cache_size() == 1
    # The last six rows in a batch of the same size, so that the same products are formed.
    rows = np.resize(np.arange(64, 70), 64)
    logits, expected = (x[:6] for x in apply(blueprint, params, extra, codes[rows], classes[rows]))
    np.testing.assert_allclose(log_probs[-6:], expected, atol=1e-5)
    np.testing.assert_array_equal(correct[-6:], np.argmax(logits, axis=-1) == codes[-6:])
    summary = scorer.summary(params, extra, {"codes": codes, "label": classes})
    np.testing.assert_allclose(summary["nll"], -log_probs.sum((1, 2)).mean(), rtol=1e-5)
    np.testing.assert_allclose(summary["bits_per_code"], -log_probs.mean() / np.log(2), rtol=1e-5)
    parts = [summary[f"nll_depth{i}"] for i in (1, 2, 3)]
    np.testing.assert_allclose(sum(parts), summary["nll"], rtol=1e-5)


def test_chunks_of_cells_change_nothing():
    blueprint, params, extra = random_model(CASES["dnd"])
    codes, classes = some_codes(CASES["dnd"])
    _, expected = apply(blueprint, params, extra, codes, classes)
    model = blueprint.build(params, extra)
    found, _ = jax.jit(lambda: code_log_probs(model, codes, classes, chunk=5))()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("codes", "classes", "message"),
    [
        (np.zeros((1, 4, 2)), [0], r"codes have shape \(4, 2\), expected \(4, 3\)"),
        (np.full((1, 4, 3), 12), [0], "code 12 is outside 0 .. 11"),
        (np.full((1, 4, 3), -1), [0], "code -1 is outside"),
        (np.zeros((1, 4, 3)), [4], "class id 4 is outside 0 .. 3"),
    ],
)
def test_the_scorer_refuses(codes, classes, message):
    blueprint, params, extra = random_model(CASES["dnd"])
    with pytest.raises(InputError, match=message):
        CodeScorer(blueprint.build)(params, extra, codes, np.array(classes))


def source_of(codebook=None, **changes):
    meta = dict(codebook_size=12, depth=3, grid=[2, 2], class_names=["a", "b", "c"])
    return types.SimpleNamespace(meta=meta | changes, codebook=codebook)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(codebook_size=16), "the codes have codebook_size 16, the model has 12"),
        (dict(depth=2), "the codes have depth 2, the model has 3"),
        (dict(grid=[4, 1]), r"the codes have grid \[4, 1\], the model has \[2, 2\]"),
        (dict(class_names=["a"]), "the codes have classes 1, the model has 3"),
    ],
)
def test_codes_of_another_shape_are_refused(changes, message):
    run = CodeModelRun(model=CASES["dnd"])
    check_codes(run, source_of())
    with pytest.raises(InputError, match=message):
        check_codes(run, source_of(**changes))


def test_the_rq_transformer_needs_the_codebook():
    run = RQTransformerRun(model=CASES["rq"])
    check_codes(run, source_of(codebook=np.zeros((3, 12, 5))))
    for codebook, shape in ((None, "None"), (np.zeros((3, 12, 4)), r"\(3, 12, 4\)")):
        with pytest.raises(InputError, match=f"codebook.npy is {shape}, expected"):
            check_codes(run, source_of(codebook=codebook))


@pytest.fixture(scope="module")
def generator():
    blueprint, params, extra = random_model(CASES["dnd"])
    run = types.SimpleNamespace(model=CASES["dnd"], sampling=SamplingConfig(cfg_scale=(1.0,)))
    return Generator(run, params, extra, ["a", "b", "c"], CodeSampler(blueprint.build))


def test_best_of_n_keeps_the_highest_score(generator):
    classes = np.array([2, 0])
    codes, log_probs = generator.sample(np.repeat(classes, 4), seed=3, batch=8)
    totals = log_probs.sum((1, 2)).reshape(2, 4)
    assert len(np.unique(totals)) == 8
    best, scores = generator.best_of(classes, 4, seed=3)
    np.testing.assert_allclose(scores, totals.max(1), atol=1e-5)
    expected = codes.reshape(2, 4, 4, 3)[np.arange(2), totals.argmax(1)]
    np.testing.assert_array_equal(best, expected)
    with pytest.raises(InputError, match="n of at least 1, got 0"):
        generator.best_of(classes, 0)


def test_batches_go_on_where_the_last_one_stopped(generator):
    classes = np.arange(11) % 3
    whole, _ = generator.sample(classes, seed=5, batch=8)  # The second batch is padded.
    rest, _ = generator.sample(np.resize(classes[8:], 8), seed=5, batch=8, first_image=8)
    np.testing.assert_array_equal(whole[8:], rest[:3])


def test_completion_keeps_whole_rows(generator):
    given, _ = some_codes(CASES["dnd"], batch=8)
    codes, _ = generator.sample(np.zeros(8, int), given=given, given_rows=1)
    np.testing.assert_array_equal(codes[:, :2], given[:, :2])
    assert (codes[:, 2:] != given[:, 2:]).mean() > 0.3
