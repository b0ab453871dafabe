"""Attention implementations against loops and each other, and which one is chosen."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.nn import attention
from jaxllm.nn.attention import attend
from jaxllm.parallel.mesh import MeshConfig, make_mesh


def qkv(queries, keys, heads, kv_heads, dim=8, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, queries, heads, dim)] + [(batch, keys, kv_heads, dim)] * 2
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def by_loops(q, k, v, *, causal, lengths):
    """One query of one head of one example at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    batch, queries, heads, dim = q.shape
    for b, t, n in np.ndindex(batch, queries, heads):
        seen = min(lengths[b], k.shape[1])
        if causal:
            seen = min(seen, t + k.shape[1] - queries + 1)
        group = n // (heads // k.shape[2])
        scores = k[b, :seen, group] @ q[b, t, n] / np.sqrt(dim)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, :seen, group] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("ratio", "queries", "keys", "causal", "key_length"),
    [
        (1, 5, 5, True, None),
        (2, 3, 7, True, None),
        (4, 1, 6, True, None),
        (4, 4, 6, False, None),
        (1, 4, 6, False, 3),
        (2, 5, 5, True, jnp.array([2, 5])),
        (4, 4, 6, False, jnp.array([1, 6])),
    ],
)
def test_xla_equals_loops(ratio, queries, keys, causal, key_length):
    q, k, v = qkv(queries, keys, 4, 4 // ratio)
    found = attend(q, k, v, causal=causal, key_length=key_length, implementation="xla")
    lengths = np.broadcast_to(keys if key_length is None else np.asarray(key_length), 2)
    expected = by_loops(q, k, v, causal=causal, lengths=lengths)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_xla_equals_the_framework(causal):
    q, k, v = qkv(6, 6, 4, 2)
    expected = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=jnp.array([6, 4])
    )
    found = attend(q, k, v, causal=causal, key_length=jnp.array([6, 4]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_softmax_is_float32_under_bfloat16():
    q, k, v = qkv(6, 6, 2, 2, dtype=jnp.bfloat16)
    found = attend(q, k, v, causal=True)
    assert found.dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(partial(attend, causal=True))(q, k, v).jaxpr
    kinds = {str(e.outvars[0].aval.dtype) for e in jaxpr.eqns if e.primitive.name == "exp"}
    inner = [e for e in jaxpr.eqns if "jaxpr" in e.params]
    kinds |= {
        str(e.outvars[0].aval.dtype)
        for outer in inner
        for e in outer.params["jaxpr"].jaxpr.eqns
        if e.primitive.name == "exp"
    }
    assert kinds == {"float32"}
    expected = by_loops(q, k, v, causal=True, lengths=[6, 6])
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02)


# -- the TPU kernel, interpreted ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("causal", "heads", "kv_heads", "dim", "length"),
    [(True, 2, 1, 64, 256), (False, 2, 2, 128, 128), (True, 1, 1, 40, 128)],
)
def test_splash_equals_xla(causal, heads, kv_heads, dim, length):
    q, k, v = qkv(length, length, heads, kv_heads, dim, batch=1)
    found = attention._splash(q, k, v, causal=causal, interpret=True)
    expected = attend(q, k, v, causal=causal, implementation="xla")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_splash_gradients_equal_xla():
    args = qkv(128, 128, 2, 1, 64, batch=1)

    def loss(run, args):
        return jnp.sum(jnp.sin(run(*args)))

    found = jax.grad(partial(loss, partial(attention._splash, causal=True, interpret=True)))(args)
    expected = jax.grad(partial(loss, partial(attend, causal=True)))(args)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_splash_runs_on_each_devices_own_examples_and_heads():
    q, k, v = qkv(128, 128, 4, 2, 64, batch=4)
    expected = attend(q, k, v, causal=True)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        found = jax.jit(partial(attention._splash, causal=True, interpret=True))(q, k, v)
    assert found.addressable_shards[0].data.shape == (1, 128, 2, 64)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# -- the choice -----------------------------------------------------------------------------------


def chosen(backend, monkeypatch, queries=256, keys=256, dim=64, dtype=jnp.bfloat16, **kwargs):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    names = []
    for name in ("xla", "cudnn", "splash"):
        monkeypatch.setattr(
            attention, f"_{name}", lambda q, *args, name=name, **kw: names.append(name) or q
        )
    attend(*qkv(queries, keys, 2, 2, dim, dtype=dtype), **kwargs)
    return names[0]


@pytest.mark.parametrize(
    ("backend", "case", "expected"),
    [
        ("cpu", dict(), "xla"),
        ("tpu", dict(), "splash"),
        ("tpu", dict(causal=True, dtype=jnp.float32), "splash"),
        ("tpu", dict(queries=200, keys=200), "xla"),
        ("tpu", dict(queries=128), "xla"),
        ("tpu", dict(queries=1, keys=128, causal=True), "xla"),
        ("tpu", dict(key_length=100), "xla"),
        ("tpu", dict(implementation="xla"), "xla"),
        ("gpu", dict(), "cudnn"),
        ("gpu", dict(causal=True, dtype=jnp.float16), "cudnn"),
        ("gpu", dict(key_length=100), "cudnn"),
        ("gpu", dict(queries=128), "cudnn"),
        ("gpu", dict(queries=128, causal=True), "xla"),
        ("gpu", dict(dtype=jnp.float32), "xla"),
        ("gpu", dict(dim=256), "xla"),
        ("gpu", dict(dim=60), "xla"),
    ],
)
def test_the_implementation_fits_backend_dtype_and_mask(backend, case, expected, monkeypatch):
    assert chosen(backend, monkeypatch, **case) == expected


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        ("splash", dict(queries=200, keys=200)),
        ("splash", dict(key_length=3)),
        ("splash", dict(queries=128)),
        ("cudnn", dict(queries=128, causal=True)),
    ],
)
def test_what_a_named_implementation_cannot_mask_is_refused(implementation, case, monkeypatch):
    with pytest.raises(InputError, match=f"{implementation} attention cannot take"):
        chosen("cpu", monkeypatch, implementation=implementation, **case)


def test_a_refusing_cudnn_falls_back_with_a_warning(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def refuse(*args, **kwargs):
        raise RuntimeError("no such card")

    monkeypatch.setattr(attention, "_cudnn", refuse)
    q, k, v = qkv(4, 4, 2, 2, dtype=jnp.bfloat16)
    with pytest.warns(UserWarning, match="no such card"):
        found = attend(q, k, v, causal=True)
    np.testing.assert_array_equal(found, attend(q, k, v, causal=True, implementation="xla"))
    with pytest.raises(RuntimeError, match="no such card"):
        attend(q, k, v, causal=True, implementation="cudnn")
