"""Random attention streams of ragged rows, and plain NumPy attention and SnapKV to compare with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import quick_compile

SHARED = Path(os.environ.get("JAXLLM_TEST_DATA", "shared/data"))
HEADS = SHARED / "head_scores"
LLAMA = HEADS / "Meta-Llama-3-8B-Instruct_retrieval_reasoning_heads.json"
MISTRAL = HEADS / "Mistral-7B-Instruct-v0.2_retrieval_reasoning_heads.json"
DUO = HEADS / "duo_attention/Meta-Llama-3.1-8B-Instruct/full_attention_heads.tsv"
BABILONG = SHARED / "babilong/0k/qa1.jsonl"


def needs(path):
    return pytest.mark.skipif(
        not path.exists(), reason=f"{path} is not there; set JAXLLM_TEST_DATA"
    )


class Stream(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    positions: np.ndarray

    def part(self, start, stop):
        return Stream(*(jnp.asarray(x[:, start:stop]) for x in self))


def stream(lengths, total, groups, kv_heads=2, dim=8, seed=0):
    """Row b has its last `lengths[b]` of `total` places in use, the others are padding."""
    rng = np.random.default_rng(seed)
    shape = len(lengths), total
    q = rng.standard_normal((*shape, kv_heads * groups, dim)).astype(np.float32)
    k, v = (rng.standard_normal((*shape, kv_heads, dim)).astype(np.float32) for _ in range(2))
    places = np.arange(total) - (total - np.asarray(lengths)[:, None])
    return Stream(2 * q, k, v, np.maximum(places, -1).astype(np.int32))


def attention_loops(s, *, window=None, soft_cap=None):
    """Every query over all keys of its row that it may see, one at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in s[:3])
    out = np.zeros_like(q)
    groups = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        now = s.positions[b, t]
        seen = (s.positions[b] >= 0) & (s.positions[b] <= now)
        if window is not None:
            seen &= s.positions[b] > now - window
        if not seen.any():
            continue
        scores = k[b, seen, n // groups] @ q[b, t, n] / np.sqrt(q.shape[-1])
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, n // groups] / weights.sum()
    return out


_extend = jax.jit(lambda cache, part: cache.extend(*part))
_compress = jax.jit(lambda cache: cache.compress())


def extend(cache, part):
    with quick_compile():
        return _extend(cache, part)


def compress(cache):
    with quick_compile():
        return _compress(cache)


def extend_all(cache, s, portions, run=extend):
    """Feeds a stream in portions; the outputs joined, and the last cache."""
    outputs, start = [], 0
    for count in portions:
        out, cache = run(cache, s.part(start, start + count))
        outputs.append(out)
        start += count
    return np.concatenate(outputs, axis=1), cache


def counted():
    """An `extend` of its own, which nothing has compiled, and the lengths it is traced for."""
    traces = []

    @jax.jit
    def run(cache, part):
        traces.append(part.q.shape[1])
        return cache.extend(*part)

    return run, traces


def snapkv_kept(q, k, positions, capacity, *, window, sinks=0, pool=7, group="mean", kept=None):
    """Positions that one KV head of one row keeps: SnapKV by the letter, in position space.

    Args:
      q: [window, G, H], the newest queries.
      k: {position: key} of everything held before the choice, the window included.
      positions: The positions of the window's queries.
    """
    held = np.array(sorted(k))
    keys = np.stack([k[p] for p in held]).astype(np.float64)
    weights = np.zeros((len(positions), q.shape[1], len(held)))
    for i, now in enumerate(positions):
        for g in range(q.shape[1]):
            scores = keys @ q[i, g].astype(np.float64) / np.sqrt(keys.shape[1])
            scores = np.where(held <= now, scores, -np.inf)
            e = np.exp(scores - scores.max())
            weights[i, g] = e / e.sum()
    reduce = {"mean": np.mean, "max": np.max, "sum": np.sum}[group]
    score = dict(zip(held.tolist(), reduce(weights.mean(axis=0), axis=0), strict=True))
    candidates = [p for p in held.tolist() if p not in set(positions.tolist())]
    reach = pool // 2
    pooled = {p: max(score[r] for r in candidates if abs(r - p) <= reach) for p in candidates}
    ranked = sorted(candidates, key=lambda p: (p >= sinks, -pooled[p] if p >= sinks else p, p))
    return sorted(ranked[:capacity])
