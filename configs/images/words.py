"""Rich text at small scale: words of Shakespeare rendered at 16x32 pixels, drawn and read back.

    python train/words.py configs/images/words.py --workdir runs/words

Hardware: 2 CPU cores. Time: 4 min 53 s on a quiet Xeon. Metric: 81 % of the samples
are words (docs/words/report.md, one seed). Words of the test split are never trained on.
"""

from jaxllm.data.images import ImageDataConfig
from jaxllm.images.config import CodeDataConfig, CodeModelRun, TokenizerRun
from jaxllm.images.words import WordsRun
from jaxllm.models.dnd import DnDConfig
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.quantize import ResidualVQ
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig

CODES, DEPTH, SIZE = 128, 2, (16, 32)


def get_config() -> WordsRun:
    return WordsRun(
        tokenizer=TokenizerRun(
            model=ImageTokenizerConfig(
                image_size=SIZE,
                channels=1,
                width=32,
                patch=2,
                multipliers=(1, 2),
                res_blocks=1,
                groups=8,
                latent_dim=32,
                quantizer=ResidualVQ(
                    codebook_size=CODES,
                    code_dim=16,
                    depth=DEPTH,
                    shared=False,
                    decay=0.95,
                    restart_below=0.1,
                ),
            ),
            data=ImageDataConfig(
                source="words",
                image_size=SIZE,
                channels=1,
                flip=False,
                jitter=0,
                unconditional=True,
                batch_size=32,
            ),
            optimizer=OptimizerConfig(
                name="adam", learning_rate=2e-3, schedule="cosine", warmup_steps=20
            ),
            loop=LoopConfig(steps=1200, log_every=50, eval_every=300),
            kmeans_start=512,
        ),
        code_model=CodeModelRun(
            model=DnDConfig(
                codebook_size=CODES,
                grid=(4, 8),
                depth=DEPTH,
                num_classes=1,
                class_dropout=0.0,
                layers=6,
                heads=4,
                dim=128,
                mlp_hidden=352,
                head_layers=(3, 5),
                per_depth_embedding=True,
                dropout=0.0,
                remat="dots",
            ),
            data=CodeDataConfig(batch_size=64, random_crop=False, balance=0.0),
            optimizer=OptimizerConfig(
                learning_rate=2e-3,
                schedule="cosine",
                warmup_steps=40,
                weight_decay=0.05,
                ema_decay=0.98,
            ),
            loop=LoopConfig(steps=1000, log_every=50, eval_every=200, keep_best="nll"),
        ),
    )
