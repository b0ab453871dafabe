"""Head importance: files, estimators and gates of HeadKV-R, ER and HeadKV-R2 (arXiv:2410.19258).

An estimator reduces attention rows to one number per head. Row t of an example is the attention of
the position whose output *is* answer token t: with teacher forcing the row at the position before
that token (`generating_rows`). Attention columns, token ids and spans share one index; padding on
the left shifts them all.

Scores are averaged over the examples that pass a gate, normalised to shares, and reduced from query
heads to KV heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxllm.data.records import check_target
from jaxllm.errors import InputError
from jaxllm.evals.text import rouge_n, token_f1

GroupReduction = Literal["mean", "max", "sum"]
_REDUCTIONS: Mapping[str, Any] = {"mean": np.mean, "max": np.max, "sum": np.sum}


# -- files ----------------------------------------------------------------------------------------


def read_scores(path: Path) -> np.ndarray:
    """Reads the released format: one JSON object from "layer-head" to a list, one float per run.

    Returns:
      float64 [L, N, runs].

    Raises:
      InputError: Names the first duplicate, missing or ill-named head, a list of another length
        than the others, or a value that is not a finite number.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{path}: head {key!r} is there twice")
            found[key] = value
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected a JSON object of heads")
    heads = {_head(path, key): runs for key, runs in content.items()}
    layers, width = (1 + max(index[axis] for index in heads) for axis in (0, 1))
    for index in np.ndindex(layers, width):
        if index not in heads:
            raise InputError(f"{path}: head '{index[0]}-{index[1]}' is missing of {layers}x{width}")
    count = len(heads[0, 0]) if isinstance(heads[0, 0], list) else 0
    for (layer, head), runs in sorted(heads.items()):
        if not isinstance(runs, list) or not runs or len(runs) != count:
            length = len(runs) if isinstance(runs, list) else type(runs).__name__
            raise InputError(
                f"{path}: head '{layer}-{head}' has {length} runs, expected {count or 'some'}"
            )
        for run, value in enumerate(runs):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise InputError(
                    f"{path}: head '{layer}-{head}' run {run} is {value!r}, expected a number"
                )
    rows = [[heads[layer, head] for head in range(width)] for layer in range(layers)]
    return np.asarray(rows, np.float64)


def _head(path: Path, key: str) -> tuple[int, int]:
    parts = key.split("-")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(f"{path}: key {key!r}, expected 'layer-head'")
    layer, head = int(parts[0]), int(parts[1])
    if key != f"{layer}-{head}":
        raise InputError(f"{path}: key {key!r}, expected '{layer}-{head}'")
    return layer, head


