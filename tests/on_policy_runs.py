"""Two runs on sampled completions, one after the other, and a script around them.

    JUDGED=FILE python on_policy_runs.py MODEL_FOLDER WORKDIR

trains GRPO on completions sampled at every step, parameters split over two devices, and makes the
job of DPO on completions sampled once; the prompts of what is judged are noted in FILE.
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
    """GRPO, and DPO on completions sampled once."""
    data = replace(DATA, prompts=str(folder / "prompts.jsonl"))
    once = replace(data, refresh="once", select="best_of_n", validation_prompts=0)
    made = (
        replace(run_of(folder, GRPO(group_size=4, kl_coef=0.01), steps=3), data=data),
        replace(run_of(folder, DPO()), data=once),
    )
    feedback, mesh = RuleFeedback(f"{__name__}:judged"), MeshConfig(data=1, fsdp=2)
    return [replace(run, feedback=feedback, mesh=mesh) for run in made]


def main(folder, workdir):
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    start_distributed()
    with end_together():
        every_step, once = runs(folder)
        train(preference_job(every_step, workdir / "grpo"), workdir / "grpo")
        preference_job(once, workdir / "dpo")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
