"""Feedback: anything that scores completions, and what scores become: pairs, lists, labels, picks.

The environment of the unified view (section 2 of arXiv:2409.02795) as one callable. Given scores, a
rule, a reward model or verifier, a judge and a lexicon all return scores [P, K] for K completions
of P prompts; which algorithm uses them, and whether completions were sampled from the policy, is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from jaxllm.errors import InputError
from jaxllm.preference.records import Example

Completions = Sequence[Sequence[str]]
"""K texts for each of P prompts."""
Ids = Sequence[int]


class Feedback(Protocol):
    """Scores completions; higher is better."""

    def __call__(self, prompts: Sequence[str], completions: Completions) -> np.ndarray:
        """Returns float64 [P, K]."""
        ...


# -- sources -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """Scores or labels that exist already, by (prompt, completion)."""

    scores: Mapping[tuple[str, str], float]

    def __call__(self, prompts: Sequence[str], completions: Completions) -> np.ndarray:
        """See `Feedback`; a completion without a score is an InputError."""

        def look_up(prompt: str, completion: str) -> float:
            if (prompt, completion) not in self.scores:
                raise InputError(f"no score is given for {completion!r:.40} after {prompt!r:.40}")
            return float(self.scores[prompt, completion])

        return Rule(look_up)(prompts, completions)


@dataclass(frozen=True)
class Rule:
    """A function of one prompt and completion, such as a lexicon, a unit test or a checker."""

    function: Callable[[str, str], float]

    def __call__(self, prompts: Sequence[str], completions: Completions) -> np.ndarray:
        """See `Feedback`."""
        _rectangular(prompts, completions)
        rows = zip(prompts, completions, strict=True)
        return check_scores([[self.function(p, c) for c in row] for p, row in rows])


@dataclass(frozen=True)
class RewardModel:
    """A model that scores many prompts with one completion each: a reward model or a verifier."""

    function: Callable[[Sequence[str], Sequence[str]], ArrayLike]
    """(prompts, completions), equally long -> one score each."""
    batch_size: int = 64

    def __call__(self, prompts: Sequence[str], completions: Completions) -> np.ndarray:
        """See `Feedback`."""
        width = _rectangular(prompts, completions)
        first = [prompt for prompt in prompts for _ in range(width)]
        second = [completion for row in completions for completion in row]
        scores: list[float] = []
        for start in range(0, len(first), self.batch_size):
            part = slice(start, start + self.batch_size)
            found = np.asarray(self.function(first[part], second[part]), np.float64)
            if found.shape != (len(first[part]),):
                raise InputError(
                    f"the reward model gave scores {found.shape} for {len(first[part])} texts"
                )
            scores.extend(found.tolist())
        return check_scores(np.reshape(scores, (len(prompts), width)))


@dataclass(frozen=True)
class Judge:
    """Compares completions two by two; the score is the share of comparisons won.

    Every pair is shown in both orders, so that a preference for the first place cancels. No verdict
    counts as half a win for each.
    """

    function: Callable[[str, str, str], bool | None]
    """(prompt, first, second) -> whether the first is better, or None for no verdict or a tie."""

    def __call__(self, prompts: Sequence[str], completions: Completions) -> np.ndarray:
        """See `Feedback`; at least two completions of each prompt."""
        width = _rectangular(prompts, completions)
        if width < 2:
            raise InputError("a judge needs at least two completions of each prompt, found 1")
        wins = np.zeros((len(prompts), width))
        for row, (prompt, texts) in enumerate(zip(prompts, completions, strict=True)):
            for i, first in enumerate(texts):
                for j, second in enumerate(texts):
                    if i != j:
                        verdict = self.function(prompt, first, second)
                        share = 0.5 if verdict is None else float(verdict)
                        wins[row, i] += share
                        wins[row, j] += 1 - share
        return wins / (2 * (width - 1))


# -- what scores become --------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two completions of a prompt by their places, and how much better the first scored."""

    prompt: int
    chosen: int
    rejected: int
    margin: float


def scores_to_pairs(
    scores: ArrayLike,
    how: Literal["best_worst", "all", "random"] = "best_worst",
    *,
    min_margin: float = 0.0,
    seed: int = 0,
) -> list[Pair]:
    """Returns pairs of completions whose scores differ by more than `min_margin`.

    Args:
      scores: [P, K].
      how: `best_worst`, the highest against the lowest (the first ones at ties); `all` pairs;
        `random`, one of those.
      min_margin: Smaller or equal differences give no pair, so a prompt may have none.
      seed: Of the random choice, which depends on (seed, prompt) only.
    """
    found: list[Pair] = []
    for prompt, row in enumerate(check_scores(scores)):
        if how == "best_worst":
            candidates = [(int(np.argmax(row)), int(np.argmin(row)))]
        else:
            candidates = [(i, j) for i in range(len(row)) for j in range(len(row))]
        pairs = [
            Pair(prompt, i, j, float(row[i] - row[j]))
            for i, j in candidates
            if row[i] - row[j] > min_margin
        ]
        if how == "random" and pairs:
            pairs = [pairs[int(np.random.default_rng((seed, prompt)).integers(len(pairs)))]]
        found += pairs
    return found


