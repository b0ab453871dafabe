"""The image tokenizer: sizes, codes and prefixes, patches, rematerialisation, refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.models.image_tokenizer import (
    ImageTokenizer,
    ImageTokenizerConfig,
    fold_patches,
    run_block,
    unfold_patches,
)
from jaxllm.nn.conv import ResnetBlock
from jaxllm.nn.module import Blueprint
from jaxllm.quantize import FSQ, ResidualVQ

CONFIG = ImageTokenizerConfig(
    image_size=(8, 12),
    width=4,
    multipliers=(1, 2, 2),
    res_blocks=1,
    groups=2,
    latent_dim=6,
    quantizer=ResidualVQ(codebook_size=9, code_dim=5, depth=3),
)
IMAGES = jax.random.uniform(jax.random.key(2), (2, 8, 12, 3), minval=-1.0)


def blueprint_of(config, dtype=jnp.float32):
    return Blueprint(lambda rngs: ImageTokenizer(config, rngs=rngs, dtype=dtype))


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(CONFIG)


def random_arrays(config):
    """Random (params, extra); filled by NumPy, which needs no compilation."""
    rng = np.random.default_rng(0)
    blueprint = blueprint_of(config)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32),
        (blueprint.abstract_params, blueprint.abstract_extra),
    )


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameter_counts_of_the_released_tokenizer():
    params = blueprint_of(ImageTokenizerConfig()).abstract_params
    assert count(params["encoder"]) == 27_194_880
    assert count(params["decoder"]) == 39_294_851
    assert count([params["quant_conv"], params["post_quant_conv"]]) == 131_584
    extra = blueprint_of(ImageTokenizerConfig()).abstract_extra
    # The released table has one padding row more, which is not stored.
    assert extra["quantizer_state"]["codebook"].size == 4_194_560 - 256
    attentive = blueprint_of(ImageTokenizerConfig(attention_levels=(4,))).abstract_params
    assert count(attentive["encoder"]) == 29_298_176
    assert count(attentive["decoder"]) == 42_449_795


@pytest.fixture(scope="module")
def passes(arrays):
    """What one compiled pass over all methods returns."""

    @jax.jit
    def run(params, extra):
        model = blueprint_of(CONFIG).build(params, extra)
        latents = model.encode(IMAGES)
        out = model.quantize(latents)
        codes = model.to_codes(IMAGES)
        partial = model.from_codes(codes, 2), model.from_codes(codes)
        vectors = [
            CONFIG.quantizer.decode(*model.quantizer_parts(), out.codes, depth=depth)
            for depth in (1, 2, 3)
        ]
        again = model.decode(vectors[1]), model.decode(out.quantized)
        return latents, out, codes, partial, vectors, again

    return run(*arrays)


def test_codes_in_raster_order(passes):
    latents, out, codes, *_ = passes
    assert latents.shape == (2, 2, 3, 5) and latents.dtype == jnp.float32
    assert codes.shape == (2, 6, 3) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes.reshape(2, 2, 3, 3), out.codes)
    assert CONFIG.grid == (2, 3) and CONFIG.factor == 4


def test_decoding_a_prefix_decodes_the_sum_of_its_vectors(arrays, passes):
    _, out, codes, partial, vectors, again = passes
    table = np.asarray(arrays[1]["quantizer_state"]["codebook"][0])
    running = np.zeros((2, 6, 5))
    for depth in range(3):
        running = running + table[np.asarray(codes[..., depth])]
        np.testing.assert_allclose(vectors[depth].reshape(2, 6, 5), running, atol=1e-5)
    np.testing.assert_allclose(vectors[2], out.quantized, atol=1e-5)
    np.testing.assert_allclose(partial[0], again[0], atol=1e-5)
    np.testing.assert_allclose(partial[1], again[1], atol=1e-5)
    assert partial[0].shape == (2, 8, 12, 3)
    assert np.abs(partial[0] - partial[1]).max() > 1e-3


def test_rematerialisation_changes_neither_value_nor_gradient():
    block = ResnetBlock(2, 4, groups=2, rngs=nnx.Rngs(params=jax.random.key(0)))
    x = IMAGES[:, :3, :3, :2]

    def loss(x, remat):
        return jnp.sum(run_block(block, x, remat) ** 2)

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for a, b in zip(run(x, True), run(x, False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_rematerialisation_reaches_every_residual_block():
    def blocks(config):
        blueprint = blueprint_of(config)
        jaxpr = jax.make_jaxpr(lambda p, e: (m := blueprint.build(p, e)).decode(m.encode(IMAGES)))
        names = [e.primitive.name for e in jaxpr(*random_arrays(config)).jaxpr.eqns]
        return names.count("checkpoint") + names.count("remat2")

    assert blocks(CONFIG) == 0
    # Encoder: three levels of one and two in the middle. Decoder: three of two and two.
    assert blocks(dataclasses.replace(CONFIG, remat=True)) == 3 + 2 + 3 * 2 + 2


def test_attention_sits_at_the_asked_levels_and_in_the_middle():
    def attentions(config):
        params = blueprint_of(config).abstract_params
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        return {path.split("['q']")[0] for path in paths if "attention" in path and "['q']" in path}

    middle = {f"['{part}']['middle']['attention']" for part in ("encoder", "decoder")}
    assert attentions(CONFIG) == middle
    blocks = {"encoder": 2, "decoder": 3}
    expected = {
        f"['{part}']['levels'][1]['attentions'][{i}]"
        for part, n in blocks.items()
        for i in range(n)
    }
    asked = dataclasses.replace(CONFIG, attention_levels=(1,), res_blocks=2)
    assert attentions(asked) == middle | expected


def test_folding_patches():
    x = jnp.arange(2.0 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    folded = fold_patches(x, 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(unfold_patches(folded, 2), x)
    np.testing.assert_array_equal(fold_patches(x, 1), x)
    np.testing.assert_array_equal(unfold_patches(x, 1), x)


def test_a_patch_is_one_more_halving_of_the_grid():
    config = dataclasses.replace(CONFIG, patch=2, image_size=(16, 24))
    assert config.factor == 8 and config.grid == (2, 3)
    blueprint = blueprint_of(config)
    shapes = jax.eval_shape(
        lambda p, e, x: (blueprint.build(p, e).to_codes(x), blueprint.build(p, e).encode(x)),
        blueprint.abstract_params,
        blueprint.abstract_extra,
        jax.ShapeDtypeStruct((2, 16, 24, 3), jnp.float32),
    )
    assert shapes[0].shape == (2, 6, 3) and shapes[1].shape == (2, 2, 3, 5)


def test_bfloat16_compute_keeps_float32_where_it_matters():
    blueprint = blueprint_of(CONFIG, jnp.bfloat16)

    def run(params, extra, images):
        model = blueprint.build(params, extra)
        latents = model.encode(images)
        return (
            latents,
            model.decode(latents),
            model.decoder.trunk(jnp.ones((1, 2, 3, 6), jnp.bfloat16)),
        )

    latents, decoded, features = jax.eval_shape(
        run, blueprint.abstract_params, blueprint.abstract_extra, IMAGES
    )
    assert latents.dtype == decoded.dtype == jnp.float32
    assert features.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(blueprint.abstract_params)} == {jnp.dtype("float32")}


def test_a_quantizer_without_a_codebook():
    config = dataclasses.replace(CONFIG, quantizer=FSQ((3, 5)))
    blueprint = blueprint_of(config)
    assert not jax.tree.leaves(blueprint.abstract_extra.get("quantizer_state", {}))
    codes = jax.eval_shape(
        lambda p, e, x: blueprint.build(p, e).to_codes(x),
        blueprint.abstract_params,
        blueprint.abstract_extra,
        IMAGES,
    )
    assert codes.shape == (2, 6, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_size=(8, 10)), "is not a positive multiple of 4"),
        (dict(image_size=(0, 8)), "is not a positive multiple of 4"),
        (dict(patch=4), "is not a positive multiple of 16"),
        (dict(patch=0), "patch 0 must be at least 1"),
        (dict(width=5), "does not split into 2 groups"),
        (dict(attention_levels=(3,)), r"attention_levels \(3,\) must lie in 0 .. 2"),
        (dict(multipliers=()), "attention_levels"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)