def write_scores(path: Path, runs: ArrayLike) -> None:
    """Writes [L, N, runs] in the released format: one line, heads in row-major order.

    Raises:
      InputError: Another number of axes, no runs, or a value that is not finite.
    """
    runs = np.asarray(runs, np.float64)
    if runs.ndim != 3 or not runs.size:
        raise InputError(f"scores of shape {runs.shape}, expected [layers, heads, runs]")
    if not np.isfinite(runs).all():
        layer, head, run = np.argwhere(~np.isfinite(runs))[0]
        raise InputError(f"head '{layer}-{head}' run {run} is {runs[layer, head, run]}")
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The released files write whole numbers without a point.
    content = {
        f"{i}-{j}": [int(x) if x.is_integer() else x for x in runs[i, j].tolist()]
        for i, j in np.ndindex(*runs.shape[:2])
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def read_duo_scores(path: Path) -> np.ndarray:
    """Reads DuoAttention's `full_attention_heads.tsv`: a line per layer, a column per KV head.

    Returns:
      float64 [L, K], learned gates mostly in [0, 1] (small negatives occur).

    Raises:
      InputError: A missing file, a value that is not a finite number, or unequal lines.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows: list[list[float]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = [float(value) for value in line.split("\t")]
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if not all(map(math.isfinite, row)):
            raise InputError(f"{path}:{number}: holds a value that is not finite")
        if rows and len(row) != len(rows[0]):
            raise InputError(f"{path}:{number}: {len(row)} heads, expected {len(rows[0])}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no heads")
    return np.asarray(rows)


# -- from runs to shares --------------------------------------------------------------------------


def shares(scores: ArrayLike, temperature: float = 1.0) -> np.ndarray:
    """Normalises scores to sum 1, raises them to the power `temperature`, normalises again.

    Args:
      scores: [L, N]; negative scores count as 0.
      temperature: The released code's name for the exponent.

    Raises:
      InputError: No positive score, one that is not finite, or a temperature that is not positive.
    """
    scores = np.maximum(np.asarray(scores, np.float64), 0.0)
    if not np.isfinite(scores).all() or not scores.sum() > 0:
        raise InputError("head scores must be finite, at least one above 0")
    if not temperature > 0:
        raise InputError(f"temperature {temperature} must be positive")
    powered = (scores / scores.sum()) ** temperature
    return powered / powered.sum()


def reduce_groups(
    scores: ArrayLike, kv_heads: int, reduction: GroupReduction = "mean"
) -> np.ndarray:
    """Reduces query heads [L, N] to KV heads [L, K]; query head n belongs to KV head n // (N/K).

    Raises:
      InputError: N is not a multiple of K, or an unknown reduction.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.shape[1] % kv_heads:
        raise InputError(f"scores of shape {scores.shape} do not fit {kv_heads} KV heads a layer")
    if reduction not in _REDUCTIONS:
        raise InputError(f"reduction {reduction!r} is not one of {', '.join(_REDUCTIONS)}")
    return _REDUCTIONS[reduction](scores.reshape(len(scores), kv_heads, -1), axis=-1)


def top_heads(scores: ArrayLike, count: int) -> list[tuple[int, int]]:
    """Returns (layer, head) of the `count` highest scores [L, N], best first."""
    scores = np.asarray(scores)
    best = np.argsort(-scores, axis=None, kind="stable")[:count]
    return [(int(i), int(j)) for i, j in zip(*np.unravel_index(best, scores.shape), strict=True)]


# -- estimators -----------------------------------------------------------------------------------


def generating_rows(start: int, length: int) -> np.ndarray:
    """Returns the query rows whose outputs are tokens start .. start + length - 1.

    Raises:
      InputError: The first token of a text has no row that generates it.
    """
    if start < 1:
        raise InputError(f"an answer at index {start} has no token before it to generate it")
    return np.arange(start - 1, start - 1 + length)


def retrieval_scores(
    attention: jax.Array,
    ids: jax.Array,
    generated: jax.Array,
    span: jax.Array,
    steps: jax.Array,
    *,
    beyond_answer: bool = False,
) -> jax.Array:
    """HeadKV-R, Eq. 1: how often a head looks at the needle's copy of the token being generated.

    Args:
      attention: [B, N, T, S] rows of the generated tokens.
      ids: int [B, S] token of each column.
      generated: int [B, T] token each row generates.
      span: int [B, 2], start and end of the needle's answer among the columns.
      steps: bool [B, T], the rows that exist.
      beyond_answer: Count steps beyond the length of the answer too, as the released code does over
        its 50 decode steps; a head may then score above 1.

    Returns:
      float32 [B, N]; each hit adds 1 / (length of the span).
    """
    length = span[:, 1] - span[:, 0]
    if not beyond_answer:
        steps = steps & (jnp.arange(steps.shape[1]) < length[:, None])
    best = jnp.argmax(attention, axis=-1)
    inside = (best >= span[:, 0, None, None]) & (best < span[:, 1, None, None])
    there = jnp.take_along_axis(ids[:, None], best.reshape(len(ids), 1, -1), axis=-1)
    hits = inside & (there.reshape(best.shape) == generated[:, None]) & steps[:, None]
    return hits.sum(axis=-1) / jnp.maximum(length, 1)[:, None].astype(jnp.float32)


def reasoning_scores(attention: jax.Array, span: jax.Array, steps: jax.Array) -> jax.Array:
    """HeadKV-R2, Eq. 2: attention on the right answer from among the N largest weights of a row.

    The same reduction on retrieval examples is the paper's ablation ER.

    Args:
      attention: [B, N, T, S] rows of the generated tokens.
      span: int [B, 2], start and end of the right answer; its length is the N of Eq. 2.
      steps: bool [B, T], the rows that exist; those beyond N are not counted.

    Returns:
      float32 [B, N], at most 1.
    """
    attention = attention.astype(jnp.float32)
    length = span[:, 1] - span[:, 0]
    columns = jnp.arange(attention.shape[-1])
    inside = (columns >= span[:, :1]) & (columns < span[:, 1:])
    steps = steps & (jnp.arange(steps.shape[1]) < length[:, None])
    descending = -jnp.sort(-attention, axis=-1)
    last = jnp.maximum(length - 1, 0)[:, None, None, None]
    least = jnp.take_along_axis(descending, last, axis=-1)
    # Of equal weights the lower positions count, so that exactly N take part.
    above, tied = attention > least, attention == least
    places = length[:, None, None, None] - above.sum(axis=-1, keepdims=True)
    largest = above | (tied & (jnp.cumsum(tied, axis=-1) <= places))
    counted = largest & inside[:, None, None] & steps[:, None, :, None]
    mass = jnp.where(counted, attention, 0.0).sum(axis=(-2, -1))
    return mass / jnp.maximum(length, 1)[:, None]


# -- where the answer is --------------------------------------------------------------------------

SpanRule = Literal["exact", "overlap90", "largest_overlap"]


def find_span(
    ids: Sequence[int], needle: Sequence[int], rule: SpanRule = "exact"
) -> tuple[int, int]:
    """Returns start and end of a needle among token ids.

    Args:
      ids: The prompt.
      needle: Tokens to find.
      rule: `exact` wants the same tokens once; `overlap90` takes the first window of the needle's
        length that shares over 90 % of the needle's set of tokens (the released code for R);
        `largest_overlap` the window that shares most, the last one of equals (for R2).

    Raises:
      InputError: An empty needle, no window that fits, or for `exact` more than one.
    """
    ids, needle = list(ids), list(needle)
    width = len(needle)
    starts = range(len(ids) - width + 1)
    if not needle:
        raise InputError("an empty needle has no span")
    if rule == "exact":
        found = [start for start in starts if ids[start : start + width] == needle]
        if len(found) != 1:
            raise InputError(f"a needle of {width} tokens is there {len(found)} times, expected 1")
        return found[0], found[0] + width
    wanted = set(needle)
    overlaps = [len(wanted & set(ids[start : start + width])) / len(wanted) for start in starts]
    if rule == "overlap90":
        found = [start for start, overlap in enumerate(overlaps) if overlap > 0.9][:1]
    elif rule == "largest_overlap":
        best = max(overlaps, default=0.0)
        found = [start for start, overlap in enumerate(overlaps) if overlap == best and best][-1:]
    else:
        raise InputError(f"rule {rule!r} is not one of exact, overlap90, largest_overlap")
    if not found:
        raise InputError(f"no window of {width} tokens overlaps the needle enough ({rule})")
    return found[0], found[0] + width


# -- gates ----------------------------------------------------------------------------------------


def passes_rouge(response: str, answer: str) -> bool:
    """The gate of R: ROUGE-1 recall of the answer in the response above 50 %."""
    return rouge_n(response, answer, 1).recall * 100 > 50


def passes_qa_f1(response: str, answer: str) -> bool:
    """The gate of R2: token F1 of response and answer above 50 %."""
    return token_f1(response, answer).f1 * 100 > 50


def passes_argmax(predicted: ArrayLike, answer: ArrayLike, steps: ArrayLike) -> np.ndarray:
    """The gate without generation: over half of the answer's tokens are the model's first choice.

    Args:
      predicted: int [B, T] most likely token of each row, the answer given (teacher forcing).
      answer: int [B, T].
      steps: bool [B, T], the rows that exist.

    Returns:
      bool [B].
    """
    steps = np.asarray(steps, bool)
    right = (np.asarray(predicted) == np.asarray(answer)) & steps
    return 2 * right.sum(axis=1) > steps.sum(axis=1)
