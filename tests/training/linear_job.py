"""A job that trains in milliseconds yet uses everything a state can hold, and a script around it.

    python linear_job.py DIR [DIR ...] --delay 0.05

trains it in one folder after the other on two devices; tests kill and resume such processes.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.pipeline import Batches
from jaxllm.errors import InputError, run_command
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.training.job import Job, LoopConfig
from jaxllm.training.loop import train
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import apply_gradients

ROWS, INPUTS, OUTPUTS, BATCH = 40, 8, 16, 8
LOOP = LoopConfig(
    steps=30, log_every=1, eval_every=7, save_every=4, keep_best="norm", compile_cache=False
)
RULES = ((r"^w$", ("embed", "mlp")), (r"^b$", (None,)))


class Numbers:
    """Rows of a linear map; row `bad` holds a NaN, row `broken` cannot be read."""

    def __init__(self, delay=0.0, bad=None, broken=None, rows=ROWS):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(rows, INPUTS)).astype(np.float32)
        self.y = self.x @ rng.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
        self.delay, self.bad, self.broken = delay, bad, broken

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        time.sleep(self.delay / BATCH)
        if index == self.broken:
            raise InputError(f"numbers.jsonl:{index}: truncated")
        x = np.full_like(self.x[index], np.nan) if index == self.bad else self.x[index]
        return {"x": x, "y": self.y[index], "index": np.float32(index)}


def jitter(example, rng):
    return {**example, "x": example["x"] + rng.normal(0, 0.01, INPUTS).astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class LinearRun:
    loop: LoopConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


OPTIMIZER = OptimizerConfig(learning_rate=0.05, ema_decay=0.9, weight_decay=0.01)


def linear_job(
    loop,
    *,
    mesh=MeshConfig(),  # noqa: B008
    source=None,
    identity="linear",
    optimizer=OPTIMIZER,
    spoil=None,
    **job,
):
    """Data order, both noises, average, moments and extra state all reach the numbers."""
    transform = make_optimizer(optimizer, loop.steps)

    def init(key):
        params = {
            "w": jax.random.uniform(key, (INPUTS, OUTPUTS)),
            "b": jnp.zeros((OUTPUTS,)),
        }
        ema = optimizer.ema_decay is not None
        return new_state(params, transform, ema=ema, extra={"mean": jnp.zeros((INPUTS,))})

    def step(state, batch, key):
        noise = jax.random.uniform(jax.random.fold_in(key, state.step), (OUTPUTS,))

        def loss_of(params):
            error = batch["x"] @ params["w"] + params["b"] - batch["y"] + 0.01 * noise
            loss = jnp.mean(error**2)
            return loss if spoil is None else spoil(loss, params["w"], state.step)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        metrics = {"loss": loss, "first_row": batch["index"][0]}
        extra = {"mean": 0.9 * state.extra["mean"] + 0.1 * jnp.mean(batch["x"], axis=0)}
        return apply_gradients(state, grads, metrics, batch, transform, optimizer.ema_decay, extra)

    fields = dict(
        name="linear",
        config=LinearRun(loop, optimizer, mesh),
        loop=loop,
        mesh=mesh,
        init=init,
        step=step,
        batches=Batches(source or Numbers(), BATCH, loop.seed, jitter),
        rules=RULES,
        identity=identity,
        evaluate=lambda state: {"norm": float(jnp.sum(state.best_params["w"] ** 2))},
    )
    return Job(**{**fields, **job})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--delay", type=float, default=0.0)
    arguments = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    for folder in arguments.folders:
        train(linear_job(LOOP, source=Numbers(arguments.delay)), folder)


if __name__ == "__main__":
    sys.exit(run_command(main))
