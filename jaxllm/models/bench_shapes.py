"""The models that benchmarks time: Llamas with a 32,000-word vocabulary and an untied head, a DnD.

The two small Llamas have the sizes of two published story models (karpathy/llama2.c); that of 1.1B
parameters, which is for GPUs, has TinyLlama's (arXiv:2401.02385). The code model is the XL of the
released DnD-Transformers, without dropout, so that its losses can be compared.
"""

from __future__ import annotations

from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.dnd import DnDConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig


def llama_shape(
    dim: int, layers: int, heads: int, hidden: int, vocab: int, kv_heads: int | None = None
) -> DecoderConfig:
    """Returns a Llama with an untied head; `kv_heads` None means as many as query heads."""
    attention = AttentionConfig(heads, kv_heads or heads, head_dim=dim // heads)
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
LLAMA_1B = llama_shape(2048, 22, 32, 5632, 32000, kv_heads=4)
"""1,100,048,384 parameters."""
DND_XL = DnDConfig.of_size("XL", class_dropout=0.0, dropout=0.0)
"""About 0.8 billion parameters; 256 cells of 2 codes."""
