"""The update step: accumulation, averaging, norms, and the first bad tensor by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import batch_sharding
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import apply_gradients, make_step, watched_names


def loss_fn(model, batch, rng):
    params, extra = model
    error = jnp.tanh(batch["x"] @ params["w"]) - batch["y"] + extra["shift"]
    return jnp.mean(error**2), {"size": jnp.mean(jnp.abs(error))}


def problem(config, rows=16):
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(rows, 4)).astype(np.float32),
        "y": rng.normal(size=(rows, 3)).astype(np.float32),
    }
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    optimizer = make_optimizer(config, 10)
    extra = {"shift": jnp.full((3,), 0.5)}
    state = new_state(params, optimizer, ema=config.ema_decay is not None, extra=extra)
    step = make_step(loss_fn, lambda params, extra: (params, extra), optimizer, config)
    return state, batch, step


@pytest.mark.parametrize("meshed", [False, True])
def test_accumulated_gradients_equal_those_of_the_whole_batch(meshed):
    results = []
    for accumulate in (1, 4):
        config = OptimizerConfig(accumulate=accumulate, ema_decay=0.9, eps=1e-3)
        state, batch, step = problem(config, rows=32)
        if meshed:
            batch = jax.device_put(batch, batch_sharding(make_mesh()))
        results.append(jax.jit(step)(state, batch, jax.random.key(0)))
    (whole, whole_metrics), (parts, part_metrics) = results
    assert whole_metrics.keys() == part_metrics.keys()
    for a, b in zip(
        jax.tree.leaves((whole, whole_metrics)), jax.tree.leaves((parts, part_metrics)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_micro_batches_get_different_keys():
    seen = []

    def noisy(model, batch, rng):
        return jnp.sum(model[0]["w"]) * jax.random.uniform(rng), {"draw": jax.random.uniform(rng)}

    config = OptimizerConfig(accumulate=4)
    state, batch, _ = problem(config)
    step = jax.jit(make_step(noisy, lambda *p: p, make_optimizer(config, 10), config))
    for _ in range(2):
        state, metrics = step(state, batch, jax.random.key(0))
        seen.append(float(metrics["draw"]))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 4)
    assert seen[0] == pytest.approx(np.mean([jax.random.uniform(key) for key in keys]), rel=1e-6)
    assert seen[0] != seen[1]


def test_a_batch_that_does_not_split_is_refused():
    state, batch, step = problem(OptimizerConfig(accumulate=3))
    with pytest.raises(InputError, match="batch size 16 is not a multiple of .*accumulate 3"):
        step(state, batch, jax.random.key(0))


def test_average_norms_and_counters_by_hand():
    config = OptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=None, ema_decay=0.8)
    optimizer = make_optimizer(config, 10)
    state = new_state({"w": jnp.array([3.0, 4.0])}, optimizer, ema=True)
    grads = {"w": jnp.array([2.0, 0.0])}
    averages = []
    for _ in range(2):
        state, metrics = apply_gradients(
            state, grads, {"loss": jnp.ones(())}, {"x": jnp.ones(1)}, optimizer, config.ema_decay
        )
        averages.append(state.ema["w"].tolist())
    # w goes 3, 2, 1; the average 0.8 * 3 + 0.2 * 2 = 2.8, then 0.8 * 2.8 + 0.2 * 1 = 2.44.
    np.testing.assert_allclose(averages, [[2.8, 4.0], [2.44, 4.0]], rtol=1e-6)
    assert state.best_params is state.ema and int(state.step) == 2
    assert float(metrics["grad_norm"]) == 2.0 and float(metrics["update_norm"]) == 1.0
    assert float(metrics["param_norm"]) == pytest.approx(17**0.5, rel=1e-6)
    assert state.first_bad.tolist() == [-1, -1]


BIG = 3e38


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(batch=np.inf), "batch x"),
        (dict(loss=np.nan), "loss"),
        (dict(grad=np.nan), "gradient of b"),
        # Finite gradients whose update or second moment overflows.
        (dict(param=BIG, grad=-1e3, rate=1e36), "updated b"),
        (dict(grad=1e25, name="adam"), "optimizer state 0/nu/b"),
        (dict(extra=np.nan), "extra state seen"),
    ],
)
def test_the_first_bad_tensor_is_named_with_the_step_it_first_appears(change, name):
    config = OptimizerConfig(
        name=change.get("name", "sgd"), learning_rate=change.get("rate", 1.0), clip_norm=None
    )
    optimizer = make_optimizer(config, 10)
    params = {"b": jnp.full((2,), change.get("param", 1.0)), "c": jnp.ones((2,))}
    state = new_state(params, optimizer, ema=False, extra={"seen": jnp.zeros(2)})
    state = dataclasses.replace(state, step=jnp.int32(6))
    batch = {"mask": np.ones(2, bool), "x": np.full(2, change.get("batch", 0.0))}
    grads = {"b": jnp.array([0.0, change.get("grad", 0.0)]), "c": jnp.zeros(2)}
    metrics = {"loss": jnp.float32(change.get("loss", 0.0))}
    extra = {"seen": jnp.array([0.0, change.get("extra", 0.0)])}
    after, _ = apply_gradients(state, grads, metrics, batch, optimizer, None, extra)
    step, number = after.first_bad.tolist()
    assert (step, watched_names(batch, state)[number]) == (7, name)
    # Later steps do not overwrite it.
    later, _ = apply_gradients(after, grads, {"loss": jnp.nan}, batch, optimizer, None, extra)
    assert later.first_bad.tolist() == [step, number]
