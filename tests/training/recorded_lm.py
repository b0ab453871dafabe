"""train/lm.py on a tiny model whose reading is slowed down and recorded.

    DELAY=0.05 READS=FILE python recorded_lm.py [--dotted.key value ...] [--workdir DIR]

Each row of training data that is read takes DELAY seconds and adds its number to READS; the
FAIL_AT-th is refused, as an unreadable record would be.
"""

import os
import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

from jaxllm.data.text import TextDataConfig
from jaxllm.errors import InputError
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.optimizer import OptimizerConfig

BATCH, LENGTH = 8, 12


def get_config() -> LanguageModelRun:
    return LanguageModelRun(
        model=DecoderConfig(
            vocab_size=259,
            dim=16,
            layers=1,
            attention=AttentionConfig(heads=4, kv_heads=4, head_dim=4),
            mlp=MlpConfig(hidden=32),
            max_positions=LENGTH,
            dropout=0.1,
        ),
        data=TextDataConfig(row_length=LENGTH, batch_size=BATCH),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant", ema_decay=0.9),
        loop=LoopConfig(log_every=1, save_every=5, keep=99, compile_cache=False),
    )


class Recorded:
    """Rows that note when they were read."""

    def __init__(self, rows):
        self.rows, self.taken = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        time.sleep(float(os.environ["DELAY"]))
        self.taken += 1
        if self.taken == int(os.environ.get("FAIL_AT", 0)):
            raise InputError(f"text.txt:{self.taken}: truncated")
        with Path(os.environ["READS"]).open("a") as file:
            file.write(f"{index}\n")
        return self.rows[index]


def main() -> None:
    import jax

    from jaxllm.data.pipeline import Batches
    from jaxllm.training import language_model

    jax.config.update("jax_disable_most_optimizations", True)
    language_model.Batches = lambda rows, *rest, **more: Batches(Recorded(rows), *rest, **more)
    sys.argv = ["lm.py", __file__, *sys.argv[1:]]
    runpy.run_path(str(Path(__file__).parents[2] / "train/lm.py"), run_name="__main__")


if __name__ == "__main__":
    main()
