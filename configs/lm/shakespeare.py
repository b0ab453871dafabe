"""Shakespeare at small scale: a decoder of 1 million parameters on the bundled text.

    python train/lm.py configs/lm/shakespeare.py --workdir runs/shakespeare

Hardware: 2 CPU cores. Time: 8 min 30 s, beside other work on the same cores. Validation bits per
byte (`eval/bits_per_byte`, the last tenth of the text): 2.25, one seed.
"""

from jaxllm.data.text import TextDataConfig
from jaxllm.data.text_tokenizers import TextTokenizerConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.optimizer import OptimizerConfig

VOCABULARY, DIM, LENGTH = 1024, 128, 256


def get_config() -> LanguageModelRun:
    return LanguageModelRun(
        model=DecoderConfig(
            vocab_size=VOCABULARY,
            dim=DIM,
            layers=4,
            attention=AttentionConfig(heads=4, kv_heads=4, head_dim=32),
            mlp=MlpConfig(hidden=352),
            max_positions=LENGTH,
            tie_embeddings=True,
            dropout=0.1,
        ),
        tokenizer=TextTokenizerConfig(train_bpe=VOCABULARY),
        data=TextDataConfig(row_length=LENGTH, batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, schedule="cosine", warmup_steps=40, weight_decay=0.1
        ),
        loop=LoopConfig(steps=600, log_every=20, eval_every=200),
    )
