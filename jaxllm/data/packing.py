"""Token documents into rows of one length, for training and evaluation.

A document of n tokens gives n - 1 predictions, so it fills n - 1 places of a row: the tokens all
but the last, the targets all but the first. Rows are planned from the lengths alone and filled when
they are read. Best fit takes the longest document first and puts it where the least room is left
(as in arXiv:2404.10830); a document longer than a row is cut, each part beginning with the last
target of the part before, so that every token is a target once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxllm.errors import InputError

Packing = Literal["best_fit", "sequential", "none"]
Piece = tuple[int, int, int]
"""(document, first place, places)."""


@dataclass(frozen=True)
class RowPlan:
    """Which pieces of which documents make up each row."""

    row_length: int
    pieces: np.ndarray
    """int64 [pieces, 3]: document, first place and number of places, row after row."""
    starts: np.ndarray
    """int64 [rows + 1]: the first piece of each row."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> list[Piece]:
        """Returns the pieces of one row."""
        part = self.pieces[self.starts[index] : self.starts[index + 1]]
        return [tuple(piece) for piece in part.tolist()]

    @property
    def filled(self) -> float:
        """The share of all places that hold a token."""
        return float(self.pieces[:, 2].sum() / max(1, len(self) * self.row_length))


def plan_rows(
    lengths: Sequence[int] | np.ndarray,
    row_length: int,
    packing: Packing = "best_fit",
    *,
    long: Literal["split", "refuse"] = "split",
    name: Callable[[int], str] = lambda document: f"document {document}",
) -> RowPlan:
    """Returns the rows of documents; the same lengths always give the same rows.

    Args:
      lengths: Tokens of each document; one of fewer than two tokens predicts nothing and gets no
        place.
      row_length: Places of a row, `T`.
      packing: `best_fit`; `sequential` keeps the order and begins a row when the next document does
        not fit; `none` gives every document (or part) its own row.
      long: Whether a document of more than row_length + 1 tokens is cut or refused.
      name: Names a document in errors.
    """
    if row_length < 1:
        raise InputError(f"row_length {row_length} must be at least 1")
    pieces: list[Piece] = []
    for document, length in enumerate(np.asarray(lengths, np.int64).tolist()):
        if length - 1 > row_length and long == "refuse":
            raise InputError(
                f"{name(document)} has {length} tokens, rows of {row_length} hold {row_length + 1}"
            )
        pieces += [
            (document, start, min(row_length, length - 1 - start))
            for start in range(0, length - 1, row_length)
        ]
    rows = {
        "best_fit": _best_fit,
        "sequential": _sequential,
        "none": lambda p, _: [[x] for x in p],
    }[packing](pieces, row_length)
    counts = [len(row) for row in rows]
    return RowPlan(
        row_length,
        np.array([piece for row in rows for piece in row], np.int64).reshape(-1, 3),
        np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
    )


def _sequential(pieces: list[Piece], row_length: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    left = 0
    for piece in pieces:
        if piece[2] > left:
            rows.append([])
            left = row_length
        rows[-1].append(piece)
        left -= piece[2]
    return rows


def _best_fit(pieces: list[Piece], row_length: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    # open_rows[c] are the rows with c places left; bit c of `some` tells whether there are any.
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]
    some = 0
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        wide_enough = some >> piece[2]
        if wide_enough:
            room = piece[2] + (wide_enough & -wide_enough).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                some ^= 1 << room
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - piece[2]
        if left:
            open_rows[left].append(row)
            some |= 1 << left
    return rows


def fill_row(
    pieces: Sequence[Piece],
    row_length: int,
    tokens: Callable[[int, int, int], np.ndarray],
    weights: Callable[[int, int, int], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Returns one row as arrays [T].

    Args:
      pieces: What the row holds, in order.
      row_length: `T`.
      tokens: (document, start, stop) -> ids of these tokens.
      weights: (document, start, stop) -> how much the loss of predicting each of them counts; None
        for 1.

    Returns:
      `tokens` int32; `targets` int32, the token after each; `weights` float32, 0 on padding;
      `positions` int32, from 0 in each piece; `segment_ids` int32, 1 for the first piece, 2 for the
      second, ..., 0 for padding. Padded tokens and targets are 0.
    """
    row: dict[str, Any] = {
        name: np.zeros(row_length, np.int32)
        for name in ("tokens", "targets", "positions", "segment_ids")
    }
    row["weights"] = np.zeros(row_length, np.float32)
    at = 0
    for number, (document, start, places) in enumerate(pieces, 1):
        ids = tokens(document, start, start + places + 1)
        here = slice(at, at + places)
        row["tokens"][here], row["targets"][here] = ids[:-1], ids[1:]
        row["positions"][here] = np.arange(places)
        row["segment_ids"][here] = number
        stop = start + places + 1
        row["weights"][here] = 1.0 if weights is None else weights(document, start + 1, stop)
        at += places
    return row
