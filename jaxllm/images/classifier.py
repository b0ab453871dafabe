"""The job that trains a small image classifier, and what others use it for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.data.images import ImageDataConfig, PrepareImage, open_images
from jaxllm.data.pipeline import Batch, Batches, padded_batches, stack_examples
from jaxllm.errors import InputError
from jaxllm.images.config import ClassifierRun
from jaxllm.images.runs import load_params
from jaxllm.models.image_classifier import CLASSIFIER_RULES, ClassifierConfig, ImageClassifier
from jaxllm.nn.module import Blueprint
from jaxllm.parallel.processes import fetch
from jaxllm.training.job import Job, Program
from jaxllm.training.optimizer import make_optimizer
from jaxllm.training.state import TrainState, new_state
from jaxllm.training.step import make_step

EVAL_BATCH = 128


def classifier_blueprint(config: ClassifierConfig) -> Blueprint[ImageClassifier]:
    """Returns the blueprint of the classifier."""
    return Blueprint(lambda rngs: ImageClassifier(config, rngs=rngs))


def classifier_job(run: ClassifierRun) -> Job:
    """Returns the job: cross-entropy on augmented images, accuracy on the validation split."""
    source = open_images(run.data, "train")
    if len(source.class_names) != run.model.num_classes:
        raise InputError(
            f"model.num_classes is {run.model.num_classes}, the data has {len(source.class_names)}"
        )
    program = classifier_program(run)
    validation = held_out(run.data, "validation")

    def evaluate(state: TrainState) -> dict[str, float]:
        return {"accuracy": Scorer(run.model, state.best_params).accuracy(validation)}

    return Job(
        name="classifier",
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=program.init,
        step=program.step,
        batches=Batches(
            source,
            run.data.batch_size,
            run.loop.seed,
            PrepareImage(run.data, train=True),
        ),
        rules=program.rules,
        evaluate=evaluate,
        identity=run.model,
    )


def classifier_program(run: ClassifierRun) -> Program:
    """Returns what `classifier_job` compiles."""
    blueprint = classifier_blueprint(run.model)
    optimizer = make_optimizer(run.optimizer, run.loop.steps)

    def loss_fn(
        model: ImageClassifier, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del rng
        logits = model.logits(model.features(batch["image"]))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"])}

    def init(key: jax.Array) -> TrainState:
        params, _ = blueprint.init(key)
        return new_state(params, optimizer, ema=run.optimizer.ema_decay is not None)

    return Program(
        init=init,
        step=make_step(loss_fn, blueprint.build, optimizer, run.optimizer),
        rules=CLASSIFIER_RULES,
        batch=image_batch(run.data),
    )


def image_batch(data: ImageDataConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a training batch of images."""
    shape = (data.batch_size, *data.image_size, data.channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    }


def held_out(data: Any, split: Any, *, limit: int | None = None) -> Batch:
    """Returns a split prepared without augmentation, {"image": [n, H, W, channels], "label"}."""
    source = open_images(data, split)
    prepare = PrepareImage(data, train=False)
    rng = np.random.default_rng(0)
    count = len(source) if limit is None else min(limit, len(source))
    # Evenly spread rows: sources are sorted by class.
    rows = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    return stack_examples([prepare(source[i], rng) for i in rows])


@dataclass(frozen=True)
class Scorer:
    """A trained classifier as a fixed measuring instrument."""

    config: ClassifierConfig
    params: Any

    @classmethod
    def load(cls, run_dir: Path) -> Scorer:
        """Reads the classifier of a finished run."""
        run, params, _ = load_params(run_dir, ClassifierRun)
        return cls(run.model, params)

    def measure(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns pooled features [n, width] and class probabilities [n, classes].

        Args:
          images: float32 [n, H, W, channels] in [-1, 1].
        """
        features, probabilities = [], []
        for batch, real in padded_batches({"image": images}, EVAL_BATCH):
            feature, probability = self._compiled(self.params, batch["image"])
            features.append(fetch(feature)[:real])
            probabilities.append(fetch(probability)[:real])
        return np.concatenate(features), np.concatenate(probabilities)

    @cached_property
    def _compiled(self) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
        blueprint = classifier_blueprint(self.config)

        def run(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = blueprint.build(params, {})
            features = model.features(batch)
            return features, jax.nn.softmax(model.logits(features))

        return jax.jit(run)

    def accuracy(self, examples: Batch) -> float:
        """Returns the share of examples whose label is the most likely class."""
        _, probabilities = self.measure(examples["image"])
        return float(np.mean(np.argmax(probabilities, -1) == examples["label"]))
