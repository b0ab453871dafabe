"""The decoder language models: cached, packed, padded, scanned and sharded runs agree."""

from __future__ import annotations

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxllm.decoding.text_cache import dense_cache
from jaxllm.errors import InputError
from jaxllm.models.decoder import DECODER_KERNELS, DECODER_RULES, DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig, attend
from jaxllm.nn.linear import outputs_first
from jaxllm.nn.mlp import MlpConfig
from jaxllm.nn.norm import NormConfig
from jaxllm.nn.rope import RopeConfig
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import leaf_paths, param_shardings

V = 33
LLAMA = DecoderConfig(
    vocab_size=V,
    dim=16,
    layers=4,
    attention=AttentionConfig(4, 2, 8),
    mlp=MlpConfig(24),
    windows=(3, None),
    init_std=0.3,
)
CONFIGS = {
    # Alternating windows, and everything of Gemma 2.
    "gemma": dataclasses.replace(
        LLAMA,
        attention=AttentionConfig(4, 1, 8, scale=0.2, soft_cap=2.0),
        mlp=MlpConfig(24, "gelu_tanh"),
        norm=NormConfig(eps=1e-6, unit_offset=True),
        post_norms=True,
        scale_embeddings=True,
        tie_embeddings=True,
        logit_soft_cap=3.0,
    ),
    # Windows from one layer on, and everything of Qwen.
    "qwen": dataclasses.replace(
        LLAMA,
        layers=3,
        attention=AttentionConfig(4, 4, 6, bias=True, qk_norm=True),
        windows=(None, 4, 4),
    ),
    # Learned positions, biases, LayerNorm, and the parallel residual of GPT-NeoX.
    "gpt": dataclasses.replace(
        LLAMA,
        layers=2,
        attention=AttentionConfig(2, 2, 8, bias=True, out_bias=True),
        mlp=MlpConfig(24, "gelu", gated=False, bias=True),
        norm=NormConfig("layer"),
        rope=RopeConfig(fraction=0.5),
        max_positions=10,
        learned_positions=True,
        parallel_residual=True,
        windows=(None,),
    ),
}
TOKENS = jnp.asarray(np.random.default_rng(1).integers(V, size=(2, 10)), jnp.int32)


@pytest.fixture(scope="module", params=list(CONFIGS))
def made(request):
    """(config, blueprint, params); no parameter is at its special initial value."""
    config = CONFIGS[request.param]
    blueprint = decoder(config)
    return config, blueprint, random_params(blueprint)


def random_params(blueprint):
    """Norms near 1, everything else of standard deviation 0.3; biases too."""
    rng = np.random.default_rng(2)

    def fill(path, leaf):
        normal = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.2 * normal if path[-1].key == "scale" else 0.3 * normal

    return jax.tree_util.tree_map_with_path(fill, blueprint.abstract_params)


@cache
def hidden_of(blueprint):
    return jax.jit(lambda params, *args: blueprint.build(params, {}).hidden(*args))


