"""Distances between distributions by hand, the NaN of equal ones, and the sampling floor."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import multinomial

from jaxllm.errors import InputError
from jaxllm.evals.distributions import (
    entropy_ratio,
    js_distance,
    js_distance_floor,
    kl_divergence,
    majority_bias,
    minority_recall,
    reference_distributions,
    sampled_js_distance,
)

P = np.array([0.5, 0.3, 0.15, 0.05])


def test_js_distance_is_that_of_scipy_where_scipy_has_one():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), (2, 20))
    expected = [jensenshannon(a, b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(js_distance(p, q), expected, rtol=1e-12)
    np.testing.assert_allclose(js_distance([1.0, 0.0], [0.0, 1.0]), math.sqrt(math.log(2)))


def test_equal_distributions_have_distance_zero_and_not_nan():
    """Rounding makes some of these divergences -1e-17; the released evaluation drops them."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(6), 2000)
    q = p * (1 + 1e-16) / 1.0
    distances = js_distance(p, q)
    assert np.isfinite(distances).all() and distances.max() < 1e-7


def test_printed_distances_of_the_dpo_optimum():
    for beta, expected in ((0.1, 0.4496), (0.5, 0.1653), (1.0, 0.0)):
        q = P ** (1 / beta)
        np.testing.assert_allclose(js_distance(P, q / q.sum()), expected, atol=5.1e-5)


def test_kl_majority_bias_minority_recall_and_entropy_by_hand():
    q = np.array([0.7, 0.2, 0.1, 0.0])
    np.testing.assert_allclose(
        kl_divergence(q, P), sum(a * math.log(a / b) for a, b in zip(q[:3], P, strict=False))
    )  # noqa: E501
    assert kl_divergence(P, q) == np.inf
    np.testing.assert_allclose(majority_bias(P, q), 1.4)
    np.testing.assert_allclose(minority_recall(P, q), 0.1 / 0.2)
    assert np.isnan(minority_recall([0.5, 0.5], [0.9, 0.1]))
    np.testing.assert_allclose(entropy_ratio([0.5, 0.5], [1.0, 0.0]), 0.0)
    assert np.isnan(entropy_ratio([1.0, 0.0], [0.5, 0.5]))
    stacked = np.stack([P, P[::-1]])
    np.testing.assert_allclose(majority_bias(stacked, stacked[::-1]), [0.1, 0.1])


def test_floor_is_the_exact_mean_over_all_samples_of_eight():
    exact = sum(
        multinomial.pmf(counts, 8, P) * js_distance(P, np.array(counts) / 8)
        for counts in itertools.product(range(9), repeat=4)
        if sum(counts) == 8
    )
    # Standard error of 20,000 draws is about 0.0006.
    np.testing.assert_allclose(js_distance_floor(P, 8, draws=20_000), exact, atol=2.5e-3)
    assert js_distance_floor(P, 64) < js_distance_floor(P, 8) / 2
    assert js_distance_floor(P, 8, seed=3) == js_distance_floor(P, 8, seed=3)


def test_sampled_distance_comes_with_its_floor_and_counts_what_it_cannot_read():
    found = sampled_js_distance(P, [0, 0, 1, None, 2])
    np.testing.assert_allclose(found.distance, js_distance(P, [0.5, 0.25, 0.25, 0]))
    assert (found.samples, found.unreadable) == (4, 1)
    assert found.floor == js_distance_floor(P, 4)
    released = sampled_js_distance(P, [0, 0, 1, None, 2], unreadable_class=0)
    np.testing.assert_allclose(released.distance, js_distance(P, [0.6, 0.2, 0.2, 0]))
    assert (released.samples, released.unreadable) == (5, 1)
    with pytest.raises(InputError, match="none of 2 samples"):
        sampled_js_distance(P, [None, None])
    with pytest.raises(InputError, match="class 4, expected 0 .. 3"):
        sampled_js_distance(P, [0, 4])


def test_reference_lines():
    lines = reference_distributions(P)
    expected = {
        "uniform": [0.25] * 4,
        "moved_0.05": [0.45, 0.3, 0.15, 0.1],
        "moved_0.1": [0.4, 0.3, 0.15, 0.15],
        "reversed": [0.05, 0.15, 0.3, 0.5],
        "majority": [1, 0, 0, 0],
    }
    assert lines.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(lines[name], value, atol=1e-12)


@pytest.mark.parametrize("bad", [[0.5, 0.4], [1.5, -0.5], [np.nan, 1.0]])
def test_what_is_no_distribution_is_refused(bad):
    with pytest.raises(InputError, match="sum to 1"):
        js_distance(bad, [0.5, 0.5])
