"""One process alone: nothing to agree on, nobody to end with; what the environment may say."""

import jax
import pytest

from jaxllm.errors import InputError
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.processes import agreed, end_together, start_distributed, wait_for_all
from jaxllm.parallel.sharding import reader

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def test_one_process_decides_alone_and_keeps_its_exceptions():
    assert agreed(7) == 7 and first_of_all_meshes() == {(0, 1)}
    wait_for_all("here")
    with pytest.raises(ZeroDivisionError), end_together():
        raise ZeroDivisionError


def first_of_all_meshes():
    return {reader(make_mesh(MeshConfig(*shape))) for shape in ((8, 1, 1), (2, 2, 2), (1, 1, 8))}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, "2", "0"), "JAX_COORDINATOR_ADDRESS is not set, but others of"),
        (("localhost:1", "2", None), "JAX_PROCESS_ID is not set, but others of"),
        (("localhost:1", "two", "0"), "JAX_NUM_PROCESSES 'two' is not a number"),
        (("localhost:1", "2", "-1"), "JAX_PROCESS_ID '-1' is not a number"),
    ],
)
def test_a_half_filled_environment_is_refused(monkeypatch, values, message):
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        start_distributed("on")


def test_without_workers_nothing_is_started(monkeypatch):
    for name in (*NAMES, "TPU_WORKER_HOSTNAMES", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    start_distributed("auto")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    start_distributed("auto")
    start_distributed("off")
    assert not jax.distributed.is_initialized()
