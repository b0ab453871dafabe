"""Text metrics: ROUGE (Lin, 2004), SQuAD exact match and token F1, perplexity of given log-probs.

ROUGE-L between the OCR of a reconstruction and the true text is rOCR, and the perplexity of the
OCR of a generated image under a language model is PPL_OCR (section 4.1 of arXiv:2410.01912).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxllm.errors import InputError


class Score(NamedTuple):
    """Overlap in [0, 1]: over the prediction, over the reference, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def words(text: str) -> list[str]:
    """Lower-cased maximal runs of letters and digits of any script; the rest separates words.

    A script that writes no spaces gives one word per run; segment such text beforehand.
    """
    return re.findall(r"[^\W_]+", text.lower())


def rouge_n(prediction: str, reference: str, n: int) -> Score:
    """ROUGE-N: overlap of word n-grams, each counted at most as often as in the other text.

    Words as in `words`, without stemming. Texts with fewer than n words score 0.

    Raises:
      InputError: n below 1.
    """
    if n < 1:
        raise InputError(f"ROUGE-{n}, expected n >= 1")
    counts = []
    for text in (prediction, reference):
        tokens = words(text)
        counts.append(Counter(zip(*(tokens[i:] for i in range(n)), strict=False)))
    return _score((counts[0] & counts[1]).total(), counts[0].total(), counts[1].total())


def rouge_l(prediction: str, reference: str) -> Score:
    """ROUGE-L: longest common subsequence of words, over the whole text as one sentence."""
    predicted, expected = words(prediction), words(reference)
    return _score(_common_subsequence(predicted, expected), len(predicted), len(expected))


def character_similarity(a: str, b: str) -> float:
    """Twice the longest common subsequence of characters over both lengths; 1 for two empty texts.

    The "ratio" of fuzzy string matching libraries, unrounded.
    """
    return 2 * _common_subsequence(list(a), list(b)) / (len(a) + len(b)) if a or b else 1.0


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two answers are equal after SQuAD normalisation (`normalise_answer`)."""
    return normalise_answer(prediction) == normalise_answer(reference)


def token_f1(prediction: str, reference: str) -> Score:
    """Overlap of the bags of words of two answers after SQuAD normalisation.

    Two answers that are both empty agree (score 1); an empty one against another scores 0.
    """
    predicted, expected = (Counter(normalise_answer(t).split()) for t in (prediction, reference))
    if not predicted and not expected:
        return Score(1.0, 1.0, 1.0)
    return _score((predicted & expected).total(), predicted.total(), expected.total())


def normalise_answer(text: str) -> str:
    """Lower case without ASCII punctuation and English articles (SQuAD, arXiv:1606.05250)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_perplexity(log_probs: ArrayLike, mask: ArrayLike) -> float:
    """Exponential of the mean negative log-probability over all unmasked tokens together.

    Args:
      log_probs: [B, T] natural-log probabilities of the tokens; where masked they are not read.
      mask: [B, T] true (or non-zero) for the tokens that count.

    Raises:
      InputError: shapes differ, no token counts, or a counted log-prob is not finite or positive.
    """
    values, counted = np.asarray(log_probs, np.float64), np.asarray(mask).astype(bool)
    if values.shape != counted.shape or not counted.any():
        raise InputError(
            f"log-probs {values.shape} with a mask {counted.shape} of {counted.sum()} tokens, "
            "expected equal shapes and at least one token"
        )
    values = values[counted]
    if not np.isfinite(values).all() or values.max() > 1e-4:
        raise InputError("a counted log-prob is not finite or positive, expected values <= 0")
    return math.exp(-values.mean())


def _score(overlap: int, predicted: int, expected: int) -> Score:
    if not overlap:
        return Score(0.0, 0.0, 0.0)
    return Score(overlap / predicted, overlap / expected, 2 * overlap / (predicted + expected))


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö, 2004).

    Bit i of `row` is 0 where the subsequence of a[:i+1] and the b read so far is one longer than
    that of a[:i]; one addition of Python integers updates a whole row of the usual table.
    """
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matched = row & positions.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()
