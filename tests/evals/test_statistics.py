"""Intervals against textbook values and against their own coverage."""

import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.evals.statistics import (
    Interval,
    bootstrap_interval,
    mean_interval,
    paired_difference,
    wilson_interval,
)


def test_t_interval_of_three_seeds_by_hand():
    # mean 2, sd 1, standard error 1/sqrt(3), t(0.975, 2 degrees of freedom) = 4.302653 (t table).
    half = 4.302653 / np.sqrt(3)
    interval = mean_interval([1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        [interval.mean, interval.low, interval.high], [2, 2 - half, 2 + half], atol=1e-6
    )
    assert interval.n == 3


def test_wilson_interval_by_formula():
    z, n, p = 1.959964, 20, 0.15
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = wilson_interval(3, 20)
    np.testing.assert_allclose(
        [interval.mean, interval.low, interval.high], [p, centre - half, centre + half], atol=1e-6
    )
    assert wilson_interval(0, 10).low == 0
    # z²/(n + z²) is the upper end at no success.
    np.testing.assert_allclose(wilson_interval(0, 10).high, z**2 / (10 + z**2), atol=1e-6)


def test_pairing_removes_the_shared_part():
    shared = np.array([0.0, 10.0, 20.0, 30.0])
    noise = np.array([0.1, -0.1, 0.1, -0.1])
    paired = paired_difference(shared + 1 + noise, shared)
    assert paired.excludes(0) and abs(paired.mean - 1) < 1e-9
    assert not mean_interval(shared + 1 + noise).excludes(0)


def test_bootstrap_covers_is_seeded_and_survives_constants():
    values = np.random.default_rng(0).normal(3, 1, 400)
    interval = bootstrap_interval(values, seed=1)
    assert interval == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert interval.low < 3 < interval.high
    # For 400 values the percentile bootstrap agrees with the t interval to a few percent.
    np.testing.assert_allclose(
        interval.high - interval.low, 2 * 1.966 * values.std(ddof=1) / 20, rtol=0.1
    )
    assert bootstrap_interval([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 3)
    assert bootstrap_interval(values, statistic=np.median).mean == np.median(values)


def test_text_form():
    assert str(Interval(0.51234, 0.4, 0.6, 3)) == "0.5123 [0.4, 0.6] (n=3)"


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: mean_interval([1.0]), "at least 2"),
        (lambda: mean_interval([1.0, np.nan]), "value 1 is nan"),
        (lambda: mean_interval([1.0, 2.0], confidence=95), "confidence is 95"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "2 and 3"),
        (lambda: wilson_interval(5, 4), "5 successes in 4"),
    ],
)
def test_bad_input_is_named(call, culprit):
    with pytest.raises(InputError, match=culprit):
        call()
