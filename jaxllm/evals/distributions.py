"""Distances and biases between distributions over a few classes, from probabilities or samples.

p [..., M] is the target and q the model's distribution; both sum to 1. A distance from samples is
never 0, even for a perfect model: `sampled_js_distance` returns that floor beside it. Metrics of
section 5 of arXiv:2412.20299.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr, rel_entr

from jaxllm.errors import InputError


def js_distance(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """Square root of the Jensen-Shannon divergence in nats [...], in [0, 0.8326].

    The divergence is held at 0 or above: of equal distributions rounding makes it -1e-17, whose
    root is NaN, and an evaluation that drops NaN drops the perfect answers.
    """
    p, q = _distributions(p), _distributions(q)
    middle = (p + q) / 2
    divergence = (rel_entr(p, middle) + rel_entr(q, middle)).sum(-1) / 2
    return np.sqrt(np.maximum(divergence, 0.0))


def kl_divergence(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """KL(p || q) in nats [...]; infinite where q lacks a class of p."""
    return rel_entr(_distributions(p), _distributions(q)).sum(-1)


def majority_bias(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """q(argmax p) / max p [...]: 1 is ideal, above 1 the majority is over-represented."""
    p, q = _distributions(p), _distributions(q)
    top = np.argmax(p, -1)[..., None]
    return (np.take_along_axis(q, top, -1) / np.take_along_axis(p, top, -1))[..., 0]


def minority_recall(p: ArrayLike, q: ArrayLike, below: float = 0.2) -> np.ndarray:
    """q(minority) / p(minority) [...], the minority being classes with 0 < p < `below`.

    NaN where p has no minority; average with `np.nanmean` and say how many there are.
    """
    p, q = _distributions(p), _distributions(q)
    minority = (p > 0) & (p < below)
    mass = np.where(minority, p, 0).sum(-1)
    found = np.where(minority, q, 0).sum(-1)
    return np.where(mass > 0, found / np.where(mass > 0, mass, 1), np.nan)


def entropy_ratio(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """H(q) / H(p) [...]: below 1 the model is more certain than the group; NaN where H(p) is 0."""
    ours, theirs = entr(_distributions(q)).sum(-1), entr(_distributions(p)).sum(-1)
    return np.where(theirs > 0, ours / np.where(theirs > 0, theirs, 1), np.nan)


@dataclass(frozen=True)
class SampledDistance:
    """A JS distance from samples, and what a perfect model would show.

    Attributes:
      distance: Of the samples' frequencies to the target.
      floor: Mean distance of as many samples drawn from the target itself.
      samples: How many were counted.
      unreadable: How many named no class.
    """

    distance: float
    floor: float
    samples: int
    unreadable: int


def sampled_js_distance(
    p: ArrayLike,
    classes: Sequence[int | None],
    *,
    unreadable_class: int | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> SampledDistance:
    """JS distance of sampled classes to `p` [M], with the floor for that number of samples.

    Args:
      p: [M], the target of one prompt.
      classes: Class of each sample; None where it could not be read.
      unreadable_class: Count those as this class (the released evaluation of GDPO takes 0);
        None leaves them out.
      draws: Simulated evaluations behind the floor.
      seed: Of those.

    Raises:
      InputError: A class outside [0, M), or no sample to count.
    """
    target = _distributions(p)
    unreadable = sum(c is None for c in classes)
    filled = [unreadable_class if c is None else c for c in classes]
    counted = np.array([c for c in filled if c is not None], int)
    if not len(counted):
        raise InputError(f"none of {len(classes)} samples names a class, expected at least one")
    if counted.min() < 0 or counted.max() >= len(target):
        raise InputError(f"a sample is of class {counted.max()}, expected 0 .. {len(target) - 1}")
    frequencies = np.bincount(counted, minlength=len(target)) / len(counted)
    floor = js_distance_floor(target, len(counted), draws, seed)
    return SampledDistance(float(js_distance(target, frequencies)), floor, len(counted), unreadable)


def js_distance_floor(p: ArrayLike, samples: int, draws: int = 2000, seed: int = 0) -> float:
    """Mean JS distance to `p` [M] of the frequencies of samples drawn from `p`; Monte Carlo.

    Raises:
      InputError: No samples.
    """
    if samples < 1:
        raise InputError(f"{samples} samples, expected at least 1")
    p = _distributions(p)
    counts = np.random.default_rng(seed).multinomial(samples, p / p.sum(), size=draws)
    return float(js_distance(p, counts / samples).mean())


def reference_distributions(p: ArrayLike) -> dict[str, np.ndarray]:
    """Distributions [M] whose distances to `p` [M] give a distance its scale.

    Uniform, `p` with 0.05 or 0.1 moved from its most to its least likely class, `p` reversed, and
    everything on the majority.
    """
    p = _distributions(p)
    lines = {"uniform": np.full(len(p), 1 / len(p))}
    top, bottom = np.argmax(p), np.argmin(p)
    for share in (0.05, 0.1):
        moved = p.copy()
        amount = min(share, p[top])
        moved[top] -= amount
        moved[bottom] += amount
        lines[f"moved_{share:g}"] = moved
    return {**lines, "reversed": p[::-1].copy(), "majority": np.eye(len(p))[top]}


def _distributions(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all() or x.min() < 0 or np.abs(x.sum(-1) - 1).max() > 1e-3:
        raise InputError(
            f"a distribution of shape {x.shape} has a negative or non-finite entry or does not sum "
            "to 1"
        )
    return x
