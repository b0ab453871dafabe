"""Your own images at 64 pixels, one sub-folder per class: a tokenizer with d = 2.

    python train/tokenizer.py configs/images/folder64.py --data.folder images

Then `folder64_codes.py` and `folder64_dnd.py` in this folder. Hardware: one GPU, or a
laptop with patience. Time and result depend on the images and are not measured here.
"""

from jaxllm.data.images import ImageDataConfig
from jaxllm.images.config import TokenizerRun
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.quantize import ResidualVQ
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig

SIZE = (64, 64)


def get_config() -> TokenizerRun:
    return TokenizerRun(
        model=ImageTokenizerConfig(
            image_size=SIZE,
            channels=3,
            width=64,
            patch=2,
            multipliers=(1, 2, 2),
            groups=16,
            latent_dim=64,
            quantizer=ResidualVQ(
                codebook_size=1024, code_dim=32, depth=2, shared=False, restart_below=0.1
            ),
        ),
        data=ImageDataConfig(
            source="folder", folder="images", image_size=SIZE, channels=3, resize="crop"
        ),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=1e-3, schedule="cosine", warmup_steps=200
        ),
        loop=LoopConfig(steps=20_000, log_every=100, eval_every=2000, save_every=1000),
        kmeans_start=512,
    )
