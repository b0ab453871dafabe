"""The update step: a loss function in, a pure (state, batch, key) -> (state, metrics) out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.errors import InputError
from jaxllm.parallel.sharding import leaf_paths
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.state import TrainState, Tree

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
"""loss_fn(model, batch, rng) -> (scalar loss, metrics); every value is a mean over the batch."""
StepFn = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_step(
    loss_fn: LossFn,
    build: Callable[[Tree, Tree], Any],
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
) -> StepFn:
    """Returns the step of a job with one loss and one optimiser.

    Args:
      loss_fn: See `LossFn`.
      build: Makes the model from (params, extra); `nnx.merge` with the graph definition filled in.
      optimizer: From `make_optimizer`.
      config: Accumulation and averaging are taken from here.
    """

    def gradients(state: TrainState, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        def loss_of(params: Tree, part: Batch, part_key: jax.Array) -> tuple[jax.Array, Metrics]:
            return loss_fn(build(params, state.extra), part, part_key)

        grad_fn = jax.value_and_grad(loss_of, has_aux=True)
        if config.accumulate == 1:
            (loss, metrics), grads = grad_fn(state.params, batch, key)
            return grads, {"loss": loss, **metrics}
        rows = len(jax.tree.leaves(batch)[0])
        if rows % config.accumulate:
            raise InputError(
                f"batch size {rows} is not a multiple of optimizer.accumulate {config.accumulate}"
            )
        # Every accumulate-th example makes a micro-batch, so that each spans all devices.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(key, config.accumulate)

        def one(total: Tree, part: tuple[Batch, jax.Array]) -> tuple[Tree, Metrics]:
            (loss, metrics), grads = grad_fn(state.params, *part)
            # Left to itself the compiler adds up gradients before they are divided over devices.
            grads = jax.lax.optimization_barrier(grads)
            return jax.tree.map(jnp.add, total, grads), {"loss": loss, **metrics}

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        total, metrics = jax.lax.scan(one, zeros, (parts, keys))
        mean = 1.0 / config.accumulate
        return jax.tree.map(lambda g: g * mean, total), jax.tree.map(
            lambda m: jnp.mean(m, axis=0), metrics
        )

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(state, batch, jax.random.fold_in(key, state.step))
        return apply_gradients(state, grads, metrics, batch, optimizer, config.ema_decay)

    return step


def apply_gradients(
    state: TrainState,
    grads: Tree,
    metrics: Metrics,
    batch: Batch,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    extra: Tree | None = None,
) -> tuple[TrainState, Metrics]:
    """Updates parameters, average and health; adds the norms of gradients, parameters, updates."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None and ema_decay is not None:
        ema = jax.tree.map(lambda a, p: a + (1.0 - ema_decay) * (p - a), ema, params)
    metrics = {
        **metrics,
        "grad_norm": optax.global_norm(grads),
        "param_norm": optax.global_norm(params),
        "update_norm": optax.global_norm(updates),
    }
    new = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        extra=state.extra if extra is None else extra,
    )
    loss = metrics["loss"]
    watched = jax.tree.leaves([part for _, part in _watched(batch, loss, grads, new)])

    def search() -> jax.Array:
        finite = _finite(watched)
        found = jnp.stack([new.step, jnp.argmin(finite).astype(jnp.int32)])
        return jnp.where(jnp.all(finite), state.first_bad, found)

    # What is not finite shows in a norm, or stands in what has none. Buffers that the step does not
    # change, such as a reference model, show in the loss.
    norms = [metrics[name] for name in ("grad_norm", "param_norm", "update_norm")]
    healthy = jnp.all(_finite([*norms, *jax.tree.leaves((loss, batch, extra))]))
    healthy |= state.first_bad[0] >= 0
    first_bad = jax.lax.cond(healthy, lambda: state.first_bad, search)
    return dataclasses.replace(new, first_bad=first_bad), metrics


def _finite(leaves: Sequence[jax.Array]) -> jax.Array:
    """Whether each array is finite, bool [leaves]."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def _watched(batch: Tree, loss: Any, grads: Tree, new: TrainState) -> list[tuple[str, Tree]]:
    # The order of blame: a bad batch explains a bad loss, a bad loss bad gradients, and those a bad
    # update; but an update may also overflow by itself.
    return [
        ("batch", batch),
        ("loss", loss),
        ("gradient of", grads),
        ("updated", new.params),
        ("updated average of", new.ema),
        ("optimizer state", new.opt_state),
        ("extra state", new.extra),
    ]


def watched_names(batch: Tree, state: TrainState) -> list[str]:
    """Names the tensors that `first_bad` numbers, in its order; both arguments may be abstract."""
    return [
        f"{what} {path}".strip()
        for what, part in _watched(batch, 0.0, state.params, state)
        for path, _ in leaf_paths(part)
    ]
