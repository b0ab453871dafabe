"""The JSONL records of code models: {"class_id": 3, "codes": [[...], ...]}, positions x depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxllm.data.records import read_jsonl
from jaxllm.errors import InputError


def read_code_rows(path: Path, model: Any) -> list[dict[str, Any]]:
    """Returns the records of a file, each checked against the model's config.

    Raises:
      InputError: Naming file and record: a missing field, a class id outside the model's range, a
        grid of another shape, or a code outside the codebook.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        where = f"{path}: record {number}"
        for field in ("class_id", "codes"):
            if field not in row:
                raise InputError(f"{where}: has no field {field!r}")
        if not _is_int(row["class_id"]) or not 0 <= row["class_id"] < model.num_classes:
            raise InputError(
                f"{where}: class_id {row['class_id']!r} is outside 0 .. {model.num_classes - 1}"
            )
        codes = row["codes"]
        if not isinstance(codes, list) or len(codes) != model.cells:
            count = len(codes) if isinstance(codes, list) else repr(codes)
            raise InputError(f"{where}: codes has {count} positions, expected {model.cells}")
        for position, cell in enumerate(codes):
            if not isinstance(cell, list) or len(cell) != model.depth:
                raise InputError(
                    f"{where}: position {position} is {cell!r}, expected {model.depth} codes"
                )
            bad = [c for c in cell if not _is_int(c) or not 0 <= c < model.codebook_size]
            if bad:
                raise InputError(
                    f"{where}: code {bad[0]!r} at position {position} is outside "
                    f"0 .. {model.codebook_size - 1}"
                )
    return rows


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
