"""Real reviews with many raters: beliefs with known group distributions, and a lexicon reward.

The snippets of VADER (Hutto and Gilbert, ICWSM 2014): sentences of film and product reviews, each
rated from -4 to 4 by 15 to 29 people. A rating's bucket is the belief, and the raters of a snippet
are the group whose distribution over beliefs is the target of GDPO (arXiv:2412.20299), as ratings
are in its review task.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxllm.data.images import bundled
from jaxllm.errors import InputError
from jaxllm.preference.formats import BeliefPairs, Record, StatedBelief

Source = Literal["movie", "amazon"]
LOWEST, HIGHEST = -4, 4
BUCKETS: dict[str, tuple[int, ...]] = {
    "very bad": (-4, -3),
    "bad": (-2, -1),
    "neutral": (0,),
    "good": (1, 2),
    "very good": (3, 4),
}
"""Names of the beliefs 1 to 5 (the ordinal scale of GDPO) and their ratings."""


@dataclass(frozen=True)
class Snippet:
    """One sentence of a review and what its raters said."""

    identity: str
    text: str
    ratings: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean rating, -4 to 4."""
        return sum(self.ratings) / len(self.ratings)

    @property
    def beliefs(self) -> np.ndarray:
        """Share of raters in each bucket, float64 [5]."""
        return np.bincount([bucket(r) for r in self.ratings], minlength=len(BUCKETS)) / len(
            self.ratings
        )


def bucket(rating: float) -> int:
    """The bucket (0 to 4) of a rating; a mean belongs to that of the nearest whole rating."""
    nearest = int(np.clip(np.rint(rating), LOWEST, HIGHEST))
    return next(i for i, ratings in enumerate(BUCKETS.values()) if nearest in ratings)


def load_snippets(source: Source = "movie", folder: Path | None = None) -> list[Snippet]:
    """Returns the 10,605 film or 3,708 product snippets in the order of their file.

    Args:
      source: Which.
      folder: Holds the files under their published names; None for the bundled ones.

    Raises:
      InputError: A missing file, a damaged line, or ratings that do not have the stated mean.
    """
    folder = bundled("vader_reviews") if folder is None else folder
    texts = folder / f"{source}ReviewSnippets_GroundTruth.txt"
    path = folder / f"{source}ReviewSnippets_anonDataRatings.txt"
    rated: dict[str, tuple[str, tuple[int, ...]]] = {}
    for where, (identity, mean, _, listed) in _lines(path, 4):
        rated[identity] = mean, _ratings(listed, float(mean), where)
    snippets = []
    for where, (identity, mean, text) in _lines(texts, 3):
        if identity not in rated or abs(float(rated[identity][0]) - float(mean)) > 1e-3:
            raise InputError(f"{where}: no ratings of mean {mean} for {identity} in {path.name}")
        snippets.append(Snippet(identity, text, rated[identity][1]))
    return snippets


def review_records(
    snippets: Sequence[Snippet],
    *,
    pairs: int = 10,
    seed: int = 0,
    belief_pairs: BeliefPairs = "conditioned",
    replies: Sequence[Snippet] | None = None,
) -> list[Record]:
    """Returns GDPO pairs: what a group thinks of a snippet, and a sentence that says so.

    For every bucket b with a share p_b of the raters there are floor(pairs p_b) pairs. The chosen
    completion is `b<name>` with `>` and a real sentence whose own mean rating is in b; the rejected
    one has a sentence of another bucket, drawn evenly, behind the same belief (`conditioned`) or
    behind that bucket's own (`different`).

    Args:
      snippets: What prompts are made of.
      pairs: N, pairs per snippet before rounding down.
      seed: Of the sentences; those of a snippet depend on (seed, its place) only.
      belief_pairs: What rejected completions state.
      replies: Where the sentences come from; None for `snippets`.

    Raises:
      InputError: A bucket without sentences.
    """
    by_bucket: list[list[str]] = [[] for _ in BUCKETS]
    for snippet in snippets if replies is None else replies:
        by_bucket[bucket(snippet.mean)].append(snippet.text)
    for name, found in zip(BUCKETS, by_bucket, strict=True):
        if not found:
            raise InputError(f"no sentence has a mean rating in the bucket {name!r}")
    names = [f"{number}<{name}" for number, name in enumerate(BUCKETS, 1)]
    digits = tuple(str(number) for number in range(1, len(BUCKETS) + 1))
    records = []
    for place, snippet in enumerate(snippets):
        rng = np.random.default_rng((seed, place))
        shares = snippet.beliefs
        counts = np.floor(pairs * shares + 1e-9).astype(int)
        for mine in np.repeat(np.arange(len(BUCKETS)), counts).tolist():
            other = int(rng.choice([i for i in range(len(BUCKETS)) if i != mine]))
            accept, reject = (
                by_bucket[i][int(rng.integers(len(by_bucket[i])))] for i in (mine, other)
            )
            stated = names[mine if belief_pairs == "conditioned" else other]
            records.append(
                Record(
                    f"<Q>{snippet.text}<A>",
                    (f"{names[mine]}>{accept}", f"{stated}>{reject}"),
                    belief=StatedBelief(names[mine], digits, tuple(shares.tolist())),
                )
            )
    return records


# -- a reward ------------------------------------------------------------------------------------


@functools.cache
def lexicon() -> dict[str, float]:
    """Mean valence of 7,500 words and emoticons by ten raters, -4 to 4."""
    path = bundled("vader_reviews", "vader_lexicon.txt")
    return {word: float(mean) for _, (word, mean, *_) in _lines(path, 4)}


def lexicon_score(text: str) -> float:
    """Mean valence of the words of a text, -4 to 4, a cheap reward for demos.

    Words are what white space separates, in lower case. A word counts with its own entry in the
    lexicon, or else with that of the word without punctuation at its ends; words without entry
    count 0, so that one strong word does not outweigh a long text. An empty text scores 0. There is
    no negation and no emphasis, unlike in VADER itself.
    """
    valence, words = lexicon(), text.lower().split()
    found = (valence.get(w, valence.get(w.strip(string.punctuation), 0.0)) for w in words)
    return sum(found) / max(1, len(words))


def lexicon_reward(prompt: str, completion: str) -> float:
    """`lexicon_score` of the completion, as a rule for `feedback.Rule`."""
    return lexicon_score(completion)


def _lines(path: Path, count: int) -> list[tuple[str, list[str]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = []
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = line.rstrip("\r").split("\t", count - 1)
            if len(fields) != count:
                raise InputError(f"{path}:{number}: {len(fields)} fields, expected {count}")
            rows.append((f"{path}:{number}", fields))
    return rows


def _ratings(listed: str, mean: float, where: str) -> tuple[int, ...]:
    try:
        ratings = json.loads(listed)
    except ValueError:
        ratings = None
    if not isinstance(ratings, list) or not ratings:
        raise InputError(f"{where}: {listed!r:.40} is no list of ratings")
    for rating in ratings:
        if type(rating) is not int or not LOWEST <= rating <= HIGHEST:
            raise InputError(f"{where}: rating {rating!r} is outside {LOWEST} to {HIGHEST}")
    if abs(sum(ratings) / len(ratings) - mean) > 1e-3:
        raise InputError(f"{where}: the ratings have mean {sum(ratings) / len(ratings):.4f}")
    return tuple(ratings)
