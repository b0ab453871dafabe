"""Text for language models: which files, which records, which tokens count, as rows.

A text file is one stream, cut into documents of about a megabyte at line ends, or one document a
line. A JSONL file holds a document a line: `text`; `prompt` with `completion`, whose loss is on the
completion; or `messages`, whose loss is on what the assistant wrote. Instead of a prompt or
completion there may be `prompt_ids` or `completion_ids`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxllm.data.chat import (
    ChatTemplate,
    check_messages,
    encode_turns,
    load_chat_template,
    tokenizer_chat_template,
)
from jaxllm.data.images import bundled
from jaxllm.data.line_file import LineFile
from jaxllm.data.packing import Packing, RowPlan, fill_row, plan_rows
from jaxllm.data.pipeline import Example
from jaxllm.data.records import parse_record
from jaxllm.data.text_tokenizers import Tokenizer
from jaxllm.data.token_cache import Document, TokenCache, cached_tokens, file_digest
from jaxllm.errors import InputError

Split = Literal["train", "validation"]
DOCUMENT_BYTES = 1 << 20
RECORDS = {".jsonl", ".ndjson"}
FIELDS = ("text", "messages", "prompt", "prompt_ids", "completion", "completion_ids")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextDataConfig:
    """Which text, how it is held out, and how it becomes rows."""

    file: str | None = None
    """A text file, or a .jsonl file of records; None for the bundled Shakespeare."""
    validation_file: str | None = None
    """Held-out text; None holds out a part of `file`."""
    validation_fraction: float = 0.1
    """Part of `file` that is held out: the end of a text, or records chosen at random."""
    split_seed: int = 0
    """Chooses the records that are held out."""
    documents: Literal["file", "line"] = "file"
    """Whether a text file is one stream or a document a line."""
    row_length: int = 256
    """Tokens of a row, T."""
    packing: Packing = "best_fit"
    """How documents share rows; `none` pads each to a row of its own."""
    long_documents: Literal["split", "refuse"] = "split"
    """What happens to documents longer than a row."""
    chat_template: str | None = None
    """A .jinja file or a tokenizer folder for `messages`; None for the tokenizer's own."""
    batch_size: int = 32
    """Rows per step over all hosts."""
    cache: str | None = None
    """Folder for tokenised text; None for JAXLLM_CACHE or the user's cache folder."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise InputError(
                f"data.validation_fraction {self.validation_fraction} is outside [0, 1)"
            )
        if self.row_length < 1:
            raise InputError(f"data.row_length {self.row_length} must be at least 1")

    @property
    def path(self) -> Path:
        """The training file."""
        return bundled("text", "tinyshakespeare.txt") if self.file is None else Path(self.file)

    @property
    def holds_out(self) -> bool:
        """Whether there is a validation split."""
        return self.validation_file is not None or self.validation_fraction > 0


class TextRows:
    """The rows of a split; a random-access source for `Batches`."""

    def __init__(self, cache: TokenCache, plan: RowPlan):
        self.cache, self.plan = cache, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Example:
        """Returns one row; see `packing.fill_row`."""
        pieces = self.plan.row(index)
        weights = self.cache.weights if self.cache.weighted else None
        return fill_row(pieces, self.plan.row_length, self.cache.tokens, weights)


def open_text(config: TextDataConfig, tokenizer: Tokenizer, split: Split) -> TextRows:
    """Returns the rows of one split, tokenising its file if that has not been done before.

    Raises:
      InputError: A missing, empty or undecodable file, a record that is none of the three kinds,
        a split without a document, or a document longer than a row where these are refused.
    """
    path = _split_path(config, split)
    lines = _lines(str(path), _stamp(path))
    template = _template(config, tokenizer)
    key = [
        file_digest(path),
        tokenizer.identity,
        None if template is None else template.identity,
        None if config.validation_file else [config.validation_fraction, config.split_seed, split],
        config.documents,
        path.suffix in RECORDS,
    ]

    def documents() -> Iterator[tuple[int, Document | None]]:
        for line, record in read_records(config, split):
            try:
                yield line, encode_record(record, tokenizer, template)
            except InputError as error:
                raise InputError(f"{lines.where(line)}: {error}") from None

    cache = cached_tokens(
        config.cache, key, tokenizer.vocab_size, documents, f"{path.name} {split}"
    )
    if cache.skipped:
        places = ", ".join(lines.where(line) for line in cache.skipped[:5])
        more = ", ..." if len(cache.skipped) > 5 else ""
        _log.warning(
            "%d records have no token to predict and are left out: %s%s",
            len(cache.skipped),
            places,
            more,
        )
    if not len(cache):
        raise InputError(f"{path}: the {split} split has no document with a token to predict")
    plan = plan_rows(
        cache.lengths,
        config.row_length,
        config.packing,
        long=config.long_documents,
        name=lambda document: lines.where(int(cache.lines[document])),
    )
    return TextRows(cache, plan)


def read_records(config: TextDataConfig, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 0, record) of a split; text is {"text": ...}."""
    path = _split_path(config, split)
    lines = _lines(str(path), _stamp(path))
    whole = config.validation_file is not None
    if path.suffix not in RECORDS and config.documents == "file":
        yield from _stream(lines, 0.0 if whole else config.validation_fraction, split)
        return
    chosen = np.arange(len(lines))
    if not whole:
        held_out = round(len(lines) * config.validation_fraction)
        order = np.random.default_rng(config.split_seed).permutation(len(lines))
        chosen = np.sort(order[:held_out] if split == "validation" else order[held_out:])
    for line in chosen.tolist():
        content = lines[line]
        if not content.strip():
            continue
        if path.suffix in RECORDS:
            yield line, parse_record(content, lines.where(line))
        else:
            yield line, {"text": _decode(content.removesuffix(b"\r"), lines.where(line))}


