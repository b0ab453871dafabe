"""DnD-Transformer XXL on Text-Image codes, d = 1, 24x24 cells, unconditional.

    python train/code_model.py configs/images/text_image384_dnd.py --workdir runs/text_image384_dnd

Codes: `python train/extract_codes.py configs/images/text_image384_codes.py`. Hardware and time: not
measured here. The paper samples with temperature 0.1 and no guidance (arXiv:2410.01912); PPL_OCR
values are only in a figure.
"""

from jaxllm.images.config import CodeModelRun
from jaxllm.images.runs import replace_in
from jaxllm.training.run_folder import sibling_config


def get_config() -> CodeModelRun:
    run = sibling_config(__file__, "imagenet256_dnd_xxl.py")
    model = dict(
        model__depth=1,
        model__head_layers=(47,),
        model__codebook_size=4096,
        model__grid=(24, 24),
        model__num_classes=1,
        model__class_dropout=0.0,
    )
    return replace_in(
        run,
        **model,
        data__cache="runs/text_image384_codes",
        sampling__cfg_scale=(1.0,),
        sampling__temperature=(0.1,),
    )
