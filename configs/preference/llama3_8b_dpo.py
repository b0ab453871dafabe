r"""DPO (arXiv:2305.18290) on Llama 3 8B against a frozen copy of its start.

    python train/preference.py configs/preference/llama3_8b_dpo.py --data.file data/pairs.jsonl \
        --workdir runs/llama3_8b_dpo

Hardware: planned for v5e:4x8 (32 chips), see docs/tpu.md, and not run here. Time: not measured.
Expected metric: a loss of ln 2 = 0.693 at the first step; none is published for this data. The
policy may also be a run, such as that of `configs/lm/llama3_8b_sft.py`.

beta, optimiser, warm-up and clipping are of the released code of DPO; batch, lengths and the number
of steps are this file's. `--model.reference.kind PrecomputedReference` scores all records once
before the first step and then holds no reference.
"""

from pathlib import Path

from jaxllm.parallel.mesh import MeshConfig
from jaxllm.preference.config import FrozenReference, ModelConfig, OfflineData, PreferenceRun
from jaxllm.preference.pairwise import DPO
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.run_folder import load_config


def get_config() -> PreferenceRun:
    start = load_config(Path(__file__).parents[1] / "lm" / "llama3_8b_sft.py")
    return PreferenceRun(
        model=ModelConfig(
            policy="weights/Meta-Llama-3-8B-Instruct",
            reference=FrozenReference(),
            architecture=start.model,
            remat="full",
        ),
        data=OfflineData(file="data/pairs.jsonl", max_prompt=1024, batch_size=64, row_length=2048),
        algorithm=DPO(beta=0.1),
        optimizer=OptimizerConfig(
            name="rmsprop", learning_rate=5e-7, warmup_steps=150, beta2=0.99, clip_norm=10.0
        ),
        loop=LoopConfig(steps=1000, log_every=10, save_every=250),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
