r"""The ImageNet tokenizer of the DnD-Transformer: RQ-VAE, 256 pixels to 16x16 cells of d codes.

    python train/tokenizer.py configs/images/imagenet256_tokenizer.py \
        --perceptual.path weights/lpips --workdir runs/imagenet256_tokenizer

For another depth add `--model.quantizer.depth 1` (or 4, 8). Data: TFDS imagenet2012 prepared as
array_record. `weights/lpips` holds the VGG16 and LPIPS files of their authors.

Hardware in the paper (arXiv:2410.01912, App. B): 8 A100. Time: not measured here.
The paper's ImageNet validation rFID (Table 1a): d=1 2.98, d=2 0.93, d=4 0.60, d=8 0.42; L2 0.11,
0.08, 0.05, 0.04; code usage 100 %.

Recipe of App. B and RQ-VAE: Adam, fixed learning rate 4e-5 after half an epoch of warm-up, batch
256, 100 epochs = 100 x floor(1,281,167 / 256) = 100 x 5,004 steps, no clipping; hinge loss of
weight 0.75 from the first step, LPIPS of weight 1, commitment 0.25. The released code updates its
shared codebook once per depth (`--model.quantizer.ema-mode sequential`) and uses BatchNorm in the
discriminator (`--adversarial.model.norm batch`); pooled updates and GroupNorm are the default.
"""

from jaxllm.data.images import ImageDataConfig
from jaxllm.images.config import AdversarialConfig, PerceptualConfig, TokenizerRun
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.quantize import ResidualVQ
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig

BATCH, EPOCH = 256, 1_281_167 // 256
DATA = ImageDataConfig(
    source="tfds",
    tfds="imagenet2012",
    image_size=(256, 256),
    channels=3,
    resize="crop",
    balance=0.0,
    batch_size=BATCH,
)


def get_config() -> TokenizerRun:
    return TokenizerRun(
        model=ImageTokenizerConfig(
            quantizer=ResidualVQ(codebook_size=16384, code_dim=256, depth=2), remat=True
        ),
        data=DATA,
        optimizer=OptimizerConfig(
            name="adam",
            learning_rate=4e-5,
            warmup_steps=EPOCH // 2,
            beta1=0.5,
            beta2=0.9,
            clip_norm=None,
        ),
        loop=LoopConfig(
            steps=100 * EPOCH, log_every=100, eval_every=EPOCH, save_every=1000, sample_every=EPOCH
        ),
        perceptual=PerceptualConfig(kind="lpips", path="weights/lpips", weight=1.0),
        adversarial=AdversarialConfig(weight=0.75),
    )
