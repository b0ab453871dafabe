"""A blueprint puts every array where its name says, whatever the order and type of the keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.nn.module import Blueprint, Buffer


class Numbered(nnx.Module):
    def __init__(self, rngs):
        self.weights = nnx.List([nnx.Param(jnp.full((2,), float(i))) for i in range(12)])
        self.table = Buffer(jnp.ones(1))


def with_string_keys(tree):
    if not isinstance(tree, dict):
        return tree
    return {str(key): with_string_keys(tree[key]) for key in sorted(tree, key=str)}


def test_numbers_of_a_list_may_be_strings_as_checkpoints_return_them():
    blueprint = Blueprint(Numbered)
    params, extra = blueprint.init(jax.random.key(0))
    for tree in (params, with_string_keys(params)):
        model = jax.jit(blueprint.build)(tree, extra)
        np.testing.assert_array_equal([w[...][0] for w in model.weights], np.arange(12))


def test_names_of_another_model_are_refused():
    blueprint = Blueprint(Numbered)
    params, extra = blueprint.init(jax.random.key(0))
    del params["weights"][11]
    with pytest.raises(InputError, match="'11' is only in one"):
        blueprint.build(params, extra)
    with pytest.raises(InputError, match="'table' is only in one"):
        blueprint.build(blueprint.init(jax.random.key(0))[0], {})
