"""Tokenised documents on disk, made once and read through the page cache.

A cache is a folder named by what it was made from (SHA-256 of the file, tokenizer identity, split):
`tokens.bin` (uint16 or uint32), `documents.npy` (int64 [documents, 3]: end in tokens, bytes of the
text that has loss, line of the file), `weights.bin` (uint8, only where not all tokens have loss)
and `meta.json`. It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxllm.errors import InputError

FORMAT = 1

_log = logging.getLogger(__name__)


class Document(NamedTuple):
    """The tokens of one document."""

    ids: Sequence[int]
    spans: Sequence[tuple[int, int]] | None
    """Tokens [start, stop) that have loss; None for all."""
    size: int
    """UTF-8 bytes of the text that these tokens spell."""


class TokenCache:
    """The documents of one cache folder, in order."""

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text())
        table = np.load(folder / "documents.npy", mmap_mode="r")
        if table.shape != (meta["documents"], 3):
            raise ValueError(f"documents.npy has shape {table.shape}")
        self.weighted: bool = meta["weighted"]
        self.skipped: list[int] = meta["skipped"]
        """Lines whose records hold nothing to predict."""
        self._tokens = _map(folder / "tokens.bin", meta["dtype"], meta["tokens"])
        if self.weighted:
            self._weights = _map(folder / "weights.bin", "uint8", meta["tokens"])
        self._ends = table[:, 0]
        self._starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)
        self.lengths = self._ends - self._starts
        """int64 [documents]: tokens of each."""
        self.lines = table[:, 2]
        """int64 [documents]: where each begins in its file, from 0."""
        self.text_bytes = int(table[:, 1].sum())
        """UTF-8 bytes of all text that has loss."""

    def __len__(self) -> int:
        return len(self._ends)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns ids [start, stop) of one document."""
        return self._tokens[self._slice(document, start, stop)].astype(np.int32)

    def weights(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns 1 for each of these tokens that has loss, else 0; float32."""
        if not self.weighted:
            return np.ones(len(self.tokens(document, start, stop)), np.float32)
        return self._weights[self._slice(document, start, stop)].astype(np.float32)

    def _slice(self, document: int, start: int, stop: int | None) -> slice:
        first = int(self._starts[document])
        return slice(first + start, int(self._ends[document]) if stop is None else first + stop)


def cached_tokens(
    root: str | None,
    key: list[Any],
    vocab_size: int,
    documents: Callable[[], Iterator[tuple[int, Document | None]]],
    label: str,
) -> TokenCache:
    """Returns the cache of `key`, made from `documents` if there is none or it is damaged.

    Args:
      root: Folder of all caches; None for the default.
      key: JSON values that decide the tokens.
      vocab_size: Ids are below this.
      documents: Gives (line, document), or (line, None) for one with nothing to predict.
      label: Names the work on the progress bar.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()
    folder = (cache_root() / "tokens" if root is None else Path(root)) / digest[:32]
    if folder.is_dir():
        try:
            return TokenCache(folder)
        except (OSError, ValueError, KeyError) as error:
            _log.warning("tokens in %s are damaged (%s) and made again", folder, error)
            shutil.rmtree(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=digest[:8], suffix=".tmp", dir=folder.parent))
    except OSError as error:
        reason = f"cannot hold tokens ({error.strerror})"
        raise InputError(f"{folder.parent}: {reason}; set data.cache or JAXLLM_CACHE") from None
    try:
        _build(building, vocab_size, documents(), label)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # Another process was first otherwise.
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return TokenCache(folder)


def cache_root() -> Path:
    """Returns JAXLLM_CACHE, or `jaxllm` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxllm"
    return Path(os.environ.get("JAXLLM_CACHE", default))


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's contents in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(
    folder: Path, vocab_size: int, documents: Iterator[tuple[int, Document | None]], label: str
) -> None:
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    table, skipped, total, weighted = array("q"), [], 0, False
    progress = tqdm(documents, desc=f"tokens of {label}", unit=" documents", disable=None)
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "weights.bin").open("wb") as marks:
        for line, document in progress:
            if document is None:
                skipped.append(line)
                continue
            count = len(document.ids)
            tokens.write(np.asarray(document.ids, dtype).tobytes())
            mark = np.full(count, document.spans is None, np.uint8)
            for start, stop in document.spans or ():
                mark[start:stop] = 1
            marks.write(mark.tobytes())
            weighted = weighted or document.spans is not None
            total += count
            table.extend((total, document.size, line))
    if not weighted:
        (folder / "weights.bin").unlink()
    rows = np.frombuffer(table, np.int64).reshape(-1, 3) if table else np.zeros((0, 3), np.int64)
    np.save(folder / "documents.npy", rows)
    meta = {
        "tokens": total,
        "documents": len(rows),
        "dtype": np.dtype(dtype).name,
        "weighted": weighted,
        "skipped": skipped,
    }
    (folder / "meta.json").write_text(json.dumps(meta) + "\n")


def _map(path: Path, dtype: str, count: int) -> np.ndarray:
    if path.stat().st_size != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)
