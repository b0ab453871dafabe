"""What must hold in a compiled program, read off its instructions.

gathers   no all-gather leaves more than the parameters of one layer
logits    no array holds a whole batch's scores over the vocabulary
kernel    attention is a fused kernel, so no array is as long as queries times keys
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.planning.collectives import Collective
from jaxllm.planning.hlo import Array, Module, made_arrays


@dataclass(frozen=True)
class Expected:
    """What a program is checked against; None where there is no such thing in it."""

    vocabulary: int | None = None
    """V."""
    width: int | None = None
    """D, to tell arrays of tokens by the vocabulary from the parameters."""
    tokens: int | None = None
    """Tokens that one chip scores at a time, all micro-batches apart."""
    chunk: int = 1024
    """Tokens of a chunk of the vocabulary loss; a chip with no more than these has one chunk."""
    tensor: int = 1
    """Ways that the vocabulary is split."""
    kernel: bool = False
    """Whether attention should be a kernel where there is one for the platform."""


def verdicts(
    module: Module,
    expected: Expected,
    gathers: Sequence[Collective],
    layer_bytes: float,
    kernels: Sequence[str],
    *,
    platform_has_kernel: bool,
) -> dict[str, str]:
    """Returns check -> `holds`, or in words what was found instead.

    Args:
      module: The compiled program.
      expected: What there is to check.
      gathers: Its all-gathers.
      layer_bytes: Of the largest layer's parameters.
      kernels: Names of the attention kernels found.
      platform_has_kernel: Whether it was compiled for a platform that has them.
    """
    found: dict[str, str] = {}
    largest = max(gathers, key=lambda one: one.nbytes, default=None)
    if largest is None or largest.nbytes <= layer_bytes:
        found["gathers"] = "holds"
    else:
        size = largest.nbytes / 1024**2
        found["gathers"] = f"{size:.1f} MiB gathered, a layer has {layer_bytes / 1024**2:.1f}"
    if expected.vocabulary is not None and expected.tokens is not None:
        most = most_scored(module, expected)
        whole = expected.tokens > expected.chunk and most >= expected.tokens
        found["logits"] = f"of all {most} tokens of a chip" if whole else "holds"
    if expected.kernel and platform_has_kernel:
        found["kernel"] = "holds" if kernels else "plain XLA"
    return found


def most_scored(module: Module, expected: Expected) -> int:
    """Returns of how many tokens the largest array over the vocabulary is, 0 if there is none.

    Arrays with an axis of the vocabulary, or of a chip's part of it, that are not shaped as a part
    of its parameters [V, D].
    """
    assert expected.vocabulary is not None
    sizes = {expected.vocabulary, -(-expected.vocabulary // expected.tensor)}
    return max((_others(array, sizes, expected.width) for array in made_arrays(module)), default=0)


def _others(array: Array, sizes: set[int], width: int | None) -> int:
    axes = [axis for axis, size in enumerate(array.shape) if size in sizes]
    if not axes:
        return 0
    rest = math.prod(size for axis, size in enumerate(array.shape) if axis != axes[-1])
    return 0 if width is not None and width % rest == 0 else rest
