"""Several processes as one run: start, shared decisions, and an end that no process misses.

JAX runs the same program in every process, and each collective waits for all of them. So whatever
decides what is run next (which checkpoint, whether to evaluate) is decided by one process and told
to the others, and a process that fails says so before it ends: the others would wait for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.errors import InputError

_FAILED = "jaxllm/failed"
_ENDED = "jaxllm/ended"
_POLL = 0.25
# Seconds that the first process, which carries the messages, stays for the others to read them.
_LINGER = 5.0
# Seconds in which a process that fails has told so, before others notice that it has gone.
_TOLD_WITHIN = 2.0
# Set when this process has said why it ends.
_leaving = threading.Event()


def start_distributed(mode: Literal["auto", "on", "off"] = "auto", *, lost_after: int = 20) -> None:
    """Connects the processes of a multi-host run; must come before anything asks for devices.

    Where JAX finds no pod, Slurm or Kubernetes by itself, JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say where the processes meet.

    Args:
      mode: `auto` connects when the environment names more than one worker.
      lost_after: Seconds without a sign of life after which a process counts as lost, and the
        others end.

    Raises:
      InputError: If a number in the environment is none, or some of the three are missing.
    """
    if mode == "off" or (mode == "auto" and not _many_workers()):
        return
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(**_from_environment(), heartbeat_timeout_seconds=lost_after)


def _many_workers() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    sizes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "JAX_NUM_PROCESSES"))
    return "," in hosts or any(size.isdigit() and int(size) > 1 for size in sizes)


def _from_environment() -> dict[str, Any]:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = {name: os.environ.get(name) for name in names}
    if values["JAX_NUM_PROCESSES"] is None and values["JAX_PROCESS_ID"] is None:
        return {}
    for name, value in values.items():
        if value is None:
            raise InputError(f"{name} is not set, but others of {', '.join(names)} are")
        if name != names[0] and not value.isdigit():
            raise InputError(f"{name} {value!r} is not a number")
    address, count, number = (str(value) for value in values.values())
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(number),
    }


def first_process() -> bool:
    """Returns whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


def agreed(value: int) -> int:
    """Returns the first process's `value` in every process; all must call it at the same place."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(place: str) -> None:
    """Blocks until every process is at the same `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def fetch(array: jax.Array) -> np.ndarray:
    """Returns the whole of an array, also where parts of it are on devices of other processes.

    All processes must call it at the same place.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def gathered(value: Any) -> list[Any]:
    """Returns every process's `value`, a JSON tree, in the order of the processes.

    All processes must call it at the same place.
    """
    if jax.process_count() == 1:
        return [value]
    told = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(told)))
    # In powers of two, so that values of similar size share one compiled gather.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(told)] = told
    parts = multihost_utils.process_allgather(padded)
    return [json.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Ends every process of a run, promptly and with one exit code, when one of them fails.

    In the body of a `with`, an exception prints its reason (one line for an InputError, else a
    traceback), tells the other processes, which name this one and its reason, and ends the process
    without waiting for collectives that will never complete. A process that was killed tells
    nothing: the others notice by a collective that fails at once, or by JAX's own heartbeat, see
    `start_distributed`, at which JAX aborts the process; that too ends with a line that says so.
    With one process, nothing is changed.
    """
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), name="end_together", daemon=True)
    watch.start()
    with _last_words():
        try:
            yield
        except BaseException as error:
            over.set()
            watch.join(1.0)  # It may have news, and is then about to end this process.
            if _is_lost_connection(error):
                _wait_for_reason()
            _end(*_reason(error))
    over.set()
    watch.join()


@contextlib.contextmanager
def _last_words() -> Iterator[None]:
    """Says in one line how it goes on where JAX aborts the process, and makes that an exit code.

    JAX calls abort() from a thread of its own when it misses a process. Python's signal handlers
    run in the main thread only, which waits in a collective, so this is a handler of C's.
    """
    number, count = jax.process_index(), jax.process_count()

    def said(_: int) -> None:
        if not _leaving.is_set():
            print(
                f"error: process {number} of {count} was aborted by the runtime (see above; most "
                "often it has lost another process); the same command resumes",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    install = ctypes.CDLL(None).signal
    install.restype, install.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(said)
    before = install(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        install(signal.SIGABRT, before)


def _reason(error: BaseException) -> tuple[str, int]:
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
        return str(error), 2
    if _is_lost_connection(error):
        first = str(error).splitlines()[0]
        number, count = jax.process_index(), jax.process_count()
        print(
            f"error: process {number} of {count} has lost another process ({first}); the same "
            "command resumes",
            file=sys.stderr,
        )
        return "another process is lost", 1
    if isinstance(error, SystemExit):
        return f"exit {error.code}", error.code if isinstance(error.code, int) else 1
    traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return f"{type(error).__name__}: {error}".splitlines()[0], 1


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because a process at its other end has gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        words in str(error)
        for words in ("Connection", "connection", "Socket closed", "Broken pipe")
    )


def _wait_for_reason() -> None:
    """Ends this process as the one that has gone said, if it says why in time."""
    deadline = time.monotonic() + _TOLD_WITHIN
    while time.monotonic() < deadline:
        _follow()
        time.sleep(_POLL)


def _service() -> Any:
    # JAX has no public face for the key-value store that its processes share.
    from jax._src import distributed

    return distributed.global_state.client


def _end(reason: str, code: int) -> None:
    number = jax.process_index()
    told = json.dumps({"process": number, "reason": reason, "code": code})
    with contextlib.suppress(Exception):  # Another process was first.
        _service().key_value_set(_FAILED, told)
    _leave(code)


def _leave(code: int) -> None:
    _leaving.set()
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        _service().key_value_set(f"{_ENDED}/{jax.process_index()}", "")
        deadline = time.monotonic() + _LINGER
        while first_process() and time.monotonic() < deadline:
            if len(_service().key_value_dir_get(_ENDED)) == jax.process_count():
                break
            time.sleep(_POLL)
    os._exit(code)  # An orderly exit would wait for the others at a barrier.


def _watch(over: threading.Event) -> None:
    while not over.wait(_POLL):
        _follow()


def _follow() -> None:
    """Ends this process if another has failed, naming it and its reason."""
    try:
        told = json.loads(_service().key_value_try_get(_FAILED))
    except Exception:  # Nobody has failed, or the service is gone and JAX ends this process.
        return
    number, count = jax.process_index(), jax.process_count()
    if told["process"] == number:
        return
    print(
        f"error: process {told['process']} of {count} failed ({told['reason']}); "
        f"process {number} ends with it, the same command resumes",
        file=sys.stderr,
    )
    _leave(told["code"])
