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


class EagerSide:
    """Greedy decoding with a cache that grows."""

    def __init__(self, model: Any, ids: np.ndarray, new_tokens: int):
        self.model, self.ids, self.new_tokens = model, torch.from_numpy(ids), new_tokens
        self.forward = model.forward
        known = inspect.signature(model.forward).parameters
        # Named `past_key_values` in older versions, which warn or fail about the other name.
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.wants_slots = "cache_position" in known
        self.tokens = np.zeros((len(ids), 0), np.int64)

    def new_cache(self) -> Any:
        """Returns an empty cache."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def __call__(self) -> Phases:
        """Runs both phases and returns their seconds."""
        cache, token, drawn = self.new_cache(), torch.zeros(0), []
        length = self.ids.shape[1]

        def step(forward: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
            position = torch.arange(start, start + ids.shape[1])
            named: dict[str, Any] = {self.cache_name: cache}
            if self.wants_slots:
                named["cache_position"] = position
            at = position[None].expand(len(ids), -1)
            out = forward(ids, position_ids=at, use_cache=True, logits_to_keep=1, **named)
            return out.logits[:, -1].argmax(dim=-1, keepdim=True)

        def prefill() -> None:
            nonlocal token
            token = step(self.model.forward, self.ids, 0)

        def decode() -> None:
            nonlocal token
            for i in range(self.new_tokens):
                drawn.append(token)
                token = step(self.forward, token, length + i)

        phases = {"prefill": seconds_of(prefill), "decode": seconds_of(decode)}
        self.tokens = torch.cat(drawn, dim=1).numpy()
        return phases


class CompiledSide(EagerSide):
    """The same with a cache of fixed size and a compiled decode step."""

    def __init__(self, model: Any, ids: np.ndarray, new_tokens: int):
        super().__init__(model, ids, new_tokens)
        self.forward = torch.compile(model.forward, dynamic=False)

    def new_cache(self) -> Any:
        """Returns an empty cache with all slots."""
        slots = self.ids.shape[1] + self.new_tokens
        return StaticCache(config=self.model.config, max_cache_len=slots)
