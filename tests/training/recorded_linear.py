"""The linear job behind the command line of train/, its reading slowed down and recorded.

    DELAY=0.05 READS=FILE FAIL_AT=0 python recorded_linear.py [--dotted.key value ...]

Each row of training data that is read takes DELAY seconds and adds its number to READS; the
FAIL_AT-th is refused, as an unreadable record would be.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
from linear_job import OPTIMIZER, LinearRun, Numbers, linear_job

from jaxllm.cli.train import main
from jaxllm.errors import InputError
from jaxllm.training.job import LoopConfig
from jaxllm.training.loop import train

ROWS = 400


def get_config():
    """What does not depend on how long the run is, so that it can be made longer."""
    loop = LoopConfig(
        log_every=1,
        eval_every=7,
        sample_every=7,
        save_every=4,
        keep=99,
        keep_best="norm",
        compile_cache=False,
    )
    return LinearRun(loop, dataclasses.replace(OPTIMIZER, schedule="constant"))


def recorded_job(config, source=None):
    """The job of a config; its sample is a line, written and said."""

    def sample(state, path):
        weight = float(state.best_params["b"][0])
        Path(f"{path}.txt").write_text(f"{weight:.4f}\n")
        print(f"a sample: {weight:.4f}")

    source = Numbers(rows=ROWS) if source is None else source
    return linear_job(
        config.loop, mesh=config.mesh, source=source, optimizer=config.optimizer, sample=sample
    )


class Recorded(Numbers):
    """Rows that note when they were read."""

    def __init__(self):
        super().__init__(rows=ROWS)
        self.taken = 0

    def __getitem__(self, index):
        time.sleep(float(os.environ["DELAY"]))
        self.taken += 1
        if self.taken == int(os.environ["FAIL_AT"]):
            raise InputError(f"numbers.jsonl:{self.taken}: truncated")
        with Path(os.environ["READS"]).open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    main(
        LinearRun,
        lambda config, workdir: train(recorded_job(config, Recorded()), workdir),
        [__file__, *sys.argv[1:]],
    )
