"""The one exception for bad input from a user, and how commands turn it into a line.

Anything a person can cause with a file, a flag or a value is an `InputError`: commands print it as
one line and exit with code 2. Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input; the message names the file, the record and what was expected, on one line."""


def run_command(main: Callable[[], int | None]) -> int:
    """Calls `main` and returns its exit code; an `InputError` is one line on stderr and code 2."""
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
