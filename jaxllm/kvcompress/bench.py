"""`jaxllm bench headkv`: attention of one decode step under head-level budgets, float32.

The shape is that of Llama-3-8B, 8 layers deep: 32 query heads, 8 KV heads of 128 dims, a prompt of
8192 tokens, and a HeadKV plan of 128 entries per KV head on average. The released score files have
no licence, so the scores are log-normal with a spread that puts half of their sum on the same 7 %
of the heads as the released reasoning scores of that model. The sides:

* `headkv`: the library's compressed cache.
* `packed`: a lower bound, the same entries with exactly one array per head, nothing to append.
* `full`: the library's dense cache with every entry.
* `torch, released layout`: per query head, flat, copied whole at every token; `bench_torch.py`.

Before anything is timed, the outputs of the three compressed sides are compared on the same
entries, and the cache's bytes with what the plan says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decoding.text_cache import (
    DenseCache,
    attend_buffer,
    dense_cache,
    folded,
    grouped,
    ungrouped,
)
from jaxllm.errors import InputError
from jaxllm.evals.timing import Phases, first_runs, machine, medians, seconds_of, take_turns
from jaxllm.kvcompress.bucketed_cache import BucketedCache, bucketed_cache, nbytes
from jaxllm.kvcompress.compress import Eviction
from jaxllm.kvcompress.plan import Budget, Plan, headkv_plan
from jaxllm.training.run_folder import versions

_SPREAD = 1.45
_LARGEST_ERROR = 1e-4
_TORCH = "torch, released layout"
Entries = list[list[tuple[np.ndarray, np.ndarray]]]
"""Keys and values [B, entries, H] of each KV head of each layer, in the model's order."""


@dataclass(frozen=True)
class HeadShape:
    """What is timed; Llama-3-8B's heads by default."""

    layers: int = 8
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    prompt: int = 8192
    budget: int = 128
    """Mean entries per KV head, the window included."""
    ring: int = 32
    window: int = 8
    steps: int = 8
    """Tokens decoded in one timed run."""


def bench_headkv(
    *, repeats: int, batches: Sequence[int], threads: int, shape: HeadShape | None = None
) -> dict[str, Any]:
    """Returns milliseconds of attention per token of each side, bytes, and ratios.

    Args:
      repeats: Timed runs of each side, taking turns.
      batches: Rows decoded at once; the released layout knows one row and runs once for each.
      threads: Threads of the PyTorch side.
      shape: Sizes.

    Raises:
      InputError: The outputs differ, or the bytes are not the plan's.
    """
    shape = shape or HeadShape()
    plan = make_plan(shape)
    rows: list[dict[str, Any]] = []
    errors: list[float] = []
    traces = {}
    for batch in batches:
        entries = random_entries(plan, shape, batch)
        sides: dict[str, Any] = {
            "headkv": CacheSide(compressed_caches(plan, shape, entries), shape, batch),
            "packed": PackedSide(entries, shape, batch),
            "full": CacheSide(full_caches(shape, batch), shape, batch),
            **_torch_sides(entries, shape, batch, threads),
        }
        _check_bytes(plan, shape, batch, sides["headkv"].bytes)
        first = first_runs(sides)
        outputs = {name: side.first_output for name, side in sides.items() if name != "full"}
        errors += [float(np.abs(out - outputs["headkv"]).max()) for out in outputs.values()]
        if not max(errors) < _LARGEST_ERROR:
            raise InputError(f"outputs differ by {max(errors):.1e}; not timed")
        rows += _rows(batch, shape.steps, sides, take_turns(sides, repeats), first)
        traces[f"batch {batch}"] = {name: sides[name].traces for name in ("headkv", "full")}
    capacities = plan.capacities
    return {
        "attention of a decode step": rows,
        "layers": shape.layers,
        "prompt tokens": shape.prompt,
        "entries per KV head (mean, least, most)": [
            float(capacities.mean()) + shape.window,
            int(capacities.min()) + shape.window,
            int(capacities.max()) + shape.window,
        ],
        "tokens per run": shape.steps,
        "repeats": repeats,
        "largest difference of outputs": max(errors),
        "traces": traces,
        "threads of torch": threads,
        **machine(),
        "versions": versions("torch"),
    }


def make_plan(shape: HeadShape) -> Plan:
    """Returns the HeadKV plan of log-normal scores (seed 0), rounded to the library's ladder."""
    rng = np.random.default_rng(0)
    scores = rng.lognormal(sigma=_SPREAD, size=(shape.layers, shape.query_heads))
    budget = Budget(entries=shape.budget, cap=shape.prompt)
    eviction = Eviction(window=shape.window)
    return headkv_plan(scores, shape.kv_heads, budget, eviction, shape.ring)


