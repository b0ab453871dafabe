"""Text fidelity of pictures: rOCR and PPL_OCR of the DnD-Transformer paper (arXiv:2410.01912).

rOCR (section 4.1) is ROUGE-L between the text read from a reconstruction and the true text.
PPL_OCR is the perplexity, under a language model, of the text read from a generated picture. The
paper reads with Qwen2-VL-72B and scores with Qwen2.5-72B; here reader and language model are
arguments, so that a vision-language model, an OCR engine or the exact pair for small pictures
(`glyphs.GlyphReader`, `character_model.CharacterModel`) can be plugged in.

The paper leaves two things open. Averaging: `ppl_ocr` pools the tokens of all pictures and gives
the mean of the per-picture perplexities beside it. Empty readings: they are counted and reported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxllm.errors import InputError

Reader = Callable[[np.ndarray], Sequence[str]]
"""Reads pictures [B, height, width, channels] as B texts."""

LanguageModel = Callable[[str], tuple[float, int]]
"""Gives the total log-probability of a text in nats and its number of tokens."""


@dataclass(frozen=True)
class OcrFidelity:
    """rOCR of a batch of pictures.

    Attributes:
      f1: mean of `per_image`.
      per_image: ROUGE-L F1 of each picture, in [0, 1].
      exact: share of the pictures whose text equals the reference, character by character.
      empty: number of pictures in which the reader found no text; their F1 is 0.
      texts: what was read.
    """

    f1: float
    per_image: tuple[float, ...]
    exact: float
    empty: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class OcrPerplexity:
    """PPL_OCR of a batch of pictures.

    Attributes:
      perplexity: `exp(-sum of log-probabilities / sum of tokens)` over all scored pictures; NaN
        when none was scored.
      mean_image_perplexity: mean over the scored pictures of their own perplexities; NaN when none.
      per_image: perplexity of each picture, NaN where it was not scored.
      tokens: number of tokens scored.
      images: number of pictures.
      scored: number of pictures that enter the perplexities.
      empty: number of pictures in which the reader found no text.
      texts: what was read.
    """

    perplexity: float
    mean_image_perplexity: float
    per_image: tuple[float, ...]
    tokens: int
    images: int
    scored: int
    empty: int
    texts: tuple[str, ...]


def rocr(
    images: np.ndarray,
    references: Sequence[str],
    reader: Reader,
    *,
    unit: Literal["word", "char"] = "word",
) -> OcrFidelity:
    """Compares the text in reconstructed pictures with the true text.

    Args:
      images: reconstructions [B, height, width, channels], in whatever form `reader` takes.
      references: B true texts, or `reader(originals)`, which leaves the reader's own errors out.
      reader: reads pictures.
      unit: what ROUGE-L aligns. "word" is the paper's; pictures of one word have only the values 0
        and 1 under it, "char" gives them credit for single letters.

    Returns:
      Mean and per-picture F1. A picture without text or a reference without letters and digits
      scores 0, as in the rouge-score package. There is no stemming.

    Raises:
      InputError: the numbers of pictures, references and readings differ, there is none, or the
        unit is unknown.
    """
    if unit not in ("word", "char"):
        raise InputError(f"unit is {unit!r}, expected 'word' or 'char'")
    texts = _read(images, reader)
    if len(references) != len(texts):
        raise InputError(f"{len(texts)} images but {len(references)} reference texts")
    scores = tuple(
        _rouge_l_f1(text, reference, unit)
        for text, reference in zip(texts, references, strict=True)
    )
    exact = sum(text == reference for text, reference in zip(texts, references, strict=True))
    return OcrFidelity(
        f1=math.fsum(scores) / len(scores),
        per_image=scores,
        exact=exact / len(texts),
        empty=sum(map(_is_empty, texts)),
        texts=texts,
    )


def ppl_ocr(
    images: np.ndarray,
    reader: Reader,
    language_model: LanguageModel,
    *,
    on_empty: Literal["count", "score", "raise"] = "count",
) -> OcrPerplexity:
    """Measures how likely the text in generated pictures is under a language model.

    The floor is the same function on real pictures.

    Args:
      images: pictures [B, height, width, channels], in whatever form `reader` takes.
      reader: reads pictures.
      language_model: returns the total log-probability of a text (at most 0, in nats) and its
        number of tokens, e.g. `CharacterModel.score`.
      on_empty: what a picture without text does. "count": it is left out of the perplexity and
        counted in `empty`, which has to be reported next to it, since a model that draws nothing
        gets a good perplexity on what is left. "score": the language model is asked for the empty
        text, which is meaningful if it has an end mark. "raise": `InputError`.

    Raises:
      InputError: no picture, the numbers of pictures and readings differ, an empty reading under
        "raise", or a score of the language model that is not a log-probability of at least one
        token.
    """
    if on_empty not in ("count", "score", "raise"):
        raise InputError(f"on_empty is {on_empty!r}, expected 'count', 'score' or 'raise'")
    texts = _read(images, reader)
    empty = [i for i, text in enumerate(texts) if _is_empty(text)]
    if empty and on_empty == "raise":
        raise InputError(f"image {empty[0]} has no readable text ({len(empty)} of {len(texts)})")
    skipped = set(empty) if on_empty == "count" else set()
    totals = [
        (0.0, 0) if i in skipped else _score(text, i, language_model)
        for i, text in enumerate(texts)
    ]
    per_image = tuple(_perplexity(*total) for total in totals)
    scored = [value for i, value in enumerate(per_image) if i not in skipped]
    tokens = sum(count for _, count in totals)
    return OcrPerplexity(
        perplexity=_perplexity(math.fsum(log_prob for log_prob, _ in totals), tokens),
        mean_image_perplexity=math.fsum(scored) / len(scored) if scored else math.nan,
        per_image=per_image,
        tokens=tokens,
        images=len(texts),
        scored=len(scored),
        empty=len(empty),
        texts=texts,
    )


def _read(images: np.ndarray, reader: Reader) -> tuple[str, ...]:
    if not len(images):
        raise InputError("no images to read")
    texts = tuple(reader(images))
    if len(texts) != len(images):
        raise InputError(f"the reader returned {len(texts)} texts for {len(images)} images")
    return texts


def _is_empty(text: str) -> bool:
    return not text.strip()


def _score(text: str, image: int, language_model: LanguageModel) -> tuple[float, int]:
    log_prob, tokens = language_model(text)
    if tokens < 1 or not log_prob <= 0:  # `not <=` also refuses NaN
        raise InputError(
            f"image {image}: the language model scored {text!r} with log-probability {log_prob} "
            f"over {tokens} tokens, expected at most 0 over at least 1"
        )
    return float(log_prob), int(tokens)


def _perplexity(log_prob: float, tokens: int) -> float:
    if not tokens:
        return math.nan
    try:
        return math.exp(-log_prob / tokens)
    except OverflowError:
        return math.inf


def _rouge_l_f1(candidate: str, reference: str, unit: Literal["word", "char"] = "word") -> float:
    """ROUGE-L F1 (Lin 2004) over lower-case runs of letters and digits, or their characters."""
    found, expected = (re.findall(r"[^\W_]+", text.lower()) for text in (candidate, reference))
    if unit == "char":
        found, expected = list("".join(found)), list("".join(expected))
    if not found or not expected:
        return 0.0
    # With P = LCS / |found| and R = LCS / |expected|, 2PR / (P + R) is this:
    return 2 * _longest_common_subsequence(found, expected) / (len(found) + len(expected))


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)  # row[j]: length for the part of `a` read so far and b[:j]
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
