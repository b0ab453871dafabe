"""One suite for one and for many devices: eight CPU devices are made before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# Most programs here run a few times: LLVM's passes cost more than they save. XLA's own still run.
jax.config.update("jax_disable_most_optimizations", True)

import pytest  # noqa: E402

import jaxllm.nn.stack  # noqa: E402

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