def random_entries(plan: Plan, shape: HeadShape, batch: int) -> Entries:
    """Returns as many entries of each head as the plan keeps, the window's behind the others."""
    rng = np.random.default_rng(1)

    def normal(count: int) -> np.ndarray:
        return rng.standard_normal((batch, count, shape.head_dim), np.float32)

    counts = plan.capacities + shape.window
    return [[(normal(n), normal(n)) for n in layer.tolist()] for layer in counts]


def compressed_caches(plan: Plan, shape: HeadShape, entries: Entries) -> list[BucketedCache]:
    """Returns caches as they are after a prompt that left `entries`; shape.window in the ring."""
    caches = []
    last = np.arange(shape.prompt - shape.window, shape.prompt, dtype=np.int32)
    for number, (layer, heads) in enumerate(zip(plan.layers, entries, strict=True)):
        batch = heads[0][0].shape[0]
        empty = bucketed_cache(plan, number, batch, shape.query_heads, shape.head_dim)
        assert isinstance(empty, BucketedCache)
        own = [heads[head] for head in layer.order]  # Rung by rung.
        rungs, start = [], 0
        for kept, (capacity, count) in zip(empty.rungs, layer.rungs, strict=True):
            part = own[start : start + count]
            keys, values = (
                jnp.asarray(np.stack([head[i][:, :capacity] for head in part], axis=1))
                for i in (0, 1)
            )
            at = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), kept.positions.shape)
            rungs.append(kept._replace(keys=keys, values=values, positions=at))
            start += count
        recent_keys, recent_values = (
            jnp.asarray(np.stack([head[i][:, -shape.window :] for head in own], axis=2))
            for i in (0, 1)
        )
        at = jnp.broadcast_to(jnp.asarray(last), (batch, shape.window))
        ring = empty.ring.append(recent_keys, recent_values, at)
        # There is room for the new tokens: what `begin_block` would see to.
        caches.append(dataclasses.replace(empty, rungs=tuple(rungs), ring=ring, makes_room=False))
    return caches


def full_caches(shape: HeadShape, batch: int) -> list[DenseCache]:
    """Returns dense caches that hold a whole random prompt and have room for the new tokens."""
    caches = []
    size = (batch, shape.prompt, shape.kv_heads, shape.head_dim)
    at = jnp.broadcast_to(jnp.arange(shape.prompt, dtype=jnp.int32), size[:2])
    fill = jax.jit(DenseCache.append)
    for number in range(shape.layers):
        slots = shape.prompt + shape.steps
        empty = dense_cache(batch, shape.kv_heads, slots, shape.head_dim)
        keys, values = (
            jax.random.normal(jax.random.key(2 * number + i), size, jnp.float32) for i in (0, 1)
        )
        caches.append(fill(empty, keys, values, at))
    return caches


