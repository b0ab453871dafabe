"""Guidance on paired rows and its schedules by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.decoding.guidance import guidance_scales, guide, pair
from jaxllm.errors import InputError


def test_pairs_are_neighbours():
    np.testing.assert_array_equal(pair(jnp.array([4, 7]), 9), [4, 9, 7, 9])


def test_guide_is_linear_in_the_scale():
    logits = jax.random.normal(jax.random.key(0), (6, 5))
    conditional, unconditional = logits[0::2], logits[1::2]
    np.testing.assert_allclose(guide(logits, 1.0), conditional, atol=1e-6)
    np.testing.assert_allclose(guide(logits, 0.0), unconditional, atol=1e-6)
    by_hand = unconditional + 2.5 * (conditional - unconditional)
    np.testing.assert_allclose(guide(logits, 2.5), by_hand, atol=1e-6)
    between = 0.25 * guide(logits, 1.0) + 0.75 * guide(logits, 3.0)
    np.testing.assert_allclose(guide(logits, 2.5), between, atol=1e-5)


def test_schedules():
    scale = np.array([3.0, 2.0])
    np.testing.assert_array_equal(guidance_scales(scale, 3), [[3, 2]] * 3)
    ramp = guidance_scales(scale, 5, "ramp")
    np.testing.assert_allclose(ramp, [[1, 1], [1.5, 1.25], [2, 1.5], [2.5, 1.75], [3, 2]])
    assert ramp.dtype == np.float32
    np.testing.assert_array_equal(guidance_scales(scale, 1, "ramp"), [[1, 1]])
    inside = guidance_scales(scale, 4, "interval", (0.25, 0.75))
    np.testing.assert_array_equal(inside, [[1, 1], [3, 2], [3, 2], [1, 1]])
    everywhere = guidance_scales(scale, 4, "interval")
    np.testing.assert_array_equal(everywhere, guidance_scales(scale, 4))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.2, 1.1)])
def test_an_empty_or_outside_interval_is_refused(interval):
    with pytest.raises(InputError, match="guidance interval"):
        guidance_scales(np.ones(1), 4, "interval", interval)
