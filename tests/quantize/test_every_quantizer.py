"""What holds for each quantizer: decoding, idempotence, masks, shapes, refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.quantize import BSQ, FSQ, LFQ, ResidualVQ, SimVQ

QUANTIZERS = {
    "vq_ema": ResidualVQ(16, 4),
    "vq_gradient": ResidualVQ(16, 4, update="gradient"),
    "vq_cosine": ResidualVQ(16, 4, update="gradient", cosine=True),
    "vq_entropy": ResidualVQ(16, 4, update="gradient", entropy_weight=0.1, entropy_temperature=1.0),
    "rvq_shared": ResidualVQ(16, 4, depth=3),
    "rvq_sequential": ResidualVQ(16, 4, depth=3, ema_mode="sequential"),
    "rvq_separate": ResidualVQ(16, 4, depth=3, shared=False),
    "rvq_rotation": ResidualVQ(16, 4, depth=2, estimator="rotation"),
    "fsq": FSQ((8, 5, 3, 4)),
    "fsq_symmetric": FSQ((2, 5, 3, 4), symmetric=True),
    "lfq": LFQ(4),
    "bsq": BSQ(4),
    "simvq": SimVQ(16, 4, table_dim=6),
}
every = pytest.mark.parametrize("config", QUANTIZERS.values(), ids=QUANTIZERS.keys())


def make(config, shape=(2, 5, 3, 4)):
    params, state = config.init(jax.random.key(1))
    z = jax.random.normal(jax.random.key(2), shape)
    return params, state, z


@every
def test_shapes_and_ranges(config):
    params, state, z = make(config)
    output = config.quantize(params, state, z, train=True, key=jax.random.key(0))
    assert output.quantized.shape == z.shape and output.quantized.dtype == z.dtype
    assert output.codes.shape == (*z.shape[:-1], config.depth)
    assert output.codes.dtype == jnp.int32
    assert int(output.codes.min()) >= 0 and int(output.codes.max()) < config.size
    assert set(output.losses) <= {"commitment", "codebook", "entropy"}
    assert all(v.shape == () and v.dtype == jnp.float32 for v in output.losses.values())
    assert config.total_loss(output.losses).shape == ()
    assert jax.tree.structure(output.state) == jax.tree.structure(state)
    assert hash(config) == hash(dataclasses.replace(config))


@every
def test_decode_equals_quantized(config):
    """Exactly: the estimator adds nothing in the forward pass."""
    params, state, z = make(config)
    output = config.quantize(params, state, z, train=False)
    np.testing.assert_array_equal(output.quantized, config.decode(params, state, output.codes))
    table = config.codebook(params, state)
    assert table.shape == (config.depth, config.size, 4)
    levels = [table[i][output.codes[..., i]] for i in range(config.depth)]
    np.testing.assert_allclose(output.quantized, sum(levels), atol=1e-6)


@every
def test_eval_leaves_state(config):
    params, state, z = make(config)
    output = config.quantize(params, state, z, train=False)
    assert output.state is state


@pytest.mark.parametrize("name", ["vq_ema", "vq_gradient", "vq_cosine", "lfq", "bsq", "simvq"])
def test_idempotent(name):
    """Every code vector is its own nearest code."""
    config = QUANTIZERS[name]
    params, state, _ = make(config)
    codes = jnp.arange(config.size)[:, None]
    vectors = config.decode(params, state, codes)
    again = config.quantize(params, state, vectors, train=False)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_allclose(again.quantized, vectors, atol=1e-6)


def test_idempotent_residual_with_zero_code():
    """If 0 is a code and codes are far apart, a code vector uses its code, then zeros."""
    config = ResidualVQ(5, 4, depth=3)
    _, state = config.init(jax.random.key(0))
    table = jnp.concatenate([jnp.zeros((1, 4)), 4.0 * jnp.eye(4)])
    state["codebook"] = table[None]
    output = config.quantize({}, state, table, train=False)
    expected = np.stack([np.arange(5), np.zeros(5), np.zeros(5)], 1)
    np.testing.assert_array_equal(output.codes, expected)


@every
def test_mask_changes_no_statistic(config):
    """Losses, gradients, state and restarts equal those of the valid vectors; NaN padding too."""
    params, state, z = make(config, (4, 6, 4))
    mask = jnp.arange(6) < jnp.array([6, 2, 4, 1])[:, None]
    key = jax.random.key(3)

    def loss(z, mask):
        output = config.quantize(params, state, z, train=True, key=key, mask=mask)
        return config.total_loss(output.losses), output

    grad = jax.value_and_grad(loss, has_aux=True)
    (value, first), gradient = grad(z, mask)
    padded = jnp.where(mask[..., None], z, jnp.nan)
    (other_value, second), other_gradient = grad(padded, mask)
    np.testing.assert_array_equal(value, other_value)
    np.testing.assert_array_equal(gradient[mask], other_gradient[mask])
    np.testing.assert_array_equal(gradient[~mask], 0.0)
    for name in state:
        np.testing.assert_array_equal(first.state[name], second.state[name])
    np.testing.assert_array_equal(first.codes[mask], second.codes[mask])
    alone = config.quantize(params, state, z[mask], train=False)
    whole = config.quantize(params, state, padded, train=False, mask=mask)
    for name, expected in alone.losses.items():
        np.testing.assert_allclose(whole.losses[name], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vq_ema", "rvq_shared", "rvq_sequential", "rvq_separate"])
def test_masked_ema_equals_ema_of_the_valid_vectors(name):
    config = dataclasses.replace(QUANTIZERS[name], restart_below=0.0)
    _, state, z = make(config, (4, 6, 4))
    mask = jnp.arange(6) < jnp.array([6, 2, 4, 1])[:, None]
    masked = config.quantize({}, state, z, train=True, mask=mask).state
    alone = config.quantize({}, state, z[mask], train=True).state
    for leaf in state:
        np.testing.assert_allclose(masked[leaf], alone[leaf], rtol=1e-5, atol=1e-6)


@every
def test_all_padding_is_harmless(config):
    params, state, z = make(config)
    mask = jnp.zeros(z.shape[:-1], bool)
    output = config.quantize(params, state, z, train=True, key=jax.random.key(0), mask=mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((output.losses, output.state)))
    if "commitment" in output.losses:
        assert float(output.losses["commitment"]) == 0.0
    if "codebook" in state:
        np.testing.assert_allclose(output.state["codebook"], state["codebook"])


@every
def test_bfloat16_input_keeps_dtype_and_float32_losses(config):
    params, state, z = make(config)
    output = config.quantize(params, state, z.astype(jnp.bfloat16), train=False)
    assert output.quantized.dtype == jnp.bfloat16
    exact = config.quantize(params, state, z.astype(jnp.bfloat16).astype(jnp.float32), train=False)
    np.testing.assert_array_equal(output.codes, exact.codes)
    assert all(v.dtype == jnp.float32 for v in output.losses.values())


@every
def test_jit_equals_eager(config):
    params, state, z = make(config)
    key = jax.random.key(5)
    eager = config.quantize(params, state, z, train=True, key=key)
    jitted = jax.jit(lambda p, s, z: config.quantize(p, s, z, train=True, key=key))(
        params, state, z
    )
    np.testing.assert_array_equal(eager.codes, jitted.codes)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@every
def test_wrong_shapes_are_named(config):
    params, state, z = make(config)
    with pytest.raises(InputError, match=r"z has shape \(2, 5, 3, 3\)"):
        config.quantize(params, state, z[..., :3], train=False)
    with pytest.raises(InputError, match=r"mask has shape \(2, 5\)"):
        config.quantize(params, state, z, train=False, mask=jnp.ones((2, 5), bool))
    with pytest.raises(InputError, match="codes have shape"):
        config.decode(params, state, jnp.zeros((2, config.depth + 1), jnp.int32))
    with pytest.raises(InputError, match="decode depth is 4"):
        config.decode(params, state, jnp.zeros((2, config.depth), jnp.int32), depth=4)


@every
def test_unknown_code_decodes_to_nan(config):
    """A code that does not exist is never silently another code."""
    params, state, _ = make(config)
    codes = jnp.full((1, config.depth), config.size, jnp.int32)
    assert np.isnan(config.decode(params, state, codes)).all()


@pytest.mark.parametrize(
    ("make_config", "words"),
    [
        (lambda: ResidualVQ(0, 4), "codebook_size is 0"),
        (lambda: ResidualVQ(4, 4, update="adam"), "update is 'adam'"),
        (lambda: ResidualVQ(4, 4, depth=2, cosine=True), "cosine needs depth 1"),
        (lambda: ResidualVQ(4, 4, legacy_beta=True), "legacy_beta"),
        (lambda: ResidualVQ(4, 1, estimator="rotation"), "code_dim of at least 2"),
        (lambda: ResidualVQ(4, 4, dropout=1.5), "dropout is 1.5"),
        (lambda: FSQ((2, 3)), "symmetric=True"),
        (lambda: FSQ((256,) * 4), "more than int32"),
        (lambda: LFQ(31), "code_dim is 31"),
        (lambda: BSQ(0), "BSQ: code_dim is 0"),
    ],
)
def test_bad_configurations_are_refused(make_config, words):
    with pytest.raises(InputError, match=words):
        make_config()


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.5, "restart_below": 0.0}, {"temperature": 1.0, "update": "gradient"}],
)
def test_training_without_a_needed_key_is_refused(options):
    config = ResidualVQ(4, 2, depth=2, **options)
    params, state = config.init(jax.random.key(0))
    with pytest.raises(InputError, match="pass key="):
        config.quantize(params, state, jnp.zeros((3, 2)), train=True)
