r"""The Text-Image tokenizer: rendered pages at 384 pixels to a 24x24 grid, d = 1, 4,096 codes.

    python train/tokenizer.py configs/images/text_image384_tokenizer.py --data.text-file wiki.txt \
        --perceptual.path weights/lpips --workdir runs/text_image384_tokenizer

`wiki.txt` is any UTF-8 text (the paper renders Wikipedia); pages are drawn on the fly. Hardware in
the paper: 8 A100. Time: not measured here. The paper's rOCR at 512 pixels (arXiv:2410.01912,
Table 1b): d=1 0.73, d=2 0.81, d=8 0.83.
"""

from jaxllm.data.images import ImageDataConfig
from jaxllm.data.rendered_text import TextImageConfig
from jaxllm.images.config import TokenizerRun
from jaxllm.images.runs import replace_in
from jaxllm.training.run_folder import sibling_config

SIZE = (384, 384)


def get_config() -> TokenizerRun:
    run = sibling_config(__file__, "imagenet256_tokenizer.py")
    data = ImageDataConfig(
        source="pages",
        pages=TextImageConfig(size=384),
        image_size=SIZE,
        channels=3,
        flip=False,
        jitter=0,
        balanced=False,
        unconditional=True,
        batch_size=256,
    )
    changes = dict(
        model__image_size=SIZE,
        model__quantizer__codebook_size=4096,
        model__quantizer__depth=1,
        data=data,
    )
    return replace_in(run, **changes)
