"""The demo: 13 classes of bundled images at 32x32, from pixels to samples.

    python train/demo.py configs/images/demo.py --workdir runs/demo

Hardware: 2 CPU cores. Time: 4 min 59 s on a quiet Xeon. Metric: test NLL 448 nats per image; a
classifier finds the wanted class in 71 % of the samples and in 79 % of real test images
(docs/demo/report.md, one seed). Data: the 900 Fashion-MNIST images of the authors' sprite and 3,000
QuickDraw drawings; each class is cut 70/10/20.
"""

import dataclasses

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
from jaxllm.models.dnd import DnDConfig
from jaxllm.models.image_classifier import ClassifierConfig
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.quantize import ResidualVQ
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig

DATA = ImageDataConfig(source="fashion+quickdraw", image_size=(32, 32), channels=1, batch_size=64)
CODES, DEPTH, CLASSES = 256, 2, 13


def classifier(seed: int) -> ClassifierRun:
    return ClassifierRun(
        model=ClassifierConfig(num_classes=CLASSES, widths=(16, 32, 64)),
        data=DATA,
        optimizer=OptimizerConfig(
            learning_rate=4e-3, schedule="cosine", warmup_steps=20, weight_decay=0.05
        ),
        loop=LoopConfig(steps=250, seed=seed, log_every=25),
    )


def get_config() -> DemoRun:
    return DemoRun(
        scorer=classifier(seed=1),
        perceptual=classifier(seed=2),
        tokenizer=TokenizerRun(
            model=ImageTokenizerConfig(
                image_size=(32, 32),
                channels=1,
                width=32,
                patch=2,
                multipliers=(1, 2),
                res_blocks=1,
                groups=8,
                latent_dim=32,
                # At this size separate codebooks are clearly better than a shared one.
                quantizer=ResidualVQ(
                    codebook_size=CODES,
                    code_dim=16,
                    depth=DEPTH,
                    shared=False,
                    decay=0.95,
                    restart_below=0.1,
                ),
            ),
            # Many small steps: with 64 images a step the same time gives 3 dB less.
            data=dataclasses.replace(DATA, batch_size=16),
            kmeans_start=512,
            optimizer=OptimizerConfig(
                name="adam", learning_rate=2e-3, schedule="cosine", warmup_steps=20
            ),
            loop=LoopConfig(steps=1000, log_every=50, eval_every=250),
            perceptual=PerceptualConfig(kind="classifier", weight=0.05),
        ),
        code_model=CodeModelRun(
            model=DnDConfig(
                codebook_size=CODES,
                grid=(8, 8),
                depth=DEPTH,
                num_classes=CLASSES,
                layers=6,
                heads=4,
                dim=128,
                mlp_hidden=352,
                head_layers=(3, 5),
                per_depth_embedding=True,
                # In so few steps dropout 0.1 costs 30 nats of validation NLL (one seed, with
                # --code-model.model.dropout 0.1); longer runs need it.
                dropout=0.0,
                # On a CPU fresh memory costs more than the sums that fill it.
                remat="dots",
            ),
            # By class, each of 63 images of a garment would be seen 11 times as often as a cat's
            # 700, which need it more; by image, garments come too seldom to be told apart.
            data=CodeDataConfig(batch_size=32, balance=0.3),
            optimizer=OptimizerConfig(
                learning_rate=2e-3,
                schedule="cosine",
                warmup_steps=40,
                weight_decay=0.05,
                ema_decay=0.98,
            ),
            loop=LoopConfig(steps=1050, log_every=50, eval_every=350, keep_best="nll"),
        ),
        sampling=SamplingConfig(cfg_scale=(3.0,), temperature=(0.8, 0.7)),
    )
