"""Examples as batches of token rows, in three layouts that score the same tokens.

Every completion of every example is a slot p S + s of the batch: the C completions, then the belief
strings where beliefs have several tokens, then SLiC's supervised answer or KTO's mismatched
completion. Position t of a row predicts `targets[t]`; `owner[t]` is the slot that the prediction
belongs to.

    padded          a prompt with one completion per row; row p S + s holds slot p S + s
    packed          the same segments, several a row; what does not fit begins the next batch
    shared_prompt   a prompt once, then its completions as branches that do not see each other

The last token of a prompt predicts the first one of each completion, so with a shared prompt every
branch begins with a copy of it, at its position.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import grain
import numpy as np

from jaxllm.data.pipeline import Batch, Batches
from jaxllm.errors import InputError
from jaxllm.preference.records import Example, Examples

Layout = Literal["padded", "packed", "shared_prompt"]
Ids = tuple[int, ...]
Slot = tuple[int, Ids]
"""(slot of the example, token ids)."""
NAMES = ("tokens", "targets", "positions", "segment_ids", "owner", "place", "prompt_owner")
STEPS = 1 << 40


@dataclass(frozen=True)
class RowConfig:
    """Shapes of a batch; all batches have the same."""

    layout: Layout = "padded"
    batch_size: int = 16
    """Examples per step over all hosts, P; with `rows` the most that a step may have."""
    row_length: int = 512
    """Tokens of a row, T; a prompt with a completion of n tokens in all fills n - 1."""
    rows: int | None = None
    """Rows per step, R, over which the examples of a step are packed; None for one per segment."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "row_length"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name} {getattr(self, name)} must be at least 1")
        if (self.layout == "packed" and self.rows is None) or (
            self.layout == "padded" and self.rows is not None
        ):
            wanted = "a number" if self.layout == "packed" else "none"
            raise InputError(
                f"data.rows is {self.rows} with layout {self.layout}, expected {wanted}"
            )


@dataclass(frozen=True)
class _Segment:
    """A prompt with the completions that follow it in one row."""

    example: int
    """Its place in the batch, p."""
    prompt: Ids
    branches: list[Slot]

    @property
    def length(self) -> int:
        return len(self.prompt) - 1 + sum(len(ids) for _, ids in self.branches)


