"""The other side of `jaxllm bench decode`: a Llama of transformers on PyTorch.

It decodes with SDPA attention and a key/value cache in a loop of plain forward calls, which costs
less per token than `generate`. The compiled side is the same forward pass under `torch.compile`
with a static cache. Only the benchmarks import this file; the library itself needs neither package.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, StaticCache

from jaxllm.evals.timing import Phases, seconds_of
from jaxllm.hub.bench_torch import wait_for


class EagerSide:
    """Greedy decoding with a cache that grows.

    Args:
      model: Of transformers, on its device.
      ids: Prompts [B, T].
      new_tokens: Drawn by one call; a static cache has room for `slots` instead where that is more.
      slots: Tokens drawn in all.
      prefill_chunk: Prompt tokens run at a time; None for all.
    """

    def __init__(
        self,
        model: Any,
        ids: np.ndarray,
        new_tokens: int,
        *,
        slots: int = 0,
        prefill_chunk: int | None = None,
    ):
        self.model, self.ids = model, torch.from_numpy(ids).to(model.device)
        self.new_tokens, self.slots = new_tokens, ids.shape[1] + max(new_tokens, slots)
        self.prefill_chunk = prefill_chunk or ids.shape[1]
        self.forward = model.forward
        known = inspect.signature(model.forward).parameters
        # Named `past_key_values` in older versions, which warn or fail about the other name.
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.wants_slots = "cache_position" in known
        self.cache: Any = None
        self.held = 0
        self.token = torch.zeros(0)
        self.tokens = np.zeros((len(ids), 0), np.int64)

    def new_cache(self) -> Any:
        """Returns an empty cache."""
        return DynamicCache(config=self.model.config)

    def step(self, forward: Any, ids: torch.Tensor) -> torch.Tensor:
        """Appends tokens [B, T] to the cache and returns the logits [B, V] after the last."""
        position = torch.arange(self.held, self.held + ids.shape[1], device=ids.device)
        named: dict[str, Any] = {self.cache_name: self.cache}
        if self.wants_slots:
            named["cache_position"] = position
        at = position[None].expand(len(ids), -1)
        out = forward(ids, position_ids=at, use_cache=True, logits_to_keep=1, **named)
        self.held += ids.shape[1]
        return out.logits[:, -1]

    @torch.inference_mode()
    def prefill(self) -> None:
        """Runs the prompt through an empty cache."""
        self.cache, self.held, logits = self.new_cache(), 0, torch.zeros(1, 1)
        for part in self.ids.split(self.prefill_chunk, dim=1):
            logits = self.step(self.model.forward, part)
        self.token = logits.argmax(dim=-1, keepdim=True)
        wait_for(self.ids.device)

    @torch.inference_mode()
    def decode(self) -> None:
        """Draws the next tokens, which `tokens` then holds."""
        drawn = []
        for _ in range(self.new_tokens):
            drawn.append(self.token)
            self.token = self.step(self.forward, self.token).argmax(dim=-1, keepdim=True)
        self.tokens = torch.cat(drawn, dim=1).cpu().numpy()

    def __call__(self) -> Phases:
        """Runs both phases and returns their seconds."""
        return {"prefill": seconds_of(self.prefill), "decode": seconds_of(self.decode)}

    @torch.inference_mode()
    def forced_logits(self, more: np.ndarray) -> np.ndarray:
        """Returns float32 logits [B, n, V] after each of `more` [B, n] tokens behind the prompt."""
        self.prefill()
        tokens = torch.from_numpy(more).to(self.ids.device)
        found = [self.step(self.forward, token).float().cpu() for token in tokens.split(1, dim=1)]
        return torch.stack(found, dim=1).numpy()


class CompiledSide(EagerSide):
    """The same with a cache of fixed size and a compiled decode step; `mode` is torch.compile's."""

    def __init__(
        self, model: Any, ids: np.ndarray, new_tokens: int, *, mode: str | None = None, **more: Any
    ):
        super().__init__(model, ids, new_tokens, **more)
        self.forward = torch.compile(model.forward, dynamic=False, mode=mode)

    def new_cache(self) -> Any:
        """Returns an empty cache with all slots."""
        return StaticCache(config=self.model.config, max_cache_len=self.slots)
