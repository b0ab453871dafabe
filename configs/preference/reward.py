"""A reward model on pairs of your own.

    python train/reward.py configs/preference/reward.py --model.policy MODEL \
        --data.file pairs.jsonl --workdir runs/reward

Hardware: whatever holds the model, its gradients and two moments. Time: that of the file; one step
is a forward and a backward pass over `batch_size` pairs. Expected: a loss of ln 2 = 0.693 at the
first step.
"""

from jaxllm.preference.config import OfflineData
from jaxllm.preference.reward_model import BradleyTerry
from jaxllm.preference.reward_scorer import RewardRun, RewardTrunk
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


def get_config() -> RewardRun:
    return RewardRun(
        model=RewardTrunk(policy="bundled:stories260K"),
        data=OfflineData(batch_size=32, row_length=512, max_prompt=256),
        algorithm=BradleyTerry(centre=0.01),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=50),
        loop=LoopConfig(steps=1000, log_every=10, save_every=250),
    )
