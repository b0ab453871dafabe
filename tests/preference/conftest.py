"""Statistics with every optional field, so that one loop reaches all algorithms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.preference import (
    Beliefs,
    ListStats,
    PairStats,
    PointStats,
    RewardPairs,
    RolloutStats,
    RunningMean,
    Sequences,
)

TOKENS = 6


@pytest.fixture
def x64():
    """Worked numbers are checked to their last digit, which float32 cannot always hold."""
    with jax.enable_x64(True):
        yield


def make_sequences(rng, shape, scale, length):
    """Log-probs between -2 and -0.1 a token, times `scale`; lengths 3 to 6 unless given."""
    lengths = rng.integers(3, TOKENS + 1, shape) if length is None else np.full(shape, length)
    mask = np.arange(TOKENS) < lengths[..., None]

    def numbers(*axes, low=0.1, high=2.0):
        return jnp.asarray(scale * rng.uniform(low, high, (*shape, *axes)))

    return Sequences.from_tokens(
        -numbers(TOKENS),
        jnp.asarray(mask),
        -numbers(TOKENS),
        kl=numbers(),
        collision=-lengths * numbers(),
        prompt_logps=-4 * numbers(),
        prompt_lengths=jnp.full(shape, 4),
        belief_span=jnp.broadcast_to(jnp.array([0, 2]), (*shape, 2)),
    )


def make_stats(kind, rows=8, *, seed=0, scale=1.0, length=None):
    rng = np.random.default_rng(seed)

    def sequences(shape=(rows,)):
        return make_sequences(rng, shape, scale, length)

    def numbers(*shape, low=0.0, high=1.0):
        return jnp.asarray(rng.uniform(low, high, shape))

    beliefs = Beliefs(
        log_probs=jnp.asarray(np.log(rng.dirichlet(np.ones(4), rows)[:, :3]) * scale),
        target=jnp.asarray(rng.dirichlet(np.ones(3), rows)),
    )
    running = RunningMean(jnp.asarray(0.2), jnp.asarray(3.0))
    if kind is PairStats:
        margins = numbers(rows, 1, low=-1.0)
        return PairStats(sequences(), sequences(), sequences(), margins, beliefs, running)
    if kind is PointStats:
        return PointStats(
            completions=sequences(),
            desirable=jnp.arange(rows) % 3 != 0,
            rewards=numbers(rows, high=1.5),
            mismatched=sequences(),
            density_ratio=numbers(rows, high=12.0),
            beliefs=beliefs,
            running=running,
        )
    if kind is ListStats:
        return ListStats(candidates=sequences((rows, 4)), scores=numbers(rows, 4, low=-1.0))
    if kind is RewardPairs:
        return RewardPairs(scale * numbers(rows, low=-1.0), scale * numbers(rows, low=-1.0))
    seen = sequences()
    return RolloutStats(
        logps=seen.token_logps,
        mask=seen.mask,
        rewards=numbers(rows, low=-1.0),
        old_logps=seen.token_logps + scale * numbers(rows, TOKENS, low=-0.3, high=0.3),
        ref_logps=seen.ref_token_logps,
        values=numbers(rows, TOKENS, low=-1.0),
        old_values=numbers(rows, TOKENS, low=-1.0),
        baselines=numbers(rows),
    )


@pytest.fixture
def stats_of():
    """make_stats(class, rows, seed=, scale=, length=)."""
    return make_stats
