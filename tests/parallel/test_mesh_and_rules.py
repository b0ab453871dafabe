"""Meshes and sharding rules: what they give, what they refuse, and that every model is covered."""

import dataclasses
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.errors import InputError
from jaxllm.images.tokenizer import discriminator_blueprint, tokenizer_blueprint
from jaxllm.models.code_model import CODE_MODEL_RULES, code_model
from jaxllm.models.discriminator import DiscriminatorConfig
from jaxllm.models.dnd import SIZES, DnDConfig
from jaxllm.models.image_classifier import CLASSIFIER_RULES, ClassifierConfig, ImageClassifier
from jaxllm.models.image_tokenizer import TOKENIZER_RULES, ImageTokenizerConfig
from jaxllm.models.rq_transformer import RQTransformerConfig
from jaxllm.nn.module import Blueprint
from jaxllm.parallel import sharding
from jaxllm.parallel.mesh import MESH_AXES, MeshConfig, make_mesh, resolve_shape
from jaxllm.parallel.sharding import (
    batch_sharding,
    constrain,
    leaf_paths,
    like_params,
    param_shardings,
    spec_for,
)
from jaxllm.quantize import BSQ, FSQ, LFQ, ResidualVQ, SimVQ

SMALL = dict(layers=2, dim=16, heads=2, codebook_size=8, grid=(2, 2), depth=2, num_classes=3)


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), MESH_AXES)


# -- meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), 8, (1, 8, 1)),
        (MeshConfig(fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), 4, (2, 2, 1)),
        (MeshConfig(data=1), 1, (1, 1, 1)),
    ],
)
def test_mesh_shapes(config, devices, shape):
    assert resolve_shape(config, devices) == shape
    mesh = make_mesh(config, jax.devices()[:devices])
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "data=3 fsdp=1 tensor=1 does not fit 8 devices"),
        (MeshConfig(fsdp=3), "data=-1 fsdp=3 tensor=1 does not fit 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one -1"),
        (MeshConfig(data=0), "must be positive"),
        (MeshConfig(data=2, fsdp=4, slices=4), "data=2 does not divide over 4 slices"),
        (MeshConfig(slices=3), "data=8 does not divide over 3 slices"),
    ],
)
def test_impossible_meshes_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        make_mesh(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"slices": -1}, "mesh.slices -1"), ({"lost_after": 1}, "mesh.lost_after 1 must be at least")],
)
def test_impossible_mesh_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**changes)


