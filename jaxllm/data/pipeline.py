"""The input pipeline: example order is a function of (seed, step), so resuming needs only the step.

Built on grain's `MapDataset`: random access all the way, reshuffled every epoch, and independent of
how many hosts read it. Each host reads only its own rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from jaxllm.errors import InputError

Example = dict[str, Any]
Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Anything with a length and random access to examples."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Returns one example: a dict of arrays and scalars."""
        ...


@dataclass(frozen=True)
class Batches:
    """An endless, shuffled stream of batches that can be read from any step."""

    source: Source
    batch_size: int
    """Examples per step over all hosts."""
    seed: int = 0
    transform: Callable[[Example, np.random.Generator], Example] | None = None
    """Applied to every example with a generator that depends on (seed, position) only."""
    threads: int = 2
    hosts: tuple[int, int] = (0, 1)
    """(this host's number, number of hosts); the training loop sets them to fit its mesh."""

    def __post_init__(self) -> None:
        if not len(self.source):
            raise InputError("the training data has no examples")
        if self.batch_size < 1 or self.batch_size % self.hosts[1]:
            raise InputError(
                f"batch size {self.batch_size} is not a positive multiple of {self.hosts[1]} hosts"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of the first axes of a batch's arrays, which devices split, by their names."""
        return {"batch size": self.batch_size}

    def dataset(self) -> grain.MapDataset:
        """Returns this host's batches as a dataset indexed by step."""
        host, hosts = self.hosts
        data = grain.MapDataset.source(self.source).seed(self.seed).shuffle().repeat(None)
        if self.transform is not None:
            transform = self.transform
            data = data.random_map(lambda example, rng: transform(example, rng))
        return data.batch(self.batch_size // hosts)[host::hosts]

    def batch(self, step: int) -> Batch:
        """Returns the batch of one step (0-indexed)."""
        return self.dataset()[step]

    def iterate(self, start: int = 0) -> Generator[Batch]:
        """Yields batches from step `start` on, prefetched by threads that end with it."""
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=8)
        iterator = iter(self.dataset()[start:].to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()


def stack_examples(source: Source, indices: range | list[int] | None = None) -> Batch:
    """Returns the examples of a finite source as one batch, in order."""
    rows = [source[i] for i in (range(len(source)) if indices is None else indices)]
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}


def padded_batches(arrays: Batch, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """Yields (batch, real rows) over `arrays` in order; the last one is padded by repeating row 0.

    Every batch has the same shape, so that an evaluation compiles once.
    """
    total = len(next(iter(arrays.values())))
    for start in range(0, total, batch_size):
        index = np.arange(start, start + batch_size)
        index[index >= total] = 0
        yield {name: value[index] for name, value in arrays.items()}, min(batch_size, total - start)
