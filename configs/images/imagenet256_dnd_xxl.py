"""DnD-Transformer XXL (1.4B) on ImageNet codes, d = 2.

    python train/code_model.py configs/images/imagenet256_dnd_xxl.py --workdir runs/xxl

Hardware and time: not given in the paper and not measured here. Codes: `imagenet256_codes.py`.
The paper's result (arXiv:2410.01912, Table 2, guidance 2): FID 2.58, IS 295.6, precision 0.83,
recall 0.56; guidance 1.7: FID 2.78, IS 239.2. Its structures at this size (Table 3): 1D FID 4.12,
parallel 6.32, vertical 3.18, DnD 2.58. For vertical add `--model.structure vertical`; for parallel
or flat `--model.structure parallel --model.head-layers None`.

Recipe of App. E: AdamW (0.9, 0.95), weight decay 0.05, clipping at 1, learning rate 1e-4 per 256
images without a schedule, dropout 0.1, class dropout 0.1, 300 epochs = 300 x floor(1,281,167 /
256) = 300 x 5,004 steps; the appendix gives no batch size. Head layers are those of the released
script, 0-indexed; the appendix's [39, 48], 1-indexed, would be 38, 47.
"""

from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.images.config import CodeDataConfig, CodeModelRun
from jaxllm.models.dnd import DnDConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig

BATCH, EPOCH = 256, 1_281_167 // 256


def get_config(size: str = "XXL", cfg_scale: float = 2.0) -> CodeModelRun:
    return CodeModelRun(
        model=DnDConfig.of_size(
            size, codebook_size=16384, grid=(16, 16), depth=2, head_layers=(39, 47), remat="full"
        ),
        data=CodeDataConfig(cache="runs/imagenet256_codes", batch_size=BATCH, balance=0.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.05,
            clip_norm=1.0,
            ema_decay=0.9999,
        ),
        loop=LoopConfig(steps=300 * EPOCH, log_every=100, eval_every=EPOCH, save_every=1000),
        sampling=SamplingConfig(cfg_scale=(cfg_scale,)),
    )
