"""DnD-Transformer XXL on arXiv-Image codes, d = 8, unconditional.

    python train/code_model.py configs/images/arxiv256_dnd.py --workdir runs/arxiv256_dnd

Codes: `arxiv256_codes.py`. Hardware and time: not measured here. The paper samples with temperature
0.1 and no guidance (arXiv:2410.01912) and reports no number for these samples.

The recipe is that of `imagenet256_dnd_xxl.py`. Steps: 300 epochs (App. E) = 300 x
floor(2,000,000 / 256) = 300 x 7,812; for n pictures of your own `--loop.steps` 300 n / 256.
"""

from jaxllm.images.config import CodeModelRun
from jaxllm.images.runs import replace_in
from jaxllm.training.run_folder import sibling_config

EPOCH = 2_000_000 // 256


def get_config() -> CodeModelRun:
    return replace_in(
        sibling_config(__file__, "imagenet256_dnd_xxl.py"),
        model__depth=8,
        model__head_layers=(26, 29, 32, 35, 38, 41, 44, 47),
        model__num_classes=1,
        model__class_dropout=0.0,
        data__cache="runs/arxiv256_codes",
        loop__steps=300 * EPOCH,
        loop__eval_every=EPOCH,
        sampling__cfg_scale=(1.0,),
        sampling__temperature=(0.1,),
    )
