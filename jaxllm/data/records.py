"""JSONL in and out: every record is checked, nothing is left half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file; blank lines are allowed.

    Raises:
      InputError: A missing or empty file, or a line that is not a JSON object, named by its number.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # Strings may hold other line ends.
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(parse_record(line, f"{path}:{number}"))
    if not rows:
        raise InputError(f"{path}: holds no records")
    return rows


def parse_record(line: str | bytes, where: str) -> dict[str, Any]:
    """Returns the JSON object of one line, or raises InputError that begins with `where`."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text at byte {error.start} of the line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def check_target(path: Path) -> None:
    """Raises InputError where no file can be written at `path`; to be called before long work."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file to write")
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise InputError(f"{path}: {parent} is a file, expected a folder")
            break


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes records to a temporary name, then renames it."""
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
