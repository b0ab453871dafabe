"""Plans as a page: the commands that it names, and the table of what they printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError

BEGIN, END = "<!-- plans -->", "<!-- end of plans -->"
_COMMAND = re.compile(r"^jaxllm plan configs/.*$", re.MULTILINE)
_COLUMNS = (
    "config", "topology", "mesh", "GiB a chip", "step", "bound by", "MFU at best",
    "longest collective", "attention", "checks", "compile s",
)  # fmt: skip


def commands(page: str) -> list[str]:
    """Returns the `jaxllm plan` commands that follow the table of a page, one a line.

    Raises:
      InputError: The page has no place for a table.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise InputError(f"the page needs one {BEGIN} and one {END}")
    return _COMMAND.findall(page.split(END)[1].split("```bash")[1].split("```")[0])


def with_table(page: str, results: list[dict[str, Any]]) -> str:
    """Returns the page with the table of these results, each with its `command`."""
    before, _, after = page.partition(BEGIN)
    rest = after.partition(END)[2]
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join(_cells(one))} |" for one in results]
    return "\n".join([before + BEGIN, *lines, "", *_exceptions(results), END + rest])


def _cells(one: dict[str, Any]) -> list[str]:
    mesh = " x ".join(str(size) for size in one["mesh"].values())
    held = f"{one['peak GiB per chip']:.2f} of {one['HBM GiB per chip']:.0f}"
    where = f"{one['topology']} ({one['chips']})"
    if "only memory" in one:
        return [_name(one), where, mesh, held, *["-"] * 6, "-"]
    steps = one["step seconds"]
    mfu = one.get("MFU at best")
    longest = one["collectives"][0] if one["collectives"] else None
    return [
        _name(one),
        where,
        mesh,
        held,
        f"{seconds(steps['best'])} to {seconds(steps['worst'])}",
        one["bound by"],
        "-" if mfu is None else f"{100 * mfu:.0f} %",
        "-" if longest is None else _collective(longest),
        "splash" if "splash" in one["attention"] else "XLA",
        _verdict(one),
        f"{one['compile seconds']:.0f}",
    ]


def _name(one: dict[str, Any]) -> str:
    words = shlex.split(one["command"])
    name = Path(one["config"]).stem
    if "--decode" not in words:
        return name
    given = {key: words[words.index(key) + 1] for key in ("--decode", "--rows", "--kv")
             if key in words}  # fmt: skip
    cache = given.get("--kv", "full")
    return (
        f"{name}, decode step, {given.get('--rows', 1)} x {int(given['--decode']):,} held, "
        f"cache `{cache}`"
    )


def _collective(one: dict[str, Any]) -> str:
    return f"{one['kind']} over {one['axes']}, {seconds(one['ms in all'] / 1e3)}"


def _verdict(one: dict[str, Any]) -> str:
    checks = one.get("checks", {})
    failed = [name for name, found in checks.items() if found != "holds"]
    if failed:
        return "not " + ", ".join(failed)
    return ", ".join(checks) or "-"


def _exceptions(results: list[dict[str, Any]]) -> list[str]:
    """Returns a list of the checks that do not hold, and of plans of which only memory is known."""
    lines = []
    for one in results:
        if "only memory" in one:
            lines.append(f"* {_name(one)}: only memory, `{one['only memory']}`")
            continue
        for name, found in one.get("checks", {}).items():
            if found != "holds":
                lines.append(f"* {_name(one)}, {name}: {found}")
    return [*lines, ""] if lines else []


def seconds(value: float) -> str:
    """Returns a time as people read it."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.{1 if value >= 1e-3 else 2}f} ms"
