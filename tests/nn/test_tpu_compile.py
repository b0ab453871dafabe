"""The training step of a code model compiled for four TPU chips that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxllm.images.code_models import code_loss
from jaxllm.models.code_model import CODE_MODEL_RULES, code_model
from jaxllm.models.dnd import DnDConfig
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import batch_sharding, param_shardings

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = make_mesh(MeshConfig(data=2, tensor=2), list(topology.devices))
config = DnDConfig(
    codebook_size=64, grid=(8, 16), layers=2, heads=2, dim=128, mlp_hidden=128, num_classes=3
)
blueprint = code_model(config, jnp.bfloat16)


def step(params, batch):
    def loss(params):
        return code_loss(blueprint.build(params, {}), batch, jax.random.key(0))[0]

    loss, grads = jax.value_and_grad(loss)(params)
    return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def placed(tree, places):
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


rows = jax.ShapeDtypeStruct((4, 128, 2), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
places = param_shardings(blueprint.abstract_params, CODE_MODEL_RULES, mesh)
with jax.set_mesh(mesh):
    params = placed(blueprint.abstract_params, places)
    codes, label = placed(rows, (batch_sharding(mesh),) * 2)
    batch = {"codes": codes, "label": label}
    print(jax.jit(step).lower(params, batch).compile().as_text())
"""


@pytest.mark.slow
def test_a_tpu_trains_with_the_splash_kernel():
    """Each chip runs the kernel on its own two examples and one head, forward and backward."""
    pytest.importorskip("libtpu")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls = [line for line in done.stdout.splitlines() if "tpu_custom_call" in line]
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert any(kernel in line for line in calls), kernel
    assert all("[2,1,128,64]" in line for line in calls if "splash_mha_fwd" in line)
