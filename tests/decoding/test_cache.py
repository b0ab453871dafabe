"""The full cache: appending in any portions equals attending to everything."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.decoding.cache import init_cache
from jaxllm.nn.attention import attend


@pytest.mark.parametrize(
    ("kv_heads", "portions"), [(1, (4, 2)), (2, (1, 1, 1, 1, 1, 1)), (4, (3, 1, 2))]
)
def test_appending_equals_attending_to_everything(kv_heads, portions):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, 6, heads, 8)), jnp.float32)
        for heads in (4, kv_heads, kv_heads)
    )
    (cache,) = init_cache((1, kv_heads, 9, 8), 2)  # Three places stay empty.
    extend = jax.jit(lambda cache, *args: cache.extend(*args))
    outputs, start = [], 0
    for size in portions:
        part = slice(start, start + size)
        out, cache = extend(cache, q[:, part], k[:, part], v[:, part], jnp.int32(start))
        outputs.append(out)
        start += size
    expected = attend(q, k, v, causal=True)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, atol=1e-5)
    np.testing.assert_array_equal(cache.keys[:, :, :6], k.swapaxes(1, 2))
    np.testing.assert_array_equal(cache.values[:, :, :6], v.swapaxes(1, 2))
    np.testing.assert_array_equal(cache.values[:, :, 6:], 0.0)


def test_a_cache_may_be_narrower_than_the_computation():
    (cache,) = init_cache((1, 1, 4, 8), 1, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8))
    out, cache = cache.extend(x, x, x, jnp.int32(0))
    assert out.dtype == jnp.float32 and cache.keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(out, attend(x, x, x, causal=True), atol=0.05)
