"""Sides in processes of their own: results, refusals, failures and deaths come back."""

import os

import pytest

from jaxllm.errors import InputError
from jaxllm.evals.apart import SideFailed, is_out_of_memory, run_apart
from jaxllm.planning.cards import find_card


def test_the_result_is_of_another_process_with_its_own_environment():
    assert run_apart(os.getpid) != os.getpid()
    assert run_apart(os.getenv, "OF_THE_SIDE", environment={"OF_THE_SIDE": "yes"}) == "yes"
    assert "OF_THE_SIDE" not in os.environ


def test_what_goes_wrong_is_told_apart():
    with pytest.raises(InputError, match="'x' are not known"):
        run_apart(find_card, "x")
    with pytest.raises(SideFailed, match="^ValueError: .*'a'") as failed:
        run_apart(int, "a")
    assert "Traceback" in failed.value.details
    with pytest.raises(SideFailed, match="its process ended with code 3"):
        run_apart(os._exit, 3)


def test_memory_that_ran_out_is_known_by_its_message():
    assert is_out_of_memory(SideFailed("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(type("OutOfMemoryError", (RuntimeError,), {})("x"))
    assert not is_out_of_memory(SideFailed("ValueError: shapes differ"))
