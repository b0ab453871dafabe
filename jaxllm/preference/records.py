"""Preference records as token ids: a prompt with its completions, read from JSONL or JSON files.

Prompt and completion are encoded together, so that the ids are those of the text a policy sees; a
token across the boundary belongs to the completion and the record is counted as joined (or
refused). All completions of a prompt share the prompt's ids.
"""

from __future__ import annotations

import gzip
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxllm.data.chat import ChatTemplate
from jaxllm.data.line_file import LineFile
from jaxllm.data.records import parse_record
from jaxllm.data.text_tokenizers import Tokenizer, shared_prefix
from jaxllm.errors import InputError
from jaxllm.preference.formats import BeliefPairs, Kind, Record, StatedBelief, parse_preference

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Belief:
    """The belief that completions state, and the group's distribution over all beliefs."""

    span: tuple[int, int]
    """Tokens [start, stop) of the completions that state it."""
    target: tuple[float, ...]
    """Probability of each belief, [M]."""
    ids: tuple[tuple[int, ...], ...]
    """Token ids of each belief after the prompt, [M]."""


@dataclass(frozen=True)
class Example:
    """A prompt with C completions: 2 of a pair (chosen, rejected), 1 with a label, K of a list."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    """Each ends with EOS once, if it was whole."""
    desirable: bool | None = None
    scores: tuple[float, ...] | None = None
    margin: float | None = None
    belief: Belief | None = None
    target_ids: tuple[int, ...] | None = None
    """The answer of supervised training that a pair may have besides."""
    density_ratio: float | None = None
    """p(desirable)/p(undesirable) of the prompt of a completion with a label."""
    identity: str = ""
    """Names it in messages: "file:row"."""


@dataclass(frozen=True)
class Limits:
    """How long prompts and completions may be, in tokens."""

    max_prompt: int | None = None
    keep_prompt: Literal["end", "start"] = "end"
    """Which part of a longer prompt is kept."""
    max_completion: int | None = None
    """The start of a longer completion is kept, without EOS."""
    max_length: int | None = None
    """Prompt and completion together; completions are cut to what the prompt leaves."""
    max_list: int | None = None
    """Most completions of a record."""
    max_beliefs: int | None = None
    """Most beliefs of a record."""

    def __post_init__(self) -> None:
        for name in ("max_prompt", "max_completion", "max_length"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "max_length" else 1):
                raise InputError(f"{name} {value} is too small for a token")
        for name in ("max_list", "max_beliefs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value} must be at least 1")


@dataclass(frozen=True)
class RecordConfig:
    """How files of preference records are read."""

    kind: Kind | None = None
    """The format; None recognises it by the fields of each record."""
    belief_pairs: BeliefPairs = "conditioned"
    """What rejected completions of GDPO rows state: the chosen one's belief, or their own."""
    boundary: Literal["join", "refuse"] = "join"
    """Whether a token across the end of the prompt joins the completion or is an error."""
    limits: Limits = Limits()
    skip_bad: bool = False
    """Leave bad records out, counted and listed, instead of stopping at the first."""