def iota(text):
    """Devices of "[2,4]T(1,0)" or "[8]": counted up in that shape, transposed, in one row."""
    shape, turned = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    order = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
    return (order.transpose(numbers(turned)) if turned else order).reshape(-1)


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def groups_of(text):
    """Sets of devices of one collective, in any of the three notations that XLA prints."""
    if listed := re.match(r"\{(\{.*?\})\}", text):
        return [numbers(group) for group in re.findall(r"\{.*?\}", listed[1])]
    if counted := re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return iota(counted[3]).reshape(int(counted[1]), int(counted[2])).tolist()
    named = r"mesh\[(.*?)\](?:, device_ids=\((.*?)\) )? ?\{(.*?)\}"
    axes, order, used = re.match(named, text).groups()
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    order = iota(order or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
    last = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", used)]
    moved = np.moveaxis(order, last, range(-len(last), 0))
    return moved.reshape(-1, math.prod(order.shape[axis] for axis in last)).tolist()


def collectives(program):
    """{kind: {(bytes, devices that talk to each other)}} of a compiled program in float32."""
    found = {}
    line = r"= f32\[([\d,]*)\]\S* (all-\w+|reduce-scatter)(?:-start)?\(.*replica_groups=(.*)"
    for shape, kind, groups in re.findall(line, program):
        for group in groups_of(groups):
            size = 4 * math.prod(numbers(shape))
            found.setdefault(kind, set()).add((size, tuple(sorted(group))))
    return found


def test_between_slices_only_gradients_travel():
    """Two slices of four devices: parameters are gathered inside a slice, not across."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, slices=2), jax.devices()[::-1])
    assert [d.id for d in mesh.devices[0].flat] == [0, 1, 2, 3]  # Whatever order they come in.
    weights, rows = NamedSharding(mesh, P("fsdp")), batch_sharding(mesh)

    def step(w, x):
        return w - jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (16, 64))]
    jitted = jax.jit(step, in_shardings=(weights, rows), out_shardings=weights)
    found = collectives(jitted.lower(*shapes).compile().as_text())
    slices = {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert {group for _, group in found["all-gather"]} == slices
    # What crosses is a device's quarter of the gradient, summed with its partner's.
    across = {(size, group) for pairs in found.values() for size, group in pairs}
    across = {(size, group) for size, group in across if group not in slices}
    assert across == {(64 * 64 * 4 // 4, pair) for pair in ((0, 4), (1, 5), (2, 6), (3, 7))}


# -- one parameter -------------------------------------------------------------------------------

RULES = (("w$", ("embed", "mlp")), ("twice$", ("heads", "mlp")), ("odd$", ("rows", None)))


def test_a_rule_becomes_a_spec_on_the_axes_that_the_mesh_has():
    assert spec_for("a/w", (8, 8), RULES, mesh_of(fsdp=2, tensor=4)) == P("fsdp", "tensor")
    assert spec_for("a/w", (8, 8), RULES, mesh_of(data=2, tensor=4)) == P(None, "tensor")
    assert spec_for("a/w", (8, 8), RULES, mesh_of(data=8)) == P(None, None)


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("a/bias", (8,), r"no sharding rule matches parameter 'a/bias' \(8,\)"),
        ("a/w", (8, 8, 8), r"rule 'w\$' .* has another rank than 'a/w' \(8, 8, 8\)"),
        ("twice", (8, 8), r"rule 'twice\$' uses mesh axis 'tensor' twice for 'twice'"),
        ("odd", (8, 8), r"rule 'odd\$' names 'rows', not one of batch, "),
    ],
)
def test_ambiguous_rules_are_refused_on_every_mesh(path, shape, message):
    for mesh in (mesh_of(data=8), mesh_of(fsdp=2, tensor=4)):
        with pytest.raises(ValueError, match=message):
            spec_for(path, shape, RULES, mesh)


def test_a_dimension_that_does_not_divide_is_replicated_and_said_once(caplog, monkeypatch):
    monkeypatch.setattr(sharding, "_said", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert spec_for("a/w", (6, 8), RULES, mesh_of(fsdp=4, tensor=2)) == P(None, "tensor")
    assert caplog.messages == ["a/w: dimension 6 (embed) does not divide by 4; replicated"]


def test_arrays_are_laid_out_as_their_rules_say():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    blueprint = code_model(DnDConfig(**SMALL, mlp_hidden=32, dropout=0.0))
    places = param_shardings(blueprint.abstract_params, CODE_MODEL_RULES, mesh)
    params, _ = jax.jit(blueprint.init, out_shardings=(places, None))(jax.random.key(0))
    layers = params["layers"]
    for array, spec, shard in (
        (layers["attn"]["qkv"], P(None, "fsdp", "tensor", None, None), (2, 8, 1, 3, 8)),
        (layers["attn"]["out"], P(None, "tensor", None, "fsdp"), (2, 1, 8, 8)),
        (layers["mlp"]["gate"], P(None, "fsdp", "tensor"), (2, 8, 16)),
        (layers["mlp"]["down"], P(None, "tensor", "fsdp"), (2, 16, 8)),
        (params["token_embed"], P(None, "tensor", "fsdp"), (1, 4, 8)),
        (params["head_out"], P(None, "fsdp", "tensor"), (2, 8, 4)),
        (params["head_norm"], P(None, None), (2, 16)),
    ):
        assert array.sharding.spec == spec
        assert {piece.data.shape for piece in array.addressable_shards} == {shard}


def test_mirrors_of_parameters_live_where_these_do():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = {
        "a": {"w": jax.ShapeDtypeStruct((4, 4), "f4")},
        "w": jax.ShapeDtypeStruct((8, 8), "f4"),
    }
    places = param_shardings(shapes, RULES, mesh)
    state = {
        "0": {"mu": shapes, "count": jax.ShapeDtypeStruct((), "i4")},
        "row": {"w": shapes["a"]["w"]},
    }
    found = like_params(state, shapes, places, mesh)
    assert found["0"]["mu"] == places
    assert found["0"]["count"].spec == P()
    assert found["row"]["w"].spec == P()  # The name of a parameter, but not its shape.


def test_constraints_without_and_with_a_mesh():
    x = np.ones((8, 6), np.float32)
    assert constrain(x, "batch", "embed") is x
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        y = jax.jit(lambda x: constrain(x, "batch", "mlp"))(x)
    assert y.sharding.is_equivalent_to(
        NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), P(("data", "fsdp"))), 2
    )
    assert batch_sharding(make_mesh(MeshConfig(data=4, fsdp=2))).shard_shape((16, 3)) == (2, 3)


# -- every model ---------------------------------------------------------------------------------


def tokenizer(quantizer, **changes):
    return tokenizer_blueprint(
        ImageTokenizerConfig(
            **{
                **dict(image_size=(16, 16), width=8, multipliers=(1, 2), groups=4),
                **dict(latent_dim=8, attention_levels=(0,), quantizer=quantizer),
                **changes,
            }
        )
    )


def models():
    dnd = DnDConfig(**SMALL)
    for structure in ("dnd", "vertical", "parallel", "flat"):
        yield structure, code_model(dataclasses.replace(dnd, structure=structure)), CODE_MODEL_RULES
    odd = dataclasses.replace(dnd, per_depth_embedding=True, share_heads=True, kv_heads=1)
    yield "dnd with options", code_model(odd), CODE_MODEL_RULES
    yield "rq", code_model(RQTransformerConfig(**SMALL)), CODE_MODEL_RULES
    for quantizer in (
        ResidualVQ(codebook_size=8, code_dim=4, depth=2, update="gradient"),
        ResidualVQ(codebook_size=8, code_dim=4, depth=2),
        FSQ(levels=(4, 4)),
        LFQ(code_dim=4),
        BSQ(code_dim=4),
        SimVQ(codebook_size=8, code_dim=4),
    ):
        yield type(quantizer).__name__, tokenizer(quantizer), TOKENIZER_RULES
    for norm in ("group", "batch", "none"):
        config = DiscriminatorConfig(norm=norm, width=16)
        yield f"discriminator {norm}", discriminator_blueprint(config), TOKENIZER_RULES
    config = ClassifierConfig()
    yield "classifier", Blueprint(lambda rngs: ImageClassifier(config, rngs=rngs)), CLASSIFIER_RULES


def test_every_parameter_of_every_model_has_exactly_one_rule_and_no_rule_is_idle():
    used = {}
    for name, blueprint, rules in models():
        for path, leaf in leaf_paths(blueprint.abstract_params):
            matching = [pattern for pattern, _ in rules if re.search(pattern, path)]
            assert len(matching) == 1, f"{name}: {path} matches {matching}"
            spec_for(path, leaf.shape, rules, mesh_of(fsdp=2, tensor=2))
            used.setdefault(rules, set()).update(matching)
    for rules, patterns in used.items():
        assert patterns == {pattern for pattern, _ in rules}


@pytest.mark.parametrize("mesh", [mesh_of(fsdp=8), mesh_of(tensor=8), mesh_of(2, 4, 4)], ids=str)
def test_large_parameters_of_full_size_models_divide(mesh, monkeypatch):
    full = [
        (code_model(DnDConfig.of_size("XXL", depth=2)), CODE_MODEL_RULES),
        (code_model(RQTransformerConfig()), CODE_MODEL_RULES),
        (tokenizer_blueprint(ImageTokenizerConfig()), TOKENIZER_RULES),
    ]
    assert SIZES["XXL"] == (48, 24, 1536) and full[0][0].parameter_count > 1.3e9
    ways = {name: size for name, size in mesh.shape.items() if name != "data" and size > 1}
    for blueprint, rules in full:
        whole = split = 0
        for path, leaf in leaf_paths(blueprint.abstract_params):
            spec = spec_for(path, leaf.shape, rules, mesh)
            used = [axis for axis in spec if axis is not None]
            whole += leaf.size
            split += leaf.size // math.prod(mesh.shape[axis] for axis in used)
            if leaf.size >= 4 << 20:
                assert set(used) == set(ways), path
        assert split < 1.02 * whole / math.prod(ways.values())
