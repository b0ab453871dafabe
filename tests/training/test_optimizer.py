"""Schedules, decay, clipping and averaging against numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.models.code_model import code_model
from jaxllm.models.dnd import DnDConfig
from jaxllm.models.rq_transformer import RQTransformerConfig
from jaxllm.parallel.sharding import leaf_paths
from jaxllm.training.optimizer import OptimizerConfig, decay_mask, learning_rate, make_optimizer

LINEAR = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=3, final_fraction=0.5)
COSINE = OptimizerConfig(learning_rate=2.0, schedule="cosine", final_fraction=0.1)


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (OptimizerConfig(learning_rate=0.3), 10, {0: 0.3, 9: 0.3}),
        # Warm-up: 1/4, 2/4, 3/4, then 4 updates fall from 1 towards 0.5.
        (
            LINEAR,
            7,
            {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 0.875, 5: 0.75, 6: 0.625, 7: 0.5, 9: 0.5},
        ),
        # 2 * (0.1 + 0.9 * (1 + cos(pi t / 8)) / 2)
        (COSINE, 8, {0: 2.0, 2: 1.736396, 4: 1.1, 8: 0.2, 20: 0.2}),
    ],
)
def test_schedules(config, steps, expected):
    schedule = learning_rate(config, steps)
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-6), step


@pytest.mark.parametrize(
    ("config", "exempt"),
    [
        (DnDConfig, {"head_norm", "layers/attn_norm/scale", "layers/mlp_norm/scale"}),
        (
            RQTransformerConfig,
            {"norm/scale"}
            | {
                f"{part}layers/{norm}_norm/scale"
                for part in ("", "depth_")
                for norm in ("attn", "mlp")
            },
        ),
    ],
)
def test_decay_touches_kernels_and_embeddings_but_no_scale(config, exempt):
    sizes = dict(layers=2, dim=16, heads=2, codebook_size=8, grid=(2, 2), depth=2, num_classes=3)
    params = code_model(config(**sizes)).abstract_params
    mask = dict(leaf_paths(decay_mask(params)))
    assert {path for path, decays in mask.items() if not decays} == exempt
    assert {"class_embed", "head_out", "layers/attn/qkv", "layers/mlp/down"} <= mask.keys()


def test_stacked_biases_and_convolutions():
    params = {
        "layers": {"mlp": {"bias": jnp.zeros((4, 8)), "up": jnp.zeros((4, 8, 8))}},
        "conv": {"kernel": jnp.zeros((3, 3, 4, 4)), "bias": jnp.zeros((4,))},
    }
    assert decay_mask(params) == {
        "layers": {"mlp": {"bias": False, "up": True}},
        "conv": {"kernel": True, "bias": False},
    }


def update_of(config, params, grads, steps=1):
    optimizer = make_optimizer(config, 10)
    state, updates = optimizer.init(params), None
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
    return updates


def test_adamw_update_by_hand():
    config = OptimizerConfig(
        learning_rate=0.1, beta1=0.9, beta2=0.5, eps=0.01, weight_decay=0.2, clip_norm=None
    )
    params = {"w": jnp.full((1, 1), 3.0), "b": jnp.full((1,), 3.0)}
    grads = {"w": jnp.full((1, 1), 2.0), "b": jnp.full((1,), 2.0)}
    # A constant gradient g has corrected moments g and g^2: the step is g / (|g| + eps).
    adam = 2.0 / (2.0 + 0.01)
    for steps in (1, 3):
        updates = update_of(config, params, grads, steps)
        assert float(updates["b"][0]) == pytest.approx(-0.1 * adam, rel=1e-6)
        assert float(updates["w"][0, 0]) == pytest.approx(-0.1 * (adam + 0.2 * 3.0), rel=1e-6)


def test_rmsprop_update_by_hand():
    config = OptimizerConfig(name="rmsprop", learning_rate=0.1, beta2=0.75, eps=0.5, clip_norm=None)
    grads = {"w": jnp.full((1,), 2.0)}
    # The average of g^2 starts at 0: after one step g^2 / 4, after two 7 g^2 / 16.
    for steps, root in ((1, 1.0), (2, 1.75**0.5)):
        updates = update_of(config, {"w": jnp.zeros(1)}, grads, steps)
        assert float(updates["w"][0]) == pytest.approx(-0.1 * 2.0 / (root + 0.5), rel=1e-6)


def test_clipping_scales_the_global_norm_over_all_tensors():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # Norm 5.
    config = OptimizerConfig(name="sgd", learning_rate=1.0, clip_norm=0.5)
    updates = update_of(config, params, grads)
    np.testing.assert_allclose(updates["a"], [-0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-0.4], rtol=1e-6)
    small = jax.tree.map(lambda g: g * 0.01, grads)  # Norm 0.05 stays.
    np.testing.assert_allclose(update_of(config, params, small)["b"], [-0.04], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"accumulate": 0}, "accumulate 0"),
        ({"ema_decay": 1.0}, "ema_decay 1.0"),
        ({"name": "sgd", "weight_decay": 0.1}, "weight_decay 0.1 is only used by adamw"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**changes)
