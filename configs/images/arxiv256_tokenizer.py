r"""The arXiv-Image tokenizer: 256-pixel crops of paper pages, d = 8.

    python train/tokenizer.py configs/images/arxiv256_tokenizer.py --data.folder pages \
        --perceptual.path weights/lpips --workdir runs/arxiv256_tokenizer

`pages` is a folder with one sub-folder of page pictures (the paper: arXiv PDFs as A4 pages of
1260x1782 pixels). Hardware in the paper: 8 A100. Time: not measured here. The paper's rOCR on arXiv
at 512 pixels (arXiv:2410.01912, Table 1b): d=1 0.14, d=2 0.49, d=8 0.67.
"""

from jaxllm.images.config import TokenizerRun
from jaxllm.images.runs import replace_in
from jaxllm.training.run_folder import sibling_config


def get_config() -> TokenizerRun:
    run = sibling_config(__file__, "imagenet256_tokenizer.py")
    return replace_in(
        run,
        model__quantizer__depth=8,
        data__source="folder",
        data__folder="pages",
        data__flip=False,
        data__unconditional=True,
    )
