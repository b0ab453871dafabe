"""The other side of `jaxllm bench dnd`: a plain eager PyTorch sampling loop with a KV cache.

Written the way such a loop usually is: one module call per position, cache tensors filled in place,
`multinomial` for the draw. It is imported by the benchmark only; the library itself needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F

from jaxllm.models.code_model import code_model
from jaxllm.models.dnd import DnDConfig

Weights = dict[str, Any]


def to_torch(params: Any, config: DnDConfig) -> Weights:
    """Returns the parameters as torch tensors, layer by layer, with fused q, k, v rows."""
    tensor = lambda x: torch.from_numpy(np.array(x, np.float32))  # noqa: E731
    layers = params["layers"]
    heads, size = config.heads, config.dim // config.heads
    blocks = []
    for i in range(config.layers):
        qkv = np.asarray(layers["attn"]["qkv"][i])  # [D, N, 3, H] without grouping
        rows = qkv.transpose(2, 1, 3, 0).reshape(3 * heads * size, config.dim)
        blocks.append(
            {
                "attn_norm": tensor(layers["attn_norm"]["scale"][i]),
                "mlp_norm": tensor(layers["mlp_norm"]["scale"][i]),
                "qkv": tensor(rows),
                "out": tensor(np.asarray(layers["attn"]["out"][i]).reshape(-1, config.dim).T),
                **{
                    name: tensor(np.asarray(layers["mlp"][name][i]).T)
                    for name in ("gate", "up", "down")
                },
            }
        )
    rotary = code_model(config).build(params, {}).rotary()
    return {
        "blocks": blocks,
        "class": tensor(params["class_embed"]),
        "tokens": tensor(params["token_embed"]),
        "head_norm": tensor(params["head_norm"]),
        "head": tensor(np.asarray(params["head_out"]).transpose(0, 2, 1)),
        "cos": tensor(rotary[0]),
        "sin": tensor(rotary[1]),
    }


def rms_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Normalises x [..., D]."""
    return F.rms_norm(x, (x.shape[-1],), scale, 1e-5)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the interleaved pairs of x [..., H] by cos and sin [..., H/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class EagerLoop:
    """Weights and caches of one batch."""

    def __init__(self, weights: Weights, config: DnDConfig, batch: int):
        self.weights, self.config = weights, config
        size = (config.layers, batch, config.heads, config.cells, config.dim // config.heads)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)

    def block(self, number: int, h: torch.Tensor, position: int) -> torch.Tensor:
        """One layer on one position, [B, D]."""
        w, config = self.weights["blocks"][number], self.config
        cos, sin = self.weights["cos"][position], self.weights["sin"][position]
        qkv = F.linear(rms_norm(h, w["attn_norm"]), w["qkv"])
        q, k, v = qkv.view(len(h), 3, config.heads, -1).unbind(1)
        self.keys[number, :, :, position] = rotate(k, cos, sin)
        self.values[number, :, :, position] = v
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin)[:, :, None],
            self.keys[number, :, :, : position + 1],
            self.values[number, :, :, : position + 1],
        )
        h = h + F.linear(out.flatten(1), w["out"])
        x = rms_norm(h, w["mlp_norm"])
        return h + F.linear(F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"])

    @torch.no_grad()
    def run(
        self,
        class_ids: torch.Tensor,
        choose: Callable[[int, int, torch.Tensor], torch.Tensor],
    ) -> None:
        """Walks all cells; `choose(position, depth, logits [B, V])` returns the codes [B]."""
        weights, ends = self.weights, self.config.segment_ends()
        h = weights["class"][class_ids]
        for position in range(self.config.cells):
            start, codes = 0, []
            for depth, end in enumerate(ends):
                for number in range(start, end + 1):
                    h = self.block(number, h, position)
                start = end + 1
                normal = rms_norm(h, weights["head_norm"][depth])
                code = choose(position, depth, F.linear(normal, weights["head"][depth]))
                codes.append(code)
                if depth + 1 < len(ends):
                    h = h + weights["tokens"][depth][code]
            h = torch.stack([weights["tokens"][i][c] for i, c in enumerate(codes)]).sum(0)


def eager_sampler(params: Any, config: DnDConfig, batch: int, threads: int) -> Callable[[], None]:
    """Returns a function that draws one batch, warmed up."""
    torch.set_num_threads(threads)
    weights = to_torch(params, config)
    classes = torch.arange(batch) % config.num_classes

    def run() -> None:
        EagerLoop(weights, config, batch).run(
            classes, lambda p, d, logits: torch.multinomial(logits.softmax(-1), 1)[:, 0]
        )

    run()
    return run


def largest_difference(params: Any, config: DnDConfig) -> float:
    """Returns the largest absolute logit difference to our teacher-forced pass."""
    shape = (2, config.cells, config.depth)
    codes = np.random.default_rng(0).integers(0, config.codebook_size, shape)
    model = code_model(config).build(params, {})
    hidden = model.hidden(jax.numpy.asarray(codes), jax.numpy.arange(2))
    ours = np.stack([np.asarray(h @ model.head_kernel(i)) for i, h in enumerate(hidden)], axis=2)
    worst = 0.0

    def choose(position: int, depth: int, logits: torch.Tensor) -> torch.Tensor:
        nonlocal worst
        gap = np.abs(logits.numpy() - ours[:, position, depth]).max()
        worst = max(worst, float(gap))
        return torch.from_numpy(codes[:, position, depth])

    EagerLoop(to_torch(params, config), config, 2).run(torch.arange(2), choose)
    return worst