class PreferenceRows:
    """Batches of given examples; a source of `PreferenceBatches`.

    Args:
      examples: All of them with the same kind of feedback.
      config: Layout and shapes.
      mismatched: Add to every example a completion of an example with another prompt, for KTO. The
        pairing is random, the same in every epoch and layout.
      supervised: Score the `target_ids` of every example too.
      columns: Further arrays [n, ...], one entry per example, such as `ref_logps` [n, C] and
        `ref_token_logps` [n, C, L].

    Raises:
      InputError: Examples of different kinds, a prompt and completion that do not fit into a row,
        columns of another length, or no other prompt to mismatch with.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: RowConfig,
        *,
        mismatched: bool = False,
        supervised: bool = False,
        columns: Mapping[str, np.ndarray] | None = None,
    ):
        if not len(examples):
            raise InputError("there are no preference examples")
        self.examples = examples if isinstance(examples, Examples) else Examples(examples)
        self.config, self.columns = config, dict(columns or {})
        summary = _summary(self.examples)
        self._fields = summary.fields
        self.completions = summary.completions
        """C."""
        self.completion_length = summary.longest
        """L, tokens of the longest completion."""
        self.beliefs = summary.beliefs
        """M; 0 without beliefs."""
        self.belief_strings = summary.belief_strings
        """Whether beliefs are scored as completions, because some have several tokens."""
        self.mismatched, self.supervised = mismatched, supervised
        if supervised:
            self.completion_length = max(summary.longest, *_supervised_lengths(self.examples))
        self._mates = _mates(self.examples) if mismatched else None
        strings = self.beliefs if self.belief_strings else 0
        self.slots = self.completions + strings + supervised + mismatched
        """S: slots of an example: completions, belief strings, the supervised answer, the
        mismatched completion."""
        shared = config.layout == "shared_prompt"
        self.rows = config.rows or config.batch_size * (1 if shared else self.slots)
        """R."""
        self._check(shared)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"example": np.int32(index)}

    def batch(self, indices: Sequence[int], hosts: tuple[int, int] = (0, 1)) -> Batch:
        """Returns one batch of examples, or this host's equal part of its rows and examples.

        `owner`, `belief_row` and `segment_ids` count over the whole batch, whichever part is
        returned.

        Returns:
          int32 [R, T]: `tokens`; `targets`, the next token of the segment; `positions`;
          `segment_ids`, -1 at padding; `owner`, the slot p S + s whose token is predicted here, -1
          elsewhere; `place` of that token in its completion; `prompt_owner`, p where a token of
          the prompt of example p is predicted, once per example, -1 elsewhere; with shared prompts
          `branch`, 0 in the prompt and s + 1 in slot s.
          [P]: `valid` bool; `example` int32, index of the example or -1; whatever the examples
          have of `desirable` bool, `scores` float32 [P, C], `margin` and `density_ratio` float32,
          `belief_target`
          float32 [P, M], `belief_mask` bool [P, M], `belief_span` int32 [P, 2] (tokens of a
          completion), and for one-token beliefs `belief_ids` int32 [P, M] with the place
          `belief_row`, `belief_position` that predicts them; the columns.

        Raises:
          InputError: Examples that do not fit into the rows.
        """
        segments = [s for p, i in enumerate(indices) for s in self._segments(p, int(i))]
        placed = self._place(segments)
        if placed is None or len(indices) > self.config.batch_size:
            raise InputError(f"{len(indices)} examples do not fit into {self.rows} rows")
        arrays = self._fill(segments, placed)
        batch = {**arrays, **self._per_example(np.asarray(indices, np.int64))}
        if self.beliefs and not self.belief_strings:
            batch |= self._belief_places(arrays, len(indices))
        host, count = hosts
        return {name: np.split(value, count)[host] for name, value in batch.items()}

    def in_order(self) -> Iterator[Batch]:
        """Yields batches of every example once, in order, the last one partly invalid."""
        start = 0
        while start < len(self):
            stop = min(start + self.config.batch_size, len(self))
            if self.config.rows is not None:
                stop = start + self.fitting(range(start, stop))
            yield self.batch(range(start, stop))
            start = stop

    def fitting(self, indices: Sequence[int]) -> int:
        """Returns how many leading examples fit into the rows of a batch."""
        room = np.full(self.rows, self.config.row_length)
        for count, index in enumerate(indices):
            for segment in self._segments(0, index):
                row = _best_row(room, segment.length)
                if row is None:
                    return count
                room[row] -= segment.length
        return len(indices)

    # -- where everything goes -------------------------------------------------------------------

    def _slots(self, index: int) -> tuple[Ids, list[Slot]]:
        """The prompt of an example and its filled slots."""
        example = self.examples[index]
        slots = list(enumerate(example.completion_ids))
        if self.belief_strings and example.belief is not None:
            slots += [(self.completions + m, ids) for m, ids in enumerate(example.belief.ids)]
        if self.supervised:
            slots.append((self.slots - 1 - self.mismatched, example.target_ids or ()))
        if self._mates is not None:
            # A longer prompt than the mate's may leave less room.
            room = self.config.row_length - len(example.prompt_ids) + 1
            other = self.examples[int(self._mates[index])].completion_ids[0]
            slots.append((self.slots - 1, other[:room]))
        return example.prompt_ids, slots

    def _segments(self, p: int, index: int) -> list[_Segment]:
        prompt, slots = self._slots(index)
        if self.config.layout == "shared_prompt":
            return [_Segment(p, prompt, slots)]
        return [_Segment(p, prompt, [slot]) for slot in slots]

    def _place(self, segments: Sequence[_Segment]) -> list[tuple[int, int]] | None:
        """Row and first position of every segment; None if they do not fit."""
        if self.config.rows is None:
            shared = self.config.layout == "shared_prompt"
            return [
                (s.example if shared else s.example * self.slots + s.branches[0][0], 0)
                for s in segments
            ]
        room, placed = np.full(self.rows, self.config.row_length), []
        for segment in segments:
            row = _best_row(room, segment.length)
            if row is None:
                return None
            placed.append((row, self.config.row_length - int(room[row])))
            room[row] -= segment.length
        return placed

    def _fill(self, segments: Sequence[_Segment], placed: Sequence[tuple[int, int]]) -> Batch:
        shared = self.config.layout == "shared_prompt"
        shape = (self.rows, self.config.row_length)
        empty = {"segment_ids": -1, "owner": -1, "prompt_owner": -1}
        names = (*NAMES, "branch") if shared else NAMES
        arrays = {name: np.full(shape, empty.get(name, 0), np.int32) for name in names}
        for number, (segment, (row, start)) in enumerate(zip(segments, placed, strict=True)):
            out = {name: array[row] for name, array in arrays.items()}
            head = len(segment.prompt) - 1
            out["segment_ids"][start : start + segment.length] = number
            here = slice(start, start + head)
            out["tokens"][here], out["targets"][here] = segment.prompt[:-1], segment.prompt[1:]
            out["positions"][here] = np.arange(head)
            if segment.branches[0][0] == 0:
                out["prompt_owner"][here] = segment.example
            at = start + head
            for slot, ids in segment.branches:
                here = slice(at, at + len(ids))
                out["tokens"][here], out["targets"][here] = (segment.prompt[-1], *ids[:-1]), ids
                out["positions"][here] = np.arange(head, head + len(ids))
                out["owner"][here] = segment.example * self.slots + slot
                out["place"][here] = np.arange(len(ids))
                if shared:
                    out["branch"][here] = slot + 1
                at += len(ids)
        return arrays

    def _per_example(self, indices: np.ndarray) -> Batch:
        size = self.config.batch_size
        chosen = [self.examples[int(i)] for i in indices]

        def padded(values: Any, dtype: type, fill: Any = 0) -> np.ndarray:
            values = np.asarray(values, dtype)
            out = np.full((size, *values.shape[1:]), fill, dtype)
            out[: len(values)] = values
            return out

        batch = {
            "valid": np.arange(size) < len(indices),
            "example": padded(indices, np.int32, -1),
        }
        if "desirable" in self._fields:
            batch["desirable"] = padded([e.desirable for e in chosen], bool, False)
        for name in ("margin", "density_ratio"):
            if name in self._fields:
                batch[name] = padded([getattr(e, name) for e in chosen], np.float32)
        if "scores" in self._fields:
            rows = [_wide(e.scores or (), self.completions) for e in chosen]
            batch["scores"] = padded(rows, np.float32)
        if "belief" in self._fields:
            found = [e.belief for e in chosen if e.belief is not None]
            counts = np.array([len(b.target) for b in found])
            batch["belief_target"] = padded(
                [_wide(b.target, self.beliefs) for b in found], np.float32
            )
            batch["belief_mask"] = padded(np.arange(self.beliefs) < counts[:, None], bool, False)
            batch["belief_span"] = padded([b.span for b in found], np.int32)
            if not self.belief_strings:
                ids = [_wide([i[0] for i in b.ids], self.beliefs) for b in found]
                batch["belief_ids"] = padded(ids, np.int32)
        for name, column in self.columns.items():
            batch[name] = padded(column[indices], column.dtype.type)
        return batch

    def _belief_places(self, arrays: Batch, count: int) -> Batch:
        """Where the first token of each belief of the first completions is predicted."""
        places = np.zeros((2, self.config.batch_size), np.int32)
        rows, columns = np.nonzero((arrays["owner"] >= 0) & (arrays["place"] == 0))
        owner = arrays["owner"][rows, columns]
        first = owner % self.slots == 0
        places[:, owner[first] // self.slots] = rows[first], columns[first]
        return {"belief_row": places[0], "belief_position": places[1]}

    def _check(self, shared: bool) -> None:
        for name, column in self.columns.items():
            if len(column) != len(self):
                raise InputError(f"{name} has {len(column)} entries for {len(self)} examples")
        if not shared and self.rows < self.slots:
            raise InputError(f"data.rows {self.rows} cannot hold the {self.slots} of one example")
        for index, example in enumerate(self.examples):
            if not example.prompt_ids or not all(example.completion_ids):
                raise InputError(f"{example.identity}: an empty prompt or response")
            longest = max(segment.length for segment in self._segments(0, index))
            if longest > self.config.row_length:
                raise InputError(
                    f"{example.identity}: needs a row of {longest} tokens, data.row_length is "
                    f"{self.config.row_length}; set limits or a longer row"
                )


@dataclass(frozen=True)
class PreferenceBatches(Batches):
    """An endless, shuffled stream of batches of `PreferenceRows`, readable from any step.

    `batch_size` must be that of the rows. Without `rows`, a step takes the next `batch_size`
    examples of the stream; with it, as many as fit.
    """

    source: PreferenceRows = field()

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.source
        if self.batch_size != rows.config.batch_size:
            raise InputError(
                f"batch size {self.batch_size} differs from the rows' {rows.config.batch_size}"
            )
        if rows.rows % self.hosts[1]:
            raise InputError(f"{rows.rows} rows are not a multiple of {self.hosts[1]} hosts")

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of the first axes of a batch's arrays."""
        return {"batch size": self.batch_size, "rows of a batch": self.source.rows}

    def dataset(self) -> grain.MapDataset:
        """Returns this host's batches as a dataset indexed by step."""
        return grain.MapDataset.source(_Steps(self))

    @cached_property
    def stream(self) -> _Stream:
        """Which examples each step has."""
        return _Stream(self.source, Batches(self.source, self.batch_size, self.seed))


