"""Log-probabilities of given completions under a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.decoding.text import bucket


class CompletionScorer:
    """A compiled scorer of (prompt, completion) pairs; compiles once per batch shape."""

    def __init__(self, build: Callable[[Any, Any], Any]):
        self.build = build

        def score(params: Any, extra: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
            model = build(params, extra)
            return model.token_logprobs(model.hidden(tokens), targets)

        self._run = jax.jit(score)

    def __call__(
        self,
        params: Any,
        extra: Any,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        batch: int = 8,
    ) -> list[np.ndarray]:
        """Returns float32 log p of each completion token given all before it, in nats.

        Args:
          params: Model parameters.
          extra: The model's buffers.
          pairs: Prompt and completion ids, at least one of each.
          batch: Rows scored together; rows of similar length share a batch and are padded on the
            right, which nothing before the padding sees.
        """
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        found: list[np.ndarray] = [np.empty(0)] * len(pairs)
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            rows = [[*pairs[i][0], *pairs[i][1]] for i in numbers]
            length = bucket(max(map(len, rows)) - 1)
            tokens = np.zeros((min(batch, len(pairs)), length), np.int32)
            targets = np.zeros_like(tokens)
            for place, row in enumerate(rows):
                tokens[place, : len(row) - 1], targets[place, : len(row) - 1] = row[:-1], row[1:]
            values = np.asarray(self._run(params, extra, tokens, targets))
            for place, number in enumerate(numbers):
                first = len(pairs[number][0]) - 1
                found[number] = values[place, first : first + len(pairs[number][1])]
        return found
