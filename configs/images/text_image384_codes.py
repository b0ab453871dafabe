r"""Codes of rendered pages at 384 pixels.

    python train/extract_codes.py configs/images/text_image384_codes.py --data.text-file wiki.txt \
        --tokenizer runs/text_image384_tokenizer --workdir runs/text_image384_codes

Hardware: one accelerator. Time: not measured here.
"""

from jaxllm.images.extract import ExtractRun
from jaxllm.training.run_folder import sibling_config


def get_config() -> ExtractRun:
    tokenizer = sibling_config(__file__, "text_image384_tokenizer.py")
    return ExtractRun(data=tokenizer.data, crops="one")
