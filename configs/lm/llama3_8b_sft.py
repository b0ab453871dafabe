r"""Llama 3 8B fine-tuned on `messages`, with the loss on the assistant's turns.

    python train/lm.py configs/lm/llama3_8b_sft.py --data.file data/chat.jsonl \
        --workdir runs/llama3_8b_sft

Hardware: planned for v5e:4x8 (32 chips), see docs/tpu.md, and not run here. Time: not measured.
Expected metric: none published for this data. `weights/Meta-Llama-3-8B-Instruct` is a folder of
Hugging Face: config.json, safetensors, tokenizer and chat template.
"""

from dataclasses import replace

from jaxllm.data.text import TextDataConfig
from jaxllm.data.text_tokenizers import TextTokenizerConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.run_folder import sibling_config

WEIGHTS = "weights/Meta-Llama-3-8B-Instruct"


def get_config() -> LanguageModelRun:
    run: LanguageModelRun = sibling_config(__file__, "llama3_8b.py")
    return replace(
        run,
        tokenizer=TextTokenizerConfig(path=WEIGHTS),
        init_from=WEIGHTS,
        data=TextDataConfig(
            file="data/chat.jsonl", validation_fraction=0.02, row_length=4096, batch_size=64
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-5,
            schedule="cosine",
            warmup_steps=50,
            final_fraction=0.1,
            weight_decay=0.1,
        ),
        loop=LoopConfig(steps=1000, log_every=10, eval_every=200, save_every=200),
    )
