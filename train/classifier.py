"""Trains the small classifier that scores samples or gives perceptual features.

python train/classifier.py configs/images/CONFIG.py [--dotted.key value ...] [--workdir DIR]
"""

from jaxllm.cli.train import main
from jaxllm.images.classifier import classifier_job
from jaxllm.images.config import ClassifierRun
from jaxllm.training.loop import train

if __name__ == "__main__":
    main(ClassifierRun, lambda run, workdir: train(classifier_job(run), workdir))
