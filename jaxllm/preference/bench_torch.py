"""The other side of `jaxllm bench preference`: a DPO step of transformers on PyTorch.

It does what TRL's DPOTrainer does, without its data loading and logging: chosen and rejected
completions of a batch are padded to the longest and go through policy and frozen reference in one
forward pass each, and the log-probs of the completions are summed. All logits are formed, where TRL
1.16 has an output layer that gives log-probs. SDPA attention, `clip_grad_norm_` and the fused
AdamW. Only the benchmark imports this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from jaxllm.evals.timing import Phases, seconds_of
from jaxllm.preference.bench import ALGORITHM, OPTIMIZER
from jaxllm.preference.records import Example


class TorchStep:
    """One DPO step after the other on one batch."""

    def __init__(self, policy: Any, reference: Any, pairs: Sequence[Example]):
        self.policy, self.reference = policy.train(), reference.requires_grad_(False)
        self.tokens, self.filled, self.completion = _padded(pairs)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            fused=True,
        )
        self.losses: list[float] = []

    def _log_probs(self, model: Any) -> torch.Tensor:
        """Summed log-probs [2 P] of the completions, the chosen ones first."""
        found = model(self.tokens, attention_mask=self.filled, use_cache=False).logits[:, :-1]
        targets = self.tokens[:, 1:, None]
        picked = found.gather(-1, targets)[..., 0] - torch.logsumexp(found, -1)
        return (picked * self.completion[:, 1:]).sum(-1)

    def _loss(self) -> torch.Tensor:
        with torch.no_grad():
            expected = self._log_probs(self.reference)
        chosen, rejected = (self._log_probs(self.policy) - expected).chunk(2)
        return -F.logsigmoid(ALGORITHM.beta * (chosen - rejected)).mean()

    def __call__(self) -> Phases:
        """Updates once and returns the seconds it took."""
        loss = torch.zeros(())

        def run() -> None:
            nonlocal loss
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                self.policy.parameters(), OPTIMIZER.clip_norm or torch.inf
            )
            self.optimizer.step()

        seconds = seconds_of(run)
        self.losses.append(float(loss.detach()))
        return {"step": seconds}


def _padded(pairs: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ids, which of them are no padding, and which are a completion's, [2 P, T] each."""
    rows = [(pair.prompt_ids, pair.completion_ids[side]) for side in (0, 1) for pair in pairs]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = torch.zeros((len(rows), longest), dtype=torch.long)
    filled, scored = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor([*prompt, *completion])
        filled[row, :end] = 1
        scored[row, len(prompt) : end] = 1
    return tokens, filled, scored
