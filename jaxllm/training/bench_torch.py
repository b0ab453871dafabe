"""The other side of training benchmarks: updates of a PyTorch module.

SDPA attention, `cross_entropy` of all logits, `clip_grad_norm_` and the fused AdamW. In half
precision the parameters stay float32 and a bfloat16 copy of them computes, as ours does. Only the
benchmarks import this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jaxllm.evals.timing import Phases, seconds_of
from jaxllm.hub.bench_torch import wait_for
from jaxllm.training.bench import OPTIMIZER


class TorchUpdates:
    """One update after the other of a module that maps its inputs to a loss.

    Args:
      module: On its device, in float32. Parameters with two or more dimensions decay, those whose
        names end in `norm` excepted.
      inputs: Its arguments.
      half: Compute in bfloat16.
      compiled: Under `torch.compile`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Sequence[torch.Tensor],
        *,
        half: bool = False,
        compiled: bool = False,
    ):
        self.module, self.inputs, self.half = module.train(), inputs, half
        # As ours: scales are not decayed.
        named = list(module.named_parameters())
        decay = [p.ndim >= 2 and not name.endswith("norm") for name, p in named]
        kernels = [p for (_, p), decays in zip(named, decay, strict=True) if decays]
        scales = [p for (_, p), decays in zip(named, decay, strict=True) if not decays]
        self.device = named[0][1].device
        self.optimizer = torch.optim.AdamW(
            [
                {"params": kernels, "weight_decay": OPTIMIZER.weight_decay},
                {"params": scales, "weight_decay": 0.0},
            ],
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
            fused=True,
        )
        self.loss_fn: Any = torch.compile(self._loss, dynamic=False) if compiled else self._loss
        self.losses: list[float] = []

    def _loss(self, *inputs: torch.Tensor) -> torch.Tensor:
        if not self.half:
            return self.module(*inputs)
        half = {name: p.to(torch.bfloat16) for name, p in self.module.named_parameters()}
        return torch.func.functional_call(self.module, half, inputs)

    def __call__(self) -> Phases:
        """Updates once and returns the seconds it took."""
        loss = torch.zeros(())

        def run() -> None:
            nonlocal loss
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss_fn(*self.inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                self.module.parameters(), OPTIMIZER.clip_norm or torch.inf
            )
            self.optimizer.step()
            wait_for(self.device)

        seconds = seconds_of(run)
        self.losses.append(float(loss.detach()))
        return {"step": seconds}


class _NextToken(torch.nn.Module):
    """The mean cross-entropy of a language model of transformers."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class TorchStep(TorchUpdates):
    """Updates of a language model of transformers on ids [B, T + 1]; options of `TorchUpdates`."""

    def __init__(self, model: Any, ids: np.ndarray, *, half: bool = False, compiled: bool = False):
        parts = (ids[:, :-1], ids[:, 1:])
        inputs = [torch.from_numpy(x.copy()).to(model.device) for x in parts]
        super().__init__(_NextToken(model), inputs, half=half, compiled=compiled)
