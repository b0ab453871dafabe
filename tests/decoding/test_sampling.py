"""Filters by hand, and draws that depend on their own key only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.decoding.sampling import check_filters, filter_logits, sample_token

# Probabilities 0.5, 0.25, 0.125, 0.125 at shuffled places.
LOGITS = jnp.log(jnp.array([0.125, 0.5, 0.125, 0.25]))


def kept(logits, **filters):
    return np.flatnonzero(np.isfinite(filter_logits(logits, **filters))).tolist()


def test_top_k_keeps_exactly_k_even_of_ties():
    assert kept(LOGITS, top_k=1) == [1]
    assert kept(LOGITS, top_k=2) == [1, 3]
    assert kept(LOGITS, top_k=3) == [0, 1, 3]
    assert kept(LOGITS, top_k=4) == kept(LOGITS, top_k=9) == kept(LOGITS) == [0, 1, 2, 3]
    assert kept(jnp.zeros(5), top_k=2) == [0, 1]
    np.testing.assert_array_equal(filter_logits(LOGITS, top_k=2)[jnp.array([1, 3])], LOGITS[1::2])


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, [1]),
        (0.4999, [1]),
        (0.5001, [1, 3]),  # The token that crosses p stays.
        (0.7499, [1, 3]),
        (0.7501, [0, 1, 3]),
        (0.8751, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_first_token_that_crosses_p(top_p, expected):
    assert kept(LOGITS, top_p=top_p) == expected
    assert kept(LOGITS, top_p=jnp.float32(top_p)) == expected


def test_top_p_counts_the_mass_that_top_k_left():
    # After top-k 2 the masses are 2/3 and 1/3: p = 0.6 is reached by the first alone, which of all
    # four it would not be.
    assert kept(LOGITS, top_k=2, top_p=0.6) == [1]
    assert kept(LOGITS, top_p=0.6) == [1, 3]
    assert kept(jnp.zeros(4), top_p=0.5001) == [0, 1, 2]


def test_a_traced_top_p_of_one_keeps_everything():
    logits = jnp.array([40.0, 0.0, -40.0, -90.0])  # The cumulative sum is 1 after the first.
    assert kept(logits, top_p=jnp.float32(1.0)) == [0, 1, 2, 3]


def test_temperature_comes_before_top_p():
    uniforms = jax.random.uniform(jax.random.key(0), 300)
    rows = jnp.broadcast_to(LOGITS, (300, 4))
    # At temperature 1/2 the masses are 16, 4, 1, 1 of 22, so that p = 0.72 keeps one token only.
    drawn = sample_token(uniforms, rows, temperature=0.5, top_p=0.72)
    assert set(drawn.tolist()) == {1}
    assert set(sample_token(uniforms, rows, top_p=0.72).tolist()) == {1, 3}
    # At temperature 4 they are nearly equal: all of them stay.
    assert set(sample_token(uniforms, rows, temperature=4.0, top_p=0.9).tolist()) == {0, 1, 2, 3}


def test_temperature_zero_takes_the_most_likely_token():
    logits = jax.random.normal(jax.random.key(1), (50, 9))
    for key in (0, 1):
        drawn = sample_token(jax.random.uniform(jax.random.key(key), 50), logits, temperature=0.0)
        np.testing.assert_array_equal(drawn, jnp.argmax(logits, axis=-1))
    assert drawn.dtype == jnp.int32


def test_frequencies_follow_the_temperature():
    uniforms = jax.random.uniform(jax.random.key(2), 20_000)
    drawn = sample_token(uniforms, jnp.broadcast_to(LOGITS, (20_000, 4)), temperature=0.5)
    expected = np.array([1, 16, 1, 4]) / 22
    found = np.bincount(drawn, minlength=4) / 20_000
    # Four standard errors of the most uncertain share.
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.2 / 20_000))


@pytest.mark.parametrize("size", [1, 2, 5, 16, 100, 1000])
def test_the_cumulative_distribution_is_inverted(size):
    rng = np.random.default_rng(size)
    masses = rng.exponential(size=size) * (rng.uniform(size=size) < 0.7)
    masses[rng.integers(size)] = 1.0
    uniforms = np.concatenate([rng.uniform(size=300), [0.0, 1 - 2**-23]]).astype(np.float32)
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(masses), jnp.float32)
    drawn = np.asarray(sample_token(jnp.asarray(uniforms), jnp.tile(logits, (302, 1))))
    assert (masses[drawn] > 0).all()
    ends = np.cumsum(masses) / masses.sum()
    # Rounding may move a number that lies on the edge between two tokens.
    assert (uniforms < ends[drawn] + 1e-5).all()
    assert (uniforms > ends[drawn] - masses[drawn] / masses.sum() - 1e-5).all()
    assert drawn[-2] == np.flatnonzero(masses)[0] and drawn[-1] == np.flatnonzero(masses)[-1]


def test_of_equally_likely_tokens_greedy_takes_the_lowest():
    logits = jnp.array([[-jnp.inf, 1.0, 3.0, 3.0, 2.9999]])
    for uniform in (0.0, 0.5, 0.999):
        assert sample_token(jnp.array([uniform]), logits, temperature=0.0).tolist() == [2]


def test_a_draw_depends_on_its_own_row_only():
    uniforms = jax.random.uniform(jax.random.key(3), 40)
    logits = jax.random.normal(jax.random.key(4), (40, 5))
    whole = sample_token(uniforms, logits, top_p=0.8)
    part = np.array([31, 7, 18])
    np.testing.assert_array_equal(
        sample_token(uniforms[part], logits[part], top_p=0.8), whole[part]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1, 0, 1.0), "temperature -0.1"),
        ((float("nan"), 0, 1.0), "temperature nan"),
        ((1.0, -1, 1.0), "top_k -1"),
        ((1.0, 0, 0.0), "top_p 0.0"),
        ((1.0, 0, 1.5), "top_p 1.5"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        check_filters(*settings)
    check_filters(0.0, 0, 1.0)
