"""Training-free methods: choosing among candidates, changing logits, moving a reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.decoding.sampling import sample_token
from jaxllm.errors import InputError
from jaxllm.preference import RewardPairs, algorithm, preference_loss
from jaxllm.preference.logit_mixing import (
    best_block,
    candidate_tokens,
    proxy_tuned_logits,
    realigned_logits,
    reward_guided_logits,
)
from jaxllm.preference.selection import (
    best_of_n,
    best_of_n_kl,
    distinct,
    icdpo,
    mbr,
    mbr_utility,
    regularised_best_of_n,
    weighted_vote,
)
from jaxllm.preference.wrappers import TRDPO, moved_reference


def test_best_of_n_and_its_divergence():
    assert best_of_n([[0.1, 0.7, 0.7], [3.0, -1.0, 2.0]]).tolist() == [1, 0]
    assert best_of_n_kl(1) == 0
    # Exact for distinct rewards in the limit of many outcomes: sum q log(q/p) of 2000 outcomes.
    k = np.arange(1, 2001)
    q = (k / 2000) ** 4 - ((k - 1) / 2000) ** 4
    np.testing.assert_allclose(best_of_n_kl(4), (q * np.log(q * 2000)).sum(), rtol=1e-3)
    with pytest.raises(InputError, match="finite values"):
        best_of_n([[1.0, float("nan")]])
    with pytest.raises(InputError, match="n 0"):
        best_of_n_kl(0)


def test_regularised_best_of_n_prefers_what_is_near():
    rewards, proximity = [[1.0, 1.2]], [[-10.0, -30.0]]
    assert regularised_best_of_n(rewards, proximity, 0.0).tolist() == [1]
    assert regularised_best_of_n(rewards, proximity, 0.02).tolist() == [0]
    with pytest.raises(InputError, match="beta -1"):
        regularised_best_of_n(rewards, proximity, -1)


def test_mbr_takes_the_candidate_nearest_to_the_others():
    texts = [1.0, 1.2, 1.1, 9.0, 0.5]
    utility = -np.abs(np.subtract.outer(texts, texts))[None]
    assert mbr(utility).tolist() == [2]
    # All weight on the outlier makes it the answer.
    assert mbr(utility, [[0.0, 0.0, 0.0, 1.0, 0.0]]).tolist() == [3]
    np.testing.assert_allclose(mbr_utility(utility)[0, 0], -(0.2 + 0.1 + 8 + 0.5) / 5)


def test_weighted_vote():
    answers = ["7", "12", "7", None, "12"]
    assert weighted_vote(answers) == "7"
    assert weighted_vote(answers, [0.2, 0.9, 0.2, 5.0, 0.1]) == "12"
    assert weighted_vote([None, None]) is None
    with pytest.raises(InputError, match="5 answers with 2 scores"):
        weighted_vote(answers, [1.0, 2.0])


def test_icdpo_and_distinct():
    # Gains of 1, 3 and 2 nats from the examples.
    assert icdpo([[-4.0, -7.0, -1.0]], [[-5.0, -10.0, -3.0]]).tolist() == [1]
    assert distinct([(1, 2), (3,), (1, 2), (3,), (4,)]).tolist() == [True, True, False, False, True]


def test_proxy_tuning_of_log_probs_is_emulated_fine_tuning():
    """p proportional to base * expert / anti-expert, whether from logits or log-probabilities."""
    base, expert, anti = jax.random.normal(jax.random.key(0), (3, 2, 5))
    products = jax.nn.softmax(base) * jax.nn.softmax(expert) / jax.nn.softmax(anti)
    expected = products / products.sum(-1, keepdims=True)
    mixed = proxy_tuned_logits(base, expert, anti)
    np.testing.assert_allclose(jax.nn.softmax(mixed), expected, rtol=1e-5)
    logs = [jax.nn.log_softmax(x) for x in (base, expert, anti)]
    np.testing.assert_allclose(jax.nn.softmax(proxy_tuned_logits(*logs)), expected, rtol=1e-5)
    np.testing.assert_array_equal(proxy_tuned_logits(base, expert, anti, 0.0), base)
    # Small models with a padded vocabulary.
    wide = [jnp.pad(x, ((0, 0), (0, 3)), constant_values=9.0) for x in (expert, anti)]
    np.testing.assert_array_equal(proxy_tuned_logits(base, *wide), mixed)
    with pytest.raises(InputError, match="anti-expert has 4 tokens, the base 5"):
        proxy_tuned_logits(base, expert, anti[:, :4])


def test_realignment_is_a_geometric_mixture():
    aligned, ref = jax.random.normal(jax.random.key(1), (2, 2, 5))
    for strength in (0.0, 0.5, 1.0, 2.0):
        raw = jax.nn.softmax(aligned) ** strength * jax.nn.softmax(ref) ** (1 - strength)
        found = jax.nn.softmax(realigned_logits(aligned, ref, strength))
        np.testing.assert_allclose(found, raw / raw.sum(-1, keepdims=True), rtol=1e-5)


def test_realignment_is_the_optimum_of_another_beta():
    """ref exp(r/beta) at strength s is ref exp(r s/beta)."""
    ref, reward = jax.random.normal(jax.random.key(2), (2, 1, 6))
    aligned = ref + reward / 0.5
    np.testing.assert_allclose(
        jax.nn.softmax(realigned_logits(aligned, ref, 0.25)),
        jax.nn.softmax(ref + reward / 2.0),
        rtol=1e-5,
    )


def test_args_chooses_among_the_top_tokens_by_logit_plus_reward():
    logits = jnp.asarray([[2.0, 1.5, 0.0, 1.0], [0.0, 0.0, 5.0, 4.0]])
    ids = candidate_tokens(logits, 3)
    assert ids.tolist() == [[0, 1, 3], [2, 3, 0]]
    rewards = jnp.asarray([[0.0, 1.0, 0.5], [0.0, 0.1, 0.0]])
    guided = reward_guided_logits(logits, ids, rewards, 1.5)
    expected = [[2.0, 3.0, -np.inf, 1.75], [0.0, -np.inf, 5.0, 4.15]]
    np.testing.assert_allclose(guided, expected, rtol=1e-6)
    greedy = sample_token(jnp.zeros(2), guided, temperature=0.0)
    assert greedy.tolist() == [1, 2]
    uniforms = jnp.linspace(0, 0.999, 2000)
    drawn = sample_token(uniforms, jnp.tile(guided[:1], (2000, 1)), temperature=0.7)
    shares = np.bincount(drawn, minlength=4) / 2000
    np.testing.assert_allclose(shares, jax.nn.softmax(guided[0] / 0.7), atol=2e-3)
    with pytest.raises(InputError, match="k is 5"):
        candidate_tokens(logits, 5)


def test_best_block():
    assert best_block(jnp.asarray([[0.1, 0.3], [2.0, -1.0]])).tolist() == [1, 0]


def test_the_reference_moves_every_so_many_steps():
    config = TRDPO(alpha=0.6, every=4)
    reference, policy = {"w": jnp.asarray([1.0])}, {"w": jnp.asarray([2.0])}
    moved = [
        float(moved_reference(config, reference, policy, jnp.asarray(s))["w"][0]) for s in range(6)
    ]
    np.testing.assert_allclose(moved, [1, 1, 1, 1, 1.6, 1], rtol=1e-6)
    # A reference is never touched by a policy that has gone wrong between two moves.
    broken = {"w": jnp.asarray([jnp.nan])}
    assert moved_reference(config, reference, broken, jnp.asarray(3))["w"][0] == 1


def test_bradley_terry_by_hand():
    stats = RewardPairs(
        jnp.asarray([1.0, 0.0]), jnp.asarray([0.5, 2.0]), margin=jnp.asarray([0.25, 0.0])
    )
    loss, metrics = preference_loss(stats, algorithm("bradley_terry").config(centre=0.01))
    expected = [
        math.log1p(math.exp(-0.25)) + 0.01 * 1.5**2,
        math.log1p(math.exp(2.0)) + 0.01 * 2.0**2,
    ]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == -0.75


def test_bradley_terry_of_several_objectives():
    stats = RewardPairs(jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.0, 1.0]]))
    config = algorithm("bradley_terry").config(weights=(0.75, 0.25))
    loss, metrics = preference_loss(stats, config)
    expected = 0.75 * math.log1p(math.exp(-1.0)) + 0.25 * math.log1p(math.exp(1.0))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.5, rtol=1e-6)
    with pytest.raises(InputError, match="None weights for 2 objectives"):
        preference_loss(stats, algorithm("bradley_terry").config())
