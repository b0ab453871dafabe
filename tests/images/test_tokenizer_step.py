"""The one-pass step of tokenizer and discriminator against plain gradients of the whole loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.data.images import ImageDataConfig
from jaxllm.images.config import AdversarialConfig, PerceptualConfig, TokenizerRun
from jaxllm.images.losses import discriminator_loss, generator_loss, r1_penalty
from jaxllm.images.tokenizer import (
    discriminator_blueprint,
    tokenizer_blueprint,
    tokenizer_step,
    two_optimizers,
)
from jaxllm.models.discriminator import DiscriminatorConfig
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.quantize import ResidualVQ
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.state import new_state

QUANTIZER = ResidualVQ(codebook_size=6, code_dim=3, depth=2, restart_below=0.0)
RUN = TokenizerRun(
    model=ImageTokenizerConfig(
        image_size=(8, 8), channels=1, width=2, multipliers=(1,), patch=2, res_blocks=1, groups=1,
        latent_dim=3, quantizer=QUANTIZER,
    ),
    data=ImageDataConfig(image_size=(8, 8), channels=1),
    reconstruction="l2",
    perceptual=PerceptualConfig(weight=0.7),
    adversarial=AdversarialConfig(
        weight=0.75, start_step=3, r1_weight=0.2,
        model=DiscriminatorConfig(channels=1, width=4, layers=1),
    ),
)  # fmt: skip
TOKENIZER = tokenizer_blueprint(RUN.model)
DISCRIMINATOR = discriminator_blueprint(RUN.adversarial.model)
# Plain gradient descent at rate 1: the change of a parameter is minus its gradient.
DESCENT = optax.sgd(1.0)
KEY = jax.random.key(7)
IMAGES = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1), minval=-1.0)


def perceptual(params, images, decoded):
    """Any smooth distance stands in for the network."""
    return jnp.mean(params * jnp.sin(images - decoded) ** 2)


def random(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), jnp.float32), tree
    )


@pytest.fixture(scope="module")
def start():
    params = {
        "tokenizer": random(TOKENIZER.abstract_params, 0),
        "discriminator": random(DISCRIMINATOR.abstract_params, 1),
    }
    _, quantizer_state = QUANTIZER.init(jax.random.key(0))
    extra = {
        "tokenizer": {"quantizer_state": quantizer_state},
        "discriminator": {},
        "perceptual": jnp.float32(1.3),
    }
    return new_state(params, DESCENT, ema=False, extra=extra)


@pytest.fixture(scope="module")
def steps(start):
    """(state, metrics) after one step before and one after the adversarial start."""
    step = jax.jit(tokenizer_step(RUN, TOKENIZER, DISCRIMINATOR, perceptual, DESCENT))
    late = dataclasses.replace(start, step=jnp.int32(3))
    return {n: step(state, {"image": IMAGES}, KEY) for n, state in ((2, start), (3, late))}


@pytest.fixture(scope="module")
def plain(start):
    """The same losses written as one function of all parameters, differentiated by `jax.grad`."""
    extra = start.extra

    def decode(params):
        model = TOKENIZER.build(params["tokenizer"], extra["tokenizer"])
        out = model.quantize(model.encode(IMAGES), train=True, key=KEY)
        return model.decode(out.quantized), QUANTIZER.beta * out.losses["commitment"], out.state

    def nll(params):
        decoded = decode(params)[0]
        return jnp.mean((IMAGES - decoded) ** 2) + 0.7 * perceptual(1.3, IMAGES, decoded)

    def fool(params):
        return generator_loss(
            DISCRIMINATOR.build(params["discriminator"], {})(decode(params)[0]), "hinge"
        )

    def judge(params):
        model = DISCRIMINATOR.build(params["discriminator"], {})
        fake = jax.lax.stop_gradient(decode(params)[0])
        hinge = discriminator_loss(model(IMAGES), model(fake), "hinge")
        return 0.75 * hinge + 0.2 * r1_penalty(model, IMAGES)

    @jax.jit
    def everything(params):
        names = dict(nll=nll, fool=fool, judge=judge, commitment=lambda p: decode(p)[1])
        return {n: jax.value_and_grad(f)(params) for n, f in names.items()}, decode(params)[2]

    return everything(start.params)


def last_kernel(gradient):
    return gradient["tokenizer"]["decoder"]["conv_out"]["kernel"]


def moved(before, after):
    return jax.tree.map(lambda a, b: a - b, before.params, after.params)


def close(found, expected):
    """Float32, relative 1e-4, absolute 1e-5."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_adaptive_weight_is_the_ratio_of_last_kernel_gradients(steps, plain):
    values, _ = plain
    nll, fool = (jnp.linalg.norm(last_kernel(values[name][1])) for name in ("nll", "fool"))
    assert fool > 1e-3
    for step in (2, 3):
        np.testing.assert_allclose(
            steps[step][1]["adaptive_weight"], nll / (fool + 1e-4), rtol=1e-4
        )


