"""Three checks beside the comparison: causes, long decoding, speed.

* `causal_check`: are heads that score high needed? They are set to zero, against random heads.
* `long_decode`: compression again and again while decoding, against compressing the prompt only.
* `step_times`: microseconds, bytes and compilation of the real caches at a longer context.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decoding.language_model import LanguageModel
from jaxllm.evals.statistics import nested_interval
from jaxllm.kvcompress.bucketed_cache import bucketed_caches, nbytes
from jaxllm.kvcompress.evidence_run import HEADS, TASKS, TEST, VALIDATION, CacheEvidenceRun
from jaxllm.kvcompress.masked_cache import Choice, masked_cache
from jaxllm.kvcompress.measure import measure_heads
from jaxllm.kvcompress.recall import Task, answers_right, shifted
from jaxllm.kvcompress.recall_methods import (
    CONTROLS,
    SCORED,
    Method,
    Space,
    candidates,
    main_estimator,
)
from jaxllm.kvcompress.recall_protocols import recall_examples
from jaxllm.kvcompress.scores import top_heads
from jaxllm.kvcompress.tasks import Batch

Tree = Any
Scores = Mapping[str, np.ndarray]


# -- are the scored heads causes? -----------------------------------------------------------------


def causal_check(
    run: CacheEvidenceRun, name: str, models: Sequence[tuple[LanguageModel, Scores]]
) -> list[dict[str, Any]]:
    """Accuracy with the full cache after the outputs of some query heads are set to zero.

    For each n the n highest by score, against n random heads of the model and n random heads of
    the layers that the highest are in (as many of each).

    Returns:
      One row per estimator and n; `random` and `same_layers` are means over draws, `worse` is the
      share of same-layer draws that hurt at least as much as the highest heads do.
    """
    task = TASKS[name]
    batch = task.batch(TEST, 0, run.sequences)
    first = models[0][0]
    layers, heads = first.config.layers, first.config.attention.heads
    zeroed = jax.jit(_zeroed_answers(first))
    inputs = shifted(batch)

    def accuracy(params: Tree, gone: Sequence[tuple[int, int]]) -> float:
        kept = np.ones((layers, heads), np.float32)
        for head in gone:
            kept[head] = 0
        right = zeroed(params, kept, inputs["tokens"], inputs["targets"])
        return float(answers_right(np.asarray(right), batch).mean())

    rows = []
    for estimator in models[0][1]:
        for count in run.zeroed:
            found: dict[str, list[float]] = {
                "top": [],
                "random": [],
                "same_layers": [],
                "worse": [],
            }
            for number, (model, scores) in enumerate(models):
                rng = np.random.default_rng([count, number])
                best = top_heads(scores[estimator], count)
                top = accuracy(model.params, best)
                anywhere = [
                    accuracy(model.params, [divmod(int(i), heads) for i in picked])
                    for picked in _draws(rng, layers * heads, count, run.zero_draws)
                ]
                beside = []
                for _ in range(run.zero_draws):
                    gone = [
                        (layer, int(head))
                        for layer in range(layers)
                        for head in rng.choice(
                            heads, sum(at == layer for at, _ in best), replace=False
                        )
                    ]
                    beside.append(accuracy(model.params, gone))
                found["top"].append(top)
                found["random"].append(float(np.mean(anywhere)))
                found["same_layers"].append(float(np.mean(beside)))
                found["worse"].append(float(np.mean(np.asarray(beside) <= top)))
            whole = [accuracy(model.params, []) for model, _ in models]
            rows.append(
                {"task": name, "estimator": estimator, "heads": count, "whole": whole, **found}
            )
    return rows


def _draws(rng: np.random.Generator, total: int, count: int, draws: int) -> list[np.ndarray]:
    return [rng.choice(total, count, replace=False) for _ in range(draws)]


def _zeroed_answers(model: LanguageModel) -> Any:
    def right(params: Tree, kept: jax.Array, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        attn = params["layers"]["attn"]
        attn = {**attn, "out": attn["out"] * kept[:, :, None, None]}
        network = model.blueprint.build(
            {**params, "layers": {**params["layers"], "attn": attn}}, {}
        )
        return network.token_logprobs(network.hidden(tokens), targets, with_accuracy=True)[1]

    return right


# -- compression during long decoding -------------------------------------------------------------


def long_decode(
    run: CacheEvidenceRun, task: Task, models: Sequence[LanguageModel]
) -> list[dict[str, Any]]:
    """Accuracy in the second half of long sequences, under compression every ring or once.

    The first half is a prompt. `every` compresses it and then whenever the ring is full, so that
    memory stays constant; `prompt only` keeps all that comes after the prompt, as the released
    code does. Chunks of what the ring has room for are read at once, which gives the same entries
    as one token after another.

    Returns:
      One row per budget, method and mode, accuracy also by tokens since the value was set.
    """
    batch = task.batch(TEST, 0, run.sequences)
    validation = task.batch(VALIDATION, 0, run.validation)
    reader = _LongReader(run, models[0], task.length)
    scores = [_long_scores(model, task, run.examples) for model in models]
    rows = []

    def row(methods: Sequence[Method], budget: int, every: bool) -> dict[str, Any]:
        """Each model under a method made from its own scores."""
        parts = [
            reader(model.params, batch, own, every)
            for model, own in zip(models, methods, strict=True)
        ]
        method = methods[0]
        right = np.stack([_by_sequence(part, batch, reader.start) for part in parts])
        interval = nested_interval(right)
        far = [_by_distance(part, batch, reader.start) for part in parts]
        size = method.plan(reader.space).nbytes(1, *reader.sizes)
        if not every and method.name != "full":
            extra = task.length - reader.start - (reader.space.ring - run.window)
            size += extra * (2 * 4 * reader.space.heads * reader.sizes[1] + 4 * reader.space.layers)
        return {
            "method": method.name,
            "mode": "every" if every else "prompt only",
            "budget": budget,
            "option": method.option,
            "accuracy": [interval.mean, interval.low, interval.high],
            "by_distance": np.mean(far, axis=0).tolist(),
            "bytes": size,
        }

    full = candidates("full", reader.space, 1, {}, ())[0]
    rows.append(row([full] * len(models), 0, False))
    for budget in run.long_budgets:
        chosen: dict[str, float | None] = {}
        names = [m for m in run.methods if m not in ("full", "r2", "adaptive", "duo")]
        names.sort(key=lambda name: name in CONTROLS)
        for name in names:
            betas = run.betas if name in SCORED else (chosen.get("er") or run.betas[0],)
            own = [candidates(name, reader.space, budget, s, betas) for s in scores]

            def quality(
                number: int,
                own: list[list[Method]] = own,
            ) -> float:
                parts = [
                    reader(model.params, validation, options[number], True)
                    for model, options in zip(models, own, strict=True)
                ]
                return float(
                    np.mean([_by_sequence(part, validation, reader.start) for part in parts])
                )

            best = max(range(len(own[0])), key=quality) if len(own[0]) > 1 else 0
            picked = [options[best] for options in own]
            chosen[name] = picked[0].option
            rows.append(row(picked, budget, True))
            if name in ("uniform", "er"):
                rows.append(row(picked, budget, False))
        print(f"set_get b={budget}: {len(names)} methods", flush=True)
    return rows


def _long_scores(model: LanguageModel, task: Task, count: int) -> dict[str, np.ndarray]:
    """R and ER on the last question of each sequence."""
    batch = task.batch(HEADS, 0, count)
    examples = recall_examples(task, batch, last=True)
    return {
        name: measure_heads(model, examples, name, batch=16).runs.mean(axis=0)
        for name in ("r", "er")
    }


class _LongReader:
    """Reads sequences through masked caches that are compressed chunk by chunk; compiles once."""

    def __init__(self, run: CacheEvidenceRun, model: LanguageModel, length: int):
        heads, config = model.config.attention, model.config
        self.chunk = 3 * run.window  # The ring of a plan: four windows, as plans have it.
        self.start = length - length // 2 // self.chunk * self.chunk
        self.sizes = (heads.heads, heads.head_dim, 4)
        self.space = Space(
            config.layers, heads.kv_heads, length, run.window + self.chunk, run.eviction
        )
        self.run, self.model = run, model
        self._read = jax.jit(self._whole)

    def __call__(self, params: Tree, batch: Batch, method: Method, every: bool) -> np.ndarray:
        """Returns whether the token after each place of the second half is the first choice."""
        tokens = jnp.asarray(batch["tokens"])
        return np.asarray(self._read(params, tokens, method.choice(), every))

    def _whole(self, params: Tree, tokens: jax.Array, choice: Choice, every: jax.Array) -> Any:
        network = self.model.blueprint.build(params, {})
        blocks, (batch, length) = network.unstack(), tokens.shape
        config, heads = network.config, network.config.attention
        caches = [
            masked_cache(
                batch, heads.heads, heads.kv_heads, length, heads.head_dim, self.run.eviction
            )
            for _ in range(config.layers)
        ]

        def read(caches: list[Any], part: jax.Array, start: Any) -> tuple[list[Any], jax.Array]:
            at = start + jnp.arange(part.shape[1], dtype=jnp.int32)
            hidden, caches = network.step(blocks, caches, part, jnp.broadcast_to(at, part.shape))
            return caches, network.logits(hidden).argmax(-1)

        def compressed(caches: list[Any]) -> list[Any]:
            return [cache.compress(choice.layer(i)) for i, cache in enumerate(caches)]

        def step(caches: list[Any], number: jax.Array) -> tuple[list[Any], jax.Array]:
            start = self.start + number * self.chunk
            part = jax.lax.dynamic_slice_in_dim(tokens, start, self.chunk, axis=1)
            caches, best = read(caches, part, start)
            return jax.lax.cond(every, compressed, lambda kept: kept, caches), best

        caches, _ = read(caches, tokens[:, : self.start], 0)
        chunks = jnp.arange((length - self.start) // self.chunk)
        _, best = jax.lax.scan(step, compressed(caches), chunks)
        best = jnp.moveaxis(best, 0, 1).reshape(batch, -1)
        return best[:, :-1] == tokens[:, self.start + 1 :]


_DISTANCES = (0, 16, 48, 10**9)
"""Edges, in tokens between a value and the question for it."""


def _asked(batch: Batch, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, place and distance of every question whose answer is predicted in the second half."""
    rows, places = np.nonzero(batch["query"] > start)
    at = batch["query"][rows, places]
    return rows, at, at - batch["span"][rows, places, 0]


