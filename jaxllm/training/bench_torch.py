"""The other side of `jaxllm bench train`: a training step of transformers on PyTorch.

SDPA attention, `cross_entropy` of all logits, `clip_grad_norm_` and the fused AdamW. Only the
benchmark imports this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jaxllm.evals.timing import Phases, seconds_of
from jaxllm.training.bench import OPTIMIZER


class TorchStep:
    """One training step after the other on one batch."""

    def __init__(self, model: Any, ids: np.ndarray, *, compiled: bool = False):
        self.model = model.train()
        self.tokens, self.targets = (torch.from_numpy(x.copy()) for x in (ids[:, :-1], ids[:, 1:]))
        # As ours: scales are not decayed.
        kernels = [p for p in model.parameters() if p.ndim >= 2]
        scales = [p for p in model.parameters() if p.ndim < 2]
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

    def _loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def __call__(self) -> Phases:
        """Updates once and returns the seconds it took."""
        loss = torch.zeros(())

        def run() -> None:
            nonlocal loss
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss_fn(self.tokens, self.targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), OPTIMIZER.clip_norm or torch.inf
            )
            self.optimizer.step()

        seconds = seconds_of(run)
        self.losses.append(float(loss.detach()))
        return {"step": seconds}
