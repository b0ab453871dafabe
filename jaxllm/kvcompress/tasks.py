"""Token tasks that need long memory, small enough to train on a CPU.

* `NeedleTask`: key-value facts in noisy filler, queried later: grows retrieval heads.
* `ReasonNeedleTask`: a query names two keys, the answer is the value of the key with the higher
  rank; the other fact has the same form, as c1 has beside c2 in HeadKV-R2 (arXiv:2410.19258).
* `SetGetTask`: running updates of a few keys, for caches that compress again and again.

A batch is a dict of NumPy arrays, the same for the same (seed, step):

  tokens   int32 [B, T]
  weights  float32 [B, T]  loss weight of predicting the token in this place from those before
  answer   bool [B, T]     places of answer tokens
  query    int32 [B, M]    place of the first answer token of each query
  span     int32 [B, M, 2] start and end of the fact's value tokens that answer it
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.errors import InputError

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class NeedleTask:
    """Facts `S k v1 v2`, then queries `Q k v1 v2`, with filler between the facts.

    Attributes:
      facts: Facts, each queried once, in another order; at most `keys`.
      keys: Different keys.
      values: Different value tokens.
      filler_symbols: Alphabet of the filler.
      filler: Filler tokens.
      noise: Probability that a filler token does not follow from the one before.
      filler_weight: Loss weight of filler, against 1 of an answer.
    """

    facts: int = 6
    keys: int = 16
    values: int = 16
    filler_symbols: int = 8
    filler: int = 16
    noise: float = 0.2
    filler_weight: float = 0.3

    def __post_init__(self) -> None:
        if not 1 <= self.facts <= self.keys:
            raise InputError(f"{self.facts} facts of {self.keys} keys, expected 1 to {self.keys}")
        if min(self.values, self.filler_symbols) < 1 or self.filler < 0:
            raise InputError("values and filler_symbols must be at least 1, filler 0 or more")

    @property
    def vocab(self) -> int:
        """Filler symbols, then the marks S and Q, then keys, then values."""
        return self.filler_symbols + 2 + self.keys + self.values

    @property
    def length(self) -> int:
        """Tokens T of a sequence."""
        return 8 * self.facts + self.filler

    @property
    def context(self) -> int:
        """Tokens before the first query."""
        return 4 * self.facts + self.filler

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Returns `size` sequences."""
        out = _empty(size, self.length, self.facts)
        set_mark, query_mark = self.filler_symbols, self.filler_symbols + 1
        first_key, first_value = self.filler_symbols + 2, self.filler_symbols + 2 + self.keys
        for row in range(size):
            rng = np.random.default_rng([seed, step, row])
            keys = rng.choice(self.keys, self.facts, replace=False) + first_key
            values = rng.integers(0, self.values, (self.facts, 2)) + first_value
            tokens, weights = out["tokens"][row], out["weights"][row]
            starts = _scattered(rng, self.facts, 4, self.context)
            filler = np.ones(self.context, bool)
            for fact, start in enumerate(starts):
                tokens[start : start + 4] = (set_mark, keys[fact], *values[fact])
                filler[start : start + 4] = False
            tokens[: self.context][filler] = _markov(
                rng, int(filler.sum()), self.filler_symbols, self.noise
            )
            weights[: self.context][filler] = self.filler_weight
            for place, fact in enumerate(rng.permutation(self.facts)):
                at = self.context + 4 * place
                tokens[at : at + 4] = (query_mark, keys[fact], *values[fact])
                _ask(out, row, place, at + 2, 2, starts[fact] + 2)
        return out


