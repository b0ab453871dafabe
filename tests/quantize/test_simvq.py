"""SimVQ: the projected table is searched, trained and decoded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.quantize import SimVQ


def test_simvq_decodes_through_projection(quantize):
    """Decoding with the frozen table alone would return vectors of another space."""
    config = SimVQ(16, 4, table_dim=4)
    params, state = config.init(jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (10, 4))
    output = quantize(config, params, state, z, train=True)
    codes = output.codes[:, 0]
    product = np.asarray(state["table"], np.float64) @ np.asarray(params["projection"], np.float64)
    np.testing.assert_allclose(
        config.decode(params, state, output.codes), product[codes], rtol=1e-5
    )
    np.testing.assert_array_equal(
        codes, ((np.asarray(z)[:, None] - product) ** 2).sum(-1).argmin(-1)
    )
    assert float(jnp.abs(output.quantized - state["table"][codes]).max()) > 0.1


def test_one_step_moves_every_code_and_the_table_stays(quantize):
    """A used code's gradient moves the unused ones too, and lowers the loss."""
    config = SimVQ(64, 4)
    params, state = config.init(jax.random.key(0))
    z = 3.0 + jax.random.normal(jax.random.key(1), (5, 4))

    def loss(params, state):
        output = quantize(config, params, state, z, train=True)
        return config.total_loss(output.losses)

    by_params, by_state = jax.grad(loss, argnums=(0, 1))(params, state)
    np.testing.assert_array_equal(by_state["table"], 0.0)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, by_params)
    moved = jnp.abs(config.codebook(stepped, state) - config.codebook(params, state)).max(-1)
    assert float(moved.min()) > 0.0
    assert float(loss(stepped, state)) < float(loss(params, state))


def test_initial_scales():
    """Table and projection have standard deviation F^-1/2."""
    config = SimVQ(4000, 8, table_dim=100)
    params, state = config.init(jax.random.key(0))
    assert state["table"].shape == (4000, 100) and params["projection"].shape == (100, 8)
    np.testing.assert_allclose(np.std(state["table"]), 0.1, rtol=0.02)
    np.testing.assert_allclose(np.std(params["projection"]), 0.1, rtol=0.1)


def test_legacy_weights_are_an_option():
    losses = {"commitment": jnp.float32(1.0), "codebook": jnp.float32(10.0)}
    assert float(SimVQ(4, 2).total_loss(losses)) == 10.25
    assert float(SimVQ(4, 2, legacy_beta=True).total_loss(losses)) == 3.5
