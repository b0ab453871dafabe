r"""Pythia 2.8B (arXiv:2304.01373) fine-tuned on prompts with completions.

    python train/lm.py configs/lm/pythia_2_8b_sft.py --data.file data/sft.jsonl \
        --workdir runs/pythia_2_8b_sft

Hardware: planned for v5e:4x4 (16 chips), see docs/tpu.md, and not run here. Time: not measured.
Expected metric: none published for this data. `weights/pythia-2.8b` is the folder of Hugging Face.
"""

from dataclasses import replace

from jaxllm.data.text_tokenizers import TextTokenizerConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.norm import NormConfig
from jaxllm.nn.rope import RopeConfig
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.run_folder import sibling_config

WEIGHTS = "weights/pythia-2.8b"


def get_config() -> LanguageModelRun:
    run: LanguageModelRun = sibling_config(__file__, "gpt2_large_sft.py")
    model = DecoderConfig(
        vocab_size=50304,
        dim=2560,
        layers=32,
        attention=AttentionConfig(heads=32, kv_heads=32, head_dim=80, bias=True, out_bias=True),
        mlp=MlpConfig(hidden=10240, activation="gelu", gated=False, bias=True),
        norm=NormConfig(kind="layer"),
        rope=RopeConfig(fraction=0.25),
        max_positions=2048,
        parallel_residual=True,
        remat="full",
    )
    return replace(
        run,
        model=model,
        tokenizer=TextTokenizerConfig(path=WEIGHTS),
        init_from=WEIGHTS,
        data=replace(run.data, row_length=2048),
        optimizer=replace(run.optimizer, learning_rate=1e-5),
    )
