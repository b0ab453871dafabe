"""Completions of prompts: batches, stop strings, several samples, text as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxllm.data.text_tokenizers import StreamDecoder, Tokenizer
from jaxllm.decoding.text import TextSampler, TextSampling, TextState, repeat_rows, row_keys
from jaxllm.errors import InputError

OnText = Callable[[int, str], None]
"""Called with (prompt number, new text) as text becomes final."""


@dataclass
class Completion:
    """One sampled continuation.

    Attributes:
      ids: The sampled ids, with the one that ended it.
      log_probs: Natural log-probability of each id under the model, before temperature, penalty
        and filters.
      text: The text of `ids` without special tokens and without a stop string; None without a
        tokenizer.
      finish_reason: `stop` for a stop id or string, `length` otherwise.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str | None = None
    finish_reason: str = "length"


class _Row:
    """What the host keeps of one row between chunks."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], sampling: TextSampling):
        self.completion = Completion()
        self.stream = None if tokenizer is None else StreamDecoder(tokenizer, prompt)
        self.sampling, self.text, self.shown, self.done = sampling, "", 0, False

    def push(self, token: int, log_prob: float, stops: Sequence[str]) -> None:
        """Adds one token unless the row has ended."""
        if self.done:
            return
        self.completion.ids.append(token)
        self.completion.log_probs.append(log_prob)
        if token in self.sampling.stop_ids:
            self.finish("stop")
            return
        if self.stream is not None:
            self.text += self.stream.push(token)
            found = [at for stop in stops if (at := self.text.find(stop)) >= 0]
            if found:
                self.text, self.stream = self.text[: min(found)], None
                self.finish("stop")
                return
        if len(self.completion.ids) >= self.sampling.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        if self.stream is not None:
            self.text += self.stream.finish()
        self.done, self.completion.finish_reason = True, reason

    def news(self, stops: Sequence[str]) -> str:
        """Returns text not shown yet that no stop string can take back."""
        held = 0
        if not self.done:  # The longest end of the text with which a stop string may begin.
            for stop in stops:
                ends = (n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
                held = max(held, next(ends, 0))
        end = len(self.text) - held
        new, self.shown = self.text[self.shown : end], max(self.shown, end)
        return new


class TextGenerator:
    """A model, its tokenizer and a compiled sampler."""

    def __init__(
        self, params: Any, extra: Any, sampler: TextSampler, tokenizer: Tokenizer | None = None
    ):
        self.params, self.extra, self.sampler, self.tokenizer = params, extra, sampler, tokenizer

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: TextSampling,
        *,
        stop: Sequence[str] = (),
        samples: int = 1,
        seed: int = 0,
        batch: int = 8,
        on_text: OnText | None = None,
        least_prompt: int = 1,
        first: int = 0,
    ) -> list[list[Completion]]:
        """Returns `samples` completions of each prompt, in the order of the prompts.

        Prompts of similar length share a batch. What is drawn for a prompt depends on the seed, its
        number and the sample's number, not on the batch.

        Args:
          prompts: Token ids of each prompt.
          sampling: How tokens are drawn.
          stop: Strings that end a completion and are cut off; they need a tokenizer.
          samples: Completions per prompt, from one prefill.
          seed: Seed of all draws.
          batch: Prompts run together.
          on_text: Called as text becomes final; needs a tokenizer and one sample.
          least_prompt: See `TextSampler.prefill`.
          first: The number of the first prompt, where these are some of more.

        Raises:
          InputError: An argument or a prompt out of range.
        """
        if min(samples, batch) < 1:
            raise InputError(f"samples {samples} and batch {batch} must be at least 1")
        if (stop or on_text) and self.tokenizer is None:
            raise InputError("stop strings and streaming need a model with a tokenizer")
        if any(not text for text in stop):
            raise InputError("a stop string must not be empty")
        if on_text and samples > 1:
            raise InputError(f"streaming shows one sample per prompt, got {samples}")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results: dict[int, list[Completion]] = {}
        layers = self.sampler.layers(self.params, self.extra)
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            # A last batch of another size would be compiled anew.
            filled = numbers + numbers[-1:] * (min(batch, len(order)) - len(numbers))
            keys = row_keys(seed, [first + i for i in filled], 1 if samples == 1 else samples)
            state = self.sampler.prefill(
                self.params,
                self.extra,
                [prompts[i] for i in filled],
                keys[::samples],
                max_new_tokens=sampling.max_new_tokens,
                keep_seen=sampling.repetition_penalty != 1,
                least_prompt=least_prompt,
                layers=layers,
            )
            if samples > 1:
                state = dataclasses.replace(repeat_rows(state, samples), keys=keys)
            rows = [
                _Row(self.tokenizer, prompts[i], sampling) for i in filled for _ in range(samples)
            ]
            self._finish(state, sampling, layers, rows, stop, numbers, on_text)
            for place, number in enumerate(numbers):
                mine = rows[place * samples : (place + 1) * samples]
                results[number] = [row.completion for row in mine]
        return [results[i] for i in range(len(prompts))]

    def _finish(
        self,
        state: TextState,
        sampling: TextSampling,
        layers: Any,
        rows: Sequence[_Row],
        stop: Sequence[str],
        numbers: Sequence[int],
        on_text: OnText | None,
    ) -> None:
        """Draws until every row has ended; looks at the tokens once per chunk."""
        while True:
            state, drawn = self.sampler.decode(self.params, self.extra, state, sampling, layers)
            tokens, log_probs, valid = (np.asarray(x) for x in jax.tree.leaves(drawn))
            for place, row in enumerate(rows):
                for column in np.flatnonzero(valid[place]):
                    row.push(int(tokens[place, column]), float(log_probs[place, column]), stop)
            if on_text is not None:
                for row, number in zip(rows, numbers, strict=False):
                    if new := row.news(stop):
                        on_text(number, new)
            if all(row.done for row in rows):
                break
            ended = state.done | np.array([row.done for row in rows])
            state = dataclasses.replace(state, done=ended)
        for row in rows:
            row.completion.text = None if self.tokenizer is None else row.text
