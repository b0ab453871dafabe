"""Two runs on sampled completions, one after the other, and a script around them.

    JUDGED=FILE python on_policy_runs.py MODEL_FOLDER WORKDIR

trains GRPO on completions sampled at every step, then DPO of adapters on completions sampled once,
parameters split over two devices; the prompts whose completions are judged are noted in FILE.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

import jax
from tiny_preference import low_letters, run_of

from jaxllm.nn.lora import LoraConfig
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.parallel.processes import end_together, start_distributed
from jaxllm.preference.config import OnPolicyData, RuleFeedback
from jaxllm.preference.job import preference_job
from jaxllm.preference.pairwise import DPO
from jaxllm.preference.policy_gradient import GRPO
from jaxllm.training.loop import train

DATA = OnPolicyData(
    samples=4, max_prompt=8, max_new_tokens=6, batch_size=4, validation_prompts=2, threshold=0.5
)


def judged(prompt, completion):
    """A rule for feedback that notes what it judges."""
    with Path(os.environ["JUDGED"]).open("a") as file:
        file.write(f"{prompt}\n")
    return low_letters(prompt, completion)


def runs(folder):
    """Name -> run."""
    data = replace(DATA, prompts=str(folder / "prompts.jsonl"))
    once = replace(data, refresh="once", select="best_of_n", validation_prompts=0)
    made = {
        "grpo": replace(run_of(folder, GRPO(group_size=4, kl_coef=0.01), steps=3), data=data),
        "dpo": replace(run_of(folder, DPO(), lora=LoraConfig(2)), data=once),
    }
    feedback, mesh = RuleFeedback(f"{__name__}:judged"), MeshConfig(data=1, fsdp=2)
    return {name: replace(run, feedback=feedback, mesh=mesh) for name, run in made.items()}


def main(folder, workdir):
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    start_distributed()
    with end_together():
        for name, run in runs(folder).items():
            train(preference_job(run, workdir / name), workdir / name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