@dataclass(frozen=True)
class ReasonNeedleTask:
    """Facts `S k r v`, then queries `Q k1 k2 v` for the value of the key with the higher rank r.

    With `single` a query names one key twice: the easier half of a curriculum.

    Attributes:
      facts: Facts with different ranks, at least 2.
      queries: Queries of different pairs.
      keys: Different keys.
      values: Different values.
      ranks: Different ranks, at least `facts`.
      filler_symbols: Alphabet of the filler.
      filler: Filler tokens.
      noise: Probability that a filler token does not follow from the one before.
      filler_weight: Loss weight of filler, against 1 of an answer.
    """

    facts: int = 6
    queries: int = 6
    keys: int = 16
    values: int = 16
    ranks: int = 8
    filler_symbols: int = 8
    filler: int = 16
    noise: float = 0.2
    filler_weight: float = 0.3

    def __post_init__(self) -> None:
        if not 2 <= self.facts <= min(self.keys, self.ranks):
            raise InputError(
                f"{self.facts} facts, expected 2 to {min(self.keys, self.ranks)} (keys and ranks)"
            )
        if not 1 <= self.queries <= self.facts * (self.facts - 1) // 2:
            raise InputError(f"{self.queries} queries, {self.facts} facts have fewer pairs")

    @property
    def vocab(self) -> int:
        """Filler symbols, then S and Q, keys, ranks by rising rank, values."""
        return self.filler_symbols + 2 + self.keys + self.ranks + self.values

    @property
    def length(self) -> int:
        """Tokens T of a sequence."""
        return self.context + 4 * self.queries

    @property
    def context(self) -> int:
        """Tokens before the first query."""
        return 4 * self.facts + self.filler

    def batch(self, seed: int, step: int, size: int, *, single: bool = False) -> Batch:
        """Returns `size` sequences; `distractor` [B, M, 2] is the other key's value token."""
        out = _empty(size, self.length, self.queries)
        out["distractor"] = np.zeros((size, self.queries, 2), np.int32)
        set_mark, query_mark = self.filler_symbols, self.filler_symbols + 1
        first_key = self.filler_symbols + 2
        first_rank = first_key + self.keys
        first_value = first_rank + self.ranks
        pairs = np.array([(i, j) for i in range(self.facts) for j in range(i)])
        for row in range(size):
            rng = np.random.default_rng([seed, step, row])
            keys = rng.choice(self.keys, self.facts, replace=False) + first_key
            ranks = rng.choice(self.ranks, self.facts, replace=False)
            values = rng.integers(0, self.values, self.facts) + first_value
            tokens, weights = out["tokens"][row], out["weights"][row]
            starts = _scattered(rng, self.facts, 4, self.context)
            filler = np.ones(self.context, bool)
            for fact, start in enumerate(starts):
                tokens[start : start + 4] = (
                    set_mark,
                    keys[fact],
                    ranks[fact] + first_rank,
                    values[fact],
                )
                filler[start : start + 4] = False
            tokens[: self.context][filler] = _markov(
                rng, int(filler.sum()), self.filler_symbols, self.noise
            )
            weights[: self.context][filler] = self.filler_weight
            chosen = pairs[rng.choice(len(pairs), self.queries, replace=False)]
            for place, pair in enumerate(chosen):
                pair = rng.permutation(pair)
                if single:
                    pair[1] = pair[0]
                high, low = pair[np.argsort(-ranks[pair], kind="stable")]
                at = self.context + 4 * place
                tokens[at : at + 4] = (query_mark, *keys[pair], values[high])
                _ask(out, row, place, at + 3, 1, starts[high] + 3)
                out["distractor"][row, place] = (starts[low] + 3, starts[low] + 4)
        return out


@dataclass(frozen=True)
class SetGetTask:
    """A long run of `SET k v` and `GET k v`, where v is the last value set for k.

    Attributes:
      operations: Operations, three tokens each.
      keys: Different keys; each is set once at the beginning.
      values: Different values.
      gets: Probability that an operation after these is a GET.
    """

    operations: int = 100
    keys: int = 8
    values: int = 16
    gets: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.keys < self.operations or not 0 < self.gets < 1:
            raise InputError(
                f"{self.operations} operations on {self.keys} keys with {self.gets} gets, expected "
                "more operations than keys and a probability inside 0 and 1"
            )

    @property
    def vocab(self) -> int:
        """The marks SET and GET, keys, values."""
        return 2 + self.keys + self.values

    @property
    def length(self) -> int:
        """Tokens T of a sequence."""
        return 3 * self.operations

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Returns `size` sequences; `query` and `span` are padded with -1 behind a row's own."""
        out = _empty(size, self.length, self.operations - self.keys)
        out["query"] -= 1
        out["span"] -= 1
        for row in range(size):
            rng = np.random.default_rng([seed, step, row])
            order = rng.permutation(self.keys)
            last: dict[int, int] = {}
            asked = 0
            for operation in range(self.operations):
                at = 3 * operation
                begin = operation < self.keys
                get = not begin and bool(rng.random() < self.gets)
                key = int(order[operation] if begin else rng.integers(self.keys))
                value = int(rng.integers(self.values)) + 2 + self.keys
                if get:
                    value = int(out["tokens"][row, last[key]])
                    _ask(out, row, asked, at + 2, 1, last[key])
                    asked += 1
                else:
                    last[key] = at + 2
                out["tokens"][row, at : at + 3] = (int(get), key + 2, value)
        return out


def _empty(size: int, length: int, queries: int) -> Batch:
    return {
        "tokens": np.zeros((size, length), np.int32),
        "weights": np.zeros((size, length), np.float32),
        "answer": np.zeros((size, length), bool),
        "query": np.zeros((size, queries), np.int32),
        "span": np.zeros((size, queries, 2), np.int32),
    }


def _ask(out: Batch, row: int, place: int, at: int, count: int, fact: int) -> None:
    """Notes an answer of `count` tokens at `at`, copied from `fact`."""
    out["weights"][row, at : at + count] = 1.0
    out["answer"][row, at : at + count] = True
    out["query"][row, place] = at
    out["span"][row, place] = (fact, fact + count)


def _scattered(rng: np.random.Generator, count: int, width: int, length: int) -> np.ndarray:
    """Starts of `count` blocks of `width` at random places of `length`, without overlap."""
    free = length - count * width
    before = np.sort(rng.integers(0, free + 1, count))
    return before + width * np.arange(count)


def _markov(rng: np.random.Generator, count: int, symbols: int, noise: float) -> np.ndarray:
    """Filler that steps through its alphabet, apart from `noise`."""
    jumps = np.where(rng.random(count) < noise, rng.integers(0, symbols, count), 1)
    return (rng.integers(symbols) + np.cumsum(jumps)) % symbols
