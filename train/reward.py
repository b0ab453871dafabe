"""Trains a reward model on pairs.

python train/reward.py configs/preference/CONFIG.py [--dotted.key value ...] [--workdir DIR]
"""

from pathlib import Path

from jaxllm.cli.train import main
from jaxllm.preference.reward_job import RewardRun, reward_job
from jaxllm.training.loop import train


def run(config: RewardRun, workdir: Path) -> None:
    """Trains the reward model."""
    train(reward_job(config, workdir), workdir)


if __name__ == "__main__":
    main(RewardRun, run)
