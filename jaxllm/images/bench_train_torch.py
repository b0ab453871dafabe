"""The PyTorch side of a DnD-Transformer's training step: its loss on whole grids of codes.

The layers are those of the sampling loop in `bench_torch.py`, over all cells at once with causal
SDPA attention. Only the benchmark imports this file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from jaxllm.images.bench_torch import rms_norm, rotate, to_torch
from jaxllm.models.dnd import DnDConfig


class CodeBlock(torch.nn.Module):
    """One layer; its parameters are one entry of `to_torch`'s blocks."""

    def __init__(self, weights: dict[str, torch.Tensor], heads: int):
        super().__init__()
        self.heads = heads
        for name, weight in weights.items():
            setattr(self, name, torch.nn.Parameter(weight))

    def forward(self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Maps h [B, T, D] to [B, T, D]; cos and sin are [T, H/2]."""
        w: Any = self
        batch, length, _ = h.shape
        qkv = F.linear(rms_norm(h, w.attn_norm), w.qkv)
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (rotate(x, cos, sin).to(h.dtype) for x in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + F.linear(out.transpose(1, 2).flatten(2), w.out)
        x = rms_norm(h, w.mlp_norm)
        return h + F.linear(F.silu(F.linear(x, w.gate)) * F.linear(x, w.up), w.down)


class CodeLoss(torch.nn.Module):
    """Mean cross-entropy over batch, cells and depth of a `dnd` code model."""

    def __init__(self, params: Any, config: DnDConfig):
        super().__init__()
        weights = to_torch(params, config)
        self.blocks = torch.nn.ModuleList([CodeBlock(w, config.heads) for w in weights["blocks"]])
        self.classes = torch.nn.Parameter(weights["class"])
        self.tokens = torch.nn.Parameter(weights["tokens"])
        self.head_norm = torch.nn.Parameter(weights["head_norm"])
        self.head = torch.nn.Parameter(weights["head"])
        self.register_buffer("cos", weights["cos"])
        self.register_buffer("sin", weights["sin"])
        self.ends = config.segment_ends()
        self.tables = [i if config.per_depth_embedding else 0 for i in range(config.depth)]

    def forward(self, codes: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """Returns the loss of codes [B, cells, C] of classes [B]."""
        embedded = [self.tokens[table][codes[..., i]] for i, table in enumerate(self.tables)]
        before = torch.stack([x[:, :-1] for x in embedded]).sum(0)
        h = torch.cat([self.classes[class_ids][:, None], before], dim=1)
        start, losses = 0, []
        for depth, end in enumerate(self.ends):
            for number in range(start, end + 1):
                h = self.blocks[number](h, self.cos, self.sin)
            start = end + 1
            logits = F.linear(rms_norm(h, self.head_norm[depth]), self.head[depth]).float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), codes[..., depth].flatten()))
            if depth + 1 < len(self.ends):
                h = h + embedded[depth]
        return torch.stack(losses).mean()
