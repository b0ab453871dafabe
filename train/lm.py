"""Trains a decoder language model on text.

python train/lm.py configs/lm/CONFIG.py [--dotted.key value ...] [--workdir DIR]
"""

from pathlib import Path

from jaxllm.cli.train import main
from jaxllm.decoding.language_model import text_sampler
from jaxllm.training.language_model import LanguageModelRun, language_model_job
from jaxllm.training.loop import train


def run(config: LanguageModelRun, workdir: Path) -> None:
    """Trains the model and shows what it says."""
    train(language_model_job(config, workdir, sample=text_sampler(config)), workdir)


if __name__ == "__main__":
    main(LanguageModelRun, run)
