"""Floating-point operations of matrix products: by formula, and of the compiled program.

By formula, a token's forward pass costs 2 P, P being the weights of all matrix products with the
output projection and without the embedding table, and its attention 2 T N H a layer, half of the
full square since later keys are hidden. Training costs three times the forward pass, whatever is
computed again to save memory. This is the numerator of model FLOPs utilisation (MFU).

The compiled program's count adds up its matrix products and convolutions as one device runs them,
times the trips of their loops; what is computed again and what several devices each do count here.
"""

from __future__ import annotations

import math
import re

import numpy as np

from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.dnd import DnDConfig
from jaxllm.nn.mlp import swiglu_hidden
from jaxllm.planning.hlo import Array, Instruction, Module

TRAINING = 3.0
"""Forward and two products a weight backward."""
# Matrix products over the T x S square in the kernels of attention (splash): scores and values
# forward; scores again, their gradient and the queries' backward; the same and the values' instead.
KERNEL_PRODUCTS = {"_fwd": 2, "_dq": 3, "_dkv": 4}
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")


def decoder_flops(config: DecoderConfig, tokens: int, length: int) -> float:
    """Returns the FLOPs of the forward pass of `tokens` tokens in rows of `length`.

    Args:
      config: The model.
      tokens: Over all rows.
      length: Tokens of a row, T; a layer with a sliding window w sees min(T, w) of them. Packed
        rows count as if they were one document.
    """
    a, hidden = config.attention, config.mlp.hidden
    gates = 3 if config.mlp.gated else 2
    layer = config.dim * a.head_dim * (2 * a.heads + 2 * a.kv_heads) + gates * config.dim * hidden
    weights = config.layers * layer + config.dim * config.vocab_size
    seen = 0.0
    for window in config.layer_windows:
        w = length if window is None else min(window, length)
        seen += w * (1 - w / (2 * length))  # mean keys a query sees
    return tokens * (2.0 * weights + 4.0 * a.heads * a.head_dim * seen)


def decode_flops(config: DecoderConfig, rows: int, entries: float) -> float:
    """Returns the FLOPs of one new token in each of `rows` rows.

    Args:
      config: The model.
      rows: B.
      entries: Keys that a query sees, mean over layers and heads.
    """
    a = config.attention
    attention = 4.0 * a.heads * a.head_dim * config.layers * entries
    return rows * (decoder_flops(config, 1, 1) + attention)


def code_model_flops(config: DnDConfig, images: int) -> float:
    """Returns the FLOPs of the forward pass of a DnD-Transformer, or one of its structures.

    Every cell passes through all layers and one output projection a depth; a flat model has a token
    a code. The weights are those of `models/dnd.py`.
    """
    tokens = config.cells * (config.depth if config.structure == "flat" else 1)
    heads = config.depth if config.structure != "flat" else 1
    head_dim = config.dim // config.heads
    kv_heads = config.kv_heads or config.heads
    layer = config.dim * head_dim * (2 * config.heads + 2 * kv_heads)
    layer += 3 * config.dim * (config.mlp_hidden or swiglu_hidden(config.dim))
    weights = config.layers * layer + heads * config.dim * config.codebook_size
    return images * tokens * (2.0 * weights + 2.0 * tokens * config.dim * config.layers)


# -- the compiled program ------------------------------------------------------------------------


def compiled_flops(module: Module) -> float:
    """Returns the FLOPs of products and convolutions that one device runs in a call."""
    total = 0.0
    shapes: dict[str, dict[str, Instruction]] = {}
    for computation, line, times in module.instructions():
        if times and line.opcode in ("dot", "convolution"):
            known = shapes.setdefault(computation, module.by_name(computation))
            left, right = (known[name].results[0] for name in line.operands[:2])
            total += times * (_dot if line.opcode == "dot" else _convolution)(line, left, right)
    return total


def kernel_flops(module: Module) -> dict[str, float]:
    """Returns the FLOPs of each attention kernel that one device runs, by the kernel's name.

    Every mask here is causal, so half of the square of queries and keys is counted.
    """
    found: dict[str, float] = {}
    for name, line, times in kernels(module):
        products = next((n for part, n in KERNEL_PRODUCTS.items() if part in name), 0)
        rows = max(line.results, key=lambda a: a.nbytes).shape
        flops = products * math.prod(rows[:-2]) * float(rows[-2]) ** 2 * rows[-1]
        found[name] = found.get(name, 0.0) + times * flops
    return found


def kernels(module: Module) -> list[tuple[str, Instruction, float]]:
    """Returns (name, instruction, runs) of each attention kernel, whose results are [.., T, H]."""
    return [
        (re.sub(r"\.\d+$", "", line.name), line, times)
        for _, line, times in module.instructions()
        if 'custom_call_target="tpu_custom_call"' in line.attributes
        and any(part in line.name for part in KERNEL_PRODUCTS)
    ]


def _dot(line: Instruction, left: Array, right: Array) -> float:
    del right
    dims = line.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    contracted = math.prod(left.shape[int(d)] for d in dims.split(",") if d)
    return 2.0 * math.prod(line.results[0].shape) * contracted


def _convolution(line: Instruction, left: Array, right: Array) -> float:
    """FLOPs of a convolution, which on TPU is also how products of matrices are written.

    Only places where the window meets the input count: batched products are convolutions whose
    window lies mostly in padding.
    """
    labels = _LABELS.search(line.attributes)
    if labels is None:
        return 0.0
    inputs, kernel, outputs = labels.groups()
    out = line.results[0].shape
    groups = int(line.attribute(r"batch_group_count=(\d+)") or 1)
    features = right.shape[kernel.index("i")] / groups
    pairs = 1.0
    window = _window(line.attributes)
    for label in (x for x in outputs if x.isdigit()):
        place = int(label)  # Windows are in the order of the numbers, whatever the layout's.
        sizes = {key: values[place] for key, values in window.items() if place < len(values)}
        pairs *= _meetings(
            left.shape[inputs.index(label)], out[outputs.index(label)], sizes, line.attributes
        )
    return 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * features * pairs


def _window(attributes: str) -> dict[str, list[str]]:
    found = _WINDOW.search(attributes)
    parts = (part.split("=") for part in (found[1].split() if found else ()))
    return {key: value.split("x") for key, value in parts}


def _meetings(size: int, out: int, window: dict[str, str], attributes: str) -> float:
    """Counts pairs of output place and window place that lie on an input element."""
    wide = int(window.get("size", "1"))
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, dilate = int(window.get("stride", "1")), int(window.get("lhs_dilate", "1"))
    spread = int(window.get("rhs_dilate", "1"))
    if wide == 1 and stride == 1 and dilate == 1 and low == 0:
        return float(out)
    at = np.arange(out)[:, None] * stride + np.arange(wide) * spread - low
    return float(np.sum((at >= 0) & (at % dilate == 0) & (at // dilate < size)))
