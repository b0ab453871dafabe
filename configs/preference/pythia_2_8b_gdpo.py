r"""GDPO (arXiv:2412.20299) on Pythia 2.8B, the larger model of the paper.

    python train/preference.py configs/preference/pythia_2_8b_gdpo.py \
        --model.policy runs/pythia_2_8b_sft --data.file data/opinions.jsonl \
        --data.validation-file data/opinions_eval.jsonl --workdir runs/pythia_2_8b_gdpo

Hardware: planned for v5e:4x4 (16 chips), see docs/tpu.md, and not run here. Time: not measured.
Expected metric: as of `gpt2_large_gdpo.py`, of which everything but the model is.
"""

from dataclasses import replace
from pathlib import Path

from jaxllm.preference.config import ModelConfig, PreferenceRun
from jaxllm.training.run_folder import load_config, sibling_config


def get_config() -> PreferenceRun:
    run: PreferenceRun = sibling_config(__file__, "gpt2_large_gdpo.py")
    start = load_config(Path(__file__).parents[1] / "lm" / "pythia_2_8b_sft.py")
    model = ModelConfig(policy="runs/pythia_2_8b_sft", architecture=start.model, remat="full")
    return replace(run, model=model)
