"""Delta of the unified view: closed forms of every loss against autodiff, at random points."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit, logit

from jaxllm.preference import (
    ALGORITHMS,
    PairStats,
    PointStats,
    RolloutStats,
    algorithm,
    gradient_coefficient,
    mean_over_rows,
    preference_loss,
)

pytestmark = pytest.mark.usefixtures("x64")


def slope(v):
    """Derivative of sigma."""
    return expit(v) * expit(-v)


@dataclasses.dataclass
class Point:
    """Numbers of the pairs, as the table of closed forms names them."""

    w: np.ndarray
    l: np.ndarray  # noqa: E741
    a: np.ndarray
    c: np.ndarray
    nw: np.ndarray
    nl: np.ndarray

    @property
    def d(self):
        return self.a - self.c

    @property
    def odds(self):
        w, l = self.w / self.nw, self.l / self.nl  # noqa: E741
        return (w - l) - (np.log1p(-np.exp(w)) - np.log1p(-np.exp(l)))

    @property
    def simpo(self):
        return 2.0 * (self.w / self.nw - self.l / self.nl) - 1.0


B, EPS = 0.3, 0.1


def both(value):
    return value, -value


# (name, options) -> (-dL/dl_w, -dL/dl_l)
CLOSED = {
    "dpo": ({"beta": B}, lambda x: both(B * expit(-B * x.d))),
    "cdpo": (
        {"beta": B, "label_smoothing": EPS},
        lambda x: both(B * ((1 - EPS) * expit(-B * x.d) - EPS * expit(B * x.d))),
    ),
    "robust_dpo": (
        {"beta": B, "label_smoothing": EPS},
        lambda x: both(B * ((1 - EPS) * expit(-B * x.d) + EPS * expit(B * x.d)) / (1 - 2 * EPS)),
    ),
    "hinge": ({"beta": B}, lambda x: both(B * (B * x.d < 1))),
    "ipo": (
        {"tau": B, "average": "sum"},
        lambda x: both(-2 * (x.d - 1 / (2 * B))),
    ),
    "exo": (
        {"beta": B, "label_smoothing": EPS},
        lambda x: both(-B * slope(B * x.d) * (B * x.d - logit(1 - EPS))),
    ),
    "nca": (
        {"beta": B},
        lambda x: (B * (expit(-B * x.a) - expit(B * x.a) / 2), -B * expit(B * x.c) / 2),
    ),
    "bco_pair": (
        {"beta": B, "shift": "zero"},
        lambda x: (B * expit(-B * x.a), -B * expit(B * x.c)),
    ),
    "sppo": (
        {"beta": B},
        lambda x: (-2 * (x.a - 1 / (2 * B)), -2 * (x.c + 1 / (2 * B))),
    ),
    "apo_zero": ({"beta": B}, lambda x: (B * slope(B * x.a), -B * slope(B * x.c))),
    "apo_down": (
        {"beta": B},
        lambda x: (B * (slope(B * x.d) - slope(B * x.a)), -B * slope(B * x.d)),
    ),
    "simpo": (
        {"beta": 2.0, "gamma": 1.0},
        lambda x: (2 / x.nw * expit(-x.simpo), -2 / x.nl * expit(-x.simpo)),
    ),
    "cpo": (
        {"beta": B, "nll_weight": 0.7},
        lambda x: (
            B * expit(-B * (x.w - x.l)) + 0.7 / x.nw,
            -B * expit(-B * (x.w - x.l)),
        ),
    ),
    "orpo": (
        {"odds_weight": B},
        lambda x: (
            (1 + B * expit(-x.odds) / (1 - np.exp(x.w / x.nw))) / x.nw,
            -B / x.nl * expit(-x.odds) / (1 - np.exp(x.l / x.nl)),
        ),
    ),
    "dpop": (
        {"beta": B, "penalty": 5.0},
        lambda x: (
            B * expit(-B * (x.d - 5 * np.maximum(0, -x.a))) * (1 + 5 * (x.a < 0)),
            -B * expit(-B * (x.d - 5 * np.maximum(0, -x.a))),
        ),
    ),
    "slic_hf": (
        {"margin": 1.0, "nll_weight": 0.1},
        lambda x: ((x.w - x.l < 1) + 0.1, -1.0 * (x.w - x.l < 1)),
    ),
    "sft": ({}, lambda x: (1 / x.nw, 0 * x.nl)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_of_pairs(name, stats_of):
    options, closed = CLOSED[name]
    stats = stats_of(PairStats, rows=12)
    as_numpy = [np.asarray(x) for x in (stats.chosen.logps, stats.rejected.logps)]
    refs = [np.asarray(x) for x in (stats.chosen.ref_logps, stats.rejected.ref_logps)]
    lengths = [np.asarray(x.lengths) for x in (stats.chosen, stats.rejected)]
    point = Point(*as_numpy, as_numpy[0] - refs[0], as_numpy[1] - refs[1], *lengths)
    delta = gradient_coefficient(stats, algorithm(name).config(**options))
    expected_w, expected_l = closed(point)
    np.testing.assert_allclose(delta.chosen.logps, expected_w, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(delta.rejected.logps, expected_l, rtol=1e-10, atol=1e-12)


def test_wpo_scales_delta_of_dpo_by_a_constant_weight(stats_of):
    stats = stats_of(PairStats)
    dpo = gradient_coefficient(stats, algorithm("dpo").config())
    wpo = gradient_coefficient(stats, algorithm("wpo").config(largest_weight=None))
    log_w = sum((s.logps - s.collision) / s.lengths for s in (stats.chosen, stats.rejected))
    np.testing.assert_allclose(wpo.chosen.logps, jnp.exp(log_w) * dpo.chosen.logps, rtol=1e-10)


def test_closed_form_of_labels(stats_of):
    stats = stats_of(PointStats, rows=12)
    a = np.asarray(stats.completions.log_ratio)
    good = np.asarray(stats.desirable)
    config = algorithm("kto").config(beta=B, desirable_weight=1.2, undesirable_weight=0.8)
    z = max(0.0, np.mean(np.asarray(stats.mismatched.log_ratio)))
    expected = np.where(good, 1.2 * B * slope(B * (a - z)), -0.8 * B * slope(B * (z - a)))
    delta = gradient_coefficient(stats, config)
    np.testing.assert_allclose(delta.completions.logps, expected, rtol=1e-10)
    assert not np.any(np.asarray(delta.mismatched.logps))

    shift = np.mean(B * a)
    expected = np.where(good, B * expit(-(B * a - shift)), -B * expit(B * a - shift))
    delta = gradient_coefficient(stats, algorithm("bco").config(beta=B, shift="batch"))
    np.testing.assert_allclose(delta.completions.logps, expected, rtol=1e-10)


def test_closed_form_of_selection(stats_of):
    stats = stats_of(PointStats)
    rewards, lengths = np.asarray(stats.rewards), np.asarray(stats.completions.lengths)
    delta = gradient_coefficient(stats, algorithm("raft").config(group_size=4))
    best = np.zeros(8)
    best[[rewards[:4].argmax(), 4 + rewards[4:].argmax()]] = 1
    np.testing.assert_allclose(delta.completions.logps, best / lengths, rtol=1e-12)
    delta = gradient_coefficient(stats, algorithm("rft").config(threshold=0.8))
    np.testing.assert_allclose(delta.completions.logps, (rewards >= 0.8) / lengths, rtol=1e-12)


def test_closed_form_of_rollouts(stats_of):
    stats = stats_of(RolloutStats)
    mask, rewards = np.asarray(stats.mask), np.asarray(stats.rewards)
    groups = rewards.reshape(-1, 4)
    others = (groups.sum(1, keepdims=True) - groups) / 3
    advantages = (groups - others).reshape(-1)
    fresh = dataclasses.replace(stats, old_logps=None)
    for epsilon in (None, 0.2):
        config = algorithm("rloo").config(group_size=4, epsilon=epsilon, kl_coef=0.0)
        delta = gradient_coefficient(fresh, config)
        np.testing.assert_allclose(delta.logps, advantages[:, None] * mask, rtol=1e-10)
    delta = gradient_coefficient(fresh, algorithm("reinforce").config(baseline="none"))
    np.testing.assert_allclose(delta.logps, rewards[:, None] * mask, rtol=1e-10)
    delta = gradient_coefficient(fresh, algorithm("remax").config())
    expected = (rewards - np.asarray(stats.baselines))[:, None] * mask
    np.testing.assert_allclose(delta.logps, expected, rtol=1e-10)

    # GRPO: A rho where the clip leaves it, and kl_coef (ref/policy - 1), averaged per sequence.
    config = algorithm("grpo").config(group_size=4, kl_coef=0.04, loss_type="grpo")
    advantages = (groups - groups.mean(1, keepdims=True)) / (
        groups.std(1, ddof=1, keepdims=True) + 1e-4
    )
    advantages = advantages.reshape(-1, 1)
    ratio = np.exp(np.asarray(stats.logps - stats.old_logps))
    free = np.where(advantages > 0, ratio <= 1.2, ratio >= 0.8)
    kl = 0.04 * (np.exp(np.asarray(stats.ref_logps - stats.logps)) - 1)
    expected = (advantages * ratio * free + kl) * mask / mask.sum(1, keepdims=True)
    assert 0 < free[mask].mean() < 1
    delta = gradient_coefficient(stats, config)
    np.testing.assert_allclose(delta.logps, expected, rtol=1e-9, atol=1e-12)


def test_delta_per_token_and_the_form_of_the_survey(stats_of):
    stats = stats_of(PairStats)
    config = algorithm("ld_dpo").config(alpha=0.25)
    delta = gradient_coefficient(stats, config)
    # u of the definition, by a loop.
    for row in range(len(stats.chosen.logps)):
        shared = min(int(stats.chosen.lengths[row]), int(stats.rejected.lengths[row]))
        weights = np.where(np.arange(6) < shared, 1.0, 0.25)
        sums = []
        for s in (stats.chosen, stats.rejected):
            used = weights * np.asarray(s.mask[row])
            sums.append(used @ np.asarray(s.token_logps[row] - s.ref_token_logps[row]))
        push = 0.1 * expit(-0.1 * (sums[0] - sums[1]))
        expected = push * weights * np.asarray(stats.chosen.mask[row])
        np.testing.assert_allclose(delta.chosen.token_logps[row], expected, rtol=1e-10)
    # SFT pushes every token by 1/|o|; times |o| that is 1.
    delta = gradient_coefficient(stats, algorithm("sft").config(), per_token_mean=True)
    np.testing.assert_allclose(delta.chosen.token_logps, stats.chosen.mask * 1.0, rtol=1e-12)


def at_reference(stats):
    def equal(s):
        return dataclasses.replace(s, ref_logps=s.logps, ref_token_logps=s.token_logps, kl=0 * s.kl)

    return dataclasses.replace(stats, chosen=equal(stats.chosen), rejected=equal(stats.rejected))


# The reference-free hinge of SLiC-HF is 0 once the margin is there, which is allowed: >= and <=.
# DiscoPOP's slope at u = 0 is 5 (1 - ln 2) - 3/4 > 0: it falls only from u = 0.09 on.
PAIR_NAMES = [
    name for name, entry in ALGORITHMS.items() if entry.stats == (PairStats,) and name != "discopop"
]


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_at_the_reference_chosen_goes_up_and_rejected_down(name, stats_of):
    stats = at_reference(stats_of(PairStats))
    delta = gradient_coefficient(stats, algorithm(name).config())
    # Per token, so that losses of tokens and of sums are read alike.
    w = np.asarray(delta.chosen.token_logps)[np.asarray(stats.chosen.mask)]
    l = np.asarray(delta.rejected.token_logps)[np.asarray(stats.rejected.mask)]  # noqa: E741
    assert w.min() >= 0 and l.max() <= 0 and l.min() < 0
    assert (w.max() > 0) == (name != "apo_down")


@pytest.mark.parametrize("name", ["dpo", "grpo", "sft"])
def test_delta_times_the_gradient_of_the_log_probs_is_the_gradient(name, stats_of):
    """A model whose log-probs are linear in a parameter: chain rule against direct autodiff."""
    entry = algorithm(name)
    config = entry.config(group_size=4) if name == "grpo" else entry.config()
    stats = stats_of(entry.stats[0])
    direction = jnp.asarray(np.random.default_rng(5).normal(size=8))

    def shifted(theta):
        if isinstance(stats, RolloutStats):
            return dataclasses.replace(stats, logps=stats.logps + theta * direction[:, None])
        field = "chosen" if hasattr(stats, "chosen") else "completions"
        own = getattr(stats, field)
        moved = dataclasses.replace(own, logps=own.logps + theta * direction)
        return dataclasses.replace(stats, **{field: moved})

    def loss(theta):
        given = shifted(theta)
        return mean_over_rows(preference_loss(given, config)[0], given)

    delta = gradient_coefficient(stats, config)
    if isinstance(stats, RolloutStats):
        pushed = (delta.logps * direction[:, None]).sum()
    else:
        own = delta.chosen if hasattr(delta, "chosen") else delta.completions
        pushed = (own.logps * direction).sum()
    np.testing.assert_allclose(jax.grad(loss)(0.0), -pushed / 8, rtol=1e-10)
    assert math.isfinite(float(pushed)) and pushed != 0


def test_log_sigmoid_of_the_point_is_what_dpo_reports(stats_of):
    stats = stats_of(PairStats)
    loss, _ = preference_loss(stats, algorithm("dpo").config(beta=B))
    np.testing.assert_allclose(loss, -log_expit(B * np.asarray(stats.margin)), rtol=1e-12)
