"""Means, differences and proportions with their intervals.

Every number a report prints goes through here, so that it carries an interval and a sample size:
Student-t over seeds, percentile bootstrap over examples, t of paired differences, and the Wilson
score interval for a proportion (Wilson, 1927).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jaxllm.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
      mean: the estimate.
      low: lower end of the interval.
      high: upper end of the interval.
      n: number of observations behind it.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval; of a difference, ask for `excludes(0)`."""
        return not self.low <= value <= self.high


def mean_interval(values: Sequence[float] | ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean with the two-sided Student-t interval, the one to use over a few seeds.

    Args:
      values: [n] observations, n >= 2.
      confidence: coverage in (0, 1).

    Raises:
      InputError: fewer than two values, a non-finite value, or a confidence outside (0, 1).
    """
    x = _observations(values, confidence)
    mean = float(x.mean())
    half = float(stats.t.ppf(0.5 + confidence / 2, x.size - 1) * stats.sem(x))
    return Interval(mean, mean - half, mean + half, x.size)


def bootstrap_interval(
    values: Sequence[float] | ArrayLike,
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic with its percentile-bootstrap interval, the one to use over many examples.

    Args:
      values: [n] observations, n >= 2.
      statistic: a function of the values and of `axis`, such as `np.mean` or `np.median`.
      confidence: coverage in (0, 1).
      resamples: number of bootstrap resamples.
      seed: seed of the resampling.

    Raises:
      InputError: fewer than two values, a non-finite value, or a confidence outside (0, 1).
    """
    x = _observations(values, confidence)
    # Percentile, not scipy's default BCa: BCa is undefined when all values are equal.
    interval = stats.bootstrap(
        (x,),
        statistic,
        n_resamples=resamples,
        batch=max(1, 10_000_000 // x.size),
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    estimate = float(statistic(x, axis=-1))
    return Interval(estimate, float(interval.low), float(interval.high), x.size)


def nested_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean with the percentile interval of a bootstrap over groups and the members within each.

    Groups (trained models, say) are drawn with replacement, then members of each (test examples),
    so that both kinds of chance widen the interval. With three groups it is rough.

    Args:
      values: [groups, members], all groups of one size.
      confidence: coverage in (0, 1).
      resamples: number of bootstrap resamples.
      seed: seed of the resampling.

    Raises:
      InputError: not two axes, a non-finite value, or a confidence outside (0, 1).
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise InputError(f"values of shape {x.shape}, expected finite values [groups, members]")
    _check_confidence(confidence)
    rng = np.random.default_rng(seed)
    groups, members = x.shape
    picked = rng.integers(groups, size=(resamples, groups))
    rows = rng.integers(members, size=(resamples, groups, members))
    means = x[picked[..., None], rows].mean(axis=(1, 2))
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(x.mean()), float(low), float(high), x.size)


def paired_difference(
    a: Sequence[float] | ArrayLike, b: Sequence[float] | ArrayLike, confidence: float = 0.95
) -> Interval:
    """Mean of `a - b` over pairs (same seed, same example) with its Student-t interval.

    Args:
      a: [n] observations of the first arm.
      b: [n] observations of the second arm, in the same order.
      confidence: coverage in (0, 1).

    Raises:
      InputError: unequal lengths, or as `mean_interval`.
    """
    first, second = _observations(a, confidence), _observations(b, confidence)
    if first.size != second.size:
        raise InputError(f"paired arms have {first.size} and {second.size} values, expected equal")
    return mean_interval(first - second, confidence)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """A proportion with its Wilson score interval, sensible at 0 and 1 too.

    Args:
      successes: number of successes, 0 <= successes <= n.
      n: number of trials, n >= 1.
      confidence: coverage in (0, 1).

    Raises:
      InputError: counts out of range, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    if not 0 <= successes <= n or n < 1:
        raise InputError(f"{successes} successes in {n} trials, expected 0 <= successes <= n >= 1")
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high), n)


def _observations(values: Sequence[float] | ArrayLike, confidence: float) -> np.ndarray:
    _check_confidence(confidence)
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or x.size < 2:
        raise InputError(f"values of shape {x.shape}, expected one axis with at least 2 values")
    if not np.isfinite(x).all():
        index = int(np.flatnonzero(~np.isfinite(x))[0])
        raise InputError(f"value {index} is {x[index]}, expected finite values")
    return x


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}, expected a number between 0 and 1")
