r"""Llama 3 8B (arXiv:2407.21783) pre-trained on a JSONL file of `text` records.

    python train/lm.py configs/lm/llama3_8b.py --data.file data/pretrain.jsonl \
        --workdir runs/llama3_8b

Hardware: planned for v5e:16x16 (256 chips), see docs/tpu.md, and not run here. Time: not measured.
Expected metric: none published for this data. `weights/Meta-Llama-3-8B` holds the tokenizer; any
folder with a tokenizer.json of at most 128,256 tokens does.

Shape and peak learning rate are the paper's (Table 3); documents of a row do not see each other, as
in the paper. The batch of 2 million tokens and the number of steps are not the paper's, which has
16 million at the end and 15 trillion tokens.
"""

from jaxllm.data.text import TextDataConfig
from jaxllm.data.text_tokenizers import TextTokenizerConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.rope import RopeConfig
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.optimizer import OptimizerConfig

LENGTH = 8192


def get_config() -> LanguageModelRun:
    return LanguageModelRun(
        model=DecoderConfig(
            vocab_size=128256,
            dim=4096,
            layers=32,
            attention=AttentionConfig(heads=32, kv_heads=8, head_dim=128),
            mlp=MlpConfig(hidden=14336),
            rope=RopeConfig(base=500000.0),
            max_positions=LENGTH,
            remat="full",
        ),
        tokenizer=TextTokenizerConfig(path="weights/Meta-Llama-3-8B"),
        data=TextDataConfig(
            file="data/pretrain.jsonl",
            validation_fraction=0.001,
            row_length=LENGTH,
            batch_size=256,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-4,
            schedule="cosine",
            warmup_steps=2000,
            final_fraction=0.01,
            weight_decay=0.1,
        ),
        loop=LoopConfig(steps=100_000, log_every=10, eval_every=2000, save_every=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
