"""DPO on pairs of your own; the other algorithms by `--algorithm.kind`.

    python train/preference.py configs/preference/pairs.py --model.policy MODEL \
        --data.file pairs.jsonl --workdir runs/mine

Hardware: whatever holds twice the model, its gradients and two moments. Time: that of the file;
one step is two forward passes and one backward pass over `batch_size` pairs. Expected: a loss of
ln 2 = 0.693 at the first step. Settings are the published ones of DPO: beta 0.1, 5e-7, warm-up 150.
"""

from jaxllm.preference.config import ModelConfig, OfflineData, PreferenceRun
from jaxllm.preference.pairwise import DPO
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


def get_config() -> PreferenceRun:
    return PreferenceRun(
        model=ModelConfig(policy="bundled:stories260K"),
        data=OfflineData(batch_size=32, row_length=512, max_prompt=256),
        algorithm=DPO(beta=0.1),
        optimizer=OptimizerConfig(
            learning_rate=5e-7, warmup_steps=150, beta2=0.999, clip_norm=10.0
        ),
        loop=LoopConfig(steps=1000, log_every=10, save_every=250),
    )
