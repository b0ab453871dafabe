"""Every algorithm against worked numbers, its gradient coefficient, and inputs that break others.

Worked inputs: l_w = -12, l_l = -14, references -13 and -13.5, lengths 6 and 8, so that a = 1,
c = -0.5, Delta = 1.5; beta 0.1 where nothing else is said. Values to six decimals in float64.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.preference import (
    Beliefs,
    ListStats,
    PairStats,
    Part,
    PointStats,
    RolloutStats,
    Sequences,
    WeightedSum,
    algorithm,
    distributional,
    gradient_coefficient,
    listwise,
    pairwise,
    pairwise_anchored,
    pairwise_tokens,
    pointwise,
    policy_gradient,
    preference_loss,
    reference_free,
)

BETA = 0.1
SIGMOID = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def sequences(logps, ref, length, **others):
    row = lambda x: jnp.asarray([x], jnp.float64)  # noqa: E731
    others = {name: row(x) for name, x in others.items()}
    return Sequences(row(logps), jnp.asarray([length]), None if ref is None else row(ref), **others)


def pair(w=-12.0, l=-14.0, **others):  # noqa: E741
    return PairStats(sequences(w, -13.0, 6, kl=0.8), sequences(l, -13.5, 8, kl=1.1), **others)


def loss(options, stats=None):
    return float(preference_loss(pair() if stats is None else stats, options)[0][0])


LIST = dict(
    candidates=([-10.0, -12, -11, -15], [-11.0, -12, -12.5, -13], [5, 6, 5, 8]),
    scores=[2.0, 1, 0.5, -1],
)


def ranking():
    logps, ref, lengths = (jnp.asarray([x]) for x in LIST["candidates"])
    return ListStats(Sequences(logps, lengths, ref), jnp.asarray([LIST["scores"]]))


PAIRS = [
    (pairwise.DPO(BETA), 0.620957),
    (pairwise.ConservativeDPO(BETA, 0.1), 0.635957),
    (pairwise.RobustDPO(BETA, 0.1), 0.602207),
    (pairwise.Hinge(BETA), 0.85),
    (pairwise.IPO(BETA, "sum"), 12.25),
    (pairwise.IPO(BETA, "mean"), 22.760851),
    (pairwise.NormalisedDPO(BETA), 0.681754),
    (pairwise.EXO(BETA, 1e-3), 2.505517),
    (pairwise.DiscoPOP(BETA, 0.05), 0.849338),
    (pairwise.LengthDPO(BETA, 0.01), 0.630258),
    (pairwise.FDPO(BETA, "forward_kl"), 0.631154),
    (pairwise.FDPO(BETA, "js"), 0.660652),
    (pairwise.FDPO(BETA, "alpha", 0.5), 0.627691),
    (pairwise_anchored.NCAPair(BETA), 1.350825),
    (pairwise_anchored.BCOPair(BETA, "zero"), 1.312856),
    (pairwise_anchored.BCOPair(BETA, "batch"), 1.312700),
    (pairwise_anchored.SPPO(BETA), 36.25),
    (pairwise_anchored.APOZero(BETA), 0.962523),
    (pairwise_anchored.APODown(BETA), 0.987549),
    (pairwise_tokens.TDPO1(BETA), 0.634946),
    (pairwise_tokens.TDPO2(BETA, 0.5), 0.627924),
    (reference_free.SimPO(2.0, 1.0), 1.701413),
    (reference_free.CPO(BETA, 0.0), 0.598139),
    (reference_free.CPO(BETA, 1.0), 2.598139),
    (reference_free.ORPO(0.1), 2.085176),
    (reference_free.SLiC(1.0, 0.1), 1.2),
]


def named(cases):
    return [pytest.param(*case, id=f"{type(case[0]).__name__}-{case[1]}") for case in cases]


@pytest.mark.parametrize(("options", "expected"), named(PAIRS))
def test_pair_losses_to_six_decimals(options, expected):
    assert loss(options) == pytest.approx(expected, abs=5.1e-7)


def test_pair_losses_with_inputs_of_their_own():
    assert loss(pairwise_anchored.DPOPositive(BETA, 5.0), pair(-13.4)) == pytest.approx(
        0.792653, abs=5.1e-7
    )
    margins = pair(objective_margins=jnp.asarray([[0.3]]))
    assert loss(pairwise.MODPO(BETA, (0.7, 0.3)), margins) == pytest.approx(0.651208, abs=5.1e-7)
    metrics = preference_loss(pair(), reference_free.ORPO(0.1))[1]
    assert float(metrics["odds_ratio/log"]) == pytest.approx(-0.295473, abs=5.1e-7)
    assert float(metrics["odds_ratio/loss"]) == pytest.approx(0.851757, abs=5.1e-7)
    # The length penalty has a plus: the shorter winner is pushed more than without it.
    assert loss(pairwise.LengthDPO(BETA, 0.01)) > loss(pairwise.DPO(BETA))


def test_single_completions_to_six_decimals():
    def stats(desirable):
        # z = max(0, mean log-ratio of the mismatched completion) = 0.3.
        own = sequences(-12.0, -13.0, 6) if desirable else sequences(-14.0, -13.5, 8)
        other = sequences(-9.7, -10.0, 5)
        return PointStats(own, desirable=jnp.asarray([desirable]), mismatched=other)

    options = pointwise.KTO(BETA)
    assert loss(options, stats(True)) == pytest.approx(0.482507, abs=5.1e-7)
    assert loss(options, stats(False)) == pytest.approx(0.480011, abs=5.1e-7)


LISTS = [
    (listwise.InfoNCA(BETA, 1.0, 0.0), 1.332226),
    (listwise.NCA(BETA, 1.0, 0.0), 1.358464),
    (listwise.EXOList(BETA, 1.0), 0.389769),
    (listwise.PlackettLuceDPO(BETA), 2.932997),
    (listwise.RRHF(), 10.575),
    (listwise.PRO(0.0), 8.260430),
    (listwise.LiPO(BETA), 2.609195),
]


@pytest.mark.parametrize(("options", "expected"), named(LISTS))
def test_list_losses_to_six_decimals(options, expected):
    assert loss(options, ranking()) == pytest.approx(expected, abs=5.1e-7)


def test_advantages_and_kl_estimate():
    rewards, keep = jnp.asarray([1.0, 0.0, 0.5, 1.0]), jnp.ones(4, bool)
    np.testing.assert_allclose(
        policy_gradient.group_advantages(rewards, keep, 4),
        [0.783186, -1.305310, -0.261062, 0.783186],
        atol=5.1e-7,
    )
    np.testing.assert_allclose(
        policy_gradient.leave_one_out(rewards, keep, 4),
        [0.5, -0.833333, -0.166667, 0.5],
        atol=5.1e-7,
    )
    assert float(policy_gradient.k3(jnp.asarray(0.2), jnp.asarray(0.0))) == pytest.approx(
        0.021403, abs=5.1e-7
    )


def test_values_where_the_policy_is_the_reference():
    same = PairStats(sequences(-13.0, -13.0, 6, kl=0.0), sequences(-13.5, -13.5, 8, kl=0.0))
    eps = 1e-3
    for options, expected in (
        (pairwise.DPO(BETA), math.log(2)),
        (pairwise.ConservativeDPO(BETA), math.log(2)),
        (pairwise.RobustDPO(BETA), math.log(2)),
        (pairwise.Hinge(BETA), 1),
        (pairwise.IPO(BETA), 1 / (4 * BETA**2)),
        (pairwise_anchored.NCAPair(BETA), 2 * math.log(2)),
        (pairwise_anchored.BCOPair(BETA), 2 * math.log(2)),
        (pairwise_anchored.APOZero(BETA), 1),
        (pairwise_anchored.APODown(BETA), 1),
        (pairwise_anchored.SPPO(BETA), 1 / (2 * BETA**2)),
        (pairwise.EXO(BETA, eps), -math.log(2) - (math.log(1 - eps) + math.log(eps)) / 2),
        (pairwise_tokens.TDPO1(BETA), math.log(2)),
        (pairwise_tokens.TDPO2(BETA), math.log(2)),
        (pairwise.FDPO(BETA, "js"), math.log(2)),
        (pairwise.FDPO(BETA, "forward_kl"), math.log(2)),
        (pairwise.DiscoPOP(BETA), math.log(2) / 2 + 0.5),
    ):
        assert loss(options, same) == pytest.approx(expected, abs=1e-9), options
        if isinstance(options, pairwise.DiscoPOP):
            continue  # Its slope at 0 is 5 (1 - ln 2) - 3/4 > 0: it falls only from u = 0.09 on.
        delta = gradient_coefficient(same, options)
        assert float(delta.chosen.logps[0]) >= -1e-12 and float(delta.rejected.logps[0]) <= 1e-12


def coefficients():
    """(options, delta of the chosen, delta of the rejected) of the worked pair, by formula."""
    a, c, margin, u = 1.0, -0.5, 1.5, 0.15
    s, slope = SIGMOID, lambda x: SIGMOID(x) * SIGMOID(-x)
    beta, eps = BETA, 0.1
    m_w, m_l = -12 / 6, -14 / 8
    p_w, p_l = math.exp(m_w), math.exp(m_l)
    odds = m_w - m_l - math.log1p(-p_w) + math.log1p(-p_l)
    logit = math.log((1 - 1e-3) / 1e-3)
    simpo = 2 * (m_w - m_l) - 1
    dpo = beta * s(-u)
    cdpo = beta * ((1 - eps) * s(-u) - eps * s(u))
    robust = beta * ((1 - eps) * s(-u) + eps * s(u)) / (1 - 2 * eps)
    exo = -beta * slope(u) * (u - logit)
    cpo = beta * s(-beta * 2)
    return [
        (pairwise.DPO(beta), dpo, -dpo),
        (pairwise.ConservativeDPO(beta, eps), cdpo, -cdpo),
        (pairwise.RobustDPO(beta, eps), robust, -robust),
        (pairwise.Hinge(beta), beta, -beta),
        (pairwise.IPO(beta, "sum"), -2 * (margin - 5), 2 * (margin - 5)),
        (pairwise.EXO(beta, 1e-3), exo, -exo),
        (
            pairwise_anchored.NCAPair(beta),
            beta * (s(-beta * a) - s(beta * a) / 2),
            -beta * s(beta * c) / 2,
        ),
        (pairwise_anchored.BCOPair(beta, "zero"), beta * s(-beta * a), -beta * s(beta * c)),
        (pairwise_anchored.SPPO(beta), -2 * (a - 5), -2 * (c + 5)),
        (pairwise_anchored.APOZero(beta), beta * slope(beta * a), -beta * slope(beta * c)),
        (
            pairwise_anchored.APODown(beta),
            beta * (slope(u) - slope(beta * a)),
            -beta * slope(u),
        ),
        (reference_free.SimPO(2.0, 1.0), 2 / 6 * s(-simpo), -2 / 8 * s(-simpo)),
        (reference_free.CPO(beta, 1.0), cpo + 1 / 6, -cpo),
        (
            reference_free.ORPO(0.1),
            (1 + 0.1 * s(-odds) / (1 - p_w)) / 6,
            -0.1 / 8 * s(-odds) / (1 - p_l),
        ),
        (pairwise_anchored.DPOPositive(beta, 5.0), beta * s(-u), -beta * s(-u)),
        (reference_free.SLiC(3.0, 0.1), 1.1, -1.0),
        (pointwise.SFT(), 1 / 6, 0.0),
    ]


def test_gradient_coefficients_by_formula():
    for options, w, l in coefficients():  # noqa: E741
        delta = gradient_coefficient(pair(), options)
        found = float(delta.chosen.logps[0]), float(delta.rejected.logps[0])
        assert found == pytest.approx((w, l), abs=1e-9), options


def test_gradient_coefficients_of_single_completions_and_rollouts():
    own, other = sequences(-12.0, -13.0, 6), sequences(-9.7, -10.0, 5)
    stats = PointStats(own, desirable=jnp.asarray([True]), mismatched=other)
    v = BETA * (1.0 - 0.3)
    expected = BETA * SIGMOID(v) * SIGMOID(-v)
    delta = gradient_coefficient(stats, pointwise.KTO(BETA))
    assert float(delta.completions.logps[0]) == pytest.approx(expected, abs=1e-9)
    logps = jnp.asarray([[-1.0, -2.0], [-1.5, -0.5]])
    rollouts = RolloutStats(logps, jnp.ones((2, 2), bool), jnp.asarray([1.0, 0.0]))
    delta = gradient_coefficient(rollouts, policy_gradient.RLOO(2, None, 0.0))
    np.testing.assert_allclose(delta.logps, [[1, 1], [-1, -1]])
    options = policy_gradient.GRPO(group_size=2, loss_type="grpo")
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    delta = gradient_coefficient(rollouts, options)
    np.testing.assert_allclose(delta.logps, advantage / 2 * np.array([[1, 1], [-1, -1]]))


# -- robustness ----------------------------------------------------------------------------------


def test_options_are_refused_by_name():
    for make, message in (
        (lambda: pairwise.DPO(0.0), "DPO.beta is 0.0, expected above 0"),
        (lambda: pairwise.DPO(math.nan), "DPO.beta is nan"),
        (lambda: pairwise.ConservativeDPO(0.1, 0.5), "label_smoothing is 0.5"),
        (lambda: pairwise.MODPO(0.1, (0.7, 0.7)), "sum to 1"),
        (lambda: policy_gradient.GRPO(loss_type="dr_grpo"), "dr_grpo needs it"),
        (lambda: algorithm("dop"), "algorithm 'dop' is not known; near it: dpo"),
        (lambda: WeightedSum(()), "parts is empty"),
        (lambda: preference_loss(ranking(), pairwise.DPO()), "dpo got ListStats, expected Pair"),
        (
            lambda: preference_loss(
                PairStats(sequences(-1.0, None, 2), sequences(-1.0, None, 2)), pairwise.DPO()
            ),
            "dpo needs ref_logps",
        ),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_a_weighted_sum_is_one():
    options = WeightedSum((Part(pairwise.DPO(BETA), 0.8), Part(pointwise.SFT(), 0.5)))
    assert loss(options) == pytest.approx(0.8 * 0.620957 + 0.5 * 2.0, abs=5.1e-7)


# -- group distributional preference optimisation -------------------------------------------------


def test_gdpo_is_the_sum_of_its_terms():
    rng = np.random.default_rng(3)

    def some():
        mask = jnp.asarray(rng.random((8, 5)) < 0.7).at[:, 0].set(True)
        token_logps, ref = (jnp.asarray(-rng.uniform(0.1, 2.0, (8, 5))) for _ in range(2))
        span = jnp.broadcast_to(jnp.asarray([0, 1]), (8, 2))
        return Sequences.from_tokens(token_logps, mask, ref, belief_span=span)

    given = Beliefs(
        log_probs=jax.nn.log_softmax(jnp.asarray(rng.standard_normal((8, 3)))),
        target=jnp.asarray(rng.dirichlet(np.ones(3), 8)),
    )
    stats = PairStats(some(), some(), beliefs=given)
    value = preference_loss(stats, distributional.GroupDistributionalPO())[0]
    beliefs, w, l = stats.beliefs, stats.chosen, stats.rejected  # noqa: E741
    p, q = np.asarray(beliefs.target), np.asarray(beliefs.log_probs)
    kl = (p * (np.log(p) - q)).sum(-1)

    def after(sequences):
        ratio = np.where(sequences.mask, sequences.token_logps - sequences.ref_token_logps, 0)
        return ratio[:, 1:].sum(-1)

    nll = -np.asarray(w.token_logps)[:, 0]
    dpo = np.log1p(np.exp(-BETA * (after(w) - after(l))))
    filled = np.asarray(w.mask)[:, 1:].any(-1) & np.asarray(l.mask)[:, 1:].any(-1)
    np.testing.assert_allclose(value, kl + nll + np.where(filled, dpo, 0), rtol=1e-5)


@pytest.mark.parametrize("rejected", ["uniform", "target"])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_converges_to_the_closed_form(beta, rejected):
    """All pairs of four beliefs with their probabilities, a tabular policy, Newton-like descent."""
    p, ref = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.4, 0.2, 0.3, 0.1])
    i, j = np.array([(i, j) for i in range(4) for j in range(4) if i != j]).T
    weights = p[i] / 3 if rejected == "uniform" else p[i] * p[j] / (1 - p[i])

    def objective(logits):
        logps, refs = jax.nn.log_softmax(logits), jnp.log(ref)
        ones = jnp.ones(len(i), int)
        stats = PairStats(Sequences(logps[i], ones, refs[i]), Sequences(logps[j], ones, refs[j]))
        return jnp.sum(weights * preference_loss(stats, pairwise.DPO(beta))[0])

    logits = jnp.log(ref)
    grad, hessian = jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))
    for _ in range(30):
        logits = logits - jnp.linalg.pinv(hessian(logits), rtol=1e-9) @ grad(logits)
    expected = distributional.dpo_optimum(p, ref, beta, rejected)
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-3)


def test_the_closed_form_has_the_printed_values():
    p = [0.5, 0.3, 0.15, 0.05]
    np.testing.assert_allclose(
        distributional.dpo_optimum(p, [0.25] * 4, 0.5), [0.685, 0.247, 0.062, 0.007], atol=5.1e-4
    )
    np.testing.assert_allclose(
        distributional.dpo_optimum(p, p, 0.1), [0.9964, 0.0036, 0, 0], atol=5.1e-5
    )
    np.testing.assert_allclose(
        distributional.dpo_optimum(p, p, 0.1, "target"), [0.978, 0.020, 0.0015, 0.0002], atol=5.1e-4
    )
