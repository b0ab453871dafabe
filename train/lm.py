"""Trains a decoder language model on text.

python train/lm.py configs/lm/CONFIG.py [--dotted.key value ...] [--workdir DIR]
"""

from jaxllm.cli.train import main
from jaxllm.training.language_model import LanguageModelRun, language_model_job
from jaxllm.training.loop import train

if __name__ == "__main__":
    main(LanguageModelRun, lambda run, workdir: train(language_model_job(run, workdir), workdir))
