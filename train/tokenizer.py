"""Trains an image tokenizer.

python train/tokenizer.py configs/images/CONFIG.py [--dotted.key value ...] [--workdir DIR]
"""

from jaxllm.cli.train import main
from jaxllm.images.config import TokenizerRun
from jaxllm.images.tokenizer import tokenizer_job
from jaxllm.training.loop import train

if __name__ == "__main__":
    main(TokenizerRun, lambda run, workdir: train(tokenizer_job(run), workdir))
