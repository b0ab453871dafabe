"""Generates token sequences: one prefill of the whole ragged batch, then one jitted loop.

Prompts are padded on the left to a common length, so that every row writes the same cache slot and
the newest token is always the last one; padding has position -1 and is invisible. The loop runs in
chunks of `CHUNK` tokens with its state donated: between chunks the caller may show text, look for
stop strings, or give up. Everything that depends on random numbers depends on the row's own key and
step only, so a row's tokens do not depend on the batch it is in. A chunk is at most a block of the
caches: they make room between chunks, not at every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxllm.decoding.sampling import check_filters, check_range, penalise, sample_token
from jaxllm.decoding.text_cache import folded
from jaxllm.errors import InputError
from jaxllm.parallel.sharding import constrain

Tree = Any
CHUNK = 32
"""Tokens between two looks of the host."""
SMALLEST_BUCKET = 16


class TextModel(Protocol):
    """What a decoder must offer; see `models/decoder.py`."""

    config: Any

    def decoding_layers(self) -> Any:
        """Returns `blocks`, the layers one by one, and `head`; made once, outside the loop."""
        ...

    def step(
        self,
        layers: Any,
        caches: Any,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        outputs: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """Maps tokens [B, T] at positions [B, T] to hidden states [B, T, D], filling the caches.

        With `outputs` only those of the last so many positions.
        """
        ...

    def logits(self, hidden: jax.Array, head: Any) -> jax.Array:
        """Maps hidden states [..., D] to float32 logits [..., V]."""
        ...


NewCaches = Callable[[int, int, int], list[Any]]
"""(batch, prompt slots, all slots) -> one empty cache per layer."""


@dataclass(frozen=True)
class TextSampling:
    """How tokens are drawn and when a row ends."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    """1 is off."""
    min_p: float = 0.0
    """Keeps tokens at least this fraction as likely as the most likely one; 0 is off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already seen; 1 is off."""
    stop_ids: tuple[int, ...] = ()
    """A row ends with the first of these, which is part of its tokens."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        check_filters(self.temperature, self.top_k, self.top_p)
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p} must be between 0 (off) and 1")
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty {self.repetition_penalty} must be above 0")


@struct.dataclass
class TextState:
    """What the loop carries; B rows.

    Attributes:
      caches: One per layer.
      hidden: [B, D] final activations at the newest token.
      position: int32 [B], where the next token goes; the length of the row so far.
      keys: Typed keys [B], one per row.
      step: int32, tokens drawn so far.
      done: bool [B].
      seen: bool [B, V] tokens of the row so far, or None when nothing asks for them.
    """

    caches: Any
    hidden: jax.Array
    position: jax.Array
    keys: jax.Array
    step: jax.Array
    done: jax.Array
    seen: jax.Array | None


@struct.dataclass
class Drawn:
    """Tokens of one chunk: ids and log-probabilities [B, n]; `valid` marks the drawn ones."""

    tokens: jax.Array
    log_probs: jax.Array
    valid: jax.Array


def bucket(length: int) -> int:
    """Returns the power of two, at least 16, that holds `length` tokens."""
    return max(SMALLEST_BUCKET, 1 << max(length - 1, 0).bit_length())


