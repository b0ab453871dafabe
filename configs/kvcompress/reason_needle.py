"""Facts with ranks, queried in pairs: a model of three layers with retrieval-reasoning heads.

    python train/recall.py configs/kvcompress/reason_needle.py --workdir runs/reason_needle

Queries of one key come first, as a curriculum. Hardware: 2 CPU cores. Time: under 10 minutes.
Metric: `eval/accuracy`, the share of held-out queries answered.
"""

from dataclasses import replace

from jaxllm.kvcompress.recall import RecallRun, Stage
from jaxllm.kvcompress.tasks import ReasonNeedleTask
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.rope import RopeConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


def get_config() -> RecallRun:
    task = ReasonNeedleTask(filler_weight=0.1)
    return RecallRun(
        model=DecoderConfig(
            vocab_size=task.vocab,
            dim=64,
            layers=3,
            attention=AttentionConfig(heads=8, kv_heads=4, head_dim=16, bias=True),
            mlp=MlpConfig(hidden=112),
            rope=RopeConfig(base=100.0),
            max_positions=task.length,
            init_std=0.1,
        ),
        task=task,
        batch_size=32,
        single=0.25,
        curriculum=(
            Stage(replace(task, facts=3, queries=3), until=600, single=1.0),
            Stage(task, until=1200, single=1.0),
        ),
        optimizer=OptimizerConfig(
            name="adam",
            learning_rate=3e-3,
            schedule="linear",
            final_fraction=0.1,
            beta2=0.999,
            clip_norm=None,
        ),
        loop=LoopConfig(steps=3000, log_every=100, eval_every=500),
    )