class Examples(Sequence[Example]):
    """Examples in memory at four bytes a token, and what was left out or joined on the way."""

    def __init__(
        self,
        examples: Iterable[Example],
        skipped: Sequence[str] = (),
        joined: Sequence[str] = (),
    ):
        self._ids, self._rest, counts = array("i"), [], []
        starts = [0]
        for example in examples:
            self._ids.extend(example.prompt_ids)
            for ids in example.completion_ids:
                self._ids.extend(ids)
            counts.append([len(example.prompt_ids), *map(len, example.completion_ids)])
            starts.append(len(self._ids))
            self._rest.append(replace(example, prompt_ids=(), completion_ids=()))
        self._starts = starts
        self._counts = counts
        self.skipped = list(skipped)
        """One line for each record that was left out."""
        self.joined = list(joined)
        """Identities of records with a token across the end of the prompt."""

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        parts, at = [], self._starts[index]
        for count in self._counts[index]:
            parts.append(tuple(self._ids[at : at + count]))
            at += count
        return replace(self._rest[index], prompt_ids=parts[0], completion_ids=tuple(parts[1:]))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def read_examples(
    path: str | Path,
    tokenizer: Tokenizer | None,
    config: RecordConfig = RecordConfig(),  # noqa: B008
    template: ChatTemplate | None = None,
) -> Examples:
    """Reads a .jsonl file (also .gz) or a .json list of preference records.

    Args:
      path: The file.
      tokenizer: Encodes texts and messages; None where the file holds ids only.
      config: Format, limits, and what happens to bad records.
      template: Turns messages into text.

    Raises:
      InputError: A file without records, or, unless `skip_bad`, a bad one: one line with file, row
        and reason.
    """
    encoder = _Encoder(tokenizer, template, config.boundary)
    examples, skipped = [], []

    def parse(row: dict[str, Any]) -> Example:
        record = parse_preference(row, config.kind, config.belief_pairs)
        return shorten(encoder.encode(record), config.limits)

    for where, read in _rows(Path(path)):
        try:
            example = replace(parse(read()), identity=where)
        except InputError as error:
            reason = str(error).removeprefix(f"{where}: ")
            if not config.skip_bad:
                raise InputError(f"{where}: {reason}") from None
            skipped.append(f"{where}: {reason}")
            continue
        examples.append(example)
        if encoder.joined:
            encoder.places.append(where)
    if skipped:
        more = ", ..." if len(skipped) > 5 else ""
        _log.warning("%d records are left out: %s%s", len(skipped), "; ".join(skipped[:5]), more)
    if encoder.places:
        _log.warning(
            "%d records have a token across the end of the prompt: %s",
            len(encoder.places),
            ", ".join(encoder.places[:5]),
        )
    if not examples:
        raise InputError(f"{path}: holds no usable preference records")
    return Examples(examples, skipped, encoder.places)


def encode_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    limits: Limits = Limits(),  # noqa: B008
    template: ChatTemplate | None = None,
    name: str = "record",
) -> Examples:
    """Encodes records that were made in memory; their identities are "name:row" from 1."""
    encoder = _Encoder(tokenizer, template, "join")
    examples = []
    for number, record in enumerate(records, 1):
        where = f"{name}:{number}"
        try:
            example = shorten(encoder.encode(record), limits)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        examples.append(replace(example, identity=where))
        if encoder.joined:
            encoder.places.append(where)
    return Examples(examples, joined=encoder.places)


def shorten(example: Example, limits: Limits) -> Example:
    """Cuts an example to the limits.

    Raises:
      InputError: A prompt that leaves no room for a response, a cut that leaves nothing after the
        belief, a pair that is equal after it, or more completions or beliefs than allowed.
    """
    _check_counts(example, limits)
    prompt = example.prompt_ids
    if limits.max_prompt is not None and len(prompt) > limits.max_prompt:
        keep_end = limits.keep_prompt == "end"
        prompt = prompt[-limits.max_prompt :] if keep_end else prompt[: limits.max_prompt]
    room = limits.max_completion
    if limits.max_length is not None:
        left = limits.max_length - len(prompt)
        room = left if room is None else min(room, left)
    if room is not None and room < 1:
        raise InputError(
            f"truncation empties the response: a prompt of {len(prompt)} tokens fills "
            f"max_length {limits.max_length}"
        )
    completions = tuple(ids[:room] for ids in example.completion_ids)
    target = None if example.target_ids is None else example.target_ids[:room]
    cut = completions != example.completion_ids
    if cut and example.belief is not None and min(map(len, completions)) <= example.belief.span[1]:
        raise InputError(f"truncation empties the response: {room} tokens hold only the belief")
    if cut and is_pair(example) and completions[0] == completions[1]:
        raise InputError(f"chosen and rejected are equal in their first {room} tokens")
    return replace(example, prompt_ids=prompt, completion_ids=completions, target_ids=target)


