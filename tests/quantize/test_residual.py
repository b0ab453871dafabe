"""Residual identities, losses, gradients, dropout and stochastic codes of ResidualVQ."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.quantize import ResidualVQ, nearest_code, rotation, straight_through
from jaxllm.quantize.codebook import code_entropy

Z = jax.random.normal(jax.random.key(0), (3, 7, 4))


def start(**options):
    config = ResidualVQ(9, 4, **{"depth": 3, "shared": False, "update": "gradient", **options})
    return config, *config.init(jax.random.key(1))


def test_chain_equals_numpy_loop(quantize):
    config, params, state = start()
    output = quantize(config, params, state, Z, train=False)
    table = np.asarray(params["codebook"], np.float64)
    squares = 0.0
    for index in np.ndindex(Z.shape[:-1]):
        residual = np.asarray(Z, np.float64)[index]
        for level in range(3):
            code = int(((table[level] - residual) ** 2).sum(-1).argmin())
            assert code == int(output.codes[(*index, level)])
            residual = residual - table[level, code]
            squares += (residual**2).sum()
    np.testing.assert_allclose(output.losses["commitment"], squares / (3 * Z.size), rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_prefix_decoding_and_level_vectors_agree(shared, quantize):
    config, params, state = start(shared=shared)
    codes = quantize(config, params, state, Z, train=False).codes
    levels = config.embed_levels(params, state, codes)
    assert levels.shape == (3, 7, 3, 4)
    for depth in (1, 2, 3):
        prefix = config.decode(params, state, codes, depth=depth)
        np.testing.assert_allclose(prefix, levels[..., :depth, :].sum(-2), atol=1e-6)
    residual = Z - config.decode(params, state, codes)
    np.testing.assert_allclose(levels.sum(-2) + residual, Z, atol=1e-5)


def test_depth_one_is_plain_vq(quantize):
    config, params, state = start(depth=1)
    output = quantize(config, params, state, Z, train=False)
    table = np.asarray(params["codebook"][0])
    distance = ((np.asarray(Z)[..., None, :] - table) ** 2).sum(-1)
    np.testing.assert_array_equal(output.codes[..., 0], distance.argmin(-1))
    np.testing.assert_array_equal(output.quantized, table[distance.argmin(-1)])
    np.testing.assert_allclose(output.losses["commitment"], distance.min(-1).mean() / 4, rtol=1e-5)


def test_error_is_monotone_per_vector_if_zero_is_a_code(quantize):
    """Not so in general: a vector's error may grow with depth when 0 is not a code."""
    config, params, state = start()
    params = {"codebook": params["codebook"].at[:, 0].set(0.0)}
    codes = quantize(config, params, state, Z, train=False).codes
    errors = [
        jnp.square(Z - config.decode(params, state, codes, depth=i)).sum(-1) for i in (1, 2, 3)
    ]
    assert all(bool((b <= a + 1e-6).all()) for a, b in itertools.pairwise(errors))


def test_straight_through_applied_once_gradient_is_one(quantize):
    """Per level, the gradient would be the depth."""
    config, params, state = start()

    def f(z):
        return quantize(config, params, state, z, train=False).quantized.sum()

    np.testing.assert_array_equal(jax.grad(f)(Z), jnp.ones_like(Z))


def test_commitment_alive_at_every_level(quantize):
    """The gradient is `2/numel 1/C sum_i (z - q_i)`, with a term of every level."""
    config, params, state = start()
    codes = quantize(config, params, state, Z, train=False).codes
    expected = sum(Z - config.decode(params, state, codes, depth=i) for i in (1, 2, 3))

    def f(z):
        return quantize(config, params, state, z, train=False).losses["commitment"]

    gradient = jax.grad(f)(Z)
    np.testing.assert_allclose(gradient, 2.0 / Z.size / 3.0 * expected, rtol=1e-4, atol=1e-7)
    first = 2.0 / Z.size / 3.0 * (Z - config.decode(params, state, codes, depth=1))
    assert float(jnp.abs(gradient - first).max()) > 1e-3


def test_codebook_loss_pulls_each_level_to_its_own_residual(quantize):
    config, params, state = start()
    codes = quantize(config, params, state, Z, train=False).codes

    def f(params, z):
        return quantize(config, params, state, z, train=False).losses["codebook"]

    by_table, by_z = jax.grad(f, argnums=(0, 1))(params, Z)
    np.testing.assert_array_equal(by_z, jnp.zeros_like(Z))
    expected = np.zeros((3, 9, 4))
    residual = np.asarray(Z)
    for level in range(3):
        vectors = np.asarray(params["codebook"][level])[codes[..., level]]
        gap = 2.0 / (3 * Z.size) * (vectors - residual)
        np.add.at(expected[level], codes[..., level], gap)
        residual = residual - vectors
    np.testing.assert_allclose(by_table["codebook"], expected, rtol=1e-4, atol=1e-7)