def _by_sequence(right: np.ndarray, batch: Batch, start: int) -> np.ndarray:
    rows, at, _ = _asked(batch, start)
    hits = np.bincount(rows, right[rows, at - start - 1], minlength=len(right))
    return hits / np.maximum(np.bincount(rows, minlength=len(right)), 1)


def _by_distance(right: np.ndarray, batch: Batch, start: int) -> list[float]:
    rows, at, distance = _asked(batch, start)
    hits = right[rows, at - start - 1]
    found = []
    for low, high in zip(_DISTANCES, _DISTANCES[1:], strict=False):
        inside = (distance > low) & (distance <= high)
        found.append(float(hits[inside].mean()) if inside.any() else float("nan"))
    return found


# -- speed and bytes of the real caches -----------------------------------------------------------


def step_times(
    run: CacheEvidenceRun, model: LanguageModel, scores: Scores, repeats: int = 15
) -> list[dict[str, Any]]:
    """Times of decode blocks with real caches of `timed_length`, interleaved over the plans.

    A block begins with making room in the ring, so that its share of compression is in the time.
    Caches are empty: shapes are fixed, and the time does not depend on what they hold.
    """
    config, heads = model.config, model.config.attention
    space = Space(
        config.layers, heads.kv_heads, run.timed_length - run.window, 8 * run.window, run.eviction
    )
    main = main_estimator(scores)
    names = [
        m for m in run.methods if m != "adaptive" and (m in scores or m not in ("r", "er", "r2"))
    ]
    steps = space.ring - run.window
    timed: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name in names:
        method = candidates(name, space, run.timed_budget, scores, run.betas[1:2] or run.betas)[-1]
        plan = method.plan(space)
        # Copied: an empty cache shares its zeros, and what is donated must not be shared.
        caches = jax.tree.map(jnp.copy, bucketed_caches(plan, 1, heads.heads, heads.head_dim))
        traces = [0]

        def block(
            params: Tree, caches: list[Any], token: jax.Array, traces: list[int] = traces
        ) -> Any:
            traces[0] += 1
            network = model.blueprint.build(params, {})
            layers = network.unstack()
            caches = [cache.begin_block(steps) for cache in caches]

            def step(carry: Any, number: jax.Array) -> Any:
                caches, token = carry
                hidden, caches = network.step(layers, caches, token, number[None, None])
                return (caches, network.logits(hidden).argmax(-1).astype(jnp.int32)), None

            numbers = run.timed_length + jnp.arange(steps, dtype=jnp.int32)
            (caches, token), _ = jax.lax.scan(step, (caches, token), numbers)
            return [cache.end_block() for cache in caches], token

        run_block = jax.jit(block, donate_argnums=1)
        token = jnp.zeros((1, 1), jnp.int32)
        held = nbytes(caches)
        began = time.perf_counter()
        compiled = run_block.lower(model.params, caches, token).compile()
        seconds = time.perf_counter() - began
        caches, token = jax.block_until_ready(compiled(model.params, caches, token))
        timed[name] = [compiled, caches, token, []]
        rows.append(
            {
                "method": name,
                "bytes": held,
                "planned_bytes": plan.nbytes(1, heads.heads, heads.head_dim, 4),
                "rungs": [len(layer.rungs) for layer in plan.layers],
                "compile_seconds": seconds,
                "traces": traces[0],
                "main": name == main,
            }
        )
    for _ in range(repeats):
        for part in timed.values():
            began = time.perf_counter()
            part[1], part[2] = jax.block_until_ready(part[0](model.params, part[1], part[2]))
            part[3].append(1e6 * (time.perf_counter() - began) / steps)
    for row in rows:
        row["microseconds"] = float(np.median(timed[row["method"]][3]))
    return rows
