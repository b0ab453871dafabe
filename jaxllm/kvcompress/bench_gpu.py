"""Decoding on a GPU: the share of its memory bandwidth, with full caches and under HeadKV.

A token of every row costs one reading of the weights and of what the caches hold, so bandwidth
bounds the rate. Bytes are counted by formula: the parameters without the embedding table, and keys
and values of the entries that a token sees; slots that are still empty do not count. A run is one
call of the decode loop behind the prompt, and runs go on where the one before stopped. Logits are
compared before rates are reported: teacher-forced tokens behind a short prompt, through a full
cache, through a HeadKV cache with room for everything, and in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decoding.language_model import LanguageModel
from jaxllm.decoding.text import CHUNK, TextSampler, TextSampling, row_keys
from jaxllm.errors import InputError
from jaxllm.evals.apart import OUR_SIDE, TORCH_SIDE, Runner, SideFailed, is_out_of_memory, run_apart
from jaxllm.evals.timing import seconds_of
from jaxllm.kvcompress.bench import HeadShape, make_plan
from jaxllm.kvcompress.bucketed_cache import bucketed_caches
from jaxllm.kvcompress.plan import Plan, full_plan
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.planning.cards import Card
from jaxllm.training.bench_gpu import COMPILED, Found, fresh_params

Kind = Literal["full", "headkv"]
LARGEST_ERROR = 0.05
"""Root mean square of logit differences, as a share of that of the logits: bfloat16 rounding."""
_FORCED = 4
_PREFILL_TOKENS = 131072
"""Prompt tokens of all rows that run at a time, which bounds activations."""


@dataclass(frozen=True)
class DecodeSetting:
    """What is decoded; picklable."""

    config: DecoderConfig
    points: tuple[tuple[int, int], ...]
    """(batch, prompt tokens) of each measurement; prompts are powers of two of at least 16."""
    runs: int
    """Timed calls of the decode loop."""
    precision: str = "bfloat16"
    budget: int = 128
    """HeadKV's mean entries per KV head, the window included."""
    checked_prompt: int = 256
    prefill_tokens: int = _PREFILL_TOKENS

    @property
    def dtype(self) -> Any:
        """Of parameters, caches and the computation."""
        return jnp.dtype(self.precision)

    def chunk(self, batch: int, prompt: int) -> int:
        """Returns the tokens of each row that a prefill runs at a time, a power of two."""
        most = max(16, self.prefill_tokens // batch)
        return min(prompt, 1 << (most.bit_length() - 1))


@dataclass(frozen=True)
class Rates:
    """One measurement.

    Attributes:
      seconds: Of each run.
      tokens: Of a row in a run.
      reason: Why there is none instead; then the others are empty.
    """

    seconds: tuple[float, ...]
    tokens: int
    reason: str | None = None


@dataclass(frozen=True)
class Decoded:
    """What a side did: `rates` in the order of the points, logits [1, n, V] for the comparison."""

    rates: list[Rates]
    logits: np.ndarray


def bench_decoding(
    setting: DecodeSetting,
    card: Card,
    device: str = "cuda",
    threads: int = 1,
    run: Runner = run_apart,
) -> Found:
    """Decodes at every point with full caches, HeadKV and, with full caches, compiled PyTorch.

    Raises:
      InputError: Logits differ.
      SideFailed: Our side failed, and not for want of memory.
    """
    found = Found([], {}, [])
    sides: dict[str, Decoded] = {}
    for side, call, environment in (
        ("jaxllm, full", partial(our_side, setting, "full"), OUR_SIDE),
        ("jaxllm, headkv", partial(our_side, setting, "headkv"), OUR_SIDE),
        (COMPILED, partial(their_side, setting, device, threads, True), TORCH_SIDE),
    ):
        try:
            sides[side] = run(call, environment=environment)
        except SideFailed as error:
            if side != COMPILED and not is_out_of_memory(error):
                raise
            found.left_out.append({"what": "decode", "side": side, "reason": str(error)})
    found.errors |= _compare(sides)
    for number, (batch, prompt) in enumerate(setting.points):
        for side, decoded in sides.items():
            rates = decoded.rates[number]
            what = f"decode, batch {batch}, prompt {prompt}"
            if rates.reason is not None:
                found.left_out.append({"what": what, "side": side, "reason": rates.reason})
        here = {side: d.rates[number] for side, d in sides.items() if not d.rates[number].reason}
        found.rows += _rows(setting, card, batch, prompt, here)
    return found


def _compare(sides: dict[str, Decoded]) -> dict[str, float]:
    """Returns each side's difference from the first one, which is ours.

    Raises:
      InputError: One is more than rounding explains.
    """
    errors: dict[str, float] = {}
    first = next(iter(sides), "")
    for side, decoded in list(sides.items())[1:]:
        share = difference(decoded.logits, sides[first].logits)
        if not share < LARGEST_ERROR:
            raise InputError(f"{side}: logits differ from those of {first} by {share:.1%}")
        errors[f"decode {side}"] = share
    return errors


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the root mean square of the difference over that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def _rows(
    setting: DecodeSetting, card: Card, batch: int, prompt: int, sides: dict[str, Rates]
) -> list[dict[str, Any]]:
    per_token = {side: float(np.median(r.seconds)) / r.tokens for side, r in sides.items()}
    ours, theirs = per_token.get("jaxllm, full"), per_token.get(COMPILED)
    rows = []
    for side, rates in sides.items():
        kind: Kind = "headkv" if "headkv" in side else "full"
        moved = weight_bytes(setting) + batch * cache_bytes(setting, kind, prompt, rates.tokens)
        rows.append(
            {
                "batch": batch,
                "prompt": prompt,
                "side": side,
                "tokens/s": batch / per_token[side],
                "slowest": batch * rates.tokens / max(rates.seconds),
                "fastest": batch * rates.tokens / min(rates.seconds),
                "GB per token of all rows": moved / 1e9,
                "share of bandwidth": moved / (per_token[side] * card.bandwidth),
                "times torch compiled": None if theirs is None else theirs / per_token[side],
                "times jaxllm, full": None if ours is None else ours / per_token[side],
            }
        )
    return rows


# -- bytes by formula ----------------------------------------------------------------------------


def weight_bytes(setting: DecodeSetting) -> float:
    """Returns the bytes of the parameters that a token reads: all but an untied embedding table."""
    config, count = setting.config, decoder(setting.config).parameter_count
    table = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return float((count - table) * setting.dtype.itemsize)


def cache_bytes(setting: DecodeSetting, kind: Kind, prompt: int, tokens: int) -> float:
    """Returns the bytes of keys and values that a token of one row reads, mean over all runs.

    Args:
      setting: Model and plan.
      kind: A full cache's entries grow by every token; HeadKV's ring is emptied before each run.
      prompt: Tokens of the prompt.
      tokens: Of a run. The first run, which compiles, is not timed.
    """
    config = setting.config
    heads = config.layers * config.attention.kv_heads
    if kind == "full":
        entries = heads * (prompt + tokens + (setting.runs * tokens + 1) / 2)
    else:
        plan = headkv(setting, prompt)
        assert plan.eviction is not None
        window = plan.eviction.window
        kept = np.minimum(plan.capacities, prompt - window).sum()
        entries = float(kept) + heads * (window + (tokens + 1) / 2)
    return 2.0 * entries * config.attention.head_dim * setting.dtype.itemsize


def headkv(setting: DecodeSetting, prompt: int, budget: int | None = None) -> Plan:
    """Returns the plan of `jaxllm bench headkv` for a model and a prompt."""
    a = setting.config.attention
    budget = min(setting.budget, prompt) if budget is None else budget
    sizes = (setting.config.layers, a.heads, a.kv_heads, a.head_dim)
    return make_plan(HeadShape(*sizes, prompt=prompt, budget=budget))


# -- our side ------------------------------------------------------------------------------------


def our_side(setting: DecodeSetting, kind: Kind) -> Decoded:
    """Decodes at every point; points that the memory does not hold get a reason instead."""
    config, dtype = setting.config, setting.dtype
    blueprint = decoder(config, dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), fresh_params(config))
    model = LanguageModel("bench", config, blueprint, params, None, ())
    layers = model.sampler().layers(params, {})
    held = sum(x.nbytes for x in jax.tree.leaves((params, layers)))
    rates = []
    for batch, prompt in setting.points:
        sampler = model.sampler(
            partial(_caches, setting, kind), prefill_chunk=setting.chunk(batch, prompt)
        )
        needed = held + sampler.cache_bytes(batch, prompt, CHUNK * (setting.runs + 1))
        if (limit := memory_limit()) is not None and needed > limit:
            reason = f"needs {needed / 2**30:.1f} GiB without activations, of {limit / 2**30:.1f}"
            rates.append(Rates((), 0, reason))
            continue
        try:
            rates.append(_timed(sampler, setting, params, layers, batch, prompt))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rates.append(Rates((), 0, "out of memory"))
    return Decoded(rates, _forced(setting, kind, params))