def test_generator_gradient_is_that_of_the_total_loss(start, steps, plain):
    values, _ = plain
    after, metrics = steps[3]
    scale = 0.75 * metrics["adaptive_weight"]  # A constant to the gradient.
    expected = jax.tree.map(
        lambda a, b, c: a + b + scale * c,
        *(values[name][1]["tokenizer"] for name in ("nll", "commitment", "fool")),
    )
    close(moved(start, after)["tokenizer"], expected)
    total = values["nll"][0] + values["commitment"][0] + scale * values["fool"][0]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(metrics["adversarial"], values["fool"][0], rtol=1e-4)


def test_discriminator_gradient_is_that_of_its_own_loss(start, steps, plain):
    """The generator's loss, which also depends on the discriminator, does not reach it."""
    values, _ = plain
    close(moved(start, steps[3][0])["discriminator"], values["judge"][1]["discriminator"])
    assert optax.global_norm(values["fool"][1]["discriminator"]) > 1e-3
    assert optax.global_norm(values["judge"][1]["tokenizer"]) == 0


def test_nothing_is_adversarial_before_the_start_step(start, steps, plain):
    values, _ = plain
    after, metrics = steps[2]
    change = moved(start, after)
    assert optax.global_norm(change["discriminator"]) == 0
    expected = jax.tree.map(
        jnp.add, *(values[name][1]["tokenizer"] for name in ("nll", "commitment"))
    )
    close(change["tokenizer"], expected)
    np.testing.assert_allclose(
        metrics["loss"], values["nll"][0] + values["commitment"][0], rtol=1e-5
    )


def test_the_codebook_average_moves_once(start, steps, plain):
    _, state = plain
    after = steps[3][0].extra["tokenizer"]["quantizer_state"]
    close(after, state)
    # One decay, and the statistics of 2 images x 16 cells x 2 levels.
    before = start.extra["tokenizer"]["quantizer_state"]["counts"]
    expected = 0.99 * before.sum() + 0.01 * 2 * 16 * 2
    np.testing.assert_allclose(after["counts"].sum(), expected, rtol=1e-5)
    assert steps[3][0].extra["perceptual"] == start.extra["perceptual"]


def test_without_an_adversary_there_is_no_discriminator(start):
    run = dataclasses.replace(RUN, adversarial=AdversarialConfig(weight=0.0))
    params = {"tokenizer": start.params["tokenizer"]}
    extra = {name: start.extra[name] for name in ("tokenizer", "perceptual")}
    optimizer = two_optimizers(OptimizerConfig(), 10)
    state = new_state(params, optimizer, ema=True, extra=extra)
    step = tokenizer_step(run, TOKENIZER, DISCRIMINATOR, perceptual, optimizer)
    after, metrics = jax.eval_shape(step, state, {"image": IMAGES}, KEY)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(metrics) == {
        *("loss", "reconstruction", "perceptual", "commitment", "psnr"),
        *("grad_norm", "param_norm", "update_norm"),
    }


def test_two_optimizers_clip_separately():
    optimizer = two_optimizers(OptimizerConfig(name="sgd", learning_rate=1.0, clip_norm=1.0), 10)
    params = {"tokenizer": {"a": jnp.zeros(2)}, "discriminator": {"b": jnp.zeros(2)}}
    grads = {
        "tokenizer": {"a": jnp.array([30.0, 40.0])},
        "discriminator": {"b": jnp.array([0.3, 0.4])},
    }
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["tokenizer"]["a"], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(updates["discriminator"]["b"], [-0.3, -0.4], rtol=1e-6)
