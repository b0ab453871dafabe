"""Random access to the lines of a file that need not fit into memory."""

from __future__ import annotations

import operator
import os
import weakref
from pathlib import Path

import numpy as np

from jaxllm.errors import InputError

BLOCK = 1 << 24
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark, which some editors write first.


class LineFile:
    """The lines of a file by number, through an index of where each begins (8 bytes a line).

    Lines end in a line feed only: JSON strings may hold the other line ends of Unicode.

    Raises:
      InputError: If there is no such file, or it is empty.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file")
        self._file = self.path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        first = len(_MARK) if self._file.read(len(_MARK)) == _MARK else 0
        self._file.seek(first)
        ends, at = [], first
        while block := self._file.read(BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
        found = np.concatenate([[first], *ends]).astype(np.int64)
        if found[-1] != at:  # The last line has no line feed.
            found = np.append(found, at)
        if len(found) == 1:
            raise InputError(f"{self.path}: is empty")
        self.starts = found
        """int64 [lines + 1]: the first byte of each line, then the end of the file."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> bytes:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"line {index} of {len(self)}")
        return self.read(*self.starts[index : index + 2].tolist()).removesuffix(b"\n")

    def read(self, start: int, stop: int) -> bytes:
        """Returns bytes [start, stop) of the file."""
        content = os.pread(self._file.fileno(), stop - start, start)
        if len(content) != stop - start:
            raise InputError(f"{self.path}: became shorter while it was read")
        return content

    def border(self, at: int, within: int) -> int:
        """Returns the first line start from byte `at` on, or where a character begins if it is far.

        Args:
          at: A byte of the file.
          within: How far the line start may be.
        """
        end = int(self.starts[-1])
        found = int(self.starts[np.searchsorted(self.starts, min(at, end))])
        if found - at <= within:
            return found
        head = self.read(at, min(at + 4, end))
        return at + next((i for i, byte in enumerate(head) if byte & 0xC0 != 0x80), 0)

    def where(self, index: int) -> str:
        """Names a line (0-indexed here) for messages, which count from 1."""
        return f"{self.path}:{index + 1}"
