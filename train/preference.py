"""Trains a language model on preferences.

python train/preference.py configs/preference/CONFIG.py [--dotted.key value ...] [--workdir DIR]

`--algorithm.kind NAME` takes any algorithm with its defaults, and so do `--model.reference.kind`,
`--data.kind` and `--feedback.kind` any other part.
"""

from pathlib import Path

from jaxllm.cli.train import main
from jaxllm.preference.config import PreferenceRun, name_algorithms
from jaxllm.preference.job import preference_job
from jaxllm.training.loop import train


def run(config: PreferenceRun, workdir: Path) -> None:
    """Trains the policy."""
    train(preference_job(config, workdir), workdir)


if __name__ == "__main__":
    main(PreferenceRun, run, prepare=name_algorithms)
