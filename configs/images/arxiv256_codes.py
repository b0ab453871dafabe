r"""Codes of arXiv-Image crops at 256 pixels.

    python train/extract_codes.py configs/images/arxiv256_codes.py --data.folder crops \
        --tokenizer runs/arxiv256_tokenizer --workdir runs/arxiv256_codes

Hardware: one accelerator. Time: not measured here. Size: 2,000,000 x 256 cells x 8 codes x 2 bytes
= 8.2 GB for a set as large as the paper's. One view an image: the pages were cropped at random
before.
"""

from jaxllm.images.extract import ExtractRun
from jaxllm.training.run_folder import sibling_config


def get_config() -> ExtractRun:
    return ExtractRun(data=sibling_config(__file__, "arxiv256_tokenizer.py").data, crops="one")
