r"""GPT-2 Large fine-tuned on prompts with completions, the step before preference learning.

    python train/lm.py configs/lm/gpt2_large_sft.py --data.file data/sft.jsonl \
        --workdir runs/gpt2_large_sft

Hardware: meant for v5e:2x4 (8 chips), not run here. Time: not measured.
Expected metric: none published for this data. `weights/gpt2-large` is the folder of Hugging Face.
"""

from jaxllm.data.text import TextDataConfig
from jaxllm.data.text_tokenizers import TextTokenizerConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.norm import NormConfig
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.optimizer import OptimizerConfig

WEIGHTS = "weights/gpt2-large"


def get_config() -> LanguageModelRun:
    return LanguageModelRun(
        model=DecoderConfig(
            vocab_size=50257,
            dim=1280,
            layers=36,
            attention=AttentionConfig(heads=20, kv_heads=20, head_dim=64, bias=True, out_bias=True),
            mlp=MlpConfig(hidden=5120, activation="gelu_tanh", gated=False, bias=True),
            norm=NormConfig(kind="layer"),
            rope=None,
            learned_positions=True,
            max_positions=1024,
            tie_embeddings=True,
            remat="full",
        ),
        tokenizer=TextTokenizerConfig(path=WEIGHTS),
        init_from=WEIGHTS,
        data=TextDataConfig(
            file="data/sft.jsonl", validation_fraction=0.02, row_length=1024, batch_size=64
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-5, schedule="linear", warmup_steps=50, final_fraction=0.1
        ),
        loop=LoopConfig(steps=1000, log_every=10, eval_every=200, save_every=200),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