def _slots(prompt_length: int, max_new_tokens: int) -> tuple[int, int]:
    """Returns the prompt's bucket, and the slots of prompt and whole chunks of new tokens."""
    length = bucket(prompt_length)
    return length, length + -(-max_new_tokens // CHUNK) * CHUNK


def left_padded(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and positions int32 [B, length]; padding is token 0 at position -1."""
    tokens = np.zeros((len(prompts), length), np.int32)
    positions = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        positions[row, length - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions


class TextSampler:
    """A compiled generator; compiles once per batch size, prompt bucket and number of slots.

    Under `jax.set_mesh` rows and key/value heads are split over the mesh, with the same tokens.
    """

    def __init__(
        self,
        build: Callable[[Tree, Tree], TextModel],
        new_caches: NewCaches,
        *,
        prefill_chunk: int | None = None,
        known_ids: int | None = None,
    ):
        """Makes a generator.

        Args:
          build: (params, extra) -> model.
          new_caches: Makes empty caches; a compressed cache is another function here.
          prefill_chunk: Prompt tokens run at a time, a power of two: bounds the memory of a long
            prompt. None runs the prompt whole.
          known_ids: Only ids below it are drawn: models have rows for more ids than their tokenizer
            has. None for all.
        """
        if prefill_chunk is not None and (prefill_chunk < 1 or prefill_chunk & (prefill_chunk - 1)):
            raise InputError(f"prefill_chunk {prefill_chunk} must be a power of two")
        self.build, self.new_caches = build, new_caches
        self.prefill_chunk, self.known_ids = prefill_chunk, known_ids
        self.traces = 0
        """Times the loop was traced, that is, compiled for another shape or option."""
        self._vocabulary: int | None = None
        self._unstacked = jax.jit(lambda params, extra: build(params, extra).decoding_layers())
        self._prefill = jax.jit(self._run_prompt, static_argnames=("slots", "keep"))
        self._more = jax.jit(self._run_more)
        self._chunk = jax.jit(
            self._decode, static_argnames=("top_k", "filtered"), donate_argnames=("state",)
        )

    def layers(self, params: Tree, extra: Tree) -> Any:
        """Returns the model's layers as decoding wants them, for `prefill`, `extend`, `decode`.

        They are copies of the parameters. Without them each of those calls makes its own.
        """
        return self._unstacked(params, extra)

    def prefill(
        self,
        params: Tree,
        extra: Tree,
        prompts: Sequence[Sequence[int]],
        keys: jax.Array,
        *,
        max_new_tokens: int,
        keep_seen: bool = False,
        least_prompt: int = 1,
        layers: Any = None,
    ) -> TextState:
        """Runs the prompts and returns the state from which `decode` goes on.

        Args:
          params: Model parameters.
          extra: The model's buffers.
          prompts: Token ids of each row, at least one each.
          keys: Typed keys [B], one per row.
          max_new_tokens: Slots to leave free behind the prompt.
          keep_seen: Track which tokens a row holds, for the repetition penalty.
          least_prompt: Pads prompts as if one had that many tokens, so that batches of shorter ones
            do not compile anew.
          layers: `layers(params, extra)`, where several calls share them.

        Raises:
          InputError: An empty prompt or an id outside the vocabulary.
        """
        if self._vocabulary is None:  # The model is traced for it, once.
            self._vocabulary = jax.eval_shape(self.build, params, extra).config.vocab_size
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompt {row} is empty; a model needs at least one token")
            check_range(f"prompt {row}: token id", np.asarray(prompt), self._vocabulary)
        length, slots = _slots(max(least_prompt, *map(len, prompts)), max_new_tokens)
        tokens, positions = left_padded(prompts, length)
        return self._prefill(
            params, extra, layers, tokens, positions, keys, slots=slots, keep=keep_seen
        )

    def cache_bytes(self, batch: int, prompt_length: int, max_new_tokens: int) -> int:
        """Returns the bytes of the caches that `prefill` makes for prompts of such a length."""
        length, slots = _slots(prompt_length, max_new_tokens)
        caches = jax.eval_shape(lambda: self.new_caches(batch, length, slots))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))

    def extend(
        self,
        params: Tree,
        extra: Tree,
        state: TextState,
        more: Sequence[Sequence[int]],
        layers: Any = None,
    ) -> TextState:
        """Returns the state after `more` tokens; `state` itself stays usable.

        A context compressed once can so be asked many questions. Rows of `more` are padded on the
        left to a bucket, which takes that many slots of a dense cache.

        Raises:
          InputError: A dense cache has too few slots left.
        """
        length = bucket(max(map(len, more)))
        for number, cache in enumerate(state.caches):
            if cache.free is not None and (free := int(cache.free)) < length:
                raise InputError(
                    f"{length} more slots do not fit the cache of layer {number}, which has {free} "
                    "left; leave more room at prefill"
                )
        tokens, offsets = left_padded(more, length)
        return self._more(params, extra, layers, state, tokens, offsets)

    def decode(
        self,
        params: Tree,
        extra: Tree,
        state: TextState,
        sampling: TextSampling,
        layers: Any = None,
    ) -> tuple[TextState, Drawn]:
        """Draws up to `CHUNK` more tokens per row; `state` is donated, so do not use it again.

        The caller has seen to it that the caches hold them, as `prefill` does for
        `max_new_tokens`.
        """
        stops = np.full(-(-max(len(sampling.stop_ids), 1) // 8) * 8, -1, np.int32)
        stops[: len(sampling.stop_ids)] = sampling.stop_ids
        return self._chunk(
            params,
            extra,
            layers,
            state=state,
            temperature=jnp.float32(sampling.temperature),
            top_p=jnp.float32(sampling.top_p),
            min_p=jnp.float32(sampling.min_p),
            penalty=jnp.float32(sampling.repetition_penalty),
            stops=jnp.asarray(stops),
            limit=jnp.int32(sampling.max_new_tokens),
            top_k=sampling.top_k,
            filtered=sampling.top_p < 1,
        )

    def _run_prompt(
        self,
        params: Tree,
        extra: Tree,
        layers: Any,
        tokens: jax.Array,
        positions: jax.Array,
        keys: jax.Array,
        *,
        slots: int,
        keep: bool,
    ) -> TextState:
        model = self.build(params, extra)
        batch, length = tokens.shape
        # Behind a barrier, or the compiler would work with their zeros while it compiles.
        caches = jax.tree.map(jax.lax.optimization_barrier, self.new_caches(batch, length, slots))
        hidden, caches = self._through(model, layers, caches, tokens, positions, empty=True)
        seen = None
        if keep:
            seen = jnp.zeros((batch, model.config.vocab_size), bool)
            seen = seen.at[jnp.arange(batch)[:, None], tokens].max(positions >= 0)
        return TextState(
            caches=caches,
            hidden=hidden,
            position=positions[:, -1] + 1,
            keys=keys,
            step=jnp.int32(0),
            done=jnp.zeros(batch, bool),
            seen=seen,
        )

    def _through(
        self,
        model: TextModel,
        layers: Any,
        caches: Any,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        empty: bool,
    ) -> tuple[jax.Array, Any]:
        """Runs tokens, whole or in chunks, and returns the last hidden state [B, D].

        Args:
          model: The model.
          layers: Its decoding layers, or None.
          caches: One per layer.
          tokens: int32 [B, T].
          positions: int32 [B, T].
          empty: The caches hold nothing.
        """
        layers = model.decoding_layers() if layers is None else layers
        size = self.prefill_chunk
        length = tokens.shape[1]
        if size is None or length <= size:
            if empty:
                caches = [cache.begin_prompt() for cache in caches]
            hidden, caches = model.step(layers.blocks, caches, tokens, positions, outputs=1)
            return hidden[:, -1], caches

        def parts(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0], length // size, size).swapaxes(0, 1)

        def one(caches: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            hidden, caches = model.step(layers.blocks, caches, *part, outputs=1)
            return caches, hidden[:, -1]

        caches, hidden = jax.lax.scan(one, caches, (parts(tokens), parts(positions)))
        return hidden[-1], caches

    def _run_more(
        self,
        params: Tree,
        extra: Tree,
        layers: Any,
        state: TextState,
        tokens: jax.Array,
        offsets: jax.Array,
    ) -> TextState:
        model = self.build(params, extra)
        positions = jnp.where(offsets >= 0, state.position[:, None] + offsets, -1)
        hidden, caches = self._through(model, layers, state.caches, tokens, positions, empty=False)
        seen = state.seen
        if seen is not None:
            seen = seen.at[jnp.arange(len(tokens))[:, None], tokens].max(positions >= 0)
        return dataclasses.replace(
            state, caches=caches, hidden=hidden, position=positions[:, -1] + 1, seen=seen
        )

    def _decode(
        self,
        params: Tree,
        extra: Tree,
        layers: Any,
        *,
        state: TextState,
        temperature: jax.Array,
        top_p: jax.Array,
        min_p: jax.Array,
        penalty: jax.Array,
        stops: jax.Array,
        limit: jax.Array,
        top_k: int,
        filtered: bool,
    ) -> tuple[TextState, Drawn]:
        self.traces += 1  # Runs while tracing only.
        model = self.build(params, extra)
        layers = model.decoding_layers() if layers is None else layers
        rows = jnp.arange(len(state.position))
        blocks = (cache.block for cache in state.caches)
        size = min([CHUNK, *(block for block in blocks if block is not None)])
        caches = [cache.begin_block(size) for cache in state.caches]
        state = dataclasses.replace(state, caches=caches)
        # A number is made of (row's key, step): neither the batch nor the chunk size enters.
        steps = state.step + jnp.arange(size)
        uniforms = jax.vmap(
            lambda key: jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(key, t)))(steps)
        )(state.keys)
        empty = Drawn(
            tokens=jnp.zeros((len(rows), size), jnp.int32),
            log_probs=jnp.zeros((len(rows), size), jnp.float32),
            valid=jnp.zeros((len(rows), size), bool),
        )

        carried, unfold = folded(state.caches)
        state = dataclasses.replace(state, caches=carried)

        def unfinished(carry: tuple[jax.Array, TextState, Drawn]) -> jax.Array:
            count, state, _ = carry
            return (count < size) & ~jnp.all(state.done)

        def one_token(
            carry: tuple[jax.Array, TextState, Drawn],
        ) -> tuple[jax.Array, TextState, Drawn]:
            count, state, drawn = carry
            logits = model.logits(constrain(state.hidden, "batch", None), layers.head)
            adjusted = logits if state.seen is None else penalise(logits, state.seen, penalty)
            if self.known_ids is not None and self.known_ids < logits.shape[-1]:
                known = jnp.arange(logits.shape[-1]) < self.known_ids
                adjusted = jnp.where(known, adjusted, -jnp.inf)
            token = sample_token(
                uniforms[:, count],
                adjusted,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p if filtered else 1.0,
                min_p=min_p,
            )
            picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
            log_prob = picked - jax.nn.logsumexp(logits, axis=-1)
            drawn = Drawn(
                tokens=drawn.tokens.at[:, count].set(token),
                log_probs=drawn.log_probs.at[:, count].set(log_prob),
                valid=drawn.valid.at[:, count].set(~state.done),
            )
            ended = jnp.any(token[:, None] == stops, axis=-1) | (state.step + 1 >= limit)
            # What a finished row still computes is written as padding, so that the conversation can
            # go on where it ended.
            position = jnp.where(state.done, -1, state.position)
            caches = unfold(state.caches)
            hidden, caches = model.step(layers.blocks, caches, token[:, None], position[:, None])
            seen = None if state.seen is None else state.seen.at[rows, token].set(True)
            state = dataclasses.replace(
                state,
                caches=folded(caches)[0],
                hidden=hidden[:, -1],
                position=jnp.where(state.done, state.position, state.position + 1),
                step=state.step + 1,
                done=state.done | ended,
                seen=seen,
            )
            return count + 1, state, drawn

        _, state, drawn = jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), state, empty))
        caches = [cache.end_block() for cache in unfold(state.caches)]
        return dataclasses.replace(state, caches=caches), drawn


def repeat_rows(state: TextState, times: int) -> TextState:
    """Returns a state in which every row stands `times` times, for several samples per prompt."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else jnp.repeat(x, times, axis=0), state)


def row_keys(seed: int, requests: Sequence[int], samples: int = 1) -> jax.Array:
    """Returns typed keys [R * samples]: of (seed, request number, sample number) each."""
    numbers = jnp.asarray(requests, jnp.uint32)
    per_request = jax.vmap(lambda r: jax.random.fold_in(jax.random.key(seed), r))(numbers)
    draws = jax.vmap(
        lambda key: jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(samples))
    )
    return draws(per_request).reshape(-1)
