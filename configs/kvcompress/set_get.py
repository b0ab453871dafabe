"""Values set and asked for again and again over 180 tokens: a model for caches that decode long.

    python train/recall.py configs/kvcompress/set_get.py --workdir runs/set_get

Hardware: 2 CPU cores. Time: 5 minutes beside other work. Share of held-out queries answered
(`eval/accuracy`): 0.993, 0.991 and 0.983 with seeds 0, 1 and 2.
"""

from jaxllm.kvcompress.recall import RecallRun, Stage
from jaxllm.kvcompress.tasks import SetGetTask
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.rope import RopeConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


def get_config() -> RecallRun:
    task = SetGetTask(operations=60)
    return RecallRun(
        model=DecoderConfig(
            vocab_size=task.vocab,
            dim=64,
            layers=2,
            attention=AttentionConfig(heads=8, kv_heads=4, head_dim=16),
            mlp=MlpConfig(hidden=160),
            rope=RopeConfig(base=100.0),
            max_positions=task.length,
            init_std=0.08,
        ),
        task=task,
        batch_size=32,
        curriculum=(Stage(SetGetTask(operations=24), until=2000),),
        # A rate that does not fall, and an average instead: the plateau before the model learns to
        # match keys ends late, or never once the rate is low.
        optimizer=OptimizerConfig(
            name="adam", learning_rate=3e-3, beta2=0.999, clip_norm=None, ema_decay=0.99
        ),
        loop=LoopConfig(steps=2400, log_every=100, eval_every=500),
    )
