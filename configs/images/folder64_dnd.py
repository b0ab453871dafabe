r"""A small DnD-Transformer on the codes of your own images at 64 pixels.

    python train/code_model.py configs/images/folder64_dnd.py --model.num-classes 10 \
        --workdir runs/folder64_dnd

Hardware: as for `folder64.py`. Time and result depend on the images and are not measured here.
"""

from jaxllm.images.config import CodeDataConfig, CodeModelRun
from jaxllm.models.dnd import DnDConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


def get_config() -> CodeModelRun:
    return CodeModelRun(
        model=DnDConfig(
            codebook_size=1024,
            grid=(8, 8),
            depth=2,
            num_classes=10,
            layers=8,
            heads=8,
            dim=384,
            head_layers=(5, 7),
            per_depth_embedding=True,
        ),
        data=CodeDataConfig(cache="runs/folder64_codes", batch_size=64),
        optimizer=OptimizerConfig(
            learning_rate=6e-4,
            schedule="cosine",
            warmup_steps=500,
            weight_decay=0.05,
            ema_decay=0.999,
        ),
        loop=LoopConfig(
            steps=20_000, log_every=100, eval_every=1000, save_every=1000, keep_best="nll"
        ),
    )
