"""The other sides of `jaxllm bench preference`: DPO steps of transformers on PyTorch.

`TorchStep` does what TRL's DPOTrainer does, without its data loading and logging: chosen and
rejected completions of a batch are padded to the longest and go through policy and frozen reference
in one forward pass each, and the log-probs of the completions are summed. All logits are formed,
where TRL 1.16 has an output layer that gives log-probs. SDPA attention, `clip_grad_norm_` and the
fused AdamW. `TrainerStep` is that trainer itself. Only the benchmark imports this file.
"""

from __future__ import annotations

import tempfile
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


class TrainerStep:
    """One step of TRL's DPOTrainer after the other on one batch.

    The batch comes from the trainer's own collator, once; a step is its `training_step` (loss,
    logged metrics and backward pass), the clipping that its training loop does between that and the
    update, and the optimiser that it makes.
    """

    def __init__(self, policy: Any, reference: Any, pairs: Sequence[Example]):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        rows = [
            {
                "prompt_ids": list(pair.prompt_ids),
                "chosen_ids": list(pair.completion_ids[0]),
                "rejected_ids": list(pair.completion_ids[1]),
            }
            for pair in pairs
        ]
        with tempfile.TemporaryDirectory() as folder:
            settings = DPOConfig(
                output_dir=folder,
                beta=ALGORITHM.beta,
                max_length=None,
                per_device_train_batch_size=len(pairs),
                learning_rate=OPTIMIZER.learning_rate,
                adam_beta1=OPTIMIZER.beta1,
                adam_beta2=OPTIMIZER.beta2,
                adam_epsilon=OPTIMIZER.eps,
                weight_decay=OPTIMIZER.weight_decay,
                optim="adamw_torch_fused",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
            )
            self.trainer = DPOTrainer(
                model=policy,
                ref_model=reference,
                args=settings,
                train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
                processing_class=_tokenizer(),
            )
        self.batch = self.trainer.data_collator(rows)
        self.optimizer = self.trainer.create_optimizer()
        # Set by the training loop, which is not run.
        self.trainer.current_gradient_accumulation_steps = 1
        self.losses: list[float] = []

    def __call__(self) -> Phases:
        """Updates once and returns the seconds it took."""
        model, loss = self.trainer.model, torch.zeros(())
        model.train()

        def run() -> None:
            nonlocal loss
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.trainer.training_step(model, dict(self.batch))
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm or torch.inf)
            self.optimizer.step()

        seconds = seconds_of(run)
        self.losses.append(float(loss.detach()))
        return {"step": seconds}


def _tokenizer() -> Any:
    """The trainer asks for a tokenizer and texts; of the batch's ids it pads only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    codec = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=codec, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>"
    )


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
