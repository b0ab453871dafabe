"""The shared start of every script in train/: config file, overrides, run folder, errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError, run_command
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.parallel.processes import end_together, first_process, start_distributed
from jaxllm.training.run_folder import load_config, override


def main(
    kinds: type | tuple[type, ...],
    run: Callable[[Any, Path], Any],
    arguments: Sequence[str] | None = None,
    *,
    prepare: Callable[[list[str]], list[str]] = list,
) -> None:
    """Parses `CONFIG.py [--dotted.key value ...] [--workdir DIR]`, calls `run(config, workdir)`.

    `prepare` may rewrite the arguments.

    Exits with 0 when the run finished or a signal stopped it after saving, and with 2 and one line
    on bad input.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run_command(lambda: _main(kinds, run, prepare(given))))


def _main(kinds: type | tuple[type, ...], run: Callable[[Any, Path], Any], given: list[str]) -> int:
    if not given or given[0].startswith("-"):
        raise InputError("usage: CONFIG.py [--dotted.key value ...] [--workdir DIR]")
    path, rest = Path(given[0]), given[1:]
    workdir = Path("runs") / path.stem
    for number, argument in enumerate(rest):
        if argument == "--workdir" or argument.startswith("--workdir="):
            inline = "=" in argument
            if not inline and number + 1 == len(rest):
                raise InputError("--workdir needs a folder")
            workdir = Path(argument.split("=", 1)[1] if inline else rest[number + 1])
            rest = rest[:number] + rest[number + (1 if inline else 2) :]
            break
    config = override(load_config(path), rest)
    if not isinstance(config, kinds):
        names = (
            kinds.__name__ if isinstance(kinds, type) else " or ".join(k.__name__ for k in kinds)
        )
        raise InputError(f"config {path}: is a {type(config).__name__}, this script needs {names}")
    mesh = getattr(config, "mesh", MeshConfig(distributed="off"))
    start_distributed(mesh.distributed, lost_after=mesh.lost_after)
    if not first_process():
        logging.getLogger().setLevel(logging.ERROR)
    with end_together():
        run(config, workdir)
    return 0
