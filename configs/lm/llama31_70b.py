r"""Llama 3.1 70B (arXiv:2407.21783) pre-trained on a JSONL file of `text` records.

    python train/lm.py configs/lm/llama31_70b.py --data.file data/pretrain.jsonl \
        --workdir runs/llama31_70b

Hardware: planned for v5p:4x8x8 (256 chips), see docs/tpu.md, and not run here. Time: not measured.
Expected metric: none published for this data.

Shape and peak learning rate are the paper's (Table 3), with the rotary scaling of the released 3.1
models; batch and steps are those of `llama3_8b.py`.
"""

from dataclasses import replace

from jaxllm.data.text_tokenizers import TextTokenizerConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.rope import RopeConfig
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.run_folder import sibling_config


def get_config() -> LanguageModelRun:
    run: LanguageModelRun = sibling_config(__file__, "llama3_8b.py")
    model = replace(
        run.model,
        dim=8192,
        layers=80,
        attention=AttentionConfig(heads=64, kv_heads=8, head_dim=128),
        mlp=MlpConfig(hidden=28672),
        rope=RopeConfig(
            base=500000.0,
            scaling="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_positions=8192,
        ),
        max_positions=131072,
    )
    return replace(
        run,
        model=model,
        tokenizer=TextTokenizerConfig(path="weights/Llama-3.1-70B"),
        optimizer=replace(run.optimizer, learning_rate=1.5e-4),
    )