def _stream(lines: LineFile, fraction: float, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields stretches of about a megabyte, of whole lines if these are not longer than that."""
    first, end = int(lines.starts[0]), int(lines.starts[-1])
    cut = first + round((end - first) * (1 - fraction))
    border = lines.border(cut, DOCUMENT_BYTES)
    if fraction and border == end:  # The last line is the only one that could be held out.
        border = lines.border(cut, 0)
    at, stop = (border, end) if split == "validation" else (first, border)
    while at < stop:
        after = min(lines.border(at + DOCUMENT_BYTES, DOCUMENT_BYTES), stop)
        line = int(np.searchsorted(lines.starts, at, side="right")) - 1
        yield line, {"text": _decode(lines.read(at, after), lines.where(line))}
        at = after


def record_texts(config: TextDataConfig) -> Iterator[str]:
    """Yields the texts of the training split, to train a tokenizer on."""
    for _, record in read_records(config, "train"):
        for name in ("text", "prompt", "completion"):
            if isinstance(record.get(name), str):
                yield record[name]
        messages = record.get("messages")
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                yield message["content"]


def encode_record(
    record: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> Document | None:
    """Returns the tokens of a record, or None when they hold nothing to predict.

    A `text` begins with BOS (EOS where there is no BOS) and ends with EOS, so that every token of
    it is a target. A prompt begins as the tokenizer's convention is, a completion ends with EOS;
    ids are taken as they are. `messages` are what the template makes of them.

    Raises:
      InputError: A record of another form, ids out of range, or `messages` without an assistant
        turn.
    """
    document = _encode_record(record, tokenizer, template)
    # The first token is never predicted.
    spans = [(0, len(document.ids))] if document.spans is None else document.spans
    return document if any(stop > max(start, 1) for start, stop in spans) else None


def _encode_record(
    record: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> Document:
    found = tuple(name for name in FIELDS if name in record)
    if found == ("text",):
        return _encode_text(_string(record, "text"), tokenizer)
    if found == ("messages",):
        return _encode_messages(record["messages"], tokenizer, template)
    prompts, completions = (
        [name for name in found if name.startswith(kind)] for kind in ("prompt", "completion")
    )
    if len(found) != 2 or len(prompts) != 1 or len(completions) != 1:
        raise InputError(
            "expected `text`, `messages`, or `prompt` with `completion` (or their `_ids`), found "
            + (" and ".join(found) or "none of them")
        )
    return _encode_completion(record, tokenizer)


def _encode_text(text: str, tokenizer: Tokenizer) -> Document:
    if not text:
        return Document([], None, 0)
    start = [] if tokenizer.start is None else [tokenizer.start]
    ids, size = start + tokenizer.encode(text, eos=True), len(text.encode())
    if not start:
        size -= len(tokenizer.decode(ids[:1]).encode())
    return Document(ids, None, size)


def _encode_completion(record: dict[str, Any], tokenizer: Tokenizer) -> Document:
    bos = tokenizer.adds_bos
    if "prompt" in record and "completion" in record:
        completion = _string(record, "completion")
        prompt = _string(record, "prompt")
        ids, count = tokenizer.encode_pair(prompt, completion, bos=bos, eos=True)
        return Document(ids, [(count, len(ids))], len(completion.encode()))
    if "prompt" in record:
        first = tokenizer.encode(_string(record, "prompt"), bos=bos)
    else:
        first = _ids(record, "prompt_ids", tokenizer)
    if "completion" in record:
        last = tokenizer.encode(_string(record, "completion"), eos=True)
    else:
        last = _ids(record, "completion_ids", tokenizer)
    size = len(tokenizer.decode(last).encode())
    return Document(first + last, [(len(first), len(first) + len(last))], size)


def _encode_messages(
    messages: Any, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Document:
    check_messages(messages)
    if template is None:
        raise InputError("`messages` need a chat template and the tokenizer has none")
    ids, turns, size = encode_turns(tokenizer, template, messages)
    if not turns:
        raise InputError("`messages` hold no turn of the assistant to learn from")
    return Document(ids, turns, size)


def _template(config: TextDataConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    if config.chat_template is not None:
        template = load_chat_template(config.chat_template)
        names = {**template.names, **tokenizer.names}
        return ChatTemplate(template.source, names, template.where)
    has_own = "chat_template.jinja" in tokenizer.files or b'"chat_template"' in tokenizer.files.get(
        "tokenizer_config.json", b""
    )
    return tokenizer_chat_template(tokenizer, "the tokenizer's chat template") if has_own else None


def _split_path(config: TextDataConfig, split: Split) -> Path:
    if split == "validation" and config.validation_file is not None:
        return Path(config.validation_file)
    return config.path


@functools.lru_cache(maxsize=4)
def _lines(path: str, stamp: tuple[int, int] | None) -> LineFile:
    return LineFile(path)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells a file from the one that was at its place before."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text at byte {error.start} from there") from None


def _string(record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise InputError(f"`{name}` is a {type(record[name]).__name__}, expected text")
    return record[name]


def _ids(record: dict[str, Any], name: str, tokenizer: Tokenizer) -> list[int]:
    ids = record[name]
    if not isinstance(ids, list) or not ids or not all(type(number) is int for number in ids):
        raise InputError(f"`{name}` must be a list of token ids")
    for number in ids:
        if not 0 <= number < tokenizer.vocab_size:
            raise InputError(
                f"`{name}` holds {number}, outside the vocabulary of {tokenizer.vocab_size}"
            )
    return ids
