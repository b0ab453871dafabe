"""Reward models: a decoder with a scalar head; their config, and finished ones as feedback.

r(x, y) = w . h + b        h: final activation at the last token of the completion
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decoding.text import bucket
from jaxllm.errors import InputError
from jaxllm.models.scalar_head import token_values
from jaxllm.nn.lora import LoraConfig
from jaxllm.nn.stack import Remat
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.preference.config import (
    FeedbackConfig,
    GivenFeedback,
    ModelConfig,
    NoReference,
    OfflineData,
)
from jaxllm.preference.policy import Policy, policy_of
from jaxllm.preference.reward_model import BradleyTerry
from jaxllm.training.checkpoint import finished_steps, read_newest
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.run_folder import from_plain, read_json

JOB = "reward_model"
Tree = Any


@dataclass(frozen=True)
class RewardTrunk:
    """The decoder under the scalar head."""

    policy: str
    """The language model that it starts from: a folder, or `bundled:stories260K`."""
    lora: LoraConfig | None = None
    remat: Remat = "none"


@dataclass(frozen=True)
class RewardRun:
    """Trains a reward model on pairs."""

    model: RewardTrunk
    data: OfflineData
    feedback: FeedbackConfig = GivenFeedback()
    """Who orders the pairs; what is given, or anything that scores texts."""
    algorithm: BradleyTerry = BradleyTerry()
    use_margin: bool = False
    """Ask for a difference of at least the records' `margin`."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    loop: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


def open_trunk(run: RewardRun) -> Policy:
    """Returns the decoder of a run, without parameters."""
    model = ModelConfig(run.model.policy, NoReference(), run.model.lora, run.model.remat)
    return policy_of(model, NoReference(), run.precision)


# -- a trained one -------------------------------------------------------------------------------


class RewardScorer:
    """A finished reward model; compiles once per bucket of lengths.

    Args:
      folder: A run of `reward_job`.

    Raises:
      InputError: A folder that holds no such run, or one without a tokenizer.
    """

    def __init__(self, folder: str | Path):
        if not str(folder):
            raise InputError("feedback.run is empty, expected a run of train/reward.py")
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected a run of train/reward.py")
        path = folder / "config.json"
        saved = read_json(path)
        if not isinstance(saved, dict) or saved.get("job") != JOB:
            found = saved.get("job") if isinstance(saved, dict) else None
            raise InputError(f"{path}: a {found!r} run, expected a {JOB!r} run")
        run = from_plain(RewardRun, saved.get("config"), str(path))
        self.trunk = open_trunk(run)
        if self.trunk.tokenizer is None:
            raise InputError(f"{folder}: has no tokenizer, which texts need")
        self._tokenizer = self.trunk.tokenizer
        best = folder / "best"
        tree = read_newest(best if finished_steps(best) else folder / "checkpoints")
        self.params, self.extra = tree.get("ema", tree["params"]), tree.get("extra", {})

        @jax.jit
        def score(params: Tree, extra: Tree, tokens: jax.Array, last: jax.Array) -> jax.Array:
            model, adapters = self.trunk.build(params, extra)
            values = token_values(params["head"], model.hidden(tokens, adapters=adapters))
            return jnp.take_along_axis(values, last[:, None], 1)[:, 0]

        self._score = score

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Returns the reward of each completion, float32 [n]."""
        tokenizer = self._tokenizer
        bos = tokenizer.adds_bos
        ids = [
            tokenizer.encode_pair(p, c, bos=bos, eos=True)[0]
            for p, c in zip(prompts, completions, strict=True)
        ]
        length = bucket(max(map(len, ids)))
        tokens = np.zeros((bucket(len(ids)), length), np.int32)
        last = np.zeros(len(tokens), np.int32)
        for row, found in enumerate(ids):
            tokens[row, : len(found)], last[row] = found, len(found) - 1
        return np.asarray(self._score(self.params, self.extra, tokens, last))[: len(ids)]
