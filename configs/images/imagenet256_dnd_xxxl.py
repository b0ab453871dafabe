"""DnD-Transformer XXXL (2.5B) on ImageNet codes, d = 2.

    python train/code_model.py configs/images/imagenet256_dnd_xxxl.py --workdir runs/xxxl

Hardware and time: not given in the paper and not measured here. Codes: `imagenet256_codes.py`.
The paper's result (arXiv:2410.01912, Table 2, guidance 1.7): FID 2.21, IS 279.3, precision 0.83,
recall 0.58. The recipe is that of XXL.
"""

from jaxllm.images.config import CodeModelRun
from jaxllm.images.runs import replace_in
from jaxllm.models.dnd import SIZES
from jaxllm.training.run_folder import sibling_config


def get_config() -> CodeModelRun:
    run = sibling_config(__file__, "imagenet256_dnd_xxl.py")
    layers, heads, dim = SIZES["XXXL"]
    return replace_in(
        run, model__layers=layers, model__heads=heads, model__dim=dim, sampling__cfg_scale=(1.7,)
    )
