"""Runs one side of a benchmark in a process of its own.

Sides on one accelerator cannot share its memory: what a framework has taken it keeps until its
process ends. So each side gets a process, and the next begins when that has ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from jaxllm.errors import InputError

OUR_SIDE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
"""JAX takes nearly all memory of the card at once."""
TORCH_SIDE = {"JAX_PLATFORMS": "cpu"}
"""JAX makes the parameters beside PyTorch, and takes nothing of the card."""
_NO_MEMORY = ("resource_exhausted", "out of memory", "outofmemory")


class SideFailed(RuntimeError):
    """A side that did not run; the message is one line.

    Attributes:
      details: The traceback of its process.
    """

    def __init__(self, reason: str, details: str = ""):
        super().__init__(" ".join(reason.split())[:300])
        self.details = details


class Runner(Protocol):
    """Calls a function with arguments, somewhere, and returns its result."""

    def __call__(
        self, function: Callable[..., Any], *args: Any, environment: Mapping[str, str]
    ) -> Any:
        """Calls `function(*args)` under additional environment variables."""
        ...


def run_apart(
    function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """Calls `function(*args)` in a fresh process, waits for its end and returns the result.

    Args:
      function: A function of a module; that and arguments and result are pickled.
      *args: Its arguments.
      environment: Variables that the process has besides this one's.

    Raises:
      InputError: The function raised one.
      SideFailed: It raised something else, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, args))
    with _environment(environment or {}):
        child.start()
    sender.close()
    try:
        kind, value, details = receiver.recv()
    except EOFError:
        child.join()
        raise SideFailed(f"its process ended with code {child.exitcode}") from None
    child.join()
    if kind == "refused":
        raise InputError(value)
    if kind == "failed":
        raise SideFailed(value, details)
    return value


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error of JAX, PyTorch or a side says that memory ran out."""
    text = f"{type(error).__name__} {error}".lower()
    return any(sign in text for sign in _NO_MEMORY)


def _answer(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Sends ("done", result, ""), ("refused", message, "") or ("failed", message, traceback)."""
    try:
        answer = ("done", function(*args), "")
    except InputError as error:
        answer = ("refused", str(error), "")
    except Exception as error:
        answer = ("failed", f"{type(error).__name__}: {error}", traceback.format_exc())
    sender.send(answer)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Sets variables while a process starts, which inherits them."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