@struct.dataclass
class DenseCache:
    """Everything ever appended, in order, with its position; the smallest cache that is right."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    filled: jax.Array
    window: int | None = struct.field(pytree_node=False)
    soft_cap: float | None = struct.field(pytree_node=False)

    def extend(self, q, k, v, positions):
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.filled, axis=1)
        keys, values, held = (
            write(old, new)
            for old, new in ((self.keys, k), (self.values, v), (self.positions, positions))
        )
        groups = q.shape[2] // k.shape[2]
        wide_k, wide_v = (jnp.repeat(x, groups, axis=2) for x in (keys, values))
        scores = jnp.einsum("btnh,bsnh->bnts", q, wide_k) * q.shape[-1] ** -0.5
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        back = positions[:, -q.shape[1] :, None] - held[:, None, :]
        seen = (held[:, None, :] >= 0) & (back >= 0)
        if self.window is not None:
            seen &= back < self.window
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        out = jnp.einsum("bnts,bsnh->btnh", weights, wide_v)
        filled = self.filled + positions.shape[1]
        return out, self.replace(keys=keys, values=values, positions=held, filled=filled)


def dense_caches(config, batch, length):
    attention = config.attention
    shape = (batch, length, attention.kv_heads, attention.head_dim)
    return [
        DenseCache(
            jnp.zeros(shape),
            jnp.zeros(shape),
            jnp.full((batch, length), -1, jnp.int32),
            jnp.int32(0),
            window,
            attention.soft_cap,
        )
        for window in config.layer_windows
    ]


# -- equivalences ---------------------------------------------------------------------------------


def test_cached_steps_equal_whole_sequences_with_left_padding(made):
    config, blueprint, params = made
    positions = jnp.stack([jnp.arange(10), jnp.arange(10) - 3]).astype(jnp.int32)
    positions = jnp.maximum(positions, -1)
    whole = hidden_of(blueprint)(params, TOKENS, positions)

    @jax.jit
    def step(params, caches, tokens, positions):
        model = blueprint.build(params, {})
        return model.step(model.unstack(), caches, tokens, positions)

    caches, parts = dense_caches(config, 2, 10), []
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
        out, caches = step(params, caches, TOKENS[:, start:stop], positions[:, start:stop])
        parts.append(out)
    real = np.asarray(positions >= 0)
    stepped = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(stepped[real], whole[real], atol=2e-5)
    # The row without padding is what it is without positions.
    alone = hidden_of(blueprint)(params, jnp.roll(TOKENS, -3, axis=1))
    np.testing.assert_allclose(whole[1, 3:], alone[1, :7], atol=2e-5)


def test_a_step_for_the_last_outputs_computes_no_others(made):
    config, blueprint, params = made
    positions = jnp.maximum(jnp.stack([jnp.arange(10), jnp.arange(10) - 3]), -1)

    @partial(jax.jit, static_argnames=("outputs", "wide"))
    def step(params, caches, outputs=None, wide=False):
        model = blueprint.build(params, {})
        blocks = model.unstack()
        if wide:
            blocks = [outputs_first(block, DECODER_KERNELS, "layers") for block in blocks]
        return model.step(blocks, caches, TOKENS, positions, outputs=outputs)

    attention = config.attention
    caches = [
        dense_cache(2, attention.kv_heads, 12, attention.head_dim, window=window,
                    soft_cap=attention.soft_cap).begin_prompt()
        for window in config.layer_windows
    ]  # fmt: skip
    whole, expected = step(params, caches)
    for outputs, wide in ((1, False), (3, False), (1, True), (10, False)):
        found, held = step(params, caches, outputs, wide)
        np.testing.assert_allclose(found, whole[:, -outputs:], atol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), held, expected)


def test_a_cache_that_chooses_by_its_queries_gets_those_it_asks_for(made):
    config, blueprint, params = made
    positions, asked = jnp.broadcast_to(jnp.arange(10), (2, 10)), []

    class Asking:
        def __init__(self, cache):
            self.cache = cache

        def least_queries(self, count):
            assert count == 10
            return 4

        def extend(self, q, k, v, positions):
            asked.append(q.shape[1])
            return self.cache.extend(q, k, v, positions)

    model = blueprint.build(params, {})
    caches = [Asking(cache) for cache in dense_caches(config, 2, 10)]
    out, _ = model.step(model.unstack(), caches, TOKENS, positions, outputs=1)
    assert asked == [10] * (config.layers - 1) + [4]
    whole = hidden_of(blueprint)(params, TOKENS, positions)
    np.testing.assert_allclose(out, whole[:, -1:], atol=2e-5)


def test_padding_on_the_right_changes_nothing_before_it(made):
    _, blueprint, params = made
    run = hidden_of(blueprint)
    found = run(params, TOKENS)[:, :7]
    other = run(params, TOKENS.at[:, 7:].set(0))[:, :7]
    np.testing.assert_allclose(found, other, atol=1e-6)


def test_packed_sequences_equal_separate_ones(made):
    _, blueprint, params = made
    run = hidden_of(blueprint)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [7, 7, 7, 7, 7, 7, 7, 0, 0, 0]])
    packed = run(params, TOKENS, None, segments)
    np.testing.assert_allclose(packed[:, :4], run(params, TOKENS)[:, :4], atol=2e-5)
    second = run(params, jnp.roll(TOKENS, -4, axis=1))
    np.testing.assert_allclose(packed[0, 4:], second[0, :6], atol=2e-5)
    # Positions may be given as well, and -1 leaves what it marks out of every segment.
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3, 4, -1, -1, -1]])
    given = run(params, TOKENS, positions, segments)
    np.testing.assert_allclose(given[0], packed[0], atol=2e-5)
    alone = run(params, jnp.roll(TOKENS, -2, axis=1))
    np.testing.assert_allclose(given[1, 2:7], alone[1, :5], atol=2e-5)


def test_scanned_layers_equal_a_loop(made):
    config, blueprint, params = made

    @jax.jit
    def looped(params):
        model = blueprint.build(params, {})
        positions = jnp.arange(10)
        x, table = model._embed(TOKENS, positions), model._rotary(positions)
        for layer, window in zip(model.unstack(), config.layer_windows, strict=True):
            attention = partial(
                attend, causal=True, window=window, soft_cap=config.attention.soft_cap
            )
            x = layer(x, table, attention)
        return model.norm(x)

    found = hidden_of(blueprint)(params, TOKENS)
    np.testing.assert_allclose(found, looped(params), atol=2e-5)


def test_remat_changes_no_gradient():
    """Over scans of two layers with different windows."""
    config = dataclasses.replace(CONFIGS["gemma"], windows=(3, None))
    params = random_params(decoder(config))

    def gradient(remat):
        blueprint = decoder(dataclasses.replace(config, remat=remat))

        def loss(params):
            return jnp.sum(jnp.sin(blueprint.build(params, {}).hidden(TOKENS)))

        return jax.jit(jax.grad(loss))(params)

    expected, found = gradient("none"), gradient("full")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_sharded_logits_equal_single_and_every_parameter_has_one_rule(made):
    config, blueprint, params = made
    for path, leaf in leaf_paths(params):
        rules = [names for pattern, names in DECODER_RULES if re.search(pattern, path)]
        assert len(rules) == 1 and len(rules[0]) == leaf.ndim, path

    def logits(params):
        model = blueprint.build(params, {})
        return model.logits(model.hidden(jnp.tile(TOKENS, (2, 1))))

    expected = jax.jit(logits)(params)
    assert expected.shape == (4, 10, V) and expected.dtype == jnp.float32
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = jax.device_put(params, param_shardings(params, DECODER_RULES, mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(logits)(placed)
    np.testing.assert_allclose(found, expected, atol=5e-5)
    qkv = placed["layers"]["attn"]["qkv"]
    split = 2 if config.attention.kv_heads > 1 else 1
    assert qkv.addressable_shards[0].data.size == qkv.size // 2 // split


# -- details --------------------------------------------------------------------------------------


def test_a_window_is_what_a_token_reaches():
    """Through one layer token j reaches i exactly if i - 3 < j <= i; through two, twice as far."""
    for layers, reach in ((1, 3), (2, 5)):
        config = dataclasses.replace(LLAMA, layers=layers, windows=(3,))
        blueprint = decoder(config)
        params = random_params(blueprint)
        changed = TOKENS[0] + jnp.diag(1 - 2 * (TOKENS[0] > 16))
        out = hidden_of(blueprint)(params, jnp.concatenate([TOKENS[:1], changed]))
        moved = np.abs(np.asarray(out[1:] - out[:1])).max(-1) > 1e-6
        j, i = np.indices((10, 10))
        np.testing.assert_array_equal(moved, (j <= i) & (i - j < reach))


def test_windows_are_cycled_over_the_layers():
    assert LLAMA.layer_windows == (3, None, 3, None)
    assert dataclasses.replace(LLAMA, windows=(None,)).layer_windows == (None,) * 4
    assert dataclasses.replace(LLAMA, windows=(None, 5, 5, 5)).layer_windows == (None, 5, 5, 5)


def test_token_logprobs_are_those_of_the_logits(made):
    _, blueprint, params = made
    model = blueprint.build(params, {})
    hidden = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, 16)), jnp.float32)
    targets = TOKENS[:, :5]
    full = jax.nn.log_softmax(model.logits(hidden))
    expected = jnp.take_along_axis(full, targets[..., None], axis=-1)[..., 0]
    found, correct = model.token_logprobs(hidden, targets, chunk=4, with_accuracy=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(correct, jnp.argmax(full, axis=-1) == targets)


def test_bfloat16_computes_close_to_float32(made):
    config, blueprint, params = made
    half = decoder(config, jnp.bfloat16)
    found = hidden_of(half)(params, TOKENS)
    assert found.dtype == jnp.bfloat16
    assert half.build(params, {}).logits(found).dtype == jnp.float32
    expected = hidden_of(blueprint)(params, TOKENS)
    error = np.asarray(found, np.float32) - expected
    # A few roundings of 2^-9 for each of four layers.
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(np.square(expected)))


def test_dropout_needs_a_key_and_depends_on_it():
    blueprint = decoder(dataclasses.replace(LLAMA, layers=2, dropout=0.3))
    params = random_params(blueprint)
    run = hidden_of(blueprint)
    plain = run(params, TOKENS)
    np.testing.assert_array_equal(run(params, TOKENS), plain)
    first, again, other = (
        run(params, TOKENS, None, None, jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1 and np.abs(first - plain).max() > 0.1


def test_more_tokens_than_learned_positions_are_refused():
    blueprint = decoder(CONFIGS["gpt"])
    with pytest.raises(InputError, match="11 tokens are more than max_positions 10"):
        jax.eval_shape(
            lambda p: blueprint.build(p, {}).hidden(jnp.zeros((1, 11), int)),
            blueprint.abstract_params,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=0), "vocab_size 0 must be at least 1"),
        (dict(windows=(0,)), r"windows \(0,\) must be one or more of None or at least 1"),
        (dict(windows=()), r"windows \(\) must be"),
        (dict(windows=(1, 2, 3, 4, 5)), "5 windows are more than 4 layers"),
        (dict(dropout=1.0), r"dropout 1.0 is outside \[0, 1\)"),
        (dict(logit_soft_cap=-1.0), "logit_soft_cap -1.0 must be positive"),
        (dict(rope=RopeConfig(fraction=0.1)), "rotates 0 of 8 head dims"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LLAMA, **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(heads=4, kv_heads=3), "heads 4 is not a multiple of kv_heads 3"),
        (dict(heads=0, kv_heads=1), "heads 0 must be at least 1"),
        (dict(heads=2, kv_heads=1, scale=0.0), "attention scale 0.0 must be positive"),
        (dict(heads=2, kv_heads=1, soft_cap=-2.0), "attention soft_cap -2.0 must be positive"),
    ],
)
def test_attention_settings_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message):
        AttentionConfig(head_dim=8, **settings)
