"""Bytes that a compiled program moves between memory and arithmetic, on one device.

Every instruction that is not part of a fusion reads its operands and writes its results once. Of an
operand that a fusion only slices the slice counts, of a result that a fusion updates in place the
update; a buffer that passes through an instruction (that of a transfer under way, say) and arrays
in on-chip memory do not count. Caches are not modelled, so on a CPU this is an upper
bound.
"""

from __future__ import annotations

import re

from jaxllm.planning.hlo import Instruction, Module

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "domain",
}  # fmt: skip
_PASSED = re.compile(r"\{(\d*)\}: \((\d+), \{")
_SLICES = {"dynamic-slice", "slice", "gather"}


def memory_bytes(module: Module) -> float:
    """Returns the bytes read and written in one call, loops counted."""
    fused = {
        called
        for _, line, _ in module.instructions()
        if line.opcode not in ("while", "conditional", "call")
        for called in line.called()
    }
    total = 0.0
    for computation, lines in module.computations.items():
        times = module.runs.get(computation, 0.0)
        if times == 0 or computation in fused:
            continue
        known = module.by_name(computation)
        for line in lines:
            if line.opcode not in _FREE and not line.opcode.endswith("-done"):
                total += times * _moved(module, line, known)
    return total


def _moved(module: Module, line: Instruction, known: dict[str, Instruction]) -> float:
    if line.opcode.endswith("-start") or line.opcode == "async-update":
        return _transferred(line, known)
    body = module.computations.get(next(iter(line.called()), ""), [])
    written = _written(line, body, known)
    if line.opcode in _SLICES:
        return 2 * written
    if line.opcode == "dynamic-update-slice":
        return 2 * _bytes(known.get(line.operands[1]))
    passed = _passed(line)
    written -= sum(
        line.results[at].nbytes for at in passed if at < len(line.results)
        and len(line.results) > 1 and not line.results[at].on_chip
    )  # fmt: skip
    read = 0.0
    for number, name in enumerate(line.operands):
        if number in passed.values() and len(line.results) > 1:
            continue
        operand = known.get(name)
        part = _sliced(body, number) if line.opcode == "fusion" else None
        read += _bytes(operand) if part is None else min(part, _bytes(operand))
    return read + written


def _transferred(line: Instruction, known: dict[str, Instruction]) -> float:
    """Bytes of a transfer's start, whose results are what it reads, what it writes and flags.

    Of what it reads only as much counts as it writes: a slice, mostly into on-chip memory, or rows
    of a table. A sparse core's transfer may start without operands and be handed them by an update.
    """
    operands = line.operands[1:] if line.opcode == "async-update" else line.operands
    if not operands:
        return 0.0
    place = 0 if line.opcode == "copy-start" else len(operands)
    target = line.results[min(place, len(line.results) - 1)]
    source = known.get(operands[0])
    read = source is None or not source.results[0].on_chip
    return target.nbytes * (int(read) + int(not target.on_chip))


def _passed(line: Instruction) -> dict[int, int]:
    """Returns result number -> operand number of the buffers that pass through."""
    found = line.attribute(r"output_to_operand_aliasing=(\{(?:\{[^}]*\}: \([^)]*\),? ?)*\})")
    pairs = _PASSED.findall(found or "")
    return {int(result or 0): int(operand) for result, operand in pairs}


def _bytes(line: Instruction | None) -> float:
    if line is None:
        return 0.0
    return sum(array.nbytes for array in line.results if not array.on_chip)


def _written(line: Instruction, body: list[Instruction], known: dict[str, Instruction]) -> float:
    del known
    if line.opcode == "fusion" and body and body[-1].opcode == "dynamic-update-slice":
        inside = {part.name: part for part in body}
        return _bytes(inside.get(body[-1].operands[1]))
    return _bytes(line)


def _sliced(body: list[Instruction], number: int) -> float | None:
    """Returns the bytes that a fusion reads of a parameter it only slices, else None.

    Of a buffer that it updates in place it reads nothing.
    """
    parameter = next(
        (p for p in body if p.opcode == "parameter" and p.arguments == str(number)), None
    )
    if parameter is None:
        return None
    names = {parameter.name}
    total = 0.0
    for part in body:
        if not names & set(part.operands):
            continue
        if part.opcode == "bitcast":
            names.add(part.name)
        elif part.opcode in _SLICES and part.operands[0] in names:
            total += sum(array.nbytes for array in part.results)
        elif part.opcode == "dynamic-update-slice" and part.operands[0] in names:
            continue
        else:
            return None
    return total
