"""Decoding code stacks: cached = uncached, exact distributions, invariances, refusals."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from tiny_code_models import CASES, apply, random_model, some_codes

from jaxllm.decoding.cache import init_cache
from jaxllm.decoding.code_stacks import CodeSampler, SamplingConfig
from jaxllm.decoding.guidance import pair
from jaxllm.errors import InputError
from jaxllm.parallel.mesh import make_mesh

KEY = jax.random.key(11)


@partial(jax.jit, static_argnums=0)
def cached_logits(blueprint, params, extra, codes, class_ids):
    """Logits [B, cells, C, V] of one-cell steps that are told the true codes."""
    model = blueprint.build(params, extra)
    layers = model.unstack()

    def one_cell(carry, position):
        caches, previous = carry
        seen = []

        def choose(i, logits):
            seen.append(logits)
            return codes[:, position, i]

        caches = model.step(layers, caches, previous, class_ids, position, choose)
        return (caches, codes[:, position]), jnp.stack(seen, axis=1)

    # What the first step must not look at.
    nothing = jnp.full(codes.shape[::2], 7, jnp.int32)
    caches = init_cache(model.cache_shape, len(codes), model.dtype)
    _, logits = jax.lax.scan(one_cell, (caches, nothing), jnp.arange(codes.shape[1]))
    return logits.swapaxes(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_cached_logits_equal_uncached(name):
    """For the conditional and the unconditional rows of a guided batch; float32, 1e-4."""
    blueprint, params, extra = random_model(CASES[name])
    codes, classes = some_codes(CASES[name], batch=2)
    rows = pair(jnp.asarray(classes), CASES[name].null_class)
    codes = np.repeat(codes, 2, axis=0)
    uncached, _ = apply(blueprint, params, extra, codes, rows)
    cached = cached_logits(blueprint, params, extra, codes, rows)
    assert cached.dtype == jnp.float32
    np.testing.assert_allclose(cached, uncached, atol=1e-4)
    assert np.abs(uncached[0::2] - uncached[1::2]).max() > 0.1  # The class matters.


@pytest.mark.parametrize("name", ["dnd", "flat", "rq"])
def test_sampled_log_probs_equal_the_scorers(name):
    blueprint, params, extra = random_model(CASES[name])
    classes = np.array([0, 2, 1, 1], np.int32)
    config = SamplingConfig(cfg_scale=(2.0, 1.0, 3.0), temperature=(0.5, 1.0, 2.0), top_p=(0.9,))
    codes, log_probs = CodeSampler(blueprint.build)(params, extra, classes, KEY, config)
    _, scored = apply(blueprint, params, extra, codes, classes)
    assert codes.shape == log_probs.shape == scored.shape and codes.dtype == jnp.int32
    np.testing.assert_allclose(log_probs, scored, atol=1e-4)


def test_bfloat16_sampling_scores_like_the_scorer():
    blueprint, params, extra = random_model(CASES["options"], dtype=jnp.bfloat16)
    codes, classes = some_codes(CASES["options"])
    uncached, _ = apply(blueprint, params, extra, codes, classes)
    cached = cached_logits(blueprint, params, extra, codes, classes)
    assert cached.dtype == uncached.dtype == jnp.float32
    # Logits must not have been rounded to bfloat16's eight bits on their way.
    assert (cached != cached.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9
    np.testing.assert_allclose(cached, uncached, atol=0.1)


# -- the distribution itself ----------------------------------------------------------------------

SMALL = dict(codebook_size=3, grid=(1, 2), depth=2, layers=2)
GRIDS = np.array(list(itertools.product(range(3), repeat=4)), np.int32).reshape(81, 2, 2)


def small(name):
    return random_model(dataclasses.replace(CASES[name], **SMALL), seed=3)


@pytest.mark.parametrize("name", ["dnd", "vertical", "parallel", "flat", "rq"])
def test_probabilities_of_all_grids_sum_to_one(name):
    _, log_probs = apply(*small(name), GRIDS, np.full(81, 1))
    np.testing.assert_allclose(np.exp(log_probs.sum(axis=(1, 2))).sum(), 1.0, atol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_sample_frequencies(guided):
    """Chi-square against the exact probabilities, with guidance, temperature and top-k by hand."""
    blueprint, params, extra = small("dnd")
    logits = np.asarray(apply(blueprint, params, extra, GRIDS, np.full(81, 1))[0], np.float64)
    config = SamplingConfig(cfg_scale=(1.0,))
    if guided:
        config = SamplingConfig(
            cfg_scale=(3.0, 2.0), temperature=(0.7, 1.6), top_k=(0, 2), cfg_schedule="ramp"
        )
        null = np.asarray(apply(blueprint, params, extra, GRIDS, np.full(81, 3))[0], np.float64)
        scale = np.array([[1.0, 1.0], [3.0, 2.0]])[:, :, None]  # A ramp over two cells.
        logits = (null + scale * (logits - null)) / np.array([0.7, 1.6])[:, None]
        lowest = np.argmin(logits[:, :, 1], axis=-1)
        np.put_along_axis(logits[:, :, 1], lowest[..., None], -np.inf, axis=-1)
    weights = np.exp(logits)
    weights /= weights.sum(axis=-1, keepdims=True)
    exact = np.take_along_axis(weights, GRIDS[..., None], axis=-1).prod(axis=(1, 2, 3))
    np.testing.assert_allclose(exact.sum(), 1.0, atol=1e-5)

    draws = 6000
    codes, _ = CodeSampler(blueprint.build)(params, extra, np.full(draws, 1), KEY, config)
    numbers = np.asarray(codes).reshape(draws, 4) @ [27, 9, 3, 1]
    found = np.bincount(numbers, minlength=81)
    assert found[exact == 0].sum() == 0
    common = exact * draws >= 5
    assert common.sum() > 10
    observed = np.append(found[common], found[~common].sum())
    expected = np.append(exact[common], exact[~common].sum()) * draws
    assert stats.chisquare(observed, expected).pvalue > 1e-3


# -- what a sample may and may not depend on ------------------------------------------------------


@pytest.fixture(scope="module")
def sampling():
    """One sampler of the DnD model and a call that takes only what varies."""
    blueprint, params, extra = random_model(CASES["dnd"])
    sampler = CodeSampler(blueprint.build)
    base = SamplingConfig(cfg_scale=(2.0, 1.5, 3.0), top_p=(0.9,))

    def draw(classes=(0, 1, 2, 0, 1, 2, 0, 1), key=KEY, config=base, **kwargs):
        out = sampler(params, extra, np.asarray(classes), key, config, **kwargs)
        return tuple(map(np.asarray, out))

    draw.sampler = sampler
    return draw


def test_a_sample_does_not_depend_on_its_batch(sampling):
    codes, log_probs = sampling()
    order = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    classes = np.array((0, 1, 2, 0, 1, 2, 0, 1))
    shuffled = sampling(classes[order], image_ids=order)
    np.testing.assert_array_equal(shuffled[0], codes[order])
    few = sampling(classes[[6, 1]], image_ids=np.array([6, 1]))
    np.testing.assert_array_equal(few[0], codes[[6, 1]])
    np.testing.assert_allclose(few[1], log_probs[[6, 1]], atol=1e-5)
    # The same class with another number or another seed is another sample.
    assert (codes[0] != codes[3]).any()
    assert (sampling(key=jax.random.key(12))[0] != codes).mean() > 0.3


def test_a_sample_does_not_depend_on_the_devices(sampling):
    codes, log_probs = sampling()
    _, params, extra = random_model(CASES["dnd"])
    config = SamplingConfig(cfg_scale=(2.0, 1.5, 3.0), top_p=(0.9,))
    with jax.set_mesh(make_mesh()):
        classes = np.array((0, 1, 2, 0, 1, 2, 0, 1))
        split, split_log_probs = sampling.sampler(params, extra, classes, KEY, config)
    assert [shard.data.shape for shard in split.addressable_shards] == [(1, 4, 3)] * 8
    np.testing.assert_array_equal(split, codes)
    np.testing.assert_allclose(split_log_probs, log_probs, atol=1e-5)


def test_one_compilation_for_all_scales_temperatures_and_filters(sampling):
    sampling()
    compiled = sampling.sampler._run._cache_size()
    given, _ = some_codes(CASES["dnd"], batch=8)
    for scale, temperature, top_p in (((1.1,), (0.0,), (0.5,)), ((9.0, 1.0, 2.0), (0.3,), (0.99,))):
        config = SamplingConfig(cfg_scale=scale, temperature=temperature, top_p=top_p)
        sampling(config=config, given=given, given_cells=1)
        ramp = dataclasses.replace(config, cfg_schedule="ramp")
        sampling(key=jax.random.key(5), config=ramp, image_ids=np.arange(50, 58))
    assert sampling.sampler._run._cache_size() == compiled


def test_temperature_zero_is_the_most_likely_code_of_the_guided_logits(sampling):
    config = SamplingConfig(cfg_scale=(2.0, 1.5, 3.0), temperature=(0.0,), top_p=(0.9,))
    codes, _ = sampling(config=config)
    blueprint, params, extra = random_model(CASES["dnd"])
    classes = np.array((0, 1, 2, 0, 1, 2, 0, 1))
    conditional, _ = apply(blueprint, params, extra, codes, classes)
    null, _ = apply(blueprint, params, extra, codes, np.full(8, 3))
    mixed = null + np.array([2.0, 1.5, 3.0])[:, None] * (conditional - null)
    np.testing.assert_array_equal(codes, np.argmax(mixed, axis=-1))


def test_completion_keeps_the_given_cells_and_draws_the_rest(sampling):
    given, _ = some_codes(CASES["dnd"], batch=8)
    first, log_probs = sampling(given=given, given_cells=2)
    second, _ = sampling(given=given, given_cells=2, key=jax.random.key(99))
    np.testing.assert_array_equal(first[:, :2], given[:, :2])
    np.testing.assert_array_equal(second[:, :2], given[:, :2])
    assert (first[:, 2:] != second[:, 2:]).mean() > 0.3
    assert (first[:, 2:] != given[:, 2:]).mean() > 0.3
    # Given codes are scored too, and the drawn ones follow from them.
    blueprint, params, extra = random_model(CASES["dnd"])
    _, scored = apply(blueprint, params, extra, first, np.array((0, 1, 2, 0, 1, 2, 0, 1)))
    np.testing.assert_allclose(log_probs, scored, atol=1e-4)
    np.testing.assert_array_equal(sampling(given=given, given_cells=4)[0], given)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(classes=[0, 3]), "class id 3 is outside 0 .. 2"),
        (dict(classes=[-1]), "class id -1 is outside 0 .. 2"),
        (dict(classes=[0], given=np.full((1, 4, 3), 12)), "code 12 is outside 0 .. 11"),
        (dict(classes=[0], given=np.full((1, 4, 3), -1)), "code -1 is outside 0 .. 11"),
        (dict(classes=[0], given=np.zeros((1, 3, 3))), r"expected \(1, 4, 3\)"),
        (dict(classes=[0], given=np.zeros((1, 4, 3)), given_cells=5), "5 cells kept"),
        (dict(config=SamplingConfig(cfg_scale=(0.5,))), "cfg_scale 0.5 must be 1"),
        (dict(config=SamplingConfig(cfg_scale=(float("nan"),))), "cfg_scale nan must be 1"),
        (dict(config=SamplingConfig(top_p=(0.0,))), "top_p 0.0"),
        (dict(config=SamplingConfig(temperature=(1.0, 1.0))), "needs 1 value or one per depth"),
    ],
)
def test_refusals(sampling, change, message):
    with pytest.raises(InputError, match=message):
        sampling(**change)


def test_guidance_needs_a_null_class():
    blueprint, params, extra = random_model(dataclasses.replace(CASES["dnd"], class_dropout=0.0))
    assert params["class_embed"].shape == (3, 16)
    with pytest.raises(InputError, match="needs a model trained with class dropout"):
        CodeSampler(blueprint.build)(params, extra, np.zeros(1, int), KEY, SamplingConfig())
