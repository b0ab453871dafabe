"""Compressed caches for the decode loop, from a plan's specification and a model's config."""

from __future__ import annotations

from typing import Any

from jaxllm.decoding.text import NewCaches
from jaxllm.kvcompress.bucketed_cache import bucketed_cache
from jaxllm.kvcompress.spec import PlanSpec
from jaxllm.models.decoder import DecoderConfig
from jaxllm.nn.rope import rotary_frequencies


def plan_caches(spec: PlanSpec, config: DecoderConfig, dtype: Any) -> NewCaches:
    """Returns the maker of a model's caches under a plan.

    The plan is made for each bucket of prompt lengths, whose length caps what a head may hold:
    shapes, and so compilations, change with the bucket only.
    """
    heads = config.attention
    frequencies: tuple[float, ...] = ()
    if config.rope is not None:
        frequencies = tuple(map(float, rotary_frequencies(config.rope, heads.head_dim)))

    def make(batch: int, prompt_slots: int, slots: int) -> list[Any]:
        plan = spec.build(
            config.layers,
            heads.heads,
            heads.kv_heads,
            slots,
            longest_prompt=prompt_slots,
            frequencies=frequencies,
        )
        return [
            bucketed_cache(
                plan,
                layer,
                batch,
                heads.heads,
                heads.head_dim,
                dtype,
                window=window,
                soft_cap=heads.soft_cap,
            )
            for layer, window in enumerate(config.layer_windows)
        ]

    return make
