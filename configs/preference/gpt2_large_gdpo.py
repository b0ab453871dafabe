r"""GDPO (arXiv:2412.20299) on GPT-2 Large: calibrated beliefs, and preferences given the belief.

    python train/preference.py configs/preference/gpt2_large_gdpo.py \
        --model.policy runs/gpt2_large_sft --data.file data/opinions.jsonl \
        --data.validation-file data/opinions_eval.jsonl --workdir runs/gpt2_large_gdpo

Hardware: planned for v5e:2x4 (8 chips), see docs/tpu.md, and not run here. Time: not measured.
Expected metric: `belief/js_distance` of the evaluation falls; none is published for this data.
Records are rows of the paper's opinion data; beliefs are its six digits, a token each.

Algorithm, optimiser, batch, lengths, and choosing the checkpoint with the lowest loss over every
10,000 examples are of the released code. Its limit of 20 epochs is that of the United States' small
set of 14,321 rows; it stops after 4 evaluations without a better loss, which is not done here, and
its 8 micro-batches are needed on 4 GPUs only.
"""

from pathlib import Path

from jaxllm.parallel.mesh import MeshConfig
from jaxllm.preference.config import ModelConfig, OfflineData, PreferenceRun
from jaxllm.preference.distributional import GroupDistributionalPO
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.run_folder import load_config

BATCH = 32
ROWS = 14_321


def get_config() -> PreferenceRun:
    start = load_config(Path(__file__).parents[1] / "lm" / "gpt2_large_sft.py")
    return PreferenceRun(
        model=ModelConfig(policy="runs/gpt2_large_sft", architecture=start.model, remat="full"),
        data=OfflineData(
            file="data/opinions.jsonl",
            validation_file="data/opinions_eval.jsonl",
            max_beliefs=6,
            max_prompt=256,
            batch_size=BATCH,
            row_length=512,
        ),
        algorithm=GroupDistributionalPO(),
        optimizer=OptimizerConfig(
            name="rmsprop", learning_rate=5e-7, warmup_steps=150, beta2=0.99, clip_norm=10.0
        ),
        loop=LoopConfig(
            steps=20 * ROWS // BATCH,
            log_every=10,
            eval_every=10_000 // BATCH,
            save_every=10_000 // BATCH,
            keep_best="loss",
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
