"""The patch discriminator: shapes, receptive field, norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.discriminator import BatchNorm, Discriminator, DiscriminatorConfig
from jaxllm.models.image_classifier import ClassifierConfig, ImageClassifier
from jaxllm.nn.module import Blueprint


def blueprint_of(**changes):
    config = DiscriminatorConfig(**dict(width=4, layers=2) | changes)
    return Blueprint(lambda rngs: Discriminator(config, rngs=rngs))


def random(blueprint, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), blueprint.abstract_params
    )


def test_the_released_shape():
    """RQ-VAE's: 4x4 convolutions 3-64-128-256-1, biases only where no norm follows."""
    params = blueprint_of(width=64, norm="batch").abstract_params
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes["conv_in"] == {"kernel": (4, 4, 3, 64), "bias": (64,)}
    assert shapes["convs"][0] == {"kernel": (4, 4, 64, 128)}
    assert shapes["convs"][1] == {"kernel": (4, 4, 128, 256)}
    assert shapes["norms"][1] == {"scale": (256,), "bias": (256,)}
    assert shapes["conv_out"] == {"kernel": (4, 4, 256, 1), "bias": (1,)}


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_logits_per_patch(norm):
    blueprint = blueprint_of(norm=norm)
    params, extra = (
        random(blueprint),
        jax.tree.map(lambda x: jnp.full(x.shape, 0.5), blueprint.abstract_extra),
    )
    assert ("bias" in params["convs"][0]) == (norm == "none")
    assert ("norms" in params) == (norm != "none")
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))

    @jax.jit
    def run(images):
        model = blueprint.build(params, extra)
        return model(images), model(images, train=False)

    training, evaluation = run(images)
    assert training.shape == (3, 2, 2, 1)  # 16 -> 8 -> 4 -> 3 -> 2.
    changed, changed_evaluation = run(images.at[2].set(0.0))
    np.testing.assert_allclose(changed_evaluation[:2], evaluation[:2], rtol=1e-4, atol=1e-4)
    if norm == "batch":  # The examples of a batch see each other in training only.
        assert np.abs(changed[:2] - training[:2]).max() > 1e-2
        assert np.abs(evaluation - training).max() > 1e-2
    else:
        np.testing.assert_allclose(changed[:2], training[:2], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(evaluation, training)


def test_a_patch_sees_its_own_pixels():
    """Without norms; the receptive field of two strided 4x4 convolutions and two more is 34."""
    blueprint = blueprint_of(norm="none", width=2)
    params = random(blueprint)
    images = jnp.ones((1, 48, 48, 3))

    def corner(x):
        return blueprint.build(params, {})(x)[0, 0, 0, 0]

    seen = np.abs(jax.grad(corner)(images)[0]).sum(-1) > 0
    rows = np.flatnonzero(seen.any(1))
    # 34 pixels less the padding 1 + 2 + 4 + 4 on the upper left.
    assert rows.min() == 0 and rows.max() == 34 - 11 - 1
    np.testing.assert_array_equal(seen.any(0), seen.any(1))


def test_batch_norm_by_hand():
    norm = BatchNorm(2)
    norm.scale[...], norm.bias[...] = jnp.array([2.0, 3.0]), jnp.array([1.0, -1.0])
    norm.mean[...], norm.variance[...] = jnp.array([5.0, 4.0]), jnp.array([4.0, 9.0])
    x = np.random.default_rng(3).standard_normal((4, 3, 3, 2)).astype(np.float32) * 2 + 5
    normal = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(norm(x, train=True), normal * [2, 3] + [1, -1], atol=1e-4)
    stored = (x - [5, 4]) / [2, 3]
    np.testing.assert_allclose(norm(x, train=False), stored * [2, 3] + [1, -1], atol=1e-4)


def test_classifier_shapes_and_pooling():
    config = ClassifierConfig(channels=1, num_classes=4, widths=(8, 16), groups=4)
    blueprint = Blueprint(lambda rngs: ImageClassifier(config, rngs=rngs))
    model = blueprint.build(random(blueprint), {})
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    maps = model.feature_maps(images)
    assert [m.shape for m in maps] == [(2, 4, 4, 8), (2, 2, 2, 16)]
    features = model.features(images)
    np.testing.assert_allclose(features, np.asarray(maps[-1]).mean((1, 2)), rtol=1e-5)
    expected = np.asarray(features) @ model.out[...] + model.out_bias[...]
    np.testing.assert_allclose(model.logits(features), expected, rtol=1e-5, atol=1e-5)