def scores_to_labels(
    scores: ArrayLike, threshold: float, *, gap: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns bool [P, K]: whether each is desirable, and whether it is clear enough to be used.

    Desirable is a score of at least `threshold`; not clear, one nearer to it than `gap`.
    """
    values = check_scores(scores)
    return values >= threshold, np.abs(values - threshold) >= gap


def ranking(scores: ArrayLike) -> np.ndarray:
    """Places of the completions from the best to the worst, int [P, K]; ties keep their order."""
    return np.argsort(-check_scores(scores), axis=-1, kind="stable")


def accepted(scores: ArrayLike, threshold: float) -> list[tuple[int, int]]:
    """(prompt, completion) of every score of at least `threshold`, as RFT and STaR keep them."""
    return [(int(p), int(k)) for p, k in np.argwhere(check_scores(scores) >= threshold)]


def rejection_sample(scores: ArrayLike, beta: float, count: int, seed: int = 0) -> np.ndarray:
    """Statistical rejection sampling: samples of the policy become ones of its KL-optimal tilt.

    A candidate is accepted with probability exp((r - max r) / beta), in random rounds until `count`
    different ones are accepted (Algorithm 1 of arXiv:2309.06657). beta -> 0 takes the best ones, a
    large beta takes any.

    Args:
      scores: [P, K].
      beta: KL strength, above 0.
      count: How many of each prompt, at most K.
      seed: The choice depends on (seed, prompt) only.

    Returns:
      int [P, count], in the order of acceptance.

    Raises:
      InputError: beta or count outside its range.
    """
    values = check_scores(scores)
    if not beta > 0 or not 1 <= count <= values.shape[1]:
        raise InputError(f"beta {beta} and count {count}, expected > 0 and 1 to {values.shape[1]}")
    chosen = np.zeros((len(values), count), np.int64)
    for prompt, row in enumerate(values):
        rng, left = np.random.default_rng((seed, prompt)), list(range(len(row)))
        for place in range(count):
            chosen[prompt, place] = taken = _accept(row, left, beta, rng)
            left.remove(taken)
    return chosen


def _accept(row: np.ndarray, left: list[int], beta: float, rng: np.random.Generator) -> int:
    """The first accepted one of rounds over `left` is a draw proportional to exp(r / beta)."""
    logits = row[left] / beta
    weights = np.exp(logits - logits.max())
    return left[int(rng.choice(len(left), p=weights / weights.sum()))]


# -- examples ------------------------------------------------------------------------------------


def pair_examples(
    prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]], pairs: Iterable[Pair]
) -> list[Example]:
    """Returns pairs as examples, with their margins; prompts [P] and completions [P][K] are ids.

    Pairs of equal completions, which sampling may give, are left out.
    """
    return [
        Example(
            tuple(prompts[pair.prompt]),
            tuple(tuple(completions[pair.prompt][k]) for k in (pair.chosen, pair.rejected)),
            margin=pair.margin,
            identity=f"prompt {pair.prompt}",
        )
        for pair in pairs
        if tuple(completions[pair.prompt][pair.chosen])
        != tuple(completions[pair.prompt][pair.rejected])
    ]


def list_examples(
    prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]], scores: ArrayLike
) -> list[Example]:
    """Returns one example of K scored completions for every prompt."""
    return [
        Example(tuple(p), tuple(map(tuple, row)), scores=tuple(s), identity=f"prompt {number}")
        for number, (p, row, s) in enumerate(
            zip(prompts, completions, check_scores(scores).tolist(), strict=True)
        )
    ]


def label_examples(
    prompts: Sequence[Ids],
    completions: Sequence[Sequence[Ids]],
    scores: ArrayLike,
    threshold: float,
    *,
    gap: float = 0.0,
) -> list[Example]:
    """Returns one labelled example for every completion that is clear; see `scores_to_labels`."""
    labels, clear = scores_to_labels(scores, threshold, gap=gap)
    return [
        Example(
            tuple(prompts[p]),
            (tuple(completions[p][k]),),
            desirable=bool(labels[p, k]),
            identity=f"prompt {p} completion {k}",
        )
        for p, k in np.argwhere(clear).tolist()
    ]


# -- checks --------------------------------------------------------------------------------------


def check_scores(scores: ArrayLike) -> np.ndarray:
    """Returns scores as float64 [P, K].

    Raises:
      InputError: Another shape, or values that are not finite, naming the first.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise InputError(f"scores have shape {values.shape}, expected [prompts, completions]")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        p, k = bad[0].tolist()
        raise InputError(f"the score of completion {k} of prompt {p} is {values[p, k]}")
    return values


def _rectangular(prompts: Sequence[str], completions: Completions) -> int:
    """Returns K, the same for every prompt."""
    widths = {len(row) for row in completions}
    if len(prompts) != len(completions) or len(widths) != 1 or 0 in widths:
        raise InputError(
            f"{len(prompts)} prompts with {len(completions)} lists of {sorted(widths)}, "
            "expected equally long lists of completions, one per prompt"
        )
    return widths.pop()
