"""DPO towards cheerful stories: the bundled model of 260 thousand parameters and a lexicon.

    python train/preference.py configs/preference/lexicon_dpo.py --workdir runs/lexicon_dpo

Before the first step the policy writes eight completions of each prompt, the first words of film
reviews; a lexicon scores them; the best and the worst of each prompt make a pair.

Hardware: 2 CPU cores. Time: 2 min 6 s, beside other work on the same cores. Mean valence of
completions of prompts that are held out (`eval/score`, one seed): 0.64, where those of the training
prompts, sampled before the first step, have 0.10. The price is the text: the log-prob of the chosen
completions falls too (`rewards/chosen` -5.4), and sentences break apart.
"""

from jaxllm.preference.config import LexiconFeedback, ModelConfig, OnPolicyData, PreferenceRun
from jaxllm.preference.pairwise import DPO
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


def get_config() -> PreferenceRun:
    return PreferenceRun(
        model=ModelConfig(policy="bundled:stories260K"),
        data=OnPolicyData(
            prompts="reviews",
            max_prompts=576,
            validation_prompts=64,
            refresh="once",
            samples=8,
            select="best_of_n",
            max_prompt=24,
            max_new_tokens=48,
            batch_size=32,
        ),
        feedback=LexiconFeedback(),
        algorithm=DPO(beta=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=10, beta2=0.999),
        loop=LoopConfig(steps=100, log_every=10, eval_every=25),
    )
