"""Official state dicts in, logits and images out, against NumPy models in torch's own layout."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from torch_reference import (
    Tokenizer,
    discriminate,
    dnd_logits,
    fake_discriminator,
    fake_dnd,
    fake_tokenizer,
    share_codebook,
)

from jaxllm.errors import InputError
from jaxllm.hub.layouts import model_slots
from jaxllm.hub.official import (
    ImportOptions,
    dnd_config,
    dnd_rules,
    export_discriminator,
    export_dnd,
    export_tokenizer,
    import_discriminator,
    import_dnd,
    import_tokenizer,
)
from jaxllm.models.code_model import code_model
from jaxllm.models.discriminator import Discriminator
from jaxllm.models.dnd import SIZES, DnDConfig
from jaxllm.models.image_tokenizer import ImageTokenizer
from jaxllm.nn.module import Blueprint

# Head size 8, so that rows and columns have two rotary frequencies each.
SHAPE = dict(codes=11, dim=32, hidden=40, class_rows=6, heads=4, kv_heads=4)
GRID = 3
CASES = {
    "llamagen": (dict(layers=2, depth=1, llamagen=True), (1,)),
    "one code, one layer": (dict(layers=1, depth=1), (0,)),
    "two codes, grouped heads": (dict(layers=4, depth=2, kv_heads=2), (1, 3)),
    "three codes, one kv head": (dict(layers=3, depth=3, kv_heads=1), (0, 1, 2)),
}
TOKENIZER = dict(
    width=8,
    multipliers=(1, 2, 2),
    blocks=1,
    attention=(1,),
    latent=6,
    code_dim=5,
    codes=24,
    depth=2,
)
TOKENIZER_OPTIONS = ImportOptions(groups=4, image_size=(8, 12))


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True, err_msg=name)


def small_dnd(case="two codes, grouped heads", seed=0):
    changes, head_layers = CASES[case]
    shape = SHAPE | changes
    tensors = fake_dnd(np.random.default_rng(seed), **shape)
    options = ImportOptions(
        heads=4, grid=(GRID, GRID), head_layers=head_layers if shape["depth"] > 1 else None
    )
    return tensors, options, shape, head_layers


@pytest.mark.parametrize("case", CASES)
def test_code_model_computes_what_the_torch_layout_says(case):
    tensors, options, shape, head_layers = small_dnd(case)
    config, params, extra, used = import_dnd(tensors, options)
    assert used == len(tensors) and extra == {}
    assert config.null_class == 5 and config.class_rotary == "zero"
    assert config.segment_ends() == head_layers
    rng = np.random.default_rng(1)
    codes = rng.integers(0, shape["codes"], (3, GRID * GRID, shape["depth"]))
    classes = np.array([0, 3, config.null_class])
    model = code_model(config)

    @jax.jit
    def logits(params, codes, classes):
        built = model.build(params, extra)
        hidden = built.hidden(codes, classes)
        return jnp.stack([h @ built.head_kernel(i) for i, h in enumerate(hidden)], axis=2)

    expected = dnd_logits(
        tensors,
        codes,
        classes,
        heads=shape["heads"],
        kv_heads=shape["kv_heads"],
        head_layers=head_layers,
        grid=GRID,
    )
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits(params, codes, classes), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_code_model_survives_the_way_back_bit_for_bit(case):
    tensors, options, shape, _ = small_dnd(case)
    config, params, extra, _ = import_dnd(tensors, options)
    equal(export_dnd(params, extra, config, llamagen="llamagen" in shape), tensors)


def test_shared_head_is_repeated_in_torch():
    tensors, options, _, _ = small_dnd()
    tensors["output.1.weight"] = tensors["output.0.weight"]
    shared = ImportOptions(**{**vars(options), "share_heads": True})
    config, params, extra, used = import_dnd(tensors, shared)
    assert params["head_out"].shape[0] == 1 and used == len(tensors)
    equal(export_dnd(params, extra, config), tensors)
    assert import_dnd(tensors, options).params["head_out"].shape[0] == 2
    tensors["output.1.weight"] = tensors["output.1.weight"] + 1
    with pytest.raises(InputError, match="output.1.weight differs from output.0.weight"):
        import_dnd(tensors, shared)


def test_half_precision_becomes_float32_and_tables_are_ignored():
    tensors, options, _, _ = small_dnd()
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    tables = {"freqs_cis": np.zeros((10, 4, 2)), "causal_mask": np.ones((1, 10, 10), bool)}
    params = import_dnd(half | tables, options).params
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        params["token_embed"][0], half["tok_embeddings.weight"].astype(np.float32)
    )


def without(tensors, name):
    return {key: x for key, x in tensors.items() if key != name}


def test_code_model_tensors_that_do_not_fit_are_named():
    tensors, options, _, _ = small_dnd()
    wo = "layers.2.attention.wo.weight"
    cases = [
        (tensors | {"layers.1.attention.wqkv.bias": np.zeros(3)}, "unknown tensor layers.1.*bias"),
        (tensors | {"cls_embedding.cap_proj.fc1.weight": np.zeros(3)}, "unknown tensor cls_emb"),
        (without(tensors, wo), f"tensor {wo} is missing"),
        (without(tensors, "tok_embeddings.weight"), "tok_embeddings.weight is missing"),
        (without(tensors, "norm.0.weight"), "norm.0.weight is missing"),
        (tensors | {wo: np.zeros((32, 31))}, rf"{wo} has shape \(32, 31\), expected \(32, 32\)"),
        (tensors | {wo: np.full((32, 32), np.nan)}, f"{wo} holds a value that is not finite"),
        (tensors | {"tok_embeddings.weight": np.zeros(11)}, "expected 2 axes"),
        (
            {n: x[:-1] if "wqkv" in n else x for n, x in tensors.items()},
            "wqkv.weight has 63 rows",
        ),
    ]
    for wrong, culprit in cases:
        with pytest.raises(InputError, match=culprit):
            import_dnd(wrong, options)


def test_options_that_contradict_the_shapes_or_are_needed():
    tensors, options, _, _ = small_dnd()
    base = vars(options)
    cases = [
        ({"heads": None}, "no released model has 32 dimensions"),
        ({"heads": 3}, "3 heads"),
        ({"head_layers": None}, "no released model has 4 layers and 2 codes"),
        ({"head_layers": (3,)}, "head_layers"),
        ({"num_classes": 7}, "class table has 6 rows, not 7 or 8"),
    ]
    for changes, culprit in cases:
        with pytest.raises(InputError, match=culprit):
            import_dnd(tensors, ImportOptions(**{**base, **changes}))
    config = import_dnd(tensors, ImportOptions(**{**base, "num_classes": 6})).config
    assert config.num_classes == 6 and config.null_class is None
    one = tensors | {"cls_embedding.embedding_table.weight": np.zeros((1, 32))}
    config = import_dnd(one, options).config
    assert config.num_classes == 1 and config.null_class is None


def test_models_that_the_official_code_lacks_are_not_exported():
    tensors, options, _, _ = small_dnd()
    config, params, extra, _ = import_dnd(tensors, options)
    changes = [
        ({"class_rotary": "identity"}, "class_rotary is 'identity'"),
        ({"per_depth_embedding": True}, "token_embed .* has no counterpart"),
        ({"structure": "flat", "head_layers": None}, "depth_embed .* has no counterpart"),
    ]
    for change, culprit in changes:
        with pytest.raises(InputError, match=culprit):
            export_dnd(params, extra, DnDConfig(**{**vars(config), **change}))
    with pytest.raises(InputError, match="head_norm .* has no counterpart"):
        export_dnd(params, extra, config, llamagen=True)


def released_shapes(size, depth, class_rows=1001):
    """Every name and shape of a released code model, by the paper's sizes."""
    layers, _, dim = SIZES[size]
    hidden = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 2048: 5632}[dim]
    shapes = {
        "cls_embedding.embedding_table.weight": (class_rows, dim),
        "tok_embeddings.weight": (16384, dim),
    }
    for i in range(layers):
        shapes[f"layers.{i}.attention_norm.weight"] = (dim,)
        shapes[f"layers.{i}.attention.wqkv.weight"] = (3 * dim, dim)
        shapes[f"layers.{i}.attention.wo.weight"] = (dim, dim)
        shapes[f"layers.{i}.ffn_norm.weight"] = (dim,)
        shapes[f"layers.{i}.feed_forward.w1.weight"] = (hidden, dim)
        shapes[f"layers.{i}.feed_forward.w2.weight"] = (dim, hidden)
        shapes[f"layers.{i}.feed_forward.w3.weight"] = (hidden, dim)
    for i in range(depth):
        shapes[f"norm.{i}.weight"] = (dim,)
        shapes[f"output.{i}.weight"] = (16384, dim)
    return shapes


