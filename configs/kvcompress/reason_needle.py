"""Facts with ranks, queried in pairs: a model of two layers with retrieval-reasoning heads.

    python train/recall.py configs/kvcompress/reason_needle.py --workdir runs/reason_needle

Starts from the model of `needle.py`, which matches keys already, with queries of one key first.
Hardware: 2 CPU cores. Time: 3 minutes beside other work. Share of held-out queries answered
(`eval/accuracy`): 0.90 to 1.00, seeds 0 to 2.
"""

from jaxllm.kvcompress.recall import RecallRun, Stage
from jaxllm.kvcompress.tasks import ReasonNeedleTask
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.rope import RopeConfig
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig


def get_config() -> RecallRun:
    task = ReasonNeedleTask(keys=8, values=8, filler_weight=0.1)
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
        single=0.25,
        curriculum=(Stage(task, until=500, single=1.0),),
        init_from="runs/needle/model",
        # A rate that does not fall, and an average instead: the plateau before the model learns to
        # match keys ends late, or never once the rate is low.
        optimizer=OptimizerConfig(
            name="adam", learning_rate=3e-3, beta2=0.999, clip_norm=None, ema_decay=0.99
        ),
        loop=LoopConfig(steps=1400, log_every=100, eval_every=500),
    )
