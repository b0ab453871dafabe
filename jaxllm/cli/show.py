"""A command's result as a table in the terminal or as a section of a Markdown page."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from jaxllm.training.run_folder import write_text


def show(result: dict[str, Any]) -> None:
    """Prints a result as a two-column table; lists of rows become a table of their own."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)  # Paths may hold [brackets].
    plain = {k: v for k, v in result.items() if not isinstance(v, list) or not v}
    plain |= {k: v for k, v in result.items() if isinstance(v, list) and not _is_rows(v)}
    # Printed plainly: a table would cut long paths at the width of the terminal.
    width = max(map(len, plain), default=0)
    for name, value in plain.items():
        print(f"{name:<{width}}  {_text(value)}")
    for name, rows in result.items():
        if isinstance(rows, list) and _is_rows(rows):
            table = Table(*rows[0].keys(), title=name, title_justify="left", box=None)
            for row in rows:
                table.add_row(*(_text(value) for value in row.values()))
            console.print(table)


def _is_rows(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(row, dict) for row in value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return str(value)


def plain_json(value: Any) -> Any:
    """Returns a result that JSON can hold: what is not finite becomes None."""
    if isinstance(value, dict):
        return {name: plain_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_section(path: Path, command: str, result: dict[str, Any]) -> None:
    """Writes `result` as the section of `command` in a Markdown page; the rest of it stays.

    The section is a heading, rows as tables, and everything else as a list. A page that has the
    section already gets the new one in its place, another page at its end.
    """
    heading = f"## `{command}`\n"
    lines = [heading]
    tables = {k: v for k, v in result.items() if isinstance(v, list) and _is_rows(v)}
    for rows in tables.values():
        lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(_text(v) for v in row.values()) + " |" for row in rows]
        lines.append("")
    lines += [f"* {k}: {_text(v)}" for k, v in result.items() if k not in tables]
    section = "\n".join(lines) + "\n"
    page = path.read_text(encoding="utf-8") if path.is_file() else "# Benchmarks\n"
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    places = [i for i, part in enumerate(parts) if part.startswith(heading)]
    if places:
        parts[places[0]] = section
    else:
        parts.append(section)
    write_text(path, "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n")