class _Stream:
    """Cuts the endless order of examples into steps; remembers where each step begins."""

    def __init__(self, rows: PreferenceRows, order: Batches):
        self._rows, self._size = rows, order.batch_size
        self._order = order.dataset()
        self._starts = [0]
        self._lock = threading.Lock()

    def indices(self, step: int) -> np.ndarray:
        """Returns the examples of a step."""
        if self._rows.config.rows is None:
            return self._order[step]["example"]
        with self._lock:
            while len(self._starts) <= step + 1:
                begin = self._starts[-1]
                ahead = self._between(begin, begin + self._size)
                self._starts.append(begin + self._rows.fitting(ahead.tolist()))
            return self._between(self._starts[step], self._starts[step + 1])

    def _between(self, start: int, stop: int) -> np.ndarray:
        first = start // self._size
        chunks = [self._order[c]["example"] for c in range(first, -(-stop // self._size))]
        return np.concatenate(chunks)[start - first * self._size : stop - first * self._size]


class _Steps:
    def __init__(self, batches: PreferenceBatches):
        self._batches = batches

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Batch:
        batches = self._batches
        return batches.source.batch(batches.stream.indices(step).tolist(), batches.hosts)


def _best_row(room: np.ndarray, length: int) -> int | None:
    """The row with the least room that is enough."""
    row = int(np.where(room >= length, room, np.iinfo(room.dtype).max).argmin())
    return row if room[row] >= length else None


@dataclass
class _Summary:
    """What is the same in all examples, or largest."""

    fields: set[str]
    completions: int = 0
    longest: int = 0
    beliefs: int = 0
    belief_strings: bool = False


def _summary(examples: Sequence[Example]) -> _Summary:
    names = ("desirable", "scores", "margin", "belief", "density_ratio")
    found = _Summary({name for name in names if getattr(examples[0], name) is not None})
    for example in examples:
        here = {name for name in names if getattr(example, name) is not None}
        if here != found.fields:
            odd = sorted(here ^ found.fields)[0]
            raise InputError(f"{example.identity}: some examples have `{odd}`, others do not")
        size, before = len(example.completion_ids), found.completions
        if example.scores is None and before and size != before:
            raise InputError(f"{example.identity}: {size} completions, others have {before}")
        found.completions = max(size, before)
        found.longest = max([found.longest, *map(len, example.completion_ids)])
        if example.belief is not None:
            found.beliefs = max(found.beliefs, len(example.belief.ids))
            found.belief_strings |= any(len(ids) != 1 for ids in example.belief.ids)
    return found


def _supervised_lengths(examples: Sequence[Example]) -> list[int]:
    for example in examples:
        if not example.target_ids:
            raise InputError(f"{example.identity}: the algorithm reads `target`, which is missing")
    return [len(example.target_ids or ()) for example in examples]


def _mates(examples: Sequence[Example]) -> np.ndarray:
    """For every example another one, whose prompt differs: the next such in a random circle."""
    numbers: dict[Ids, int] = {}
    prompts = np.array([numbers.setdefault(e.prompt_ids, len(numbers)) for e in examples])
    if len(numbers) < 2:
        raise InputError("mismatched completions need examples with at least two prompts")
    order = np.random.default_rng(0).permutation(len(prompts))
    ring = np.concatenate([order, order])
    mates = np.zeros(len(prompts), np.int64)
    # Backwards, the next element with another prompt is the neighbour or the neighbour's own next.
    after = np.zeros(len(ring), np.int64)
    after[-1] = ring[-1]
    for place in range(len(ring) - 2, -1, -1):
        neighbour = ring[place + 1]
        same = prompts[neighbour] == prompts[ring[place]]
        after[place] = after[place + 1] if same else neighbour
    mates[order] = after[: len(order)]
    return mates


def _wide(values: Sequence[Any], width: int) -> list[Any]:
    return [*values, *[0] * (width - len(values))]
