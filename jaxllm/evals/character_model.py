"""An exact character n-gram model of words: the language model of the small PPL_OCR.

Interpolated Witten-Bell smoothing (Witten and Bell 1991; the form of Chen and Goodman 1998): with
`N(h)` the number of characters seen after the context `h` and `T(h)` the number of different ones,

    P(c | h) = (count(h, c) + T(h) * P(c | h')) / (N(h) + T(h))

where h' is h without its first character, down to the uniform distribution below the unigrams. The
model therefore sums to one after every context and gives every text a positive probability.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from jaxllm.errors import InputError

START, END, UNKNOWN = "<start>", "<end>", "<unk>"


class CharacterModel:
    """Character n-gram model with an end mark, made by `fit`.

    The alphabet is the characters of the training words, the end mark and one unknown mark. A
    character outside the alphabet is scored as the unknown mark: its probability is the mass of all
    unseen characters together, so texts with such characters get an upper bound of their
    probability (the mass is not divided among them).

    Args:
      order: length of the n-gram; 2 is a bigram, whose context is the one character before.
      counts: for every context (tuple of at most `order - 1` symbols, `<start>` before a text), the
        counts of the symbols that follow.
    """

    def __init__(self, order: int, counts: Mapping[tuple[str, ...], Mapping[str, int]]):
        self.order = order
        self.alphabet = (*sorted(set(counts[()]) - {END}), END, UNKNOWN)
        self._index = {symbol: k for k, symbol in enumerate(self.alphabet)}
        self._counts = counts
        self._cache: dict[tuple[str, ...], np.ndarray] = {}

    @classmethod
    def fit(cls, words: Iterable[str] | Mapping[str, int], order: int = 2) -> CharacterModel:
        """Counts the n-grams of words.

        Args:
          words: the words, or a mapping from word to count.
          order: length of the n-gram, at least 1.

        Raises:
          InputError: no word, a count below one, or an order below one.
        """
        if order < 1:
            raise InputError(f"order is {order}, expected at least 1")
        weighted = words if isinstance(words, Mapping) else Counter(words)
        counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for word, count in weighted.items():
            if count < 1:
                raise InputError(f"word {word!r} has count {count}, expected at least 1")
            symbols = (START,) * (order - 1) + (*word, END)
            for i in range(order - 1, len(symbols)):
                for length in range(order):
                    counts[symbols[i - length : i]][symbols[i]] += count
        if not counts:
            raise InputError("no words to fit a character model to")
        return cls(order, dict(counts))

    def probabilities(self, context: str = "") -> np.ndarray:
        """Returns the distribution of the next symbol.

        Args:
          context: the text so far, from its start.

        Returns:
          float64 [A], in the order of `alphabet`; sums to 1.
        """
        symbols = (START,) * (self.order - 1) + tuple(map(self._known, context))
        return self._distribution(symbols[len(symbols) - self.order + 1 :]).copy()

    def log_probs(self, text: str) -> np.ndarray:
        """Returns the log-probability of each character and of the end mark.

        Args:
          text: any text, the empty one included.

        Returns:
          float64 [len(text) + 1], in nats.
        """
        symbols = (START,) * (self.order - 1) + (*map(self._known, text), END)
        return np.array(
            [
                math.log(self._distribution(symbols[i - self.order + 1 : i])[self._index[symbol]])
                for i, symbol in enumerate(symbols)
                if i >= self.order - 1
            ]
        )

    def score(self, text: str) -> tuple[float, int]:
        """Returns the total log-probability in nats and the number of symbols, end mark included.

        This is the language model that `jaxllm.evals.ocr.ppl_ocr` asks for.
        """
        log_probs = self.log_probs(text)
        return float(log_probs.sum()), len(log_probs)

    def perplexity(self, texts: Iterable[str]) -> float:
        """Returns the perplexity per symbol, pooled over all texts, end marks included.

        Raises:
          InputError: no text.
        """
        scores = [self.score(text) for text in texts]
        if not scores:
            raise InputError("no texts to take the perplexity of")
        return math.exp(-sum(s for s, _ in scores) / sum(n for _, n in scores))

    def _known(self, character: str) -> str:
        return character if character in self._index else UNKNOWN

    def _distribution(self, context: tuple[str, ...]) -> np.ndarray:
        cached = self._cache.get(context)
        if cached is not None:
            return cached
        if context:
            lower = self._distribution(context[1:])
        else:
            lower = np.full(len(self.alphabet), 1 / len(self.alphabet))
        seen = self._counts.get(context, {})
        here = np.zeros(len(self.alphabet))
        for symbol, count in seen.items():
            here[self._index[symbol]] = count
        result = (here + len(seen) * lower) / (here.sum() + len(seen)) if seen else lower
        self._cache[context] = result
        return result