def test_total_loss_puts_beta_on_the_encoder_term():
    config, *_ = start(beta=0.25, entropy_weight=0.1)
    losses = {"commitment": jnp.float32(2.0), "codebook": jnp.float32(3.0)}
    assert float(config.total_loss(losses)) == 0.25 * 2.0 + 3.0
    with_entropy = config.total_loss({**losses, "entropy": jnp.float32(10.0)})
    np.testing.assert_allclose(with_entropy, 4.5)
    ema = ResidualVQ(4, 4)
    assert float(ema.total_loss({"commitment": jnp.float32(2.0)})) == 0.5


def test_legacy_beta_swaps_terms(quantize):
    config, params, state = start(beta=0.25, legacy_beta=True)
    losses = {"commitment": jnp.float32(2.0), "codebook": jnp.float32(3.0)}
    assert float(config.total_loss(losses)) == 2.0 + 0.25 * 3.0

    def encoder_gradient(config):
        def f(z):
            return config.total_loss(quantize(config, params, state, z, train=False).losses)

        return jax.grad(f)(Z)

    right = dataclasses.replace(config, legacy_beta=False)
    np.testing.assert_allclose(encoder_gradient(config), 4.0 * encoder_gradient(right), rtol=1e-5)


def test_rotation_forward_is_exact_and_jacobian_is_a_scaled_rotation():
    z, q = jax.random.normal(jax.random.key(0), (2, 4))
    np.testing.assert_array_equal(rotation(z, q), q)
    jacobian = np.asarray(jax.jacobian(rotation)(z, q), np.float64)
    scale = float(jnp.linalg.norm(q) / jnp.linalg.norm(z))
    turn = jacobian / scale
    np.testing.assert_allclose(turn @ turn.T, np.eye(4), atol=2e-6)
    np.testing.assert_allclose(np.linalg.det(turn), 1.0, atol=2e-6)
    np.testing.assert_allclose(jacobian @ np.asarray(z), q, atol=2e-6)


@pytest.mark.parametrize("z", [[0.0, 0.0], [1e-30, 0.0], [1.0, 0.0], [-1.0, 0.0]])
@pytest.mark.parametrize("q", [[0.0, 0.0], [1.0, 0.0]])
def test_rotation_is_finite_without_a_direction(z, q):
    z, q = jnp.array(z), jnp.array(q)
    np.testing.assert_array_equal(rotation(z, q), q)
    jacobian = jax.jacobian(rotation)(z, q)
    assert np.isfinite(jacobian).all() and float(jnp.abs(jacobian).max()) <= 1.0 + 1e-6


def test_residual_rotation_acts_on_the_sum(quantize):
    config, params, state = start(estimator="rotation")
    z = Z[0, 0]
    output = quantize(config, params, state, z, train=False)
    jacobian = jax.jacobian(lambda z: quantize(config, params, state, z, train=False).quantized)(z)
    np.testing.assert_allclose(jacobian, jax.jacobian(rotation)(z, output.quantized), atol=1e-6)


def test_straight_through_value_is_exact_for_large_numbers():
    """`z + (q - z)` would round: 1e8 + (0.1 - 1e8) is 0 in float32."""
    z, q = jnp.float32(1e8), jnp.float32(0.1)
    assert float(straight_through(z, q)) == float(q)


def test_dropout_is_per_example_and_marked_with_minus_one(quantize):
    config = ResidualVQ(8, 4, depth=4, dropout=0.5, restart_below=0.0)
    _, state = config.init(jax.random.key(1))
    z = jax.random.normal(jax.random.key(2), (400, 3, 4))
    output = quantize(config, {}, state, z, train=True, key=jax.random.key(3))
    kept = np.asarray(output.codes >= 0)
    # The same number of levels at all positions of an example, always a prefix of at least one.
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:, :1], kept.shape))
    np.testing.assert_array_equal(np.sort(kept, -1)[..., ::-1], kept)
    assert kept[..., 0].all()
    lengths = np.bincount(kept[:, 0].sum(-1), minlength=5)[1:] / 400
    # 1/2 full, the other half uniform over 1..4; five standard deviations of a share are 0.12.
    np.testing.assert_allclose(lengths, [0.125, 0.125, 0.125, 0.625], atol=0.12)
    np.testing.assert_allclose(output.quantized, config.decode({}, state, output.codes), atol=1e-6)
    levels = config.embed_levels({}, state, output.codes)
    np.testing.assert_array_equal(levels[~kept], 0.0)
    full = quantize(config, {}, state, z, train=False)
    np.testing.assert_array_equal(output.codes, np.where(kept, full.codes, -1))


def test_dropped_levels_leave_losses_and_ema(quantize):
    config = ResidualVQ(8, 4, depth=3, dropout=0.7, restart_below=0.0, decay=0.0, shared=False)
    _, state = config.init(jax.random.key(1))
    z = jax.random.normal(jax.random.key(2), (50, 2, 4))
    output = quantize(config, {}, state, z, train=True, key=jax.random.key(3))
    kept = np.asarray(output.codes >= 0)
    np.testing.assert_allclose(output.state["counts"].sum(-1), kept.sum((0, 1)))
    prefixes = [config.decode({}, state, output.codes, depth=i) for i in (1, 2, 3)]
    squares = jnp.square(z[..., None, :] - jnp.stack(prefixes, -2)).sum(-1)
    expected = (squares * kept).sum() / (kept.sum() * 4)
    np.testing.assert_allclose(output.losses["commitment"], expected, rtol=1e-5)