def _check_counts(example: Example, limits: Limits) -> None:
    beliefs = 0 if example.belief is None else len(example.belief.ids)
    for what, found, most in (
        ("completions", len(example.completion_ids), limits.max_list),
        ("beliefs", beliefs, limits.max_beliefs),
    ):
        if most is not None and found > most:
            raise InputError(f"{found} {what}, the config allows {most}")


def is_pair(example: Example) -> bool:
    """Whether the first of two completions is preferred."""
    return len(example.completion_ids) == 2 and example.scores is None


# -- reading -------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields "file:row", counted from 1, with what reads that row."""
    if path.suffix == ".json":
        yield from _json_rows(path)
        return
    lines: Iterable[tuple[str, bytes]]
    if path.suffix == ".gz":
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError) as error:
            raise InputError(f"{path}: not a whole gzip file ({error})") from None
        lines = ((f"{path}:{n}", line) for n, line in enumerate(content.split(b"\n"), 1))
    else:
        file = LineFile(path)
        lines = ((file.where(i), file[i]) for i in range(len(file)))
    for where, line in lines:
        if line.strip():
            yield where, lambda line=line, where=where: parse_record(line, where)  # type: ignore[misc]


def _json_rows(path: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of records, found {type(rows).__name__}")

    def one(row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise InputError(f"expected a JSON object, found {type(row).__name__}")
        return row

    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", lambda row=row: one(row)  # type: ignore[misc]


# -- encoding ------------------------------------------------------------------------------------


class _Encoder:
    """Texts, messages or ids of records as examples."""

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | None, boundary: str):
        self._tokenizer, self._template, self._boundary = tokenizer, template, boundary
        self._beliefs: tuple[Any, tuple[tuple[int, ...], ...]] = (None, ())
        self.joined = False
        """Whether the last record had a token across the end of its prompt."""
        self.places: list[str] = []

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError("texts need a tokenizer; without one, records must hold ids")
        return self._tokenizer

    def encode(self, record: Record) -> Example:
        self.joined = False
        prompt, belief = record.prompt, None
        contents = (
            record.completions if record.target is None else (*record.completions, record.target)
        )
        if isinstance(prompt, list):
            ids, completions = self._messages(prompt, contents)
        elif all(isinstance(content, str) for content in (prompt, *contents)):
            ids, completions = self._texts(prompt, contents)  # type: ignore[arg-type]
            if record.belief is not None:
                if not record.completions[0].startswith(record.belief.text):  # type: ignore[union-attr]
                    raise InputError(f"a response does not begin with {record.belief.text!r:.40}")
                belief = self._belief(prompt, record.belief, ids, completions[0])  # type: ignore[arg-type]
        else:
            ids, completions = self._mixed(prompt, contents)
        if self.joined and self._boundary == "refuse":
            raise InputError("prompt mismatch: its last token merges with the response's first")
        if not ids:
            raise InputError("the prompt is empty and the tokenizer has no token to begin with")
        eos = None if self._tokenizer is None else self._tokenizer.eos
        for tokens in completions:
            if not tokens or tokens == (eos,):
                raise InputError("a response is empty")
            if eos is not None and tokens[-2:] == (eos, eos):
                raise InputError("a response ends with two end marks (EOS), expected one")
        size = len(record.completions)
        example = Example(
            ids,
            completions[:size],
            record.desirable,
            record.scores,
            record.margin,
            belief,
            target_ids=next(iter(completions[size:]), None),
            density_ratio=record.density_ratio,
        )
        if is_pair(example) and completions[0] == completions[1]:
            raise InputError("chosen and rejected are equal as tokens")
        return example

    def _texts(
        self, prompt: str, completions: Sequence[str]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        tokenizer = self.tokenizer
        mark = tokenizer.names.get("eos_token")
        if mark and any(text.rstrip().endswith(mark) for text in completions):
            raise InputError(
                f"a response ends with the text {mark!r}; its end mark would be double"
            )
        bos = tokenizer.adds_bos
        wholes = [tokenizer.encode_pair(prompt, c, bos=bos, eos=True) for c in completions]
        return self._split(tokenizer.encode(prompt, bos=bos), wholes)

    def _messages(
        self, prompt: list[dict[str, Any]], completions: Sequence[Any]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        tokenizer, template = self.tokenizer, self._template
        if template is None:
            raise InputError("messages need a chat template and the tokenizer has none")
        before = template.render(prompt, add_generation_prompt=True)
        ids, wholes = tokenizer.encode(before, special=True), []
        for turns in completions:
            text = template.render([*prompt, *turns])
            if not text.startswith(before):
                raise InputError(
                    "prompt mismatch: the template renders the prompt otherwise with a response"
                )
            whole = self._end(tokenizer.encode(text, special=True))
            wholes.append((whole, shared_prefix(ids, whole)))
        return self._split(ids, wholes)

    def _end(self, ids: list[int]) -> list[int]:
        """Makes a rendered conversation end with EOS or the template's own end of a turn."""
        tokenizer = self.tokenizer
        special = set(tokenizer.codec.special.values())
        last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in special), -1)
        # Templates write a line end after the mark, which a model never has to predict.
        if last >= 0 and not tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
        return ids if tokenizer.eos is None else [*ids, tokenizer.eos]

    def _split(
        self, prompt: list[int], wholes: Sequence[tuple[list[int], int]]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        count = min(shared for _, shared in wholes)
        self.joined = count < len(prompt)
        ids = tuple(prompt[:count])
        if not ids and self.tokenizer.start is not None:
            ids = (self.tokenizer.start,)
        return ids, tuple(tuple(whole[count:]) for whole, _ in wholes)

    def _mixed(
        self, prompt: Any, completions: Sequence[Any]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Ids are taken as they are; a text beside them is encoded alone."""

        def tokens(content: Any, **marks: bool) -> tuple[int, ...]:
            if isinstance(content, str):
                return tuple(self.tokenizer.encode(content, **marks))
            size = None if self._tokenizer is None else self._tokenizer.vocab_size
            for number in content:
                if number < 0 or (size is not None and number >= size):
                    raise InputError(f"token id {number} is outside the vocabulary of {size}")
            return content

        bos = self._tokenizer is not None and self._tokenizer.adds_bos
        return tokens(prompt, bos=bos), tuple(tokens(c, eos=True) for c in completions)

    def _belief(
        self, prompt: str, stated: StatedBelief, ids: tuple[int, ...], first: tuple[int, ...]
    ) -> Belief:
        tokenizer = self.tokenizer
        if self.joined:
            raise InputError("prompt mismatch: the belief merges with the prompt's last token")
        bos = tokenizer.adds_bos
        stop = shared_prefix(tokenizer.encode(prompt + stated.text, bos=bos), [*ids, *first])
        if self._beliefs[0] != (prompt, stated.names):  # Rows of a prompt follow each other.
            pairs = [tokenizer.encode_pair(prompt, name, bos=bos) for name in stated.names]
            if any(tuple(whole[:count]) != ids for whole, count in pairs):
                raise InputError("prompt mismatch: a belief merges with the prompt's last token")
            found = tuple(tuple(whole[count:]) for whole, count in pairs)
            for i, one in enumerate(found):
                for other in found[:i]:
                    if shared_prefix(one, other) == min(len(one), len(other)):
                        raise InputError("one belief's tokens begin another's; add an end mark")
            self._beliefs = ((prompt, stated.names), found)
        span = (0, stop - len(ids))
        if span[1] < 1 or span[1] >= len(first):
            raise InputError(
                f"the belief {stated.text!r:.40} is not the start of a longer response"
            )
        return Belief(span, stated.target, self._beliefs[1])
