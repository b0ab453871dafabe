"""llama2.c checkpoints, and the bundled stories260K against an independent greedy run."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hf_reference import GOLDEN

from jaxllm.data.images import bundled
from jaxllm.errors import InputError
from jaxllm.hub.hf_folder import load_decoder
from jaxllm.hub.llama2c import load_llama2c
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig, attend
from jaxllm.nn.mlp import MlpConfig


@pytest.fixture(scope="module")
def stories():
    return load_decoder(bundled("stories260K"))


def checkpoint(config: DecoderConfig, params) -> bytes:
    """The file of a model, written from the description of the format."""
    attention, layers = config.attention, params["layers"]
    vocab = config.vocab_size if config.tie_embeddings else -config.vocab_size
    numbers = [config.dim, config.mlp.hidden, config.layers, attention.heads, attention.kv_heads]
    qkv = np.moveaxis(np.asarray(layers["attn"]["qkv"]), 1, -1)  # [L, K, G + 2, H, D]
    tables = np.zeros(config.max_positions * attention.head_dim)
    parts = [
        params["embed"],
        layers["attn_norm"]["scale"],
        qkv[:, :, :-2],
        qkv[:, :, -2],
        qkv[:, :, -1],
        np.moveaxis(np.asarray(layers["attn"]["out"]), -1, 1),
        layers["mlp_norm"]["scale"],
        *(np.swapaxes(layers["mlp"][name], 1, 2) for name in ("gate", "down", "up")),
        params["norm"]["scale"],
        tables,
    ]
    if not config.tie_embeddings:
        parts.append(np.asarray(params["head"]).T)
    header = np.array([*numbers, vocab, config.max_positions], "<i4").tobytes()
    return header + b"".join(np.asarray(part, "<f4").tobytes() for part in parts)


@pytest.mark.parametrize("tied", [True, False])
def test_files_are_read_exactly(tied, tmp_path):
    config = DecoderConfig(
        vocab_size=11,
        dim=8,
        layers=2,
        attention=AttentionConfig(4, 2, 2),
        mlp=MlpConfig(12),
        max_positions=6,
        tie_embeddings=tied,
    )
    rng = np.random.default_rng(0)
    abstract = decoder(config).abstract_params
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)
    path = tmp_path / "model.bin"
    content = checkpoint(config, params)
    path.write_bytes(content)
    found, _, again = load_llama2c(path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for damaged, message in (
        (content[:-4], f"{len(content) - 4} bytes, expected {len(content)}"),
        (content[:20], "20 bytes are no header"),
        (b"\x00" * 40, "dim 0 over 0 heads"),
        (content[:28] + b"\xff" * 4 + content[32:], "holds a value that is not finite"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            load_llama2c(path)
    with pytest.raises(InputError, match="No such file"):
        load_llama2c(tmp_path / "none.bin")


def test_the_bundled_weights_are_the_original_ones(stories):
    """Written as a llama2.c file they have the SHA-256 of the original up to its tables."""
    config, blueprint, params = stories
    assert blueprint.parameter_count == 260_032
    content = checkpoint(config, params)[: 28 + 4 * 260_032]
    expected = "340685034718160b936c5502a60a6da5c636afa1c53db33cefd0476ba3731205"
    assert hashlib.sha256(content).hexdigest() == expected


@struct.dataclass
class Grown:
    """Keys and values [B, S, K, H] of one row without padding, `length` of them so far."""

    keys: jax.Array
    values: jax.Array

    def extend(self, q, k, v, positions):
        start = (0, positions[0, 0], 0, 0)
        keys = jax.lax.dynamic_update_slice(self.keys, k, start)
        values = jax.lax.dynamic_update_slice(self.values, v, start)
        out = attend(q, keys, values, key_length=positions[:, -1] + 1)
        return out, Grown(keys, values)


def test_greedy_tokens_are_the_golden_ones(stories):
    """256 tokens from BOS with a cache, and the logits of the first 16 steps."""
    config, blueprint, params = stories
    with np.load(GOLDEN / "stories260K.npz") as golden:
        tokens, first_logits = golden["tokens"], golden["logits_first16"]
    shape = (1, 256, config.attention.kv_heads, config.attention.head_dim)
    caches = [Grown(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.layers)]

    @jax.jit
    def generate(params, caches):
        model = blueprint.build(params, {})
        layers = model.unstack()

        def body(carry, position):
            token, caches = carry
            hidden, caches = model.step(layers, caches, token[None, None], position[None, None])
            logits = model.logits(hidden[0, 0])
            following = jnp.argmax(logits).astype(jnp.int32)
            return (following, caches), (following, logits)

        steps = jnp.arange(255, dtype=jnp.int32)
        return jax.lax.scan(body, (jnp.int32(1), caches), steps)[1]

    found, logits = generate(params, caches)
    assert tokens[0] == 1
    np.testing.assert_array_equal(found, tokens[1:])
    np.testing.assert_allclose(logits[:16], first_logits, atol=1e-4)
    # The same logits without a cache.

    @jax.jit
    def run(params, tokens):
        model = blueprint.build(params, {})
        return model.logits(model.hidden(tokens))

    whole = run(params, jnp.asarray(tokens[None, :16], jnp.int32))
    np.testing.assert_allclose(whole[0], first_logits, atol=1e-4)
