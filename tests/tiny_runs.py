"""Configs of the smallest runs that go through every stage; tests train them for a few steps."""

import contextlib

import jax
import pytest

from jaxllm.data.images import ImageDataConfig
from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.images.config import (
    ClassifierRun,
    CodeDataConfig,
    CodeModelRun,
    PerceptualConfig,
    TokenizerRun,
)
from jaxllm.images.demo import DemoRun
from jaxllm.images.words import WordsRun
from jaxllm.models.dnd import DnDConfig
from jaxllm.models.image_classifier import ClassifierConfig
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.quantize import ResidualVQ
from jaxllm.training import loop as training_loop
from jaxllm.training.job import LoopConfig

CODES, DEPTH, CLASSES = 8, 2, 3
DATA = ImageDataConfig(source="quickdraw", image_size=(32, 32), batch_size=8)


@contextlib.contextmanager
def quick_compile():
    """Compiles without optimising: for programs that run only a few times."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextlib.contextmanager
def small_programs():
    """As `quick_compile`, and trains on the first device: for whole runs of the smallest models."""
    make_mesh = training_loop.make_mesh
    with quick_compile(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training_loop,
            "make_mesh",
            lambda config, devices=None: make_mesh(config, devices or jax.devices()[:1]),
        )
        yield


def loop(steps: int, **changes) -> LoopConfig:
    return LoopConfig(steps=steps, log_every=1, compile_cache=False, **changes)


def classifier(seed: int) -> ClassifierRun:
    model = ClassifierConfig(num_classes=CLASSES, widths=(8,), groups=4)
    return ClassifierRun(model=model, data=DATA, loop=loop(3, seed=seed))


def tokenizer(image_size=(32, 32), data=DATA, **changes) -> TokenizerRun:
    return TokenizerRun(
        model=ImageTokenizerConfig(
            image_size=image_size,
            channels=1,
            width=8,
            patch=8,
            multipliers=(1,),
            res_blocks=1,
            groups=4,
            latent_dim=8,
            quantizer=ResidualVQ(codebook_size=CODES, code_dim=4, depth=DEPTH, shared=False),
        ),
        data=data,
        loop=loop(3),
        kmeans_start=32,
        **changes,
    )


def code_model(grid=(4, 4), classes=CLASSES, **changes) -> CodeModelRun:
    return CodeModelRun(
        model=DnDConfig(
            codebook_size=CODES,
            grid=grid,
            depth=DEPTH,
            num_classes=classes,
            layers=2,
            heads=2,
            dim=16,
            head_layers=(0, 1),
            per_depth_embedding=True,
            **changes,
        ),
        data=CodeDataConfig(batch_size=8),
        loop=loop(3, keep_best="nll"),
    )


def demo() -> DemoRun:
    return DemoRun(
        scorer=classifier(seed=1),
        perceptual=classifier(seed=2),
        tokenizer=tokenizer(perceptual=PerceptualConfig(kind="classifier", weight=0.05)),
        code_model=code_model(),
        sampling=SamplingConfig(cfg_scale=(2.0,)),
        per_row=4,
    )


def words() -> WordsRun:
    data = ImageDataConfig(
        source="words", image_size=(16, 32), flip=False, jitter=0, unconditional=True, batch_size=8
    )
    return WordsRun(
        tokenizer=tokenizer(image_size=(16, 32), data=data),
        code_model=code_model(grid=(2, 4), classes=1, class_dropout=0.0),
        samples=16,
    )
