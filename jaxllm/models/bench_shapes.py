"""The language models that benchmarks time: Llamas with a 32,000-word vocabulary.

Their sizes are those of two published story models (karpathy/llama2.c), with an untied head.
"""

from __future__ import annotations

from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig


def llama_shape(dim: int, layers: int, heads: int, hidden: int, vocab: int) -> DecoderConfig:
    """Returns a Llama with as many key/value heads as query heads and an untied head."""
    attention = AttentionConfig(heads=heads, kv_heads=heads, head_dim=dim // heads)
    return DecoderConfig(
        vocab_size=vocab,
        dim=dim,
        layers=layers,
        attention=attention,
        mlp=MlpConfig(hidden=hidden),
    )


SHAPES: dict[str, DecoderConfig] = {
    "24M": llama_shape(288, 6, 6, 768, 32000),
    "134M": llama_shape(768, 12, 12, 2048, 32000),
}
