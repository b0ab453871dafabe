"""The other side of `jaxllm bench headkv`: the released layout, written for PyTorch on a CPU.

HeadKV's code keeps one flat array per layer, [entries of all query heads, H]: keys and values are
repeated for the query heads of a group before they are cached. A decode step makes a new flat array
with one more row at the end of each head's segment, copies the old one over, and lets every head
attend over its own segment. It knows batch 1 only, so more rows take turns. Its CUDA kernels are
replaced by `torch.cat` and one SDPA call per head. Only the benchmark imports this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from jaxllm.evals.timing import Phases, seconds_of

Entries = Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]


class FlatLayer:
    """One row's cache of one layer."""

    def __init__(self, heads: Sequence[tuple[np.ndarray, np.ndarray]], row: int, groups: int):
        keys, values = (
            [torch.from_numpy(head[i][row]) for head in heads for _ in range(groups)]
            for i in (0, 1)
        )
        self.keys, self.values = torch.cat(keys), torch.cat(values)
        self.lengths = [len(x) for x in keys]

    def extend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Appends k, v [N, H] and attends with q [N, H]; returns [N, H]."""
        self.keys, self.values = self._longer(self.keys, k), self._longer(self.values, v)
        self.lengths = [length + 1 for length in self.lengths]
        parts = zip(q, self.keys.split(self.lengths), self.values.split(self.lengths), strict=True)
        return torch.cat(
            [F.scaled_dot_product_attention(one[None], keys, values) for one, keys, values in parts]
        )

    def _longer(self, flat: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        pieces = []
        for segment, row in zip(flat.split(self.lengths), new, strict=True):
            pieces += [segment, row[None]]
        return torch.cat(pieces)


class FlatSide:
    """Decodes a few tokens; each run starts from the same caches."""

    def __init__(self, entries: Entries, token: tuple[np.ndarray, ...], steps: int, threads: int):
        torch.set_num_threads(threads)
        self.entries, self.steps = entries, steps
        self.token = [torch.from_numpy(x.copy()) for x in token]
        batch, _, query_heads, _ = token[0].shape
        self.batch, self.groups = batch, query_heads // token[1].shape[2]
        # As many bytes as after the prompt, before a token is added.
        caches = [layer for row in self._caches() for layer in row]
        self.bytes = sum(x.nbytes for layer in caches for x in (layer.keys, layer.values))
        self.first_output = np.zeros(())

    def _caches(self) -> list[list[FlatLayer]]:
        return [
            [FlatLayer(heads, row, self.groups) for heads in self.entries]
            for row in range(self.batch)
        ]

    @torch.inference_mode()
    def __call__(self) -> Phases:
        """Decodes the tokens and returns the seconds they took."""
        caches, outputs = self._caches(), []
        q, k, v = self.token

        def run() -> None:
            for _ in range(self.steps):
                for row, layers in enumerate(caches):
                    own_k, own_v = (x[row, 0].repeat_interleave(self.groups, dim=0) for x in (k, v))
                    outputs.append([layer.extend(q[row, 0], own_k, own_v) for layer in layers])

        seconds = seconds_of(run)
        first = torch.stack([torch.stack(found) for found in outputs[: self.batch]], dim=1)
        self.first_output = first[:, :, None].numpy()  # [L, B, 1, N, H]
        return {"attention": seconds}
