"""The job that trains the image tokenizer: one jitted step for generator and discriminator.

With x the images, x' their reconstruction and W the decoder's last kernel (dnd: App. B of
arXiv:2410.01912, which follows RQ-VAE):

    L_nll = reconstruction(x, x') + perceptual(x, x')
    lambda = |dL_nll/dW| / (|dL_g/dW| + 1e-4), clipped
    L_G = L_nll + beta commitment + lambda w L_g
    L_D = w discriminator_loss(D(x), D(x'))

Each loss is differentiated to x' once; the last convolution turns both cotangents into kernel
gradients, which give lambda; then the weighted sum is propagated through the decoder once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.data.images import PrepareImage, open_images
from jaxllm.data.pipeline import Batches
from jaxllm.errors import InputError
from jaxllm.evals.images import psnr
from jaxllm.hub.lpips import load_lpips, lpips_distance
from jaxllm.images.classifier import Scorer, classifier_blueprint, held_out, image_batch
from jaxllm.images.config import PerceptualConfig, TokenizerRun
from jaxllm.images.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    reconstruction_loss,
)
from jaxllm.images.reconstruct import measure_tokenizer, save_reconstructions
from jaxllm.models.discriminator import Discriminator, DiscriminatorConfig
from jaxllm.models.image_tokenizer import TOKENIZER_RULES, ImageTokenizer, ImageTokenizerConfig
from jaxllm.models.perceptual import feature_distance
from jaxllm.nn.module import Blueprint
from jaxllm.nn.precision import compute_dtype
from jaxllm.quantize import ResidualVQ, residual_kmeans_start
from jaxllm.training.job import Job, Program
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import TrainState, Tree, new_state
from jaxllm.training.step import Batch, Metrics, StepFn, apply_gradients

Perceptual = Callable[[Tree, jax.Array, jax.Array], jax.Array]


def tokenizer_blueprint(
    config: ImageTokenizerConfig, dtype: Any = jnp.float32
) -> Blueprint[ImageTokenizer]:
    """Returns the blueprint of the tokenizer, computing in `dtype`."""
    return Blueprint(lambda rngs: ImageTokenizer(config, rngs=rngs, dtype=dtype))


def discriminator_blueprint(config: DiscriminatorConfig) -> Blueprint[Discriminator]:
    """Returns the blueprint of the discriminator."""
    return Blueprint(lambda rngs: Discriminator(config, rngs=rngs))


def tokenizer_job(run: TokenizerRun) -> Job:
    """Returns the job; its state's `params` are {"tokenizer": ..., "discriminator": ...}."""
    tokenizer = tokenizer_blueprint(run.model, compute_dtype(run.precision))
    adversarial = run.adversarial.weight > 0
    loss = perceptual_loss(run.perceptual)
    source = open_images(run.data, "train")
    validation = held_out(run.data, "validation", limit=256)
    pictures = held_out(run.data, "test", limit=12)

    batches = Batches(
        source,
        run.data.batch_size,
        run.loop.seed,
        PrepareImage(run.data, train=True),
    )
    first_images = None
    if run.kmeans_start:
        count = -(-run.kmeans_start // run.data.batch_size)
        drawn = [batches.batch(step)["image"] for step in range(count)]
        first_images = np.concatenate(drawn)[: run.kmeans_start]
    program = tokenizer_program(run, loss, first_images)

    def evaluate(state: TrainState) -> dict[str, float]:
        params = state.best_params["tokenizer"]
        return measure_tokenizer(tokenizer, params, state.extra["tokenizer"], validation["image"])

    def sample(state: TrainState, path: Path) -> None:
        params = state.best_params["tokenizer"]
        save_reconstructions(
            tokenizer, params, state.extra["tokenizer"], pictures["image"], path.with_suffix(".png")
        )

    return Job(
        name="tokenizer",
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=program.init,
        step=program.step,
        batches=batches,
        rules=program.rules,
        evaluate=evaluate,
        sample=sample,
        identity={
            "model": run.model,
            "adversarial": run.adversarial.model if adversarial else None,
        },
    )


def tokenizer_program(
    run: TokenizerRun,
    loss: tuple[Perceptual, Tree] | None = None,
    first_images: np.ndarray | None = None,
) -> Program:
    """Returns what `tokenizer_job` compiles.

    Args:
      run: The config.
      loss: From `perceptual_loss`; None for one with parameters of the right shape that are 0,
        where only shapes matter.
      first_images: What the codebook starts from by k-means; None for a random start.
    """
    tokenizer = tokenizer_blueprint(run.model, compute_dtype(run.precision))
    discriminator = discriminator_blueprint(run.adversarial.model)
    perceptual, perceptual_params = blank_perceptual_loss(run.perceptual) if loss is None else loss
    optimizer = two_optimizers(run.optimizer, run.loop.steps)

    def init(key: jax.Array) -> TrainState:
        params, extra = {}, {"perceptual": perceptual_params}
        params["tokenizer"], extra["tokenizer"] = tokenizer.init(jax.random.fold_in(key, 0))
        if run.adversarial.weight > 0:
            params["discriminator"], extra["discriminator"] = discriminator.init(
                jax.random.fold_in(key, 1)
            )
        if first_images is not None:
            start_codebook(tokenizer, params["tokenizer"], extra["tokenizer"], first_images, key)
        return new_state(params, optimizer, ema=run.optimizer.ema_decay is not None, extra=extra)

    return Program(
        init=init,
        step=tokenizer_step(run, tokenizer, discriminator, perceptual, optimizer),
        rules=TOKENIZER_RULES,
        batch=image_batch(run.data),
    )


def tokenizer_step(
    run: TokenizerRun,
    tokenizer: Blueprint[ImageTokenizer],
    discriminator: Blueprint[Discriminator],
    perceptual: Perceptual,
    optimizer: optax.GradientTransformation,
) -> StepFn:
    """Returns the step that updates tokenizer, codebook and discriminator together."""
    config = run.adversarial

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        images, extra = batch["image"], state.extra
        step_key = jax.random.fold_in(key, state.step)

        def forward(params: Tree) -> tuple[tuple[jax.Array, jax.Array], Any]:
            model = tokenizer.build(params, extra["tokenizer"])
            out = model.quantize(model.encode(images), train=True, key=step_key)
            vectors = model.post_quant_conv(out.quantized.astype(model.dtype))
            features = model.decoder.trunk(vectors)
            decoded = model.decoder.last(features).astype(jnp.float32)
            quantizer_loss = run.model.quantizer.total_loss(out.losses)
            return (decoded, quantizer_loss), (features, out)

        (decoded, quantizer_loss), pull_back, (features, out) = jax.vjp(
            forward, state.params["tokenizer"], has_aux=True
        )

        def nll(picture: jax.Array) -> tuple[jax.Array, Metrics]:
            reconstruction = reconstruction_loss(images, picture, run.reconstruction)
            distance = perceptual(extra["perceptual"], images, picture)
            total = reconstruction + run.perceptual.weight * distance
            return total, {"reconstruction": reconstruction, "perceptual": distance}

        (nll_value, metrics), towards = jax.value_and_grad(nll, has_aux=True)(decoded)
        loss = nll_value + quantizer_loss
        grads = {}
        if config.weight > 0:
            started = (state.step >= config.start_step).astype(jnp.float32)
            adversary = discriminator.build(state.params["discriminator"], extra["discriminator"])

            def fool(picture: jax.Array) -> jax.Array:
                return generator_loss(adversary(picture), config.loss)

            fool_value, fool_towards = jax.value_and_grad(fool)(decoded)
            scale = jnp.ones(())
            if config.adaptive:
                model = tokenizer.build(state.params["tokenizer"], extra["tokenizer"])
                scale = adaptive_weight(
                    *(last_kernel_gradient(model, features, t) for t in (towards, fool_towards))
                )
            weight = started * config.weight * scale
            towards = towards + weight * fool_towards
            loss = loss + weight * fool_value
            grads["discriminator"], d_metrics = discriminator_gradient(
                run, discriminator, state, images, decoded, started
            )
            metrics |= {"adversarial": fool_value, "adaptive_weight": scale, **d_metrics}
        (grads["tokenizer"],) = pull_back((towards, jnp.ones(())))
        metrics = {
            "loss": loss,
            **metrics,
            **out.losses,
            "psnr": jnp.mean(psnr(images, jnp.clip(decoded, -1, 1), 2.0)),
        }
        new_extra = {
            **extra,
            "tokenizer": {"quantizer_state": out.state} if out.state else extra["tokenizer"],
        }
        return apply_gradients(
            state, grads, metrics, batch, optimizer, run.optimizer.ema_decay, new_extra
        )

    return step


def last_kernel_gradient(
    model: ImageTokenizer, features: jax.Array, towards: jax.Array
) -> jax.Array:
    """Returns the gradient of the decoder's last kernel for a cotangent of the image."""
    decoder = model.decoder

    def last(kernel: jax.Array) -> jax.Array:
        return decoder.last(features, kernel).astype(jnp.float32)

    return jax.vjp(last, decoder.conv_out.kernel[...])[1](towards)[0]


def discriminator_gradient(
    run: TokenizerRun,
    discriminator: Blueprint[Discriminator],
    state: TrainState,
    images: jax.Array,
    decoded: jax.Array,
    started: jax.Array,
) -> tuple[Tree, Metrics]:
    """Returns the discriminator's gradient and losses; both zero before its start step."""
    config = run.adversarial

    def loss_of(params: Tree) -> tuple[jax.Array, Metrics]:
        model = discriminator.build(params, state.extra["discriminator"])
        real, fake = model(images), model(decoded)
        loss = discriminator_loss(real, fake, config.loss)
        total = config.weight * loss
        if config.r1_weight > 0:
            total = total + config.r1_weight * r1_penalty(model, images)
        logits = {"logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake)}
        return started * total, {"discriminator": loss, **logits}

    return jax.grad(loss_of, has_aux=True)(state.params["discriminator"])


def two_optimizers(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns one optimiser per network, with separate clipping, as one transformation."""
    pair = {name: make_optimizer(config, steps) for name in ("tokenizer", "discriminator")}

    def labels(params: Tree) -> Tree:
        return {name: jax.tree.map(lambda _, n=name: n, part) for name, part in params.items()}

    return optax.multi_transform(pair, labels)


def perceptual_loss(config: PerceptualConfig) -> tuple[Perceptual, Tree]:
    """Returns the perceptual distance (params, images, decoded) -> scalar, and its parameters."""
    if config.kind == "none":
        return lambda params, images, decoded: jnp.zeros(()), {}
    if config.path is None:
        raise InputError(f"perceptual.kind {config.kind!r} needs perceptual.path")
    if config.kind == "lpips":
        return load_lpips(Path(config.path))
    scorer = Scorer.load(Path(config.path))
    blueprint = classifier_blueprint(scorer.config)

    def distance(params: Tree, images: jax.Array, decoded: jax.Array) -> jax.Array:
        network = blueprint.build(params, {})
        return jnp.mean(
            feature_distance(network.feature_maps(images), network.feature_maps(decoded))
        )

    return distance, scorer.params


def blank_perceptual_loss(config: PerceptualConfig) -> tuple[Perceptual, Tree]:
    """Returns `perceptual_loss` without LPIPS' files: its parameters are 0."""
    if config.kind != "lpips":
        return perceptual_loss(config)
    distance, blueprint = lpips_distance()
    abstract = blueprint.abstract_params  # type: ignore[attr-defined]
    return distance, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)


def start_codebook(
    tokenizer: Blueprint[ImageTokenizer],
    params: Tree,
    extra: Tree,
    images: np.ndarray,
    key: jax.Array,
) -> None:
    """Replaces the random codebook by k-means centres of the latents of `images`."""
    model = tokenizer.build(params, extra)
    quantizer = model.config.quantizer
    if not isinstance(quantizer, ResidualVQ):
        raise InputError("kmeans_start needs a quantizer with a codebook, ResidualVQ")
    latents = model.encode(jnp.asarray(images)).reshape(-1, quantizer.code_dim)
    new_params, new_state = residual_kmeans_start(quantizer, key, latents)
    for part, new, name in (
        (params, new_params, "quantizer_params"),
        (extra, new_state, "quantizer_state"),
    ):
        if new:
            part[name] = new
