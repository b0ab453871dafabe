"""Compiled programs as text, read: computations, instructions, and how often each one runs.

The compiler's own counts take the body of a loop once; here a computation's count is multiplied by
the trips of the loops it lies in. A trip count is the compiler's annotation, or else the constant
that the loop's condition compares with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\([1-9]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Array:
    """Type and shape of one array, as one device holds it."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False
    """In a memory of its own beside the arithmetic (VMEM, SMEM), not in HBM."""

    @property
    def nbytes(self) -> float:
        """Bytes without padding."""
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    """What follows the operands."""
    arguments: str
    """The text between the parentheses."""

    def called(self) -> list[str]:
        """Returns the computations that it names."""
        found = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            found += _NAME.findall(group)
        return found

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return None if found is None else found[1]


@dataclass
class Module:
    """A compiled program."""

    computations: dict[str, list[Instruction]]
    entry: str
    runs: dict[str, float] = field(default_factory=dict)
    """How often one call of the program runs each computation; branches count as taken."""

    def by_name(self, computation: str) -> dict[str, Instruction]:
        """Returns the instructions of a computation by name, for looking up operands."""
        return {line.name: line for line in self.computations[computation]}

    def instructions(self) -> Iterator[tuple[str, Instruction, float]]:
        """Yields (computation, instruction, how often it runs)."""
        for name, lines in self.computations.items():
            for line in lines:
                yield name, line, self.runs.get(name, 0.0)


def made_arrays(module: Module) -> Iterator[Array]:
    """Yields the arrays that a program itself makes, as one device holds them.

    What only passes through, such as the parameters that a loop carries, does not count.
    """
    passed = ("parameter", "tuple", "get-tuple-element", "while", "conditional", "call", "bitcast")
    for _, line, times in module.instructions():
        if times and line.opcode not in passed:
            yield from line.results


def parse(text: str) -> Module:
    """Returns the program of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None
    for line in _whole_lines(text):
        if head := _HEAD.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None and (found := _LINE.match(line)):
            lines.append(_instruction(found[1], found[2]))
    module = Module(computations, entry)
    _count_runs(module)
    return module


def _whole_lines(text: str) -> Iterator[str]:
    """Yields lines; those that an attribute of several lines was broken into are one."""
    whole = ""
    for line in text.splitlines():
        if line.rstrip() == "}" or _HEAD.match(line) or _LINE.match(line):
            yield whole
            whole = line
        else:
            whole += line
    yield whole


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, call = rest[:end], rest[end:].lstrip()
    opcode, _, _ = call.partition("(")
    close = _closing(call, len(opcode))
    arguments = call[len(opcode) + 1 : close]
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), bool(_SPACE.search(layout)))
        for dtype, shape, layout in _ARRAY.findall(kind)
        if dtype in ITEM_BYTES
    )
    operands = tuple(_NAME.findall(arguments))
    return Instruction(name, opcode, arrays, operands, call[close + 1 :], arguments)


def _closing(text: str, start: int) -> int:
    """Returns the place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    return len(text)


def _count_runs(module: Module) -> None:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in module.computations:
            return
        seen.add(name)
        for line in module.computations[name]:
            for called in line.called():
                visit(called)
        order.append(name)

    visit(module.entry)
    runs = dict.fromkeys(order, 0.0)
    runs[module.entry] = 1.0
    for name in reversed(order):  # Callers before what they call.
        for line in module.computations[name]:
            times = runs[name] * (trip_count(module, line) if line.opcode == "while" else 1)
            for called in line.called():
                if called in runs:
                    runs[called] += times
    module.runs = runs


def trip_count(module: Module, loop: Instruction) -> int:
    """Returns how often a loop runs, 1 where the text does not say.

    Without an annotation it is N / k of the condition `counter < N` and of the body's
    `counter + k`: loops made from `lax.scan` count up from 0, by more than 1 once unrolled.
    """
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    condition = loop.attribute(r"condition=%([\w.\-]+)") or ""
    for line in _reached(module, condition):
        if line.opcode == "constant" and line.results and line.results[0].dtype in ("s32", "u32"):
            if line.arguments.isdigit() and int(line.arguments) > 0:
                return -(-int(line.arguments) // _stride(module, loop, condition))
    return 1


def _stride(module: Module, loop: Instruction, condition: str) -> int:
    """Returns by how much the body counts up; 1 where it cannot be read."""
    places = [
        int(line.attribute(r"index=(\d+)") or 0)
        for line in module.computations.get(condition, [])
        if line.opcode == "get-tuple-element"
    ]
    body = loop.attribute(r"body=%([\w.\-]+)") or ""
    known = module.by_name(body) if body in module.computations else {}
    root = module.computations[body][-1] if known else None
    if not places or root is None or places[0] >= len(root.operands):
        return 1
    step = known.get(root.operands[places[0]])
    if step is None or step.opcode != "add":
        return 1
    constants = [known[name].arguments for name in step.operands if name in known]
    return max(1, next((int(text) for text in constants if text.isdigit()), 1))


def _reached(module: Module, name: str) -> Iterator[Instruction]:
    for line in module.computations.get(name, []):
        yield line
        for called in line.called():
            yield from _reached(module, called)
