"""Several processes as one run: start, shared decisions, and an end that no process misses.

JAX runs the same program in every process, and each collective waits for all of them. So whatever
decides what is run next (which checkpoint, whether to evaluate) is decided by one process and told
to the others, and a process that fails says so before it ends: the others would wait for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
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


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Ends every process of a run, promptly and with one exit code, when one of them fails.

    In the body of a `with`, an exception prints its reason (one line for an InputError, else a
    traceback), tells the other processes, which name this one and its reason, and ends the process
    without waiting for collectives that will never complete. A process that was killed and tells
    nothing is noticed by JAX's own heartbeat, see `start_distributed`. With one process, nothing
    is changed.
    """
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), name="end_together", daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        over.set()
        _end(*_reason(error))
    over.set()
    watch.join()


def _reason(error: BaseException) -> tuple[str, int]:
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
        return str(error), 2
    if isinstance(error, SystemExit):
        return f"exit {error.code}", error.code if isinstance(error.code, int) else 1
    traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return f"{type(error).__name__}: {error}".splitlines()[0], 1


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
        try:
            told = json.loads(_service().key_value_try_get(_FAILED))
        except Exception:  # Nobody has failed, or the service is gone and JAX ends this process.
            continue
        if not over.is_set():
            number, count = jax.process_index(), jax.process_count()
            print(
                f"error: process {told['process']} of {count} failed ({told['reason']}); "
                f"process {number} ends with it, the same command resumes",
                file=sys.stderr,
            )
            _leave(told["code"])