@pytest.mark.parametrize(
    ("size", "depth", "head_layers", "numbers"),
    [
        ("XXL", 2, (39, 47), 1_436_140_032),
        ("XXXL", 8, (26, 29, 32, 35, 38, 41, 44, 47), 2_770_503_680),
        ("B", 1, None, 110_888_448),
    ],
)
def test_full_size_names_and_shapes_map_one_to_one(size, depth, head_layers, numbers):
    shapes = released_shapes(size, depth)
    abstract = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    config = dnd_config(abstract)
    assert config == DnDConfig.of_size(
        size, depth=depth, head_layers=head_layers, class_rotary="zero"
    )
    model = code_model(config)
    slots = model_slots(dnd_rules(llamagen=False), model, depth)
    assert len(slots) == len(shapes)
    assert {slot.name: slot.torch_shape for slot in slots} == shapes
    assert sum(np.prod(s) for s in shapes.values()) == model.parameter_count == numbers


@pytest.fixture(scope="module")
def separate():
    return fake_tokenizer(np.random.default_rng(2), **TOKENIZER)


@pytest.fixture(scope="module")
def tokenizer(separate):
    """The imported tokenizer with its compiled directions."""
    config, params, extra, used = import_tokenizer(separate, TOKENIZER_OPTIONS)
    assert used == len(separate)
    blueprint = Blueprint(lambda rngs: ImageTokenizer(config, rngs=rngs))
    encode = jax.jit(lambda p, e, x: blueprint.build(p, e).encode(x))
    codes = jax.jit(lambda p, e, z: blueprint.build(p, e).quantize(z).codes)
    decode = jax.jit(lambda p, e, c: blueprint.build(p, e).from_codes(c))
    return config, params, extra, (encode, codes, decode)


