"""A DnD training step on eight devices equals the one on one device, for every kind of mesh."""

import jax
import numpy as np
import pytest

from jaxllm.data.pipeline import Batches
from jaxllm.images.code_models import code_loss
from jaxllm.models.code_model import CODE_MODEL_RULES, code_model
from jaxllm.models.dnd import DnDConfig
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import leaf_paths
from jaxllm.training.job import Job, LoopConfig
from jaxllm.training.loop import abstract_state, rows_sharding, to_devices
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import make_step

MODEL = DnDConfig(
    codebook_size=16,
    grid=(2, 2),
    depth=2,
    num_classes=7,
    layers=2,
    heads=2,
    dim=16,
    mlp_hidden=16,
    dropout=0.0,
)
# Adam divides by the size of each gradient; eps keeps that from magnifying rounding where it is 0.
OPTIMIZER = OptimizerConfig(learning_rate=0.02, eps=1e-3, weight_decay=0.1, ema_decay=0.9)
BLUEPRINT = code_model(MODEL)
# Compilation is nearly all of this test's time, and this halves it.
QUICK = {"xla_backend_optimization_level": 0}


class Codes:
    def __len__(self):
        return 32

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        codes = rng.integers(0, MODEL.codebook_size, (MODEL.cells, MODEL.depth), np.int32)
        return {"codes": codes, "label": np.int32(index % MODEL.num_classes)}


def init(key):
    params, extra = BLUEPRINT.init(key)
    # The output projection starts at zero, which would leave most gradients zero.
    noise = jax.random.normal(key, params["head_out"].shape)
    params = {**params, "head_out": 0.3 * noise}
    return new_state(params, make_optimizer(OPTIMIZER, 10), ema=True, extra=extra)


def run_steps(start, mesh_config, devices=None):
    """Two steps as the training loop takes them, with class dropout."""
    job = Job(
        name="dnd",
        config=MODEL,
        loop=LoopConfig(),
        mesh=mesh_config,
        init=init,
        step=make_step(code_loss, BLUEPRINT.build, make_optimizer(OPTIMIZER, 10), OPTIMIZER),
        batches=Batches(Codes(), 16),
        rules=CODE_MODEL_RULES,
    )
    mesh = make_mesh(mesh_config, devices)
    rows = rows_sharding(job, mesh)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(job, mesh))
        state = jax.device_put(start, shardings)
        step = jax.jit(
            job.step,
            in_shardings=(shardings, rows, None),
            out_shardings=(shardings, None),
            compiler_options=QUICK,
        )
        for number in range(2):
            batch = to_devices(job.batches.batch(number), rows)
            state, metrics = step(state, batch, jax.random.key(1))
    return state, metrics


@pytest.fixture(scope="module")
def start():
    return jax.jit(init, compiler_options=QUICK)(jax.random.key(0))


@pytest.fixture(scope="module")
def single(start):
    state, metrics = run_steps(start, MeshConfig(data=1), jax.devices()[:1])
    moved = jax.tree.map(
        lambda a, b: float(np.mean(np.asarray(a) != b)), state.params, start.params
    )
    # Every parameter took part (rows of classes and codes that were not drawn only decay).
    assert min(jax.tree.leaves(moved)) > 0.9
    return state, metrics


@pytest.mark.parametrize(
    ("mesh", "qkv_shard"),
    [
        (MeshConfig(data=8), (2, 16, 2, 3, 8)),
        (MeshConfig(data=1, fsdp=8), (2, 2, 2, 3, 8)),
        (MeshConfig(data=4, tensor=2), (2, 16, 1, 3, 8)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 8, 1, 3, 8)),
    ],
    ids=lambda value: (
        "x".join(map(str, (value.data, value.fsdp, value.tensor)))
        if isinstance(value, MeshConfig)
        else ""
    ),
)
def test_sharded_steps_equal_single_device_steps(start, single, mesh, qkv_shard):
    state, metrics = run_steps(start, mesh)
    moments = state.opt_state[1][0]
    for tree in (state.params, state.ema, moments.mu, moments.nu):
        shards = tree["layers"]["attn"]["qkv"].addressable_shards
        assert {shard.data.shape for shard in shards} == {qkv_shard} and len(shards) == 8
    assert metrics.keys() == single[1].keys()
    for (path, got), wanted in zip(
        leaf_paths((state, metrics)), jax.tree.leaves(single), strict=True
    ):
        # Tolerance: 1e-5 of the tensor's largest element.
        largest = float(np.max(np.abs(wanted)))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * largest, err_msg=path)
