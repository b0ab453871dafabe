"""Trains a small decoder on a memory task and exports it.

python train/recall.py configs/kvcompress/CONFIG.py [--dotted.key value ...] [--workdir DIR]
"""

from pathlib import Path

from jaxllm.cli.train import main
from jaxllm.kvcompress.recall import RecallRun, export_recall, recall_job
from jaxllm.training.loop import train


def run(config: RecallRun, workdir: Path) -> None:
    """Trains the model; a finished one is written to `model/`, which `--model` reads."""
    result = train(recall_job(config), workdir)
    if result.finished:
        export_recall(config, result.state, workdir / "model")


if __name__ == "__main__":
    main(RecallRun, run)
