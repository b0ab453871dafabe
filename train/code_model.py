"""Trains a DnD-Transformer (or one of the models it is compared with) on a code cache.

python train/code_model.py configs/images/CONFIG.py [--dotted.key value ...] [--workdir DIR]
"""

from jaxllm.cli.train import main
from jaxllm.images.code_models import code_model_job
from jaxllm.images.config import CodeModelRun, RQTransformerRun
from jaxllm.training.loop import train

if __name__ == "__main__":
    main((CodeModelRun, RQTransformerRun), lambda run, workdir: train(code_model_job(run), workdir))
