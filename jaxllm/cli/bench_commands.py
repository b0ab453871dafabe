"""`jaxllm bench NAME`: which benchmark a name is, and its section of a Markdown page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.cli.show import write_section
from jaxllm.data.records import check_target
from jaxllm.errors import InputError


class Bench(NamedTuple):
    """One benchmark.

    Attributes:
      run: Takes `repeats`, `batches` and `threads` and returns the result.
      batches: Batch sizes unless others are asked for.
      options: Further options that `run` takes.
    """

    run: Callable[..., dict[str, Any]]
    batches: tuple[int, ...]
    options: tuple[str, ...] = ()


def _dnd(**options: Any) -> dict[str, Any]:
    from jaxllm.images.bench import bench_dnd

    return bench_dnd(**options)


def _decode(**options: Any) -> dict[str, Any]:
    from jaxllm.decoding.bench import bench_decode

    return bench_decode(**options)


def _train(**options: Any) -> dict[str, Any]:
    from jaxllm.training.bench import bench_train

    return bench_train(**options)


def _headkv(**options: Any) -> dict[str, Any]:
    from jaxllm.kvcompress.bench import bench_headkv

    return bench_headkv(**options)


def _preference(**options: Any) -> dict[str, Any]:
    from jaxllm.preference.bench import bench_preference

    return bench_preference(**options)


def _gpu(**options: Any) -> dict[str, Any]:
    from jaxllm.cli.bench_gpu import bench_gpu

    return bench_gpu(**options)


_GPU_OPTIONS = ("parts", "peak_tflops", "bandwidth")
BENCHES = {
    "dnd": Bench(_dnd, (1, 4, 16)),
    "decode": Bench(_decode, (1, 8)),
    "train": Bench(_train, (8,)),
    "headkv": Bench(_headkv, (1, 4)),
    "preference": Bench(_preference, (4,)),
    "gpu": Bench(_gpu, (), _GPU_OPTIONS),
}


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark that was named; `--output` replaces its section of a page."""
    chosen = BENCHES[options.name]
    batches = list(chosen.batches if options.batch is None else options.batch)
    if min(options.repeats, options.threads, *batches) < 1:
        raise InputError("--repeats, --batch and --threads must be at least 1")
    more = {name: getattr(options, name) for name in _GPU_OPTIONS}
    for name, value in more.items():
        if value is not None and name not in chosen.options:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is not an option of bench {options.name}")
    if options.output is not None:
        check_target(Path(options.output))
    result = chosen.run(
        repeats=options.repeats,
        batches=batches,
        threads=options.threads,
        **{name: more[name] for name in chosen.options},
    )
    if options.output is not None:
        write_section(Path(options.output), f"jaxllm bench {options.name}", result)
    return result
