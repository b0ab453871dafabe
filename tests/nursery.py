"""Starts Python scripts as processes that need not import jax and jaxllm anew.

    with Nursery() as nursery:
        child = nursery.start(script, "--option", 3, log=path, environment={"NAME": "value"})
        group = nursery.start_together(4, script, "--option", 3, logs=path)

A nursery is a process that has imported what most scripts need and has touched no device. Each
child is forked from it and then is a process like any other: it runs the script as `__main__` with
its own arguments and environment, prints to `log`, gets signals, and ends as Python ends.
"""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Nursery:
    """Where children are forked; a context manager, at whose end none is left."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # JAX warns of forks, not knowing that no device is open.
            text=True,
        )
        self._children = []

    def start(self, script, *arguments, log, environment=()):
        """Returns the running child."""
        log.write_text("")  # Nobody must take what was printed before for its words.
        order = {
            "script": str(script),
            "arguments": list(map(str, arguments)),
            "environment": {name: str(value) for name, value in dict(environment).items()},
            "log": str(log),
        }
        child = Child(self, self.ask(order), log)
        self._children.append(child)
        return child

    def start_together(self, count, script, *arguments, logs, environment=lambda number: {}):
        """Returns `count` running processes of one run; number n prints to `logs` + ".n".

        `environment` gives what each finds in its environment, by its number.
        """
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        meeting = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": count}
        return [
            self.start(
                script,
                *arguments,
                log=logs.with_suffix(f".{number}"),
                environment={**meeting, "JAX_PROCESS_ID": number, **environment(number)},
            )
            for number in range(count)
        ]

    def ask(self, order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for child in self._children:
            child.end()
        self._process.stdin.close()
        self._process.wait(30)


class Child:
    """One process; what it prints is in `log`."""

    def __init__(self, nursery, pid, log):
        self._nursery, self.pid, self.log, self._code = nursery, pid, log, None

    def poll(self):
        """The exit code, minus the number of the signal that killed it, or None if it runs."""
        if self._code is None:
            self._code = self._nursery.ask({"poll": self.pid})
        return self._code

    def wait(self, timeout):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"process {self.pid} still runs: {self.printed}"
            time.sleep(0.01)
        return self._code

    def send_signal(self, number):
        if self.poll() is None:  # The number of a process that has ended may be another's.
            os.kill(self.pid, number)

    def end(self):
        self.send_signal(signal.SIGKILL)
        self.wait(30)

    @property
    def printed(self):
        """What it printed, without what the runtime says by itself."""
        # Threads of Gloo print in pieces, so that its lines get into each other.
        noise = re.compile(r"^([IWE]\d{4} .*|.*(\[Gloo\]|peer ranks).*|[\d ]*)\n", re.MULTILINE)
        return noise.sub("", self.log.read_text())


def _serve():
    """Answers orders until a child is born, to which it returns what to run; None at the end."""
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            return order
        print(pid, flush=True)
    return None


def _become(order):
    """Makes this the process that the order describes, and runs its script."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_TRUNC)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.environ.update(order["environment"])
    sys.argv = [order["script"], *order["arguments"]]
    sys.path[0] = str(Path(order["script"]).parent)
    runpy.run_path(order["script"], run_name="__main__")


if __name__ == "__main__":
    import jaxllm.cli.train
    import jaxllm.training.language_model
    import jaxllm.training.loop  # noqa: F401

    found = _serve()
    if found is not None:
        _become(found)
