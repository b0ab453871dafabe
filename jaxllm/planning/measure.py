"""Compiles a planned program and writes down everything that the compiled text says."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllm.planning import checks, flops, memory
from jaxllm.planning.collectives import find_collectives, summed
from jaxllm.planning.hlo import Array, Module, made_arrays, parse
from jaxllm.planning.programs import Planned
from jaxllm.planning.topologies import Topology
from jaxllm.planning.traffic import memory_bytes


def measure(planned: Planned, topology: Topology, mesh: Mesh) -> dict[str, Any]:
    """Returns the figures of a program as JSON values; call it with `mesh` in context.

    `memory.fits` is False, and there are no other figures, when the compiler found no way to hold
    the program; `unread` says why there are no others when the compiled text cannot be read.
    """
    parts = {name: memory.per_chip(part) for name, part in planned.parts.items()}
    shape = [mesh.shape[axis] for axis in mesh.axis_names]
    figures: dict[str, Any] = {
        "program": planned.name,
        "mesh": dict(zip(mesh.axis_names, shape, strict=True)),
        "parts": parts,
        "model_flops": planned.model_flops,
        "tokens": planned.tokens,
    }
    held = sum(parts.values())
    if topology.chip is not None and held > topology.chip.hbm_bytes:
        # What comes in is already too much; the compiler could only take minutes to say so.
        limit = float(topology.chip.hbm_bytes)
        figures["memory"] = {"fits": False, "peak": held, "limit": limit}
        return figures
    with tempfile.TemporaryDirectory() as folder:
        text = _compile(planned, topology, figures, Path(folder))
    if text is None:
        return figures
    module = parse(text)
    figures |= _of_text(module, topology, shape, planned)
    figures["flops"]["compiler_says"] = figures.pop("compiler_says")
    return figures


def _compile(
    planned: Planned, topology: Topology, figures: dict[str, Any], folder: Path
) -> str | None:
    """Compiles, adds times and memory to `figures`, and returns the text, None where there is none.

    A libtpu newer than jaxlib may write instructions that jaxlib cannot read back, so the compiler
    writes the text to a folder as well.
    """
    start = time.perf_counter()
    lowered = planned.function.lower(*planned.arguments)
    traced = time.perf_counter()
    try:
        compiled = lowered.compile(
            compiler_options=None
            if topology.chip is None
            else {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
        )
    except jax.errors.JaxRuntimeError as error:
        found = memory.refused(str(error))
        if found is None:
            raise
        needed, limit = found
        figures["memory"] = {"fits": False, "peak": needed, "limit": limit}
        return None
    figures["seconds"] = {"trace": traced - start, "compile": time.perf_counter() - traced}
    figures["memory"] = {"fits": True, **memory.of_compiled(compiled).plain()}
    try:
        text: str = compiled.as_text()
        figures["compiler_says"] = (compiled.cost_analysis() or {}).get("flops")
        return text
    except jax.errors.JaxRuntimeError as error:
        figures["compiler_says"] = None
        written = sorted(folder.glob("*.after_codegen.txt"), key=lambda file: file.stat().st_size)
        if written:
            return written[-1].read_text(encoding="utf-8")
        figures["unread"] = str(error).splitlines()[0]
        return None


def _of_text(
    module: Module, topology: Topology, shape: list[int], planned: Planned
) -> dict[str, Any]:
    # Slices divide the axis `data`, and the text is that of one of them.
    every = find_collectives(module, topology, [shape[0] // topology.slices, *shape[1:]])
    gathered = [one for one in every if one.kind == "all-gather"]
    largest = max(gathered, key=lambda one: one.nbytes, default=None)
    kernels = flops.kernel_flops(module)
    array = largest_array(module)
    return {
        "flops": {
            "products": flops.compiled_flops(module),
            "kernels": sum(kernels.values()),
        },
        "memory_bytes": memory_bytes(module),
        "collectives": [one.plain() for one in summed(every)],
        "largest_gather": None if largest is None else largest.plain(),
        "largest_array": {
            "type": f"{array.dtype}[{','.join(map(str, array.shape))}]",
            "nbytes": array.nbytes,
        },
        "layer_bytes": planned.layer_bytes,
        "attention_kernels": sorted(kernels),
        "checks": checks.verdicts(
            module,
            planned.expected,
            gathered,
            planned.layer_bytes,
            sorted(kernels),
            platform_has_kernel=topology.chip is not None,
        ),
        "loops": sum(line.opcode == "while" for _, line, _ in module.instructions()),
    }


def largest_array(module: Module) -> Array:
    """Returns the largest array that the program itself makes, as one device holds it."""
    return max(made_arrays(module), key=lambda array: array.nbytes)
