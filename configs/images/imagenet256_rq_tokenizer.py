r"""The RQ-VAE that the RQ-Transformer is trained on: 256 pixels to 8x8 cells of 4 codes.

    python train/tokenizer.py configs/images/imagenet256_rq_tokenizer.py \
        --perceptual.path weights/lpips --workdir runs/imagenet256_rq_tokenizer

Its codes: `python train/extract_codes.py configs/images/imagenet256_codes.py` with `--tokenizer
runs/imagenet256_rq_tokenizer --workdir runs/imagenet256_rq_codes`.

Hardware and time: not measured here. Five halvings (factor 32), attention at the 8x8 level, one
codebook of 16,384 vectors for all four depths. The authors' config file of arXiv:2203.01941 trains
10 epochs = 10 x 5,004 steps with 32 images a device; the rest of the recipe is that of
`imagenet256_tokenizer.py`, which follows it, with 256 images a step.
"""

from jaxllm.images.config import TokenizerRun
from jaxllm.images.runs import replace_in
from jaxllm.training.run_folder import sibling_config

EPOCH = 1_281_167 // 256


def get_config() -> TokenizerRun:
    return replace_in(
        sibling_config(__file__, "imagenet256_tokenizer.py"),
        model__multipliers=(1, 1, 2, 2, 4, 4),
        model__attention_levels=(5,),
        model__quantizer__depth=4,
        loop__steps=10 * EPOCH,
    )
