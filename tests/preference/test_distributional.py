"""GDPO: its three terms by hand, its variants, and what DPO converges to on beliefs."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from jaxllm.errors import InputError
from jaxllm.preference import (
    Beliefs,
    PairStats,
    PointStats,
    Sequences,
    WeightedSum,
    algorithm,
    gradient_coefficient,
    mean_over_rows,
    preference_loss,
    preset,
)
from jaxllm.preference.belief_metrics import (
    belief_preference_consistency,
    class_belief_consistency,
    parse_belief,
    parse_option,
)
from jaxllm.preference.distributional import (
    after_belief,
    belief_log_probs,
    belief_string_log_probs,
    dpo_optimum,
    find_belief_span,
)
from jaxllm.preference.mixture import Part
from jaxllm.preference.pointwise import KTO

pytestmark = pytest.mark.usefixtures("x64")


def response(policy, ref, span=(0, 2)):
    policy, ref = jnp.asarray([policy]), jnp.asarray([ref])
    return Sequences.from_tokens(
        policy, jnp.ones(policy.shape, bool), ref, belief_span=jnp.asarray([span])
    )


def example():
    """Belief of two tokens, answers of two and three; both begin with the same belief."""
    return PairStats(
        chosen=response([-0.5, -0.3, -1.0, -2.0], [-0.6, -0.4, -1.5, -2.5]),
        rejected=response([-0.5, -0.3, -3.0, -1.0, -0.7], [-0.6, -0.4, -2.0, -1.5, -0.7]),
        beliefs=Beliefs(
            log_probs=jnp.log(jnp.asarray([[0.4, 0.3, 0.1]])),
            target=jnp.asarray([[0.5, 0.5, 0.0]]),
        ),
    )


KL = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.3)
NLL = 0.4
# After the belief: a = 1.0, c = -0.5.
PREFERENCE = math.log1p(math.exp(-0.15))


def test_the_loss_is_the_sum_of_three_terms_by_hand():
    loss, metrics = preference_loss(example(), preset("gdpo"))
    np.testing.assert_allclose(loss, [KL + NLL + PREFERENCE], rtol=1e-12)
    found = [metrics[k] for k in ("belief/kl", "belief/nll", "belief/mass", "loss/dpo")]
    np.testing.assert_allclose(found, [KL, NLL, 0.8, PREFERENCE], rtol=1e-12)
    shares = [metrics["margins/belief"], metrics["margins/text"]]
    np.testing.assert_allclose(shares, [0.0, 1.5], atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("belief_only", KL + NLL), ("belief_conditioned_dpo", PREFERENCE)],
)
def test_ablations(name, expected):
    np.testing.assert_allclose(preference_loss(example(), preset(name))[0], [expected], rtol=1e-12)


def test_cdpo_is_conservative_dpo_and_not_the_released_meaning():
    stats = example()
    conservative = preference_loss(stats, preset("cdpo"))[0]
    u = 0.1 * 1.5
    expected = 0.9 * math.log1p(math.exp(-u)) + 0.1 * math.log1p(math.exp(u))
    np.testing.assert_allclose(conservative, [expected], rtol=1e-12)


def test_renormalised_beliefs_do_not_see_the_mass():
    config = algorithm("gdpo").config(preference_weight=0.0, nll_weight=0.0, renormalise=True)
    loss = preference_loss(example(), config)[0]
    expected = 0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.375)
    np.testing.assert_allclose(loss, [expected], rtol=1e-12)
    # A row without the third belief renormalises over two.
    stats = example()
    beliefs = dataclasses.replace(stats.beliefs, mask=jnp.asarray([[True, True, False]]))
    loss = preference_loss(dataclasses.replace(stats, beliefs=beliefs), config)[0]
    expected = 0.5 * math.log(0.5 / (4 / 7)) + 0.5 * math.log(0.5 / (3 / 7))
    np.testing.assert_allclose(loss, [expected], rtol=1e-12)


def test_gradient_reaches_each_term_where_it_belongs():
    stats = example()
    delta = gradient_coefficient(stats, preset("gdpo"))
    push = 0.1 / (1 + math.exp(0.15))
    np.testing.assert_allclose(delta.chosen.token_logps, [[0.5, 0.5, push, push]], rtol=1e-12)
    np.testing.assert_allclose(
        delta.rejected.token_logps, [[0, 0, -push, -push, -push]], rtol=1e-12
    )
    np.testing.assert_allclose(delta.beliefs.log_probs, [[0.5, 0.5, 0.0]], rtol=1e-12)
    np.testing.assert_array_equal(delta.chosen.logps, [0.0])


def test_the_kl_draws_the_belief_logits_to_the_target():
    """Gradient with respect to logits over the whole vocabulary is softmax - target."""
    logits = jnp.asarray([[0.3, -1.0, 2.0, 0.1, 0.7]])
    ids, target = jnp.asarray([1, 3]), jnp.asarray([[0.25, 0.75]])

    def loss(logits):
        beliefs = Beliefs(belief_log_probs(logits, ids), target)
        return beliefs.divergence(renormalise=False).sum()

    expected = np.asarray(jax.nn.softmax(logits)).copy()
    expected[0, [1, 3]] -= [0.25, 0.75]
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, rtol=1e-10)
    np.testing.assert_allclose(
        belief_log_probs(logits, ids), jax.nn.log_softmax(logits)[:, ids], rtol=1e-12
    )
    assert belief_log_probs(logits.astype(jnp.bfloat16), ids).dtype == jnp.float32


def test_beliefs_of_several_tokens_are_sums_of_their_tokens():
    tokens = jnp.asarray([[[-1.0, -2.0, 5.0], [-0.5, -0.25, -0.25]]])
    mask = jnp.asarray([[[True, True, False], [True, True, True]]])
    log_probs = belief_string_log_probs(tokens, mask)
    np.testing.assert_allclose(log_probs, [[-3.0, -1.0]])
    beliefs = Beliefs(log_probs, jnp.asarray([[0.2, 0.8]]))
    z = math.log(math.exp(-3) + math.exp(-1))
    expected = 0.2 * (math.log(0.2) + 3 + z) + 0.8 * (math.log(0.8) + 1 + z)
    np.testing.assert_allclose(beliefs.divergence(renormalise=True), [expected], rtol=1e-12)


def test_kto_variant_with_and_without_the_belief():
    pair = example()
    stats = PointStats(
        completions=pair.chosen,
        desirable=jnp.asarray([True]),
        mismatched=response([-0.5, -0.3, -1.0], [-0.6, -0.4, -1.4]),
        beliefs=pair.beliefs,
    )
    for name, a, z in (("gdpo_kto", 1.0, 0.4), ("gdpo_kto_released", 1.2, 0.6)):
        loss, metrics = preference_loss(stats, preset(name))
        expected = KL + NLL + 1 / (1 + math.exp(0.1 * (a - z)))
        np.testing.assert_allclose(loss, [expected], rtol=1e-12)
        np.testing.assert_allclose(metrics["kl"], z, rtol=1e-12)


def test_any_pair_loss_may_follow_the_belief_and_a_foreign_one_is_refused():
    stats = example()
    simpo = algorithm("simpo").config()
    config = algorithm("gdpo").config(preference=simpo, kl_weight=0.0, nll_weight=0.0)
    np.testing.assert_allclose(
        preference_loss(stats, config)[0], preference_loss(after_belief(stats), simpo)[0]
    )
    with pytest.raises(InputError, match="desirable"):
        preference_loss(stats, algorithm("gdpo").config(preference=KTO()))


def test_an_answer_that_ends_with_its_belief_has_no_preference_term():
    stats = example()
    short = response([-0.5, -0.3], [-0.6, -0.4])
    loss = preference_loss(dataclasses.replace(stats, rejected=short), preset("gdpo"))[0]
    np.testing.assert_allclose(loss, [KL + NLL], rtol=1e-12)


def test_gdpo_is_a_weighted_sum_of_its_terms():
    """The same mechanism: kl + nll + 1/2 of the preference, and the sum of two algorithms."""
    stats = example()
    half = algorithm("gdpo").config(preference_weight=0.5)
    parts = WeightedSum((Part(preset("belief_only")), Part(preset("belief_conditioned_dpo"), 0.5)))
    loss, metrics = preference_loss(stats, parts)
    np.testing.assert_allclose(loss, preference_loss(stats, half)[0], rtol=1e-12)
    assert metrics["loss/group_distributional_po"] != metrics["loss/group_distributional_po_1"]


def test_mixed_preference_optimisation_by_hand():
    stats = example()
    # Over the whole response: a = 1.2, c = -0.3, delta 0.045; mean NLL 0.95.
    dpo = math.log1p(math.exp(-0.15))
    bco = math.log1p(math.exp(-(0.12 - 0.045))) + math.log1p(math.exp(-0.03 - 0.045))
    loss, metrics = preference_loss(stats, preset("mpo"))
    np.testing.assert_allclose(loss, [0.8 * dpo + 0.2 * bco + 0.95], rtol=1e-12)
    found = [metrics[f"loss/{name}"] for name in ("dpo", "bco_pair", "sft")]
    np.testing.assert_allclose(found, [dpo, bco, 0.95], rtol=1e-12)


@partial(jax.jit, static_argnames="beta")
@jax.value_and_grad
def population_loss(logits, ref, weights, *, beta):
    """DPO over all pairs of four beliefs, each with its probability."""
    log_q, ones = jax.nn.log_softmax(logits), jnp.ones(12, int)
    stats = PairStats(*(Sequences(log_q[k], ones, jnp.log(ref)[k]) for k in np.nonzero(OTHERS)))
    return jnp.sum(weights * preference_loss(stats, algorithm("dpo").config(beta=beta))[0])


OTHERS = ~np.eye(4, dtype=bool)


@pytest.mark.parametrize("rejected", ["uniform", "target"])
@pytest.mark.parametrize("reference", [[0.25, 0.25, 0.25, 0.25], [0.5, 0.3, 0.15, 0.05]])
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_dpo_converges_to_the_closed_form(beta, reference, rejected):
    p, ref = np.array([0.5, 0.3, 0.15, 0.05]), np.array(reference)
    i, j = np.nonzero(OTHERS)
    weights = p[i] * (1 / 3 if rejected == "uniform" else p[j] / (1 - p[i]))

    def loss(logits):
        value, gradient = population_loss(logits, ref, weights, beta=beta)
        return float(value), np.asarray(gradient)

    found = minimize(loss, np.log(ref), jac=True, method="BFGS", options={"gtol": 1e-10})
    q = np.exp(found.x) / np.exp(found.x).sum()
    np.testing.assert_allclose(q, dpo_optimum(p, ref, beta, rejected), rtol=0, atol=1e-3)


def test_closed_form_matches_the_printed_table():
    p, uniform = [0.5, 0.3, 0.15, 0.05], [0.25] * 4
    table = [
        (0.1, uniform, [0.994, 0.006, 0.0, 0.0]),
        (0.1, p, [0.9964, 0.0036, 0.0, 0.0]),
        (0.5, uniform, [0.685, 0.247, 0.062, 0.007]),
        (0.5, p, [0.804, 0.174, 0.022, 0.001]),
        (1.0, uniform, p),
        (1.0, p, [0.685, 0.247, 0.062, 0.007]),
    ]
    for beta, ref, expected in table:
        np.testing.assert_allclose(dpo_optimum(p, ref, beta), expected, atol=5.1e-4)
    found = dpo_optimum(p, p, 0.1, "target")
    np.testing.assert_allclose(found, [0.978, 0.020, 0.0015, 0.0002], atol=5.1e-4)
    with pytest.raises(InputError, match="beta is 0"):
        dpo_optimum(p, p, 0.0)


def test_gdpo_recovers_the_target_where_dpo_does_not():
    """The belief terms alone, tabular, from a wrong start: q = p to 1e-3."""
    p = jnp.asarray([0.5, 0.3, 0.15, 0.05])
    accepted = jnp.arange(4)  # Every belief once, weighted by p, is the whole population.

    @jax.jit
    def step(logits, state):
        def loss(logits):
            log_q = jax.nn.log_softmax(logits)
            tokens = log_q[accepted][:, None]
            chosen = Sequences.from_tokens(
                tokens, jnp.ones((4, 1), bool), 0 * tokens, belief_span=jnp.asarray([[0, 1]] * 4)
            )
            stats = PairStats(
                chosen, chosen, beliefs=Beliefs(jnp.stack([log_q] * 4), jnp.stack([p] * 4))
            )
            return jnp.sum(p * preference_loss(stats, preset("belief_only"))[0])

        updates, state = optimiser.update(jax.grad(loss)(logits), state)
        return optax.apply_updates(logits, updates), state

    optimiser = optax.adam(0.05)
    logits = jnp.asarray([-1.0, 0.0, 1.0, 2.0])
    state = optimiser.init(logits)
    for _ in range(600):
        logits, state = step(logits, state)
    np.testing.assert_allclose(jax.nn.softmax(logits), p, atol=1e-3)


def test_belief_spans_fixed_and_as_released():
    mark = 9
    assert find_belief_span([5, 1, 2, mark, 7, 8], mark) == (0, 3)
    # A mark inside the answer: the first one closes the belief; the released code took the last.
    assert find_belief_span([5, 1, mark, 7, mark, 8], mark) == (0, 2)
    assert find_belief_span([5, 1, mark, 7, mark, 8], mark, released=True) == (0, 4)
    # No mark: refused; the released code took the whole response.
    with pytest.raises(InputError, match="no belief end mark 9"):
        find_belief_span([5, 1, 2], mark)
    assert find_belief_span([5, 1, 2], mark, released=True) == (0, 3)


def test_parsing_and_consistency_of_samples():
    samples = ["4<Somewhat good>Fine.", "1<Somewhat good>No.", "x<Yes>Sure", "5 great", "", "7<A>"]
    assert [parse_belief(s) for s in samples] == [4, 1, None, 5, None, None]
    assert [parse_option(s) for s in samples[:4]] == ["Somewhat good", "Somewhat good", "Yes", None]
    share = class_belief_consistency(samples, {"Somewhat good": 4, "Yes": 4})
    assert (share.mean, share.n) == (1 / 6, 6)
    verdicts = [True, None, False, True]
    share, unjudged = belief_preference_consistency(verdicts)
    assert (share.mean, share.n, unjudged) == (2 / 3, 3, 1)
    released, _ = belief_preference_consistency(verdicts, unjudged_agree=True)
    assert (released.mean, released.n) == (3 / 4, 4)
    with pytest.raises(InputError, match="none of 1 samples"):
        belief_preference_consistency([None])


def test_mean_over_rows_counts_rows_that_count():
    stats = dataclasses.replace(example(), valid=jnp.asarray([False]))
    per_row, _ = preference_loss(stats, preset("gdpo"))
    assert mean_over_rows(per_row, stats) == 0
