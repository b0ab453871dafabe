"""Policy gradients: loss types, clipping and groups by hand and against loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.preference import RolloutStats, algorithm, mean_over_rows, preference_loss, preset
from jaxllm.preference.policy_gradient import (
    group_advantages,
    leave_one_out,
    multi_objective_advantages,
    shaped_rewards,
)
from jaxllm.preference.ppo import PPO, ppo_advantages

pytestmark = pytest.mark.usefixtures("x64")


def scalar(stats, config):
    return float(mean_over_rows(preference_loss(stats, config)[0], stats))


def token_losses(stats, advantages, low=0.2, high=0.2, kl_coef=0.0):
    """-min(rho A, clip(rho) A) + kl_coef k3 of every token, by a loop."""
    losses = np.zeros(stats.mask.shape)
    for i, t in np.ndindex(*stats.mask.shape):
        rho = math.exp(stats.logps[i, t] - stats.old_logps[i, t])
        clipped = min(max(rho, 1 - low), 1 + high)
        d = float(stats.ref_logps[i, t] - stats.logps[i, t])
        losses[i, t] = -min(rho * advantages[i], clipped * advantages[i])
        losses[i, t] += kl_coef * (math.exp(d) - d - 1)
    return losses * np.asarray(stats.mask)


def advantages_of(stats, group, scale="group"):
    return np.asarray(group_advantages(stats.rewards, stats.kept(), group, scale))


def test_grpo_averages_tokens_in_three_ways(stats_of):
    stats = stats_of(RolloutStats)
    losses = token_losses(stats, advantages_of(stats, 4), kl_coef=0.04)
    mask = np.asarray(stats.mask)
    grpo = algorithm("grpo").config
    common = {"group_size": 4, "kl_coef": 0.04}
    per_sequence = (losses.sum(1) / mask.sum(1)).mean()
    np.testing.assert_allclose(
        scalar(stats, grpo(loss_type="grpo", **common)), per_sequence, rtol=1e-10
    )
    np.testing.assert_allclose(
        scalar(stats, grpo(loss_type="dapo", **common)), losses.sum() / mask.sum(), rtol=1e-10
    )
    constant = scalar(stats, grpo(loss_type="dr_grpo", max_length=10, **common))
    np.testing.assert_allclose(constant, losses.sum() / (10 * 8), rtol=1e-10)


def test_dapo_clips_higher_and_dr_grpo_does_not_scale(stats_of):
    stats = stats_of(RolloutStats)
    config = dataclasses.replace(preset("dapo"), group_size=4)
    losses = token_losses(stats, advantages_of(stats, 4), high=0.28)
    np.testing.assert_allclose(
        scalar(stats, config), losses.sum() / np.asarray(stats.mask).sum(), rtol=1e-10
    )
    advantages = advantages_of(stats, 4, "none")
    groups = np.asarray(stats.rewards).reshape(-1, 4)
    np.testing.assert_allclose(advantages, (groups - groups.mean(1, keepdims=True)).ravel())
    config = dataclasses.replace(preset("dr_grpo"), group_size=4)
    np.testing.assert_allclose(
        scalar(stats, config), token_losses(stats, advantages).sum() / (1024 * 8), rtol=1e-10
    )


def test_gspo_has_one_ratio_per_sequence(stats_of):
    stats = stats_of(RolloutStats)
    mask = np.asarray(stats.mask)
    log_ratio = np.asarray(stats.logps - stats.old_logps)
    mean = (log_ratio * mask).sum(1) / mask.sum(1)
    advantages = advantages_of(stats, 4)
    clipped = np.clip(np.exp(mean), 0.8, 1.2)
    expected = -np.minimum(np.exp(mean) * advantages, clipped * advantages)
    grpo = algorithm("grpo").config
    values, gradients = [], []
    for level in ("sequence", "sequence_token"):
        config = grpo(group_size=4, loss_type="grpo", importance=level)
        loss, _ = preference_loss(stats, config)
        np.testing.assert_allclose(loss, expected, rtol=1e-10)
        values.append(scalar(stats, config))
        gradients.append(
            jax.grad(
                lambda x, c=config: preference_loss(dataclasses.replace(stats, logps=x), c)[0].sum()
            )(stats.logps)
        )
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    # With one advantage per sequence the two also have the same gradient (arXiv:2507.18071).
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_advantages_leave_out_rows_that_do_not_count():
    rewards = jnp.asarray([1.0, 2.0, 6.0, 100.0])
    keep = jnp.asarray([True, True, True, False])
    found = group_advantages(rewards, keep, 4)
    std = np.std([1, 2, 6], ddof=1)
    np.testing.assert_allclose(found, [*(np.array([-2, -1, 3]) / (std + 1e-4)), 0.0], rtol=1e-12)
    np.testing.assert_allclose(leave_one_out(rewards, keep, 4), [-3.0, -1.5, 4.5, 0.0])
    # A group of equal rewards, and a row that is alone.
    np.testing.assert_array_equal(group_advantages(jnp.ones(4), keep, 4), np.zeros(4))
    alone = jnp.asarray([True, False, False, False])
    np.testing.assert_array_equal(leave_one_out(rewards, alone, 4), np.zeros(4))


def test_batch_scale_divides_by_the_spread_of_the_batch():
    rewards = jnp.asarray([0.0, 1.0, 0.0, 9.0])
    found = group_advantages(rewards, jnp.ones(4, bool), 2, "batch")
    std = np.std([0, 1, 0, 9], ddof=1) + 1e-4
    np.testing.assert_allclose(found, np.array([-0.5, 0.5, -4.5, 4.5]) / std, rtol=1e-12)


def test_given_advantages_replace_those_of_the_batch(stats_of):
    stats = stats_of(RolloutStats)
    grpo = algorithm("grpo").config(group_size=4)
    whole = scalar(stats, grpo)
    given = dataclasses.replace(stats, advantages=jnp.asarray(advantages_of(stats, 4)))
    np.testing.assert_allclose(scalar(given, grpo), whole, rtol=1e-12)
    # Half a group is no group; with advantages given it is no matter.
    half = jax.tree.map(lambda x: x[:6], given)
    assert math.isfinite(scalar(half, grpo))


def test_multi_objective_advantages_normalise_each_reward_first():
    rewards = jnp.asarray([[0.0, 0.0], [1.0, 100.0], [1.0, 0.0], [0.0, 100.0]])
    keep = jnp.ones(4, bool)
    mixed = multi_objective_advantages(rewards, (0.5, 0.5), keep, 4, "normalise_then_sum")
    # Spreads 1/sqrt(3) and 100/sqrt(3): equal weights leave rows 3 and 4, with one reward each,
    # apart by the 1e-4 beside a spread only.
    small, large = 0.5 / (3**-0.5 + 1e-4), 50 / (100 * 3**-0.5 + 1e-4)
    total = np.array([-small - large, small + large, small - large, large - small]) / 2
    np.testing.assert_allclose(mixed, total / (np.std(total, ddof=1) + 1e-4), rtol=1e-9)
    summed = multi_objective_advantages(rewards, (0.5, 0.5), keep, 4)
    assert summed[3] > 0.8 and summed[2] < -0.8  # The reward of larger spread decides.
    with pytest.raises(InputError, match="1 weights for 2 rewards"):
        multi_objective_advantages(rewards, (1.0,), keep, 4)


def test_kl_in_the_reward_has_no_gradient(stats_of):
    stats = stats_of(RolloutStats)
    expected = np.asarray(stats.rewards) - 0.05 * np.asarray(
        ((stats.old_logps - stats.ref_logps) * stats.mask).sum(1)
    )
    np.testing.assert_allclose(shaped_rewards(stats.clean(), 0.05), expected, rtol=1e-10)
    config = algorithm("rloo").config(group_size=4)

    def loss(ref):
        given = dataclasses.replace(stats, ref_logps=ref)
        return preference_loss(given, config)[0].sum()

    assert not np.asarray(jax.grad(loss)(stats.ref_logps)).any()
    assert loss(stats.ref_logps) != loss(stats.ref_logps + jnp.arange(8.0)[:, None])


def reference_gae(rewards, values, gamma, lam):
    """Generalised advantages by their definition: sums of (gamma lambda)^k delta_{t+k}."""
    n = len(values)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_ppo_advantages_against_the_definition_also_across_a_gap(stats_of, estimator):
    stats = stats_of(RolloutStats)
    mask = np.asarray(stats.mask).copy()
    mask[:, 1] = False  # Tokens that the policy did not write.
    stats = dataclasses.replace(stats, mask=jnp.asarray(mask))
    config = PPO(kl_coef=0.1, kl_estimator=estimator, gamma=0.9, lam=0.8, whiten=False)
    advantages, returns = ppo_advantages(stats, config)
    for row in range(8):
        at = np.flatnonzero(mask[row])
        log_ratio = np.asarray(stats.old_logps - stats.ref_logps)[row, at]
        kl = log_ratio if estimator == "k1" else np.exp(-log_ratio) + log_ratio - 1
        rewards = -0.1 * kl
        rewards[-1] += float(stats.rewards[row])
        values = np.asarray(stats.old_values)[row, at]
        expected = np.array(reference_gae(rewards, values, 0.9, 0.8))
        np.testing.assert_allclose(advantages[row, at], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(returns[row, at], expected + values, rtol=1e-9, atol=1e-12)
        assert not np.asarray(advantages[row])[~mask[row]].any()
    white, same = ppo_advantages(stats, dataclasses.replace(config, whiten=True))
    np.testing.assert_allclose(np.asarray(white)[mask].mean(), 0, atol=1e-10)
    np.testing.assert_allclose(np.asarray(white)[mask].std(), 1, rtol=1e-6)
    np.testing.assert_allclose(same, returns)


def test_ppo_in_parts_with_given_advantages_is_ppo_in_one(stats_of):
    """Rows all of length 6, so that halves have equally many tokens."""
    stats = stats_of(RolloutStats, length=6)
    config = algorithm("ppo").config()
    advantages, returns = ppo_advantages(stats, config)
    given = dataclasses.replace(stats, advantages=advantages, returns=returns)
    halves = [jax.tree.map(lambda x, s=s: x[s], given) for s in (slice(0, 4), slice(4, 8))]
    parts = np.mean([scalar(half, config) for half in halves])
    np.testing.assert_allclose(parts, scalar(stats, config), rtol=1e-10)


def test_reinforce_baselines(stats_of):
    stats = stats_of(RolloutStats)
    sums = np.asarray((stats.logps * stats.mask).sum(1))
    rewards, given = np.asarray(stats.rewards), np.asarray(stats.baselines)
    for baseline, b in (("none", 0.0), ("batch_mean", rewards.mean()), ("given", given)):
        loss, _ = preference_loss(stats, algorithm("reinforce").config(baseline=baseline))
        np.testing.assert_allclose(loss, -(rewards - b) * sums, rtol=1e-10)


def test_ppo_of_two_tokens_by_hand():
    """Old values 0.5 and 0.25, reward 1 at the end, no KL.

    delta_2 = 1 - 0.25 = 0.75, delta_1 = 0.25 - 0.5 = -0.25, A_1 = -0.25 + 0.95 * 0.75 = 0.4625.
    """
    stats = RolloutStats(
        logps=jnp.log(jnp.asarray([[0.6, 0.2, 0.9]])),
        old_logps=jnp.log(jnp.asarray([[0.4, 0.4, 0.1]])),
        mask=jnp.asarray([[True, True, False]]),
        rewards=jnp.asarray([1.0]),
        values=jnp.asarray([[0.9, 0.35, 7.0]]),
        old_values=jnp.asarray([[0.5, 0.25, 9.0]]),
    )
    loss, metrics = preference_loss(stats, PPO(kl_coef=0.0, whiten=False))
    # Ratios 1.5 and 0.5 with positive advantages: 1.2 clipped and 0.5.
    policy = -(1.2 * 0.4625 + 0.5 * 0.75) / 2
    # Returns 0.9625 and 1; the critic moved by 0.4, of which 0.2 counts, and by 0.1.
    value = (max((0.9 - 0.9625) ** 2, (0.7 - 0.9625) ** 2) + (0.35 - 1.0) ** 2) / 2 / 2
    np.testing.assert_allclose(loss, [policy + 0.1 * value], rtol=1e-12)
    np.testing.assert_allclose(metrics["clip_fraction"], 0.5)
