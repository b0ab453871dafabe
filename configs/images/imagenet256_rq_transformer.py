r"""RQ-Transformer 1.4B on ImageNet codes of 8x8x4: the other way to predict stacks of codes.

    python train/code_model.py configs/images/imagenet256_rq_transformer.py \
        --workdir runs/imagenet256_rq_transformer

Hardware and time: not measured here. Codes: see `imagenet256_rq_tokenizer.py`. The result that its
authors report for 1.4B without rejection sampling (arXiv:2203.01941): FID 11.56, and 8.71 on a
tokenizer trained for 50 epochs. The DnD paper (arXiv:2410.01912, Table 2) lists the 3.8B model: FID
7.55, IS 134.0.

42 body and 6 depth layers of width 1536, AdamW (0.9, 0.95), weight decay 1e-4, learning rate 5e-4
falling to 0 by a cosine, clipping at 1, batch 2,048, 100 epochs = 100 x floor(1,281,167 / 2,048) =
100 x 625 steps, top-p 0.92, no guidance and so no class dropout. Different here: the loss is the
plain cross-entropy on stored codes, not the authors' soft labels on codes drawn anew; the blocks
are SwiGLU with RMSNorm, of the same size as theirs. `--optimizer.accumulate 8` cuts a step into 8
parts of 256.
"""

from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.images.config import CodeDataConfig, RQTransformerRun
from jaxllm.models.rq_transformer import RQTransformerConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig

BATCH, EPOCH = 2048, 1_281_167 // 2048


def get_config() -> RQTransformerRun:
    return RQTransformerRun(
        model=RQTransformerConfig(
            codebook_size=16384,
            grid=(8, 8),
            depth=4,
            code_dim=256,
            layers=42,
            depth_layers=6,
            heads=24,
            dim=1536,
            class_dropout=0.0,
            remat="full",
        ),
        data=CodeDataConfig(cache="runs/imagenet256_rq_codes", batch_size=BATCH, balance=0.0),
        optimizer=OptimizerConfig(
            learning_rate=5e-4,
            schedule="cosine",
            beta1=0.9,
            beta2=0.95,
            weight_decay=1e-4,
            clip_norm=1.0,
        ),
        loop=LoopConfig(steps=100 * EPOCH, log_every=100, eval_every=EPOCH, save_every=1000),
        sampling=SamplingConfig(cfg_scale=(1.0,), top_p=(0.92,)),
    )
