"""The DnD-Transformer's structures against NumPy, by gradients and by parameter counts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_code_models import (
    CASES,
    SHAPE,
    apply,
    numpy_block,
    numpy_norm,
    random_model,
    some_codes,
    teacher_logits,
    tiny_blueprint,
)

from jaxllm.errors import InputError
from jaxllm.images.code_models import code_log_probs
from jaxllm.models.code_model import code_model
from jaxllm.models.dnd import DnDConfig

STRUCTURES = ("dnd", "vertical", "parallel", "flat")


# -- an independent forward pass ------------------------------------------------------------------


def numpy_logits(params, config, codes, class_id):
    """Teacher-forced logits [cells, C, V] of one grid, written from section 1.2 and 1.3."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    cells, depth = codes.shape
    head_dim = config.dim // config.heads

    def table(i):
        return p["token_embed"][i if config.per_depth_embedding else 0]

    def rotate(x, position):
        # Position t carries cell t - 1; pairs (0,1), (2,3), ...: first half rows, then columns.
        if position == 0:
            return x * (config.class_rotary == "identity")
        row, column = divmod(position - 1, config.grid[1])
        out = np.empty_like(x)
        for j in range(head_dim // 2):
            quarter = head_dim // 4
            where, n = (row, j) if j < quarter else (column, j - quarter)
            angle = where * 10000.0 ** (-2 * n / (head_dim / 2))
            a, b = x[..., 2 * j], x[..., 2 * j + 1]
            out[..., 2 * j] = a * np.cos(angle) - b * np.sin(angle)
            out[..., 2 * j + 1] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = np.zeros((cells, config.dim))
    x[0] = p["class_embed"][class_id]
    for t in range(1, cells):
        x[t] = sum(table(i)[codes[t - 1, i]] for i in range(depth))
    logits = np.zeros((cells, depth, config.codebook_size))
    heads = config.segment_ends()
    for layer in range(config.layers):
        x = numpy_block(x, jax.tree.map(lambda a, n=layer: a[n], p["layers"]), rotate)
        for i in (i for i in range(depth) if heads[i] == layer):
            kernel = p["head_out"][0 if config.share_heads else i]
            logits[:, i] = numpy_norm(x, p["head_norm"][i]) @ kernel
            if config.structure == "dnd" and i + 1 < depth:
                x = x + table(i)[codes[:, i]]
    return logits


@pytest.mark.parametrize("name", ["dnd", "vertical", "parallel", "options"])
def test_logits_equal_an_independent_numpy_pass(name):
    config = CASES[name]
    blueprint, params, _ = random_model(config)
    codes, classes = some_codes(config)
    found, _ = apply(blueprint, params, {}, codes, classes)
    for n in range(len(codes)):
        expected = numpy_logits(params, config, codes[n], classes[n])
        np.testing.assert_allclose(found[n], expected, rtol=1e-4, atol=1e-4)


# -- causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STRUCTURES, "rq"])
def test_causality_by_gradients(name):
    """All codes of the grid differ, so the gradient of a row is the influence of one code."""
    config = CASES[name]
    blueprint, params, extra = random_model(config)
    cells, depth = config.cells, config.depth
    assert config.codebook_size == cells * depth
    codes = jnp.arange(cells * depth).reshape(1, cells, depth)
    mix = jax.random.normal(jax.random.key(5), (config.codebook_size,))

    def outputs(params, extra):
        model = blueprint.build(params, extra)
        return (teacher_logits(model, codes, jnp.zeros((1,), int)) @ mix).reshape(-1)

    @jax.jit
    def influences(params, extra):
        by_params, by_extra = jax.jacrev(outputs, argnums=(0, 1))(params, extra)
        if name == "rq":  # [outputs, C, V, E]: level i of the codebook holds code (t, i).
            rows = jnp.linalg.norm(by_extra["codebook"], axis=-1)
            order = jnp.arange(cells * depth)
            codes_to = rows[:, order % depth, order]
        else:
            codes_to = jnp.linalg.norm(by_params["token_embed"][:, 0], axis=-1)
        layers = [
            jnp.linalg.norm(leaf.reshape(*leaf.shape[:2], -1), axis=-1)
            for leaf in jax.tree.leaves(by_params["layers"])
        ]
        return codes_to, sum(layers)

    by_code, by_layer = influences(params, extra)
    output, source = np.meshgrid(*[np.arange(cells * depth)] * 2, indexing="ij")
    earlier = source < output
    if name in ("vertical", "parallel"):
        earlier &= source // depth < output // depth  # Codes of one cell are independent.
    np.testing.assert_array_equal(by_code[~earlier], 0.0)
    assert by_code[earlier].min() > 1e-3

    if name in ("dnd", "vertical"):
        for i, end in enumerate(config.segment_ends()):
            np.testing.assert_array_equal(by_layer[i::depth, end + 1 :], 0.0)
            assert by_layer[i::depth, : end + 1].min() > 1e-3
    else:
        assert by_layer.min() > 1e-3


# -- equivalences ---------------------------------------------------------------------------------


def test_depth_one_is_the_same_model_in_every_structure():
    config = DnDConfig(**SHAPE | dict(depth=1))
    _, params, _ = random_model(config)
    codes, classes = some_codes(config)

    def logits(structure):
        blueprint = tiny_blueprint(dataclasses.replace(config, structure=structure))
        assert jax.tree.structure(blueprint.abstract_params) == jax.tree.structure(params)
        return apply(blueprint, params, {}, codes, classes)[0]

    expected = logits("flat")
    for structure in STRUCTURES[:3]:
        np.testing.assert_allclose(logits(structure), expected, rtol=1e-5, atol=1e-5)
    numpy = numpy_logits(params, config, codes[0], classes[0])
    np.testing.assert_allclose(expected[0], numpy, rtol=1e-4, atol=1e-4)


def test_segments_are_slices_of_one_scan():
    """Three scans one after the other give what one scan over all four layers gives."""
    _, params, _ = random_model(CASES["vertical"])
    codes, classes = some_codes(CASES["vertical"])

    def last_logits(name, params):
        return apply(tiny_blueprint(CASES[name]), params, {}, codes, classes)[0][:, :, -1]

    whole = last_logits("parallel", params)
    np.testing.assert_allclose(last_logits("vertical", params), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(last_logits("dnd", params) - whole).max() > 0.1
    # Injecting embeddings that are zero is not injecting.
    silent = {**params, "token_embed": jnp.zeros_like(params["token_embed"])}
    whole = last_logits("parallel", silent)
    np.testing.assert_allclose(last_logits("dnd", silent), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*STRUCTURES, "rq"])
def test_fresh_models_predict_uniformly(name):
    config = CASES[name]
    blueprint, params, extra = random_model(config)
    codes, classes = some_codes(config)
    fresh = jax.jit(lambda key: blueprint.init(key)[0]["head_out"])(jax.random.key(0))
    _, log_probs = apply(blueprint, {**params, "head_out": fresh}, extra, codes, classes)
    np.testing.assert_allclose(log_probs, -math.log(config.codebook_size), rtol=1e-7)


def test_one_cell_and_non_square_grids():
    for grid in ((1, 1), (1, 3), (3, 2)):
        config = DnDConfig(**SHAPE | dict(grid=grid, layers=3))
        cos, sin = tiny_blueprint(config).build(*random_model(config)[1:]).rotary()
        assert cos.shape == sin.shape == (config.cells, 4)
        np.testing.assert_array_equal(cos[0], 1.0)
        np.testing.assert_array_equal(sin[0], 0.0)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters_and_log_probs():
    config = CASES["options"]
    blueprint, params, _ = random_model(config, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    codes, classes = some_codes(config)

    def run(params):
        model = blueprint.build(params, {})
        log_probs, _ = code_log_probs(model, codes, classes)
        return jnp.mean(log_probs), model.hidden(codes, classes)

    grads, hidden = jax.eval_shape(jax.grad(run, has_aux=True), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert {h.dtype for h in hidden} == {jnp.dtype("bfloat16")}
    _, log_probs = apply(blueprint, params, {}, codes, classes)
    assert log_probs.dtype == jnp.float32
    _, exact = apply(tiny_blueprint(config), params, {}, codes, classes)
    np.testing.assert_allclose(log_probs, exact, atol=0.15)  # Eight bits through four layers.


@pytest.mark.parametrize("name", [*STRUCTURES, "rq"])
def test_rematerialisation_reaches_every_scan(name):
    """What it does to values and gradients is tested with the scan itself."""
    config = dataclasses.replace(CASES[name], remat="full")
    blueprint, params, extra = random_model(config)
    jaxpr = jax.make_jaxpr(lambda p: blueprint.build(p, extra).hidden(*some_codes(config)))(params)
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert len(scans) == {"dnd": 3, "vertical": 3, "parallel": 1, "flat": 1, "rq": 2}[name]
    for scan in scans:
        inner = [e.primitive.name for e in scan.params["jaxpr"].eqns]
        assert inner == ["checkpoint"] or inner == ["remat2"], inner


# -- sizes and refusals ---------------------------------------------------------------------------

COUNTS = {
    "B": (110_888_448, 123_472_128, 198_974_208),
    "L": (342_910_976, 359_689_216, 460_358_656),
    "XL": (774_699_520, 795_672_320, 921_509_120),
    "XXL": (1_410_972_672, 1_436_140_032, 1_587_144_192),
    "XXXL": (2_535_608_320, 2_569_164_800, 2_770_503_680),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_of_the_released_sizes(size):
    for depth, count in zip((1, 2, 8), COUNTS[size], strict=True):
        assert code_model(DnDConfig.of_size(size, depth=depth)).parameter_count == count
    assert (
        code_model(DnDConfig.of_size(size, structure="parallel")).parameter_count == COUNTS[size][1]
    )


def test_head_positions():
    assert DnDConfig.of_size("XXL", depth=8).segment_ends() == (26, 29, 32, 35, 38, 41, 44, 47)
    assert DnDConfig.of_size("XXL", depth=1).segment_ends() == (47,)
    released = DnDConfig.of_size("XXL", depth=2, head_layers=(39, 47))
    assert released.segment_ends() == (39, 47)
    assert DnDConfig.of_size("B", depth=2, structure="flat").sequence_length == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(head_layers=(2, 2, 3)), r"head_layers \(2, 2, 3\) must be 3 strictly increasing"),
        (dict(head_layers=(2, 1, 3)), "strictly increasing"),
        (dict(head_layers=(2, 3)), "must be 3 strictly"),
        (dict(head_layers=(0, 1, 2)), "end at the last one, 3"),
        (dict(head_layers=(-1, 1, 3)), "strictly increasing"),
        (dict(layers=2), "must be 3 strictly"),
        (dict(head_layers=(0, 1, 3), structure="parallel"), "no meaning for structure 'parallel'"),
        (dict(head_layers=(0, 1, 3), structure="flat"), "no meaning for structure 'flat'"),
        (dict(structure="diagonal"), "structure 'diagonal' is not one of"),
        (dict(dim=18), "dim 18 over 2 heads must give a head size divisible by 4"),
        (dict(kv_heads=3), "heads 2 is not a multiple of kv_heads 3"),
        (dict(class_dropout=1.0), "class_dropout 1.0 is outside"),
        (dict(dropout=-0.1), "dropout -0.1 is outside"),
        (dict(layers=0), "layers 0 must be at least 1"),
        (dict(grid=(0, 2)), "grid"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        DnDConfig(**SHAPE | changes)
    with pytest.raises(InputError, match="size 'XS' is not one of B, L"):
        DnDConfig.of_size("XS")
