"""A jitted `quantize`, compiled once per configuration and shape for all tests."""

from __future__ import annotations

from functools import partial

import jax
import pytest


@partial(jax.jit, static_argnames=("config", "train"))
def _quantize(config, params, state, z, *, train, key=None, mask=None):
    return config.quantize(params, state, z, train=train, key=key, mask=mask)


@pytest.fixture(scope="session")
def quantize():
    return _quantize
