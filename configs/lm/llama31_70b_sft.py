r"""Llama 3.1 70B fine-tuned on `messages`, with the loss on the assistant's turns.

    python train/lm.py configs/lm/llama31_70b_sft.py --data.file data/chat.jsonl \
        --workdir runs/llama31_70b_sft

Hardware: planned for v5p:4x4x4 (64 chips), see docs/tpu.md, and not run here. Time: not measured.
Expected metric: none published for this data. `weights/Llama-3.1-70B-Instruct` is a folder of
Hugging Face: config.json, safetensors, tokenizer and chat template.
"""

from dataclasses import replace

from jaxllm.data.text_tokenizers import TextTokenizerConfig
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.run_folder import sibling_config

WEIGHTS = "weights/Llama-3.1-70B-Instruct"


def get_config() -> LanguageModelRun:
    run: LanguageModelRun = sibling_config(__file__, "llama3_8b_sft.py")
    return replace(
        run,
        model=sibling_config(__file__, "llama31_70b.py").model,
        tokenizer=TextTokenizerConfig(path=WEIGHTS),
        init_from=WEIGHTS,
    )
