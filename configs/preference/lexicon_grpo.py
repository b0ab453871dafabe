"""GRPO towards cheerful stories: the bundled model samples at every step, a lexicon scores.

    python train/preference.py configs/preference/lexicon_grpo.py --workdir runs/lexicon_grpo

Hardware: 2 CPU cores. Time: 1 min 15 s, beside other work on the same cores, most of it sampling.
Mean valence of completions of prompts that are held out (`eval/score`, one seed): 0.32, 0.38 and
0.45 after 20, 40 and 60 steps; at step 5 the training prompts' score is 0.11. `kl_coef` is what
holds the text together: with 0.04 and a learning rate of 3e-4 the same 60 steps reached 2.42 by
saying "loved" again and again, at 126 nats from the reference instead of 7.
"""

from jaxllm.preference.config import LexiconFeedback, ModelConfig, OnPolicyData, PreferenceRun
from jaxllm.preference.policy_gradient import GRPO
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


def get_config() -> PreferenceRun:
    return PreferenceRun(
        model=ModelConfig(policy="bundled:stories260K"),
        data=OnPolicyData(
            prompts="reviews",
            max_prompts=576,
            validation_prompts=64,
            samples=8,
            max_prompt=24,
            max_new_tokens=48,
            batch_size=8,
        ),
        feedback=LexiconFeedback(),
        algorithm=GRPO(group_size=8, kl_coef=0.2),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=10, beta2=0.999),
        loop=LoopConfig(steps=60, log_every=5, eval_every=20),
    )
