r"""Codes of ImageNet, ten crops an image, from a trained tokenizer.

    python train/extract_codes.py configs/images/imagenet256_codes.py \
        --tokenizer runs/imagenet256_tokenizer --workdir runs/imagenet256_codes

Hardware: one accelerator. Time: not measured here. Size: 1,281,167 x 10 crops x 256 cells x 2 codes
x 2 bytes = 13.1 GB at d = 2. Crops as in the released recipe: corners and centre of an image
scaled to 1.1 times the size, and their mirror images.
"""

from jaxllm.data.images import ImageDataConfig
from jaxllm.images.extract import ExtractRun


def get_config() -> ExtractRun:
    return ExtractRun(
        data=ImageDataConfig(
            source="tfds",
            tfds="imagenet2012",
            image_size=(256, 256),
            channels=3,
            resize="crop",
            balance=0.0,
        ),
        crops="ten",
        splits=("train", "validation"),
    )
