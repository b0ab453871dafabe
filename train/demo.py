"""Trains tokenizer and DnD-Transformer on bundled images, samples, scores and writes a report.

python train/demo.py configs/images/demo.py --workdir runs/demo
"""

from jaxllm.cli.train import main
from jaxllm.images.demo import DemoRun, run_demo

if __name__ == "__main__":
    main(DemoRun, run_demo)
