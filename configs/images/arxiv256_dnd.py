"""DnD-Transformer XXL on arXiv-Image codes, d = 8, unconditional.

    python train/code_model.py configs/images/arxiv256_dnd.py --workdir runs/arxiv256_dnd

Codes: `python train/extract_codes.py configs/images/imagenet256_codes.py` with `--data.folder pages
--data.unconditional True --crops one`. Hardware and time: not measured here. The paper samples with
temperature 0.1 and no guidance (arXiv:2410.01912) and reports no number for these samples.
"""

from jaxllm.images.config import CodeModelRun
from jaxllm.images.runs import replace_in
from jaxllm.training.run_folder import sibling_config


def get_config() -> CodeModelRun:
    run = sibling_config(__file__, "imagenet256_dnd_xxl.py")
    model = dict(
        model__depth=8,
        model__head_layers=(26, 29, 32, 35, 38, 41, 44, 47),
        model__num_classes=1,
        model__class_dropout=0.0,
    )
    return replace_in(
        run,
        **model,
        data__cache="runs/arxiv256_codes",
        sampling__cfg_scale=(1.0,),
        sampling__temperature=(0.1,),
    )
