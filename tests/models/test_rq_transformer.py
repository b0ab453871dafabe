"""The RQ-Transformer against NumPy, and what its codebook and its one classifier mean.

That its cached step equals this pass is tested with the other code models in
tests/decoding/test_code_stacks.py, its causality in tests/models/test_dnd.py.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny_code_models import CASES, apply, numpy_block, numpy_norm, random_model, some_codes

from jaxllm.errors import InputError
from jaxllm.models.code_model import code_model
from jaxllm.models.rq_transformer import RQTransformerConfig

CONFIG = CASES["rq"]


def numpy_logits(params, codebook, codes, class_id):
    """Teacher-forced logits [cells, C, V] of one grid, from the equations of section 3.2."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    cells, depth = codes.shape

    def layers(stack, x):
        for layer in range(stack["attn"]["out"].shape[0]):
            x = numpy_block(x, jax.tree.map(lambda a, n=layer: a[n], stack))
        return x

    vectors = np.array([[codebook[i, codes[t, i]] for i in range(depth)] for t in range(cells)])
    u = np.zeros((cells, CONFIG.dim))
    u[0] = p["class_embed"][class_id]
    for t in range(1, cells):
        u[t] = p["position_embed"][t - 1] + vectors[t - 1].sum(0) @ p["input_proj"]
    h = layers(p["layers"], u)
    logits = np.zeros((cells, depth, CONFIG.codebook_size))
    for t in range(cells):
        v = np.zeros((depth, CONFIG.dim))
        v[0] = h[t] + p["depth_embed"][0]
        for i in range(1, depth):
            v[i] = vectors[t, :i].sum(0) @ p["depth_proj"] + p["depth_embed"][i]
        out = layers(p["depth_layers"], v)
        logits[t] = numpy_norm(out, p["norm"]["scale"]) @ p["head_out"][0]
    return logits


def test_logits_equal_an_independent_numpy_pass():
    blueprint, params, extra = random_model(CONFIG)
    codes, classes = some_codes(CONFIG)
    found, _ = apply(blueprint, params, extra, codes, classes)
    for n in range(len(codes)):
        expected = numpy_logits(params, extra["codebook"], codes[n], classes[n])
        np.testing.assert_allclose(found[n], expected, rtol=1e-4, atol=1e-4)


def test_later_cells_see_the_sum_of_codebook_vectors():
    """With one table for all levels, swapping a cell's first two codes changes that cell only."""
    blueprint, params, extra = random_model(CONFIG)
    shared = {"codebook": np.repeat(extra["codebook"][:1], 3, axis=0)}
    codes, classes = some_codes(CONFIG)
    codes[:, 1, :2] = (3, 8)
    swapped = codes.copy()
    swapped[:, 1, :2] = (8, 3)
    one, _ = apply(blueprint, params, shared, codes, classes)
    other, _ = apply(blueprint, params, shared, swapped, classes)
    changed = np.abs(one - other).max(axis=(0, 3))
    assert changed[1, 1:].min() > 0.01
    np.testing.assert_allclose(np.delete(changed, 1, axis=0), 0.0, atol=1e-5)


def test_the_codebook_is_a_buffer_and_one_classifier_serves_all_depths():
    blueprint = code_model(CONFIG)
    assert "codebook" not in blueprint.abstract_params
    assert blueprint.abstract_extra["codebook"].shape == (3, 12, 5)
    assert blueprint.abstract_params["head_out"].shape == (1, 16, 12)
    _, params, extra = random_model(CONFIG)
    model = blueprint.build(params, extra)
    for i in range(3):
        np.testing.assert_array_equal(model.head_kernel(i), params["head_out"][0])


def test_parameter_count_of_the_papers_model():
    """1.4B: 42 + 6 layers of width 1536, 8x8x4 codes, codebook of 16384."""
    count = code_model(RQTransformerConfig()).parameter_count
    block = 4 * 1536**2 + 3 * 1536 * 4096 + 2 * 1536
    embeddings = (1001 + 64 + 4 + 2 * 256) * 1536
    assert count == 48 * block + embeddings + 1536 + 1536 * 16384
    assert 1.3e9 < count < 1.5e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim=15), "dim 15 is not a multiple of heads 2"),
        (dict(depth=0), "depth 0 must be at least 1"),
        (dict(grid=(2, 0)), "grid"),
        (dict(dropout=1.0), "dropout 1.0 is outside"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)
