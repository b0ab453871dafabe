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


def by_loops(q, k, v, *, causal, lengths=None, segments=None, window=None, soft_cap=None):
    """One query of one head of one example at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    batch, queries, heads, dim = q.shape
    for b, t, n in np.ndindex(batch, queries, heads):
        position = t + k.shape[1] - queries
        seen = [
            s
            for s in range(k.shape[1] if lengths is None else lengths[b])
            if (not causal or s <= position)
            and (window is None or s > position - window)
            and (segments is None or segments[b][s] == segments[b][t])
        ]
        group = n // (heads // k.shape[2])
        scores = k[b, seen, group] @ q[b, t, n] / np.sqrt(dim)
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, group] / weights.sum()
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


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [-1, -1, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("queries", "case"),
    [
        (7, dict(window=3)),
        (3, dict(window=4)),
        (7, dict(window=1, soft_cap=0.5)),
        (7, dict(segments=SEGMENTS)),
        (7, dict(segments=SEGMENTS, causal=False)),
        (7, dict(segments=SEGMENTS, window=2, soft_cap=2.0)),
    ],
)
def test_windows_segments_and_soft_caps_equal_loops(queries, case):
    q, k, v = qkv(queries, 7, 4, 2)
    case = dict(causal=True) | case
    given = {"segment_ids" if name == "segments" else name: x for name, x in case.items()}
    np.testing.assert_allclose(attend(q, k, v, **given), by_loops(q, k, v, **case), atol=1e-5)


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize(
    ("queries", "case"),
    [
        (7, dict()),
        (3, dict()),
        (7, dict(lengths=[7, 6])),
        (4, dict(window=2)),
        (7, dict(segments=SEGMENTS, window=3, soft_cap=2.0)),
    ],
)
def test_blocks_of_queries_equal_loops(queries, case, block, monkeypatch):
    monkeypatch.setattr(attention, "_XLA_BLOCK", block)
    monkeypatch.setattr(attention, "_XLA_BLOCKS", 7)
    q, k, v = qkv(queries, 7, 4, 2)
    names = {"segments": "segment_ids", "lengths": "key_length"}
    given = {names.get(name, name): x for name, x in case.items()}
    if "key_length" in given:
        given["key_length"] = jnp.array(given["key_length"])
    found = jax.jit(partial(attend, causal=True, **given))(q, k, v)
    np.testing.assert_allclose(found, by_loops(q, k, v, causal=True, **case), atol=1e-5)


def test_a_branch_sees_the_trunk_and_itself_in_every_block(monkeypatch):
    q, k, v = qkv(6, 6, 2, 2, batch=1)
    run = partial(attend, causal=True, branch_ids=jnp.array([[0, 0, 1, 1, 2, 2]]))
    whole = jax.jit(run)(q, k, v)
    monkeypatch.setattr(attention, "_XLA_BLOCK", 2)
    np.testing.assert_allclose(jax.jit(lambda *x: run(*x))(q, k, v), whole, atol=1e-6)


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


@pytest.mark.parametrize(
    "case", [dict(window=40), dict(soft_cap=0.7), dict(segment_ids=True, window=100)]
)
def test_splash_masks_equal_xla(case):
    if "segment_ids" in case:
        ids = np.repeat([[3, 1, 2, 0], [1, 1, 1, 1]], 64, axis=1)
        case = case | dict(segment_ids=jnp.asarray(ids))
    q, k, v = qkv(256, 256, 2, 1, 64, batch=2)
    found = attention._splash(q, k, v, causal=True, interpret=True, **case)
    expected = attend(q, k, v, causal=True, implementation="xla", **case)
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
    ids = jnp.asarray(np.repeat(np.arange(8).reshape(4, 2), 64, axis=1))
    expected = attend(q, k, v, causal=True, segment_ids=ids)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        splash = partial(attention._splash, causal=True, interpret=True)
        found = jax.jit(splash)(q, k, v, segment_ids=ids)
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
        ("tpu", dict(causal=True, window=64, soft_cap=5.0), "splash"),
        ("tpu", dict(causal=True, segment_ids=np.zeros((2, 256))), "splash"),
        ("gpu", dict(), "cudnn"),
        ("gpu", dict(causal=True, dtype=jnp.float16), "cudnn"),
        ("gpu", dict(key_length=100), "cudnn"),
        ("gpu", dict(queries=128), "cudnn"),
        ("gpu", dict(queries=128, causal=True), "xla"),
        ("gpu", dict(dtype=jnp.float32), "xla"),
        ("gpu", dict(dim=256), "xla"),
        ("gpu", dict(dim=60), "xla"),
        ("gpu", dict(causal=True, window=64), "cudnn"),
        ("gpu", dict(causal=True, window=64, key_length=100), "xla"),
        ("gpu", dict(causal=True, window=256, key_length=100), "cudnn"),
        ("gpu", dict(causal=True, soft_cap=5.0), "xla"),
        ("gpu", dict(causal=True, segment_ids=np.zeros((2, 256))), "xla"),
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
        ("cudnn", dict(soft_cap=1.0)),
        ("cudnn", dict(segment_ids=np.zeros((2, 256)))),
    ],
)
def test_what_a_named_implementation_cannot_mask_is_refused(implementation, case, monkeypatch):
    with pytest.raises(InputError, match=f"{implementation} attention cannot take"):
        chosen("cpu", monkeypatch, implementation=implementation, **case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (dict(window=2), "window 2 must be at least 1 and causal, not causal=False"),
        (dict(window=0, causal=True), "window 0 must be at least 1"),
        (dict(segment_ids=np.zeros((2, 7))), r"segment_ids \(2, 7\) must be \[B, T\] of 4 queries"),
    ],
)
def test_impossible_masks_are_refused(case, message):
    with pytest.raises(InputError, match=message):
        attend(*qkv(4, 7, 2, 2), **case)


def test_cudnn_is_given_its_window(monkeypatch):
    """cuDNN counts the keys to the left of a query's own."""
    given = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **kw: given.update(kw))
    attend(*qkv(8, 8, 2, 2), causal=True, window=3, implementation="cudnn")
    assert given["local_window_size"] == (2, 0) and given["is_causal"]


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
