"""Where public implementations disagree: which side is taken, and that the other is an option."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.preference import (
    PairStats,
    PointStats,
    RunningMean,
    Sequences,
    algorithm,
    gradient_coefficient,
    preference_loss,
    preset,
)
from jaxllm.preference.pointwise import mismatched_rows
from jaxllm.preference.reference_free import log1mexp

pytestmark = pytest.mark.usefixtures("x64")


def loss_of(stats, name, **options):
    return preference_loss(stats, algorithm(name).config(**options))[0]


def one(logps, ref, length):
    return Sequences(jnp.asarray([logps]), jnp.asarray([length]), jnp.asarray([ref]))


def test_r_dpo_pushes_a_longer_winner_less():
    """From max r - alpha |y| - beta KL: the margin gets plus alpha (|w| - |l|)."""
    push = []
    for length in (4, 8, 16):
        stats = PairStats(one(-12.0, -12.0, length), one(-14.0, -14.0, 8))
        config = algorithm("r_dpo").config(alpha=0.1)
        push.append(float(gradient_coefficient(stats, config).chosen.logps[0]))
    assert push[0] > push[1] > push[2]
    # u = 0.1 * (16 - 8) = 0.8.
    np.testing.assert_allclose(push[2], 0.1 / (1 + math.exp(0.8)), rtol=1e-12)


def test_dpop_punishes_the_fall_of_the_chosen_completion():
    fallen, kept = one(-13.0, -12.0, 6), one(-12.0, -12.0, 6)
    other = one(-15.0, -14.0, 8)
    losses = [loss_of(PairStats(w, other), "dpop", beta=0.1, penalty=5.0) for w in (fallen, kept)]
    assert losses[0] > losses[1]
    # Inside the sigmoid: Delta = 0, penalty 5.
    np.testing.assert_allclose(losses[0], math.log1p(math.exp(0.5)), rtol=1e-12)


def test_ipo_of_means_and_sums():
    stats = PairStats(one(-12.0, -13.0, 4), one(-14.0, -13.5, 10))
    np.testing.assert_allclose(loss_of(stats, "ipo"), (1 / 4 + 0.5 / 10 - 5) ** 2)
    np.testing.assert_allclose(loss_of(stats, "ipo", average="sum"), (1.5 - 5) ** 2)
    assert preset("ipo_sum") == algorithm("ipo").config(average="sum")


def test_ipo_takes_lengths_from_the_mask_also_where_policy_and_reference_agree():
    tokens, mask = jnp.full((1, 6), -2.0), jnp.arange(6)[None] < 4
    same = Sequences.from_tokens(tokens, mask, tokens)
    assert same.lengths == 4
    np.testing.assert_allclose(loss_of(PairStats(same, same), "ipo"), 25.0)


def test_ld_dpo_discounts_the_reference_too(stats_of):
    stats = stats_of(PairStats)
    same = dataclasses.replace(
        stats,
        chosen=dataclasses.replace(
            stats.chosen, ref_logps=stats.chosen.logps, ref_token_logps=stats.chosen.token_logps
        ),
        rejected=dataclasses.replace(
            stats.rejected,
            ref_logps=stats.rejected.logps,
            ref_token_logps=stats.rejected.token_logps,
        ),
    )
    np.testing.assert_allclose(loss_of(same, "ld_dpo"), math.log(2), rtol=1e-12)
    full = loss_of(same, "ld_dpo", reference="full")
    uneven = np.asarray(stats.chosen.lengths != stats.rejected.lengths)
    assert (np.abs(np.asarray(full) - math.log(2)) > 1e-6).tolist() == uneven.tolist()
    np.testing.assert_allclose(
        loss_of(stats, "ld_dpo", alpha=1.0), loss_of(stats, "dpo"), rtol=1e-12
    )


def test_wpo_bounds_the_weight_by_one_unless_told_otherwise(stats_of):
    stats = stats_of(PairStats)
    sure = dataclasses.replace(stats.chosen, collision=stats.chosen.logps - 3 * 6)
    stats = dataclasses.replace(stats, chosen=sure)
    dpo = loss_of(stats, "dpo")
    assert np.all(np.asarray(loss_of(stats, "wpo")) <= np.asarray(dpo) + 1e-12)
    assert np.all(np.asarray(loss_of(stats, "wpo", largest_weight=None)) > np.asarray(dpo))


def test_wpo_weight_from_logits_by_hand():
    """w = exp(mean_t [log p_t - log sum p^2]); one token of p = (0.5, 0.3, 0.2)."""
    p = jnp.asarray([0.5, 0.3, 0.2])
    lse = jax.nn.logsumexp
    logits = jnp.log(p) + 1.7
    collision = lse(2 * logits) - 2 * lse(logits)
    np.testing.assert_allclose(collision, math.log(0.38), rtol=1e-12)

    def sequences(token):
        return Sequences(
            jnp.log(p[token])[None], jnp.asarray([1]), jnp.log(p[token])[None],
            collision=collision[None],
        )  # fmt: skip

    loss = loss_of(PairStats(sequences(1), sequences(2)), "wpo", largest_weight=None)
    np.testing.assert_allclose(loss, 0.3 / 0.38 * 0.2 / 0.38 * math.log(2), rtol=1e-12)


def test_bco_shift_is_zero_batch_or_running_mean():
    stats = PointStats(
        completions=Sequences(
            jnp.asarray([-10.0, -12.0]), jnp.asarray([5, 5]), jnp.asarray([-12.0, -11.0])
        ),
        desirable=jnp.asarray([True, False]),
        running=RunningMean(jnp.asarray(0.4), jnp.asarray(2.0)),
    )
    # Rewards 0.2 and -0.1: batch mean 0.05; with two of mean 0.4 before, 0.225.
    for shift, delta, count in (("zero", 0.0, 0), ("batch", 0.05, 2), ("running", 0.225, 4)):
        loss, metrics = preference_loss(stats, algorithm("bco").config(shift=shift))
        np.testing.assert_allclose(metrics["bco/delta"], delta, atol=1e-12)
        assert metrics["bco/count"] == count
        expected = [math.log1p(math.exp(delta - 0.2)), math.log1p(math.exp(-0.1 - delta))]
        np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_running_mean_of_batches_is_the_mean_of_all():
    values = np.random.default_rng(0).normal(size=(5, 7))
    keep = np.random.default_rng(1).uniform(size=(5, 7)) < 0.6
    state = RunningMean.start()
    for v, k in zip(values, keep, strict=True):
        state = state.update(jnp.asarray(v), jnp.asarray(k))
    np.testing.assert_allclose(state.mean, values[keep].mean(), rtol=1e-12)
    assert state.count == keep.sum()


def test_bco_density_weights_are_clipped_and_touch_undesirable_rows_only():
    same = Sequences(jnp.full(4, -9.0), jnp.full(4, 3), jnp.full(4, -9.0))
    stats = PointStats(
        completions=same,
        desirable=jnp.asarray([True, False, False, False]),
        density_ratio=jnp.asarray([7.0, 0.1, 2.0, 50.0]),
    )
    loss = loss_of(stats, "bco", density_weights=True)
    np.testing.assert_allclose(loss, np.array([1, 0.5, 2.0, 10.0]) * math.log(2), rtol=1e-12)


@pytest.mark.parametrize("batch", [2, 3, 7, 8])
def test_kto_never_pairs_a_prompt_with_its_own_completion(batch):
    rows = mismatched_rows(batch)
    assert sorted(rows) == list(range(batch))
    assert not np.any(rows == np.arange(batch))
    if batch % 2:  # What reversal does.
        assert np.any(np.arange(batch)[::-1] == np.arange(batch))


def test_kto_drift_is_one_number_of_the_whole_batch_and_never_negative():
    with pytest.raises(InputError, match="batch is 1"):
        mismatched_rows(1)
    completions = Sequences(jnp.full(2, -9.0), jnp.full(2, 3), jnp.full(2, -9.0))
    desirable = jnp.asarray([True, True])
    for gaps, z in (([0.5, 0.1], 0.3), ([-2.0, 0.5], 0.0)):
        others = dataclasses.replace(completions, logps=-9.0 + jnp.asarray(gaps))
        stats = PointStats(completions=completions, desirable=desirable, mismatched=others)
        loss, metrics = preference_loss(stats, algorithm("kto").config())
        np.testing.assert_allclose(metrics["kl"], z, atol=1e-12)
        np.testing.assert_allclose(loss, 1 / (1 + math.exp(-0.1 * z)), rtol=1e-12)


def test_orpo_nll_with_and_without_the_prompt():
    chosen = dataclasses.replace(
        one(-12.0, -12.0, 6), prompt_logps=jnp.asarray([-8.0]), prompt_lengths=jnp.asarray([4])
    )
    rejected = dataclasses.replace(
        one(-14.0, -14.0, 8), prompt_logps=jnp.asarray([-8.0]), prompt_lengths=jnp.asarray([4])
    )
    stats = PairStats(chosen, rejected)
    without = loss_of(stats, "orpo")
    with_prompt = loss_of(stats, "orpo", nll_over="prompt_and_completion")
    np.testing.assert_allclose(without - with_prompt, 12 / 6 - 20 / 10, atol=1e-12)
    chosen = dataclasses.replace(chosen, prompt_logps=jnp.asarray([-3.0]))
    with_prompt = loss_of(
        dataclasses.replace(stats, chosen=chosen), "orpo", nll_over="prompt_and_completion"
    )
    np.testing.assert_allclose(without - with_prompt, 2.0 - 1.5, rtol=1e-12)


def test_log1mexp_is_guarded_on_both_sides():
    v = jnp.asarray([0.0, -1e-9, -1e-3, -0.5, -math.log(2), -1.0, -50.0, -1e4])
    held = [min(float(x), -1e-7) for x in v]
    expected = [math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)) for x in held]
    np.testing.assert_allclose(log1mexp(v), expected, rtol=1e-12, atol=1e-300)
    slopes = jax.vmap(jax.grad(log1mexp))(v)
    # d/dv log(1 - e^v) = -1/(e^-v - 1).
    inside = np.asarray(v)[2:7]
    np.testing.assert_allclose(slopes[2:7], -1 / np.expm1(-inside), rtol=1e-9)
    assert np.isfinite(np.asarray(slopes)).all()
    assert slopes[0] == 0  # Held at -1e-7.


def test_exo_takes_constants_and_arrays_alike_under_jit(stats_of):
    stats = stats_of(PairStats)
    config = algorithm("exo").config()
    compiled = jax.jit(lambda s: preference_loss(s, config)[0])(stats)
    np.testing.assert_allclose(compiled, preference_loss(stats, config)[0], rtol=1e-12)


def test_a_larger_beta_keeps_the_policy_closer():
    """Gradient descent on one pair with flipped labels in 1 of 5: Delta = logit(0.8)/beta."""
    found = []
    for beta in (0.1, 0.5):
        config = algorithm("cdpo").config(beta=beta, label_smoothing=0.2)

        def loss(delta, config=config):
            chosen = Sequences(delta, jnp.asarray([1]), jnp.zeros(1))
            rejected = Sequences(jnp.zeros(1), jnp.asarray([1]), jnp.zeros(1))
            return preference_loss(PairStats(chosen, rejected), config)[0][0]

        delta = jnp.zeros(1)
        step = jax.jit(lambda d: d - jax.grad(loss)(d) / jax.hessian(loss)(d)[0])
        for _ in range(30):
            delta = step(delta)
        found.append(float(delta[0]))
    np.testing.assert_allclose(found, [math.log(4) / 0.1, math.log(4) / 0.5], rtol=1e-6)


def test_aot_compares_quantiles_not_pairs():
    """Paired margins 3 and -1 against reference margins 0 and 1: sorted, -1 - 0 and 3 - 1."""
    chosen = Sequences(jnp.asarray([-5.0, -9.0]), jnp.full(2, 4), jnp.asarray([-7.0, -7.0]))
    rejected = Sequences(jnp.asarray([-8.0, -8.0]), jnp.full(2, 4), jnp.asarray([-7.0, -8.0]))
    loss = loss_of(PairStats(chosen, rejected), "aot", beta=1.0)
    np.testing.assert_allclose(loss, [math.log1p(math.exp(-2)), math.log1p(math.exp(1))])
    # Log-ratios 2, -2 and -1, 0: sorted, -2 + 1 and 2 - 0.
    loss = loss_of(PairStats(chosen, rejected), "aot_unpaired", beta=1.0)
    np.testing.assert_allclose(loss, [math.log1p(math.exp(-2)), math.log1p(math.exp(1))])


EQUAL = [
    ("f_dpo", {"divergence": "reverse_kl"}, "dpo", {}, 1.0),
    ("cdpo", {"label_smoothing": 0.0}, "dpo", {}, 1.0),
    ("robust_dpo", {"label_smoothing": 0.0}, "dpo", {}, 1.0),
    ("gpo", {"function": "logistic"}, "dpo", {}, 1.0),
    ("gpo", {"function": "hinge", "beta": 0.2}, "hinge", {"beta": 0.2}, 1.0),
    # (1 - u)^2 = beta^2 (Delta - 1/beta)^2, and 1/(2 tau) = 1/beta.
    ("gpo", {"function": "squared", "beta": 0.2}, "ipo", {"tau": 0.1, "average": "sum"}, 0.04),
    ("f_dpo", {"divergence": "alpha", "alpha": 0.0}, "f_dpo", {"divergence": "forward_kl"}, 1.0),
    ("tr_dpo", {}, "dpo", {}, 1.0),
    ("dpop", {"penalty": 0.0, "beta": 0.1}, "dpo", {}, 1.0),
    ("r_dpo", {"alpha": 0.0}, "dpo", {}, 1.0),
    ("modpo", {"weights": (1.0, 0.0)}, "dpo", {}, 1.0),
    ("rpo", {"nll_weight": 0.0}, "dpo", {}, 1.0),
    ("tdpo2", {"alpha": 0.0}, "dpo", {}, 1.0),
    ("alphapo", {"alpha": 0.0, "beta": 2.0, "gamma": 1.0}, "simpo", {}, 1.0),
]


@pytest.mark.parametrize(("name", "options", "other", "others", "factor"), EQUAL)
def test_special_cases_coincide(name, options, other, others, factor, stats_of):
    stats = stats_of(PairStats)
    np.testing.assert_allclose(
        loss_of(stats, name, **options), factor * loss_of(stats, other, **others), rtol=1e-10
    )


def test_robust_dpo_is_unbiased_under_flipped_labels(stats_of):
    stats = stats_of(PairStats)
    flipped = dataclasses.replace(stats, chosen=stats.rejected, rejected=stats.chosen)
    mean = 0.8 * loss_of(stats, "robust_dpo", label_smoothing=0.2)
    mean += 0.2 * loss_of(flipped, "robust_dpo", label_smoothing=0.2)
    np.testing.assert_allclose(mean, loss_of(stats, "dpo"), rtol=1e-10)


def test_exo_is_still_at_the_logit_of_its_label():
    config = algorithm("exo").config(beta=0.1, label_smoothing=0.1)
    fixed = math.log(9) / 0.1
    stats = PairStats(one(fixed - 20.0, -20.0, 4), one(-20.0, -20.0, 4))
    np.testing.assert_allclose(gradient_coefficient(stats, config).chosen.logps, 0, atol=1e-14)
    np.testing.assert_allclose(preference_loss(stats, config)[0], 0, atol=1e-12)


def test_alphapo_by_hand():
    """Means -2 and -1.75: rewards -10 (e^0.5 - 1) and -10 (e^0.4375 - 1), margin 0.1."""
    stats = PairStats(one(-12.0, -13.0, 6), one(-14.0, -13.5, 8))
    gap = 10 * (math.exp(0.5) - math.exp(0.4375))
    np.testing.assert_allclose(loss_of(stats, "alphapo"), math.log1p(math.exp(gap + 0.1)))


@pytest.mark.parametrize(
    ("function", "expected"),
    [("exponential", math.exp(-0.15)), ("truncated_quadratic", 0.85**2)],
)
def test_gpo_functions_without_another_name(function, expected):
    stats = PairStats(one(-12.0, -13.0, 6), one(-14.0, -13.5, 8))
    np.testing.assert_allclose(loss_of(stats, "gpo", function=function), expected)