def memory_limit() -> int | None:
    """Returns the bytes that JAX may take of the device, None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _caches(setting: DecodeSetting, kind: Kind, batch: int, prompt: int, slots: int) -> list[Any]:
    a = setting.config.attention
    if kind == "full":
        plan = full_plan(setting.config.layers, a.kv_heads, slots)
    else:
        plan = headkv(setting, prompt)
    return bucketed_caches(plan, batch, a.heads, a.head_dim, setting.dtype)


def _timed(
    sampler: TextSampler, setting: DecodeSetting, params: Any, layers: Any, batch: int, prompt: int
) -> Rates:
    ids = _prompts(setting, batch, prompt).tolist()
    sampling = TextSampling(CHUNK * (setting.runs + 1), temperature=0.0)
    state = sampler.prefill(
        params,
        {},
        ids,
        row_keys(0, range(batch)),
        max_new_tokens=sampling.max_new_tokens,
        layers=layers,
    )
    tokens = 0

    def decode() -> None:
        nonlocal state, tokens
        state, drawn = sampler.decode(params, {}, state, sampling, layers)
        tokens = jax.block_until_ready(drawn).tokens.shape[1]

    decode()
    return Rates(tuple(seconds_of(decode) for _ in range(setting.runs)), tokens)


def _prompts(setting: DecodeSetting, batch: int, prompt: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, setting.config.vocab_size, (batch, prompt))


def _forced(setting: DecodeSetting, kind: Kind, params: Any) -> np.ndarray:
    """Logits [1, n, V] after each of n given tokens behind a prompt, which run one by one."""
    config, prompt = setting.config, setting.checked_prompt
    ids = jnp.asarray(_prompts(setting, 1, prompt + _FORCED), jnp.int32)
    a = config.attention
    plan = full_plan(config.layers, a.kv_heads, prompt + _FORCED)
    if kind == "headkv":  # With room for everything, so that nothing is lost.
        window = HeadShape().window
        plan = headkv(setting, prompt, prompt + window)

    @jax.jit
    def run(params: Any, ids: jax.Array) -> jax.Array:
        model = decoder(config, setting.dtype).build(params, {})
        layers, at = model.decoding_layers(), jnp.arange(prompt + _FORCED)[None]
        empty: Any = bucketed_caches(plan, 1, a.heads, a.head_dim, setting.dtype)
        caches = [cache.begin_prompt() for cache in empty]
        _, caches = model.step(layers.blocks, caches, ids[:, :prompt], at[:, :prompt])

        def one(caches: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            token, position = part
            hidden, caches = model.step(layers.blocks, caches, token[:, None], position[:, None])
            return caches, model.logits(hidden[:, -1], layers.head)

        _, logits = jax.lax.scan(one, caches, (ids.T[prompt:], at.T[prompt:]))
        return logits.swapaxes(0, 1)

    return np.asarray(run(params, ids))


# -- PyTorch's side ------------------------------------------------------------------------------


def their_side(setting: DecodeSetting, device: str, threads: int, compiled: bool) -> Decoded:
    """Decodes at every point with a static cache, under `torch.compile` where `compiled`."""
    import torch

    from jaxllm.decoding.bench_torch import CompiledSide, EagerSide
    from jaxllm.hub.bench_torch import claim, llama_model

    claim(device)
    dtype = getattr(torch, setting.precision)
    params = fresh_params(setting.config)
    model = llama_model(setting.config, params, threads, device=device, dtype=dtype)
    del params

    def side(ids: np.ndarray, **options: Any) -> EagerSide:
        if not compiled:
            return EagerSide(model, ids, CHUNK, **options)
        torch.compiler.reset()  # Every shape is a program of its own, of which only so many stay.
        return CompiledSide(model, ids, CHUNK, mode="reduce-overhead", **options)

    rates = []
    for batch, prompt in setting.points:
        try:
            one = side(
                _prompts(setting, batch, prompt),
                slots=CHUNK * (setting.runs + 1),
                prefill_chunk=setting.chunk(batch, prompt),
            )
            one.prefill()
            one.decode()
            seconds = tuple(seconds_of(one.decode) for _ in range(setting.runs))
            rates.append(Rates(seconds, CHUNK))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rates.append(Rates((), 0, "out of memory"))
    ids = _prompts(setting, 1, setting.checked_prompt + _FORCED)
    checked = side(ids[:, : setting.checked_prompt])
    return Decoded(rates, checked.forced_logits(ids[:, setting.checked_prompt :]))