def new_token(shape: HeadShape, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q [B, 1, N, H], k and v [B, 1, K, H] of every new token."""
    sizes = (shape.query_heads, shape.kv_heads, shape.kv_heads)
    keys = jax.random.split(jax.random.key(7), 3)
    return tuple(  # type: ignore[return-value]
        jax.random.normal(key, (batch, 1, heads, shape.head_dim))
        for key, heads in zip(keys, sizes, strict=True)
    )


class CacheSide:
    """Decodes a few tokens through caches of the library; each run starts from the same caches."""

    def __init__(self, caches: list[Any], shape: HeadShape, batch: int):
        self.caches, self.token, self.traces = caches, new_token(shape, batch), 0
        self.bytes = nbytes(caches)
        self.fills = [int(_ring(cache).fill) for cache in caches]
        self.first_output = np.zeros(())

        def run(caches: list[Any], token: tuple[jax.Array, ...]) -> tuple[list[Any], jax.Array]:
            self.traces += 1  # Runs while tracing only.
            carried, unfold = folded(caches)
            q, k, v = token

            def step(i: jax.Array, carry: tuple[list[Any], jax.Array]) -> tuple[Any, jax.Array]:
                carried, outputs = carry
                position = jnp.full((batch, 1), shape.prompt, jnp.int32) + i
                held, found = [], []
                for cache in unfold(carried):
                    out, cache = cache.extend(q, k, v, position)
                    held.append(cache)
                    found.append(out)
                outputs = jax.lax.dynamic_update_index_in_dim(outputs, jnp.stack(found), i, 0)
                return folded(held)[0], outputs

            outputs = jnp.zeros((shape.steps, shape.layers, *q.shape), jnp.float32)
            carried, outputs = jax.lax.fori_loop(0, shape.steps, step, (carried, outputs))
            return unfold(carried), outputs

        self.run = jax.jit(run, donate_argnums=(0,))

    def __call__(self) -> Phases:
        """Decodes the tokens and returns the seconds they took."""
        outputs = jnp.zeros(())

        def run() -> None:
            nonlocal outputs
            self.caches, outputs = self.run(self.caches, self.token)
            jax.block_until_ready((self.caches, outputs))

        seconds = seconds_of(run)
        if not self.first_output.ndim:
            self.first_output = np.asarray(outputs[0])
        # Back to before the run: the next one writes the same slots.
        self.caches = [
            _with_fill(cache, fill) for cache, fill in zip(self.caches, self.fills, strict=True)
        ]
        return {"attention": seconds}


def _ring(cache: Any) -> DenseCache:
    return cache.ring if isinstance(cache, BucketedCache) else cache


def _with_fill(cache: Any, fill: int) -> Any:
    ring = dataclasses.replace(_ring(cache), fill=jnp.int32(fill))
    return dataclasses.replace(cache, ring=ring) if isinstance(cache, BucketedCache) else ring


class PackedSide:
    """The least that must be read: each head's entries, the new one included, and nothing else."""

    def __init__(self, entries: Entries, shape: HeadShape, batch: int):
        q, k, v = new_token(shape, batch)
        held = [
            [
                tuple(
                    jnp.concatenate([jnp.asarray(x), new[:, :, head]], axis=1)[:, None]
                    for x, new in zip(pair, (k, v), strict=True)
                )
                for head, pair in enumerate(heads)
            ]
            for heads in entries
        ]
        self.bytes = nbytes(held)
        self.first_output = np.zeros(())

        def run(held: Any, q: jax.Array, factors: jax.Array) -> jax.Array:
            def step(carry: None, factor: jax.Array) -> tuple[None, jax.Array]:
                q_BKGTH = grouped(factor * q, shape.kv_heads)
                found = []
                for heads in held:
                    parts = [
                        attend_buffer(q_BKGTH[:, i : i + 1], keys, values, jnp.array(True)).out
                        for i, (keys, values) in enumerate(heads)
                    ]
                    found.append(ungrouped(jnp.concatenate(parts, axis=1)))
                return carry, jnp.stack(found)

            return jax.lax.scan(step, None, factors)[1]

        # Factors of 1 that the compiler does not know, or it would attend once for all tokens.
        self.arguments, self.run = (held, q, jnp.ones(shape.steps)), jax.jit(run)

    def __call__(self) -> Phases:
        """Attends for every token and returns the seconds it took."""
        outputs = jnp.zeros(())

        def run() -> None:
            nonlocal outputs
            outputs = jax.block_until_ready(self.run(*self.arguments))

        seconds = seconds_of(run)
        self.first_output = np.asarray(outputs[0])
        return {"attention": seconds}


def _torch_sides(
    entries: Entries, shape: HeadShape, batch: int, threads: int
) -> dict[str, Callable[[], Phases]]:
    try:
        from jaxllm.kvcompress.bench_torch import FlatSide
    except ImportError:
        return {}
    token = tuple(np.asarray(x) for x in new_token(shape, batch))
    return {_TORCH: FlatSide(entries, token, shape.steps, threads)}


def _check_bytes(plan: Plan, shape: HeadShape, batch: int, found: int) -> None:
    expected = plan.nbytes(batch, shape.query_heads, shape.head_dim, 4)
    if found != expected:
        raise InputError(f"the cache has {found} bytes, its plan says {expected}; not timed")


def _rows(
    batch: int,
    tokens: int,
    sides: dict[str, Any],
    found: dict[str, list[Phases]],
    first: dict[str, float],
) -> list[dict[str, Any]]:
    median = {name: medians(runs)["attention"] for name, runs in found.items()}
    return [
        {
            "batch": batch,
            "side": name,
            "ms per token": 1e3 * median[name] / tokens,
            "fastest": 1e3 * min(run["attention"] for run in runs) / tokens,
            "slowest": 1e3 * max(run["attention"] for run in runs) / tokens,
            "MiB": sides[name].bytes / 2**20,
            "compile s": max(0.0, first[name] - median[name]),
            "headkv is faster by": median[name] / median["headkv"],
        }
        for name, runs in found.items()
    ]
