"""One suite for one and for many devices: eight CPU devices are made before JAX starts."""

import gc
import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
wanted = {"xla_force_host_platform_device_count": "8"}
if version("jaxlib").startswith("0.10."):
    # XLA's older code generator compiles in half the time; later versions have only the new one.
    wanted["xla_cpu_use_fusion_emitters"] = "false"
flags = os.environ.get("XLA_FLAGS", "").split()
flags += [f"--{name}={value}" for name, value in wanted.items() if name not in " ".join(flags)]
os.environ["XLA_FLAGS"] = " ".join(flags)

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# Most programs here run a few times: LLVM's passes cost more than they save. XLA's own still run.
jax.config.update("jax_disable_most_optimizations", True)

import pytest  # noqa: E402

import jaxllm.nn.stack  # noqa: E402

# Tracing makes many small objects that live: looking for dead ones less often is a tenth faster.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# A loop's body of one layer compiles quickest; `tests/nn/test_stack.py` compares it with several.
jaxllm.nn.stack._UNROLLED_ON_CPU = 1


@pytest.fixture(scope="session")
def nursery():
    """Where tests start processes without waiting for their imports."""
    from nursery import Nursery

    with Nursery() as found:
        yield found


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory):
    """The folder of a finished demo of the smallest models, and the numbers it returned."""
    import tiny_runs

    from jaxllm.images.demo import run_demo

    folder = tmp_path_factory.mktemp("tiny") / "demo"
    with tiny_runs.small_programs():
        report = run_demo(tiny_runs.demo(), folder)
    return folder, report
