r"""Codes of your own images at 64 pixels.

    python train/extract_codes.py configs/images/folder64_codes.py --data.folder images \
        --tokenizer runs/folder64 --workdir runs/folder64_codes

Hardware: as for `folder64.py`. Time: not measured here.
"""

from jaxllm.images.extract import ExtractRun
from jaxllm.training.run_folder import sibling_config


def get_config() -> ExtractRun:
    return ExtractRun(data=sibling_config(__file__, "folder64.py").data, crops="ten")