def close(actual, expected):
    """1e-4 of the largest value."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)


def test_tokenizer_computes_what_the_torch_layout_says(separate, tokenizer):
    config, params, extra, (encode, to_codes, decode) = tokenizer
    assert config.multipliers == (1, 2, 2) and config.attention_levels == (1,)
    assert config.grid == (2, 3) and not config.quantizer.shared
    assert config.quantizer.ema_mode == "sequential"
    reference = Tokenizer(separate, groups=4, levels=3, depth=2)
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (2, 3, 8, 12))
    latents = reference.encode(images)
    actual = encode(params, extra, jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float32))
    close(actual, latents)
    codes = reference.quantize(latents)
    assert len(np.unique(codes)) > 3
    np.testing.assert_array_equal(to_codes(params, extra, actual), codes)
    decoded = decode(params, extra, codes.reshape(2, -1, 2))
    close(decoded, reference.decode(codes).transpose(0, 2, 3, 1))


def test_tokenizer_survives_the_way_back_bit_for_bit(separate, tokenizer):
    config, params, extra, _ = tokenizer
    equal(export_tokenizer(params, extra, config), separate)
    shared = share_codebook(separate)
    config, params, extra, used = import_tokenizer(shared, TOKENIZER_OPTIONS)
    assert config.quantizer.shared and used == len(shared)
    assert extra["quantizer_state"]["codebook"].shape == (1, 24, 5)
    equal(export_tokenizer(params, extra, config), shared)


def test_tokenizer_tensors_that_do_not_fit_are_named(separate):
    down = "encoder.down.1.downsample.conv.weight"
    book = "quantizer.codebooks.1.weight"
    padded = separate[book].copy()
    padded[-1, 0] = 1
    shared = share_codebook(separate)
    changed = shared | {"quantizer.codebooks.1.embed_ema": np.zeros((24, 5))}
    cases = [
        (separate | {"encoder.down.0.attn.0.q.bias": np.zeros(8)}, {}, "unknown tensor encoder"),
        (without(separate, down), {}, f"{down} is missing"),
        (separate | {down: np.zeros((16, 16, 3, 1))}, {}, f"{down} has shape"),
        (without(separate, "quantizer.codebooks.0.weight"), {}, "codebooks.0.weight is missing"),
        (separate | {book: padded}, {}, f"last row of {book}, padding, is not zero"),
        (separate, {"shared_codebook": True}, "codebooks.1.weight differs from .*codebooks.0.w"),
        (changed, {"shared_codebook": True}, "codebooks.1.embed_ema differs"),
        (separate, {"groups": 3}, "groups"),
        (separate, {"image_size": (8, 10)}, "image_size"),
    ]
    for tensors, options, culprit in cases:
        with pytest.raises(InputError, match=culprit):
            import_tokenizer(tensors, ImportOptions(**{**vars(TOKENIZER_OPTIONS), **options}))
    assert not import_tokenizer(changed, TOKENIZER_OPTIONS).config.quantizer.shared


def test_discriminator_in_evaluation_and_back():
    tensors = fake_discriminator(np.random.default_rng(4), width=4)
    config, params, extra, used = import_discriminator(tensors)
    assert (config.width, config.layers, config.norm) == (4, 2, "batch")
    blueprint = Blueprint(lambda rngs: Discriminator(config, rngs=rngs))
    images = np.random.default_rng(5).uniform(-1, 1, (2, 3, 16, 20))
    run = jax.jit(lambda p, e, x: blueprint.build(p, e)(x, train=False))
    actual = run(params, extra, jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float32))
    expected = discriminate(tensors, images)
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-5)
    kept = {n: x for n, x in tensors.items() if not n.endswith("num_batches_tracked")}
    assert used == len(kept)
    equal(export_discriminator(params, extra, config), kept)
    with pytest.raises(InputError, match="unknown tensor main.2.bias"):
        import_discriminator(tensors | {"main.2.bias": np.zeros(8)})
    with pytest.raises(InputError, match="main.6.running_var is missing"):
        import_discriminator(without(tensors, "main.6.running_var"))
