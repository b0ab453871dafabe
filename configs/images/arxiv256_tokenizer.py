r"""The arXiv-Image tokenizer: 256-pixel pictures of crops of paper pages, d = 8.

    python train/tokenizer.py configs/images/arxiv256_tokenizer.py --data.folder crops \
        --perceptual.path weights/lpips --workdir runs/arxiv256_tokenizer

`crops` is a folder with one sub-folder of pictures. The paper's set was not released; it is arXiv
PDFs as A4 pages of 1260x1782 pixels and ten random 512x512 crops a page, 2 million in all, which
are scaled to 256 pixels here.

Hardware in the paper: 8 A100. Time: not measured here. Steps: 100 epochs (App. B) = 100 x
floor(2,000,000 / 256) = 100 x 7,812; for n pictures of your own `--loop.steps` 100 n / 256. The
paper's rOCR on arXiv at 512 pixels (arXiv:2410.01912, Table 1b): d=1 0.14, d=2 0.49, d=8 0.67.
"""

from jaxllm.images.config import TokenizerRun
from jaxllm.images.runs import replace_in
from jaxllm.training.run_folder import sibling_config

EPOCH = 2_000_000 // 256


def get_config() -> TokenizerRun:
    return replace_in(
        sibling_config(__file__, "imagenet256_tokenizer.py"),
        model__quantizer__depth=8,
        data__source="folder",
        data__folder="crops",
        data__flip=False,
        data__unconditional=True,
        optimizer__warmup_steps=EPOCH // 2,
        loop__steps=100 * EPOCH,
        loop__eval_every=EPOCH,
        loop__sample_every=EPOCH,
    )