def test_stochastic_codes_follow_the_distances(quantize):
    table = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    z = jnp.array([0.3, 0.4])
    p = np.asarray(jax.nn.softmax(-jnp.square(table - z).sum(-1) / 0.5))
    rows = jnp.broadcast_to(z, (20000, 2))
    codes = nearest_code(rows, table, chunk_size=3000, temperature=0.5, key=jax.random.key(0))
    share = np.bincount(codes, minlength=3) / 20000
    np.testing.assert_allclose(share, p, atol=5 * 0.5 / np.sqrt(20000))
    # In evaluation the choice is the nearest code.
    config, params, state = start(temperature=5.0)
    calm = dataclasses.replace(config, temperature=0.0)
    loud = quantize(config, params, state, Z, train=True, key=jax.random.key(0)).codes
    still = quantize(config, params, state, Z, train=False).codes
    np.testing.assert_array_equal(still, quantize(calm, params, state, Z, train=False).codes)
    assert not np.array_equal(loud, still)


@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 21, 1000])
def test_chunked_search_equals_full(chunk):
    table = jax.random.normal(jax.random.key(1), (13, 4))
    rows = Z.reshape(-1, 4)
    distance = jnp.square(rows[:, None] - table).sum(-1)
    np.testing.assert_array_equal(nearest_code(rows, table, chunk_size=chunk), distance.argmin(-1))


def test_bf16_distances_are_float32():
    """Codes nearer to each other than bfloat16 can tell, on a backend that defaults to it."""
    table = jnp.array([[16.0, 0.0], [16.03, 0.0], [0.0, 1.0]])
    rows = jnp.array([[16.0, 0.0], [16.125, 0.0]], jnp.bfloat16)
    np.testing.assert_array_equal(nearest_code(rows, table, chunk_size=8), [0, 1])
    assert table.astype(jnp.bfloat16)[0, 0] == table.astype(jnp.bfloat16)[1, 0]
    with jax.default_matmul_precision("bfloat16"):
        trace = jax.make_jaxpr(lambda r: nearest_code(r, table, chunk_size=8))(rows)
    products = [line for line in str(trace).splitlines() if "dot_general" in line]
    text = str(trace)
    assert products and "HIGHEST" in text
    assert "bf16" not in text.split("dot_general")[1]


def test_code_entropy_equals_enumeration_and_ignores_chunks():
    table = np.asarray(jax.random.normal(jax.random.key(1), (5, 4)), np.float64)
    rows = np.asarray(Z.reshape(-1, 4), np.float64)
    weights = np.arange(21) % 3 > 0
    logits = -((rows[:, None] - table) ** 2).sum(-1) / 0.7
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[weights]
    mean = p.mean(0)
    expected = -(p * np.log(p)).sum(-1).mean() + (mean * np.log(mean)).sum()

    def f(chunk, rows):
        return code_entropy(
            rows,
            jnp.asarray(table, jnp.float32),
            jnp.asarray(weights, jnp.float32),
            temperature=0.7,
            chunk_size=chunk,
        )

    np.testing.assert_allclose(f(100, Z.reshape(-1, 4)), expected, rtol=1e-5)
    np.testing.assert_allclose(f(4, Z.reshape(-1, 4)), expected, rtol=1e-5)
    gradients = [jax.grad(lambda r, c=c: f(c, r))(Z.reshape(-1, 4)) for c in (100, 4)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-7)
    assert float(jnp.abs(gradients[0]).max()) > 1e-3


def test_state_with_large_codebook_has_the_released_shape(quantize):
    config = ResidualVQ(codebook_size=16384, code_dim=256, depth=2)
    params, state = jax.eval_shape(config.init, jax.random.key(0))
    assert params == {}
    # The padding row of the released file, index 16384, is not stored.
    assert state["codebook"].shape == state["sums"].shape == (1, 16384, 256)
    assert state["counts"].shape == (1, 16384)
    output = jax.eval_shape(
        lambda s, z, k: quantize(config, {}, s, z, train=True, key=k),
        state,
        jax.ShapeDtypeStruct((256, 16, 16, 256), jnp.bfloat16),
        jax.random.key(0),
    )
    assert output.codes.shape == (256, 16, 16, 2)
    assert output.quantized.dtype == jnp.bfloat16


@pytest.mark.parametrize("train", [True, False])
def test_no_assignment_matrix_is_made(train, quantize):
    """No array of (all vectors) x K: statistics are segment sums, distances are chunked."""
    config = ResidualVQ(512, 4, chunk_size=64)
    _, state = config.init(jax.random.key(0))
    z = jnp.zeros((1024, 4))
    trace = jax.make_jaxpr(
        lambda s, z: quantize(config, {}, s, z, train=train, key=jax.random.key(0))
    )(state, z)
    text = str(trace)
    assert "64,512" in text
    assert "1024,512" not in text and "512,1024" not in text
