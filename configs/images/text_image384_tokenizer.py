r"""The Text-Image tokenizer: rendered pages at 384 pixels to a 24x24 grid, d = 1, 4,096 codes.

    python train/tokenizer.py configs/images/text_image384_tokenizer.py --data.text-file wiki.txt \
        --perceptual.path weights/lpips --workdir runs/text_image384_tokenizer

`wiki.txt` is any UTF-8 text (the paper renders Wikipedia); pages are drawn when they are needed,
384 pixels with letters of 32. `--data.pages.size 512 --data.resize crop` draws the paper's page of
512 pixels and scales it down.

Hardware in the paper: 8 A100. Time: not measured here. Steps: 100 epochs (App. B) = 100 x
2,400,000 / 256 = 100 x 9,375 for a set as large as the paper's. The paper's rOCR at 512 pixels
(arXiv:2410.01912, Table 1b): d=1 0.73, d=2 0.81, d=8 0.83; at 256 pixels 0.15, 0.50, 0.80.
"""

from jaxllm.data.images import ImageDataConfig
from jaxllm.data.rendered_text import TextImageConfig
from jaxllm.images.config import TokenizerRun
from jaxllm.images.runs import replace_in
from jaxllm.training.run_folder import sibling_config

SIZE, EPOCH = (384, 384), 2_400_000 // 256


def get_config() -> TokenizerRun:
    run = sibling_config(__file__, "imagenet256_tokenizer.py")
    data = ImageDataConfig(
        source="pages",
        pages=TextImageConfig(size=384),
        image_size=SIZE,
        channels=3,
        flip=False,
        jitter=0,
        balance=0.0,
        unconditional=True,
        batch_size=256,
    )
    changes = dict(
        model__image_size=SIZE,
        model__quantizer__codebook_size=4096,
        model__quantizer__depth=1,
        data=data,
        optimizer__warmup_steps=EPOCH // 2,
        loop__steps=100 * EPOCH,
        loop__eval_every=EPOCH,
        loop__sample_every=EPOCH,
    )
    return replace_in(run, **changes)
