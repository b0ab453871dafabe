"""From a model and the rows of `rows.py` to the statistics that the algorithms read.

One forward pass scores all completions of all examples of a batch, chosen and rejected together, in
any of the three layouts. Positions that predict no completion are left out where the layout bounds
how many do. Log-probs are formed for a chunk of tokens at a time, added up in float32, and brought
from their place in a row to their slot: example p, slot s. Logits [R, T, V] never exist. Policy and
reference go through the same functions on the same batch.

Letters: P examples, S slots of an example, R rows, T positions of a row, K of them scored, L tokens
of a completion, M beliefs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.errors import InputError
from jaxllm.models.decoder import Decoder
from jaxllm.nn.vocabulary import join_chunks, split_chunks, vocabulary_logits
from jaxllm.preference.distributional import belief_log_probs
from jaxllm.preference.rows import PreferenceRows
from jaxllm.preference.statistics import (
    Beliefs,
    Given,
    ListStats,
    PairStats,
    PointStats,
    RunningMean,
    Sequences,
    Stats,
)

Batch = dict[str, jax.Array]
Need = Collection[str]
"""Names of the optional statistics that an algorithm reads, see `registry.needs`."""
PER_TOKEN = frozenset({"token_logps", "ref_token_logps", "mask", "belief_span"})
Kind = Literal["pairs", "labels", "lists"]
CHUNK = 1024


@dataclass(frozen=True)
class SlotShape:
    """What of `PreferenceRows` a compiled step depends on besides the shapes of its arrays."""

    layout: str
    slots: int
    """S."""
    completions: int
    """C, the first of the slots."""
    completion_length: int
    """L."""
    belief_strings: int = 0
    """M, if beliefs are scored as completions of their own; they follow the completions."""
    mismatched: bool = False
    """Whether the last slot is a completion of another prompt."""
    supervised: bool = False
    """Whether a slot, the last but for that, is an answer of supervised training."""
    packed: bool = False
    """Whether rows hold several segments."""

    @classmethod
    def of(cls, rows: PreferenceRows) -> SlotShape:
        """The shape of batches of these rows."""
        return cls(
            layout=rows.config.layout,
            slots=rows.slots,
            completions=rows.completions,
            completion_length=rows.completion_length,
            belief_strings=rows.beliefs if rows.belief_strings else 0,
            mismatched=rows.mismatched,
            supervised=rows.supervised,
            packed=rows.config.rows is not None,
        )


@struct.dataclass
class SlotScores:
    """Log-probs of one model, float32; parts that nothing needs are None.

    Attributes:
      logps: [P, S] sum over the tokens of a slot.
      token_logps: [P, S, L].
      collision: [P, S] sum over tokens of log sum_v p(v)^2.
      kl: [P, S] sum over tokens of KL(reference || this model) over the whole vocabulary.
      prompt_logps: [P] sum over the tokens of the prompt.
      beliefs: [P, M] log p of each belief.
    """

    logps: jax.Array
    token_logps: Given = None
    collision: Given = None
    kl: Given = None
    prompt_logps: Given = None
    beliefs: Given = None


# -- the forward pass ----------------------------------------------------------------------------


def row_hidden(
    model: Decoder, batch: Batch, shape: SlotShape, adapters: tuple[Any, float] | None = None
) -> jax.Array:
    """Final activations [R, T, D] of the rows, each completion seeing its own prompt only.

    Args:
      model: The model.
      batch: A batch of `PreferenceRows`.
      shape: Its shape.
      adapters: Low-rank changes of the layers, see `Decoder.hidden`.
    """
    run = partial(model.hidden, batch["tokens"], adapters=adapters)
    if shape.layout == "shared_prompt":
        return run(batch["positions"], batch["segment_ids"], branch_ids=batch["branch"])
    # Padding on the right is seen by nothing, so single segments need no mask.
    return run(segment_ids=batch["segment_ids"] if shape.packed else None)


def slot_scores(
    model: Decoder,
    hidden: jax.Array,
    batch: Batch,
    shape: SlotShape,
    need: Need = (),
    reference: tuple[Decoder, jax.Array] | None = None,
) -> SlotScores:
    """Sums what a model says of each token into the slots.

    Args:
      model: The model that made `hidden`.
      hidden: [R, T, D] of `row_hidden`.
      batch: The batch.
      shape: Its shape.
      need: Which optional statistics to compute.
      reference: The reference and its activations, for `kl`.
    """
    scored, at = batch, None
    if "prompt_logps" not in need:
        at = completion_positions(batch, shape)
    if at is not None:
        pick = partial(jnp.take_along_axis, indices=at, axis=1)
        scored = {**batch, **{name: pick(batch[name]) for name in ("targets", "owner", "place")}}
    last = _at(hidden, at)
    token_logps: Any = model.token_logprobs(last, scored["targets"], chunk=CHUNK)
    sums = partial(slot_sums, scored, shape)
    collision = kl = prompt = beliefs = tokens = None
    if "collision" in need or "kl" in need:
        other = None
        if "kl" in need and reference is not None:
            other = reference[0], _at(reference[1], at)
        collision, kl = vocabulary_sums(model, last, other)
        collision = sums(collision) if "collision" in need else None
        kl = None if kl is None else sums(kl)
    if "prompt_logps" in need:
        prompt = _prompt_sums(batch, token_logps)
    if PER_TOKEN & set(need):
        tokens = slot_tokens(scored, shape, token_logps)
    logps = sums(token_logps)
    if "beliefs" in need:
        beliefs = _beliefs(model, hidden, batch, shape, logps)
    return SlotScores(logps, tokens, collision, kl, prompt, beliefs)


def completion_positions(batch: Batch, shape: SlotShape) -> jax.Array | None:
    """Returns the positions that predict a completion, int32 [R, K], filled up with others.

    None where they may be all: in rows of several segments.
    """
    rows, length = batch["owner"].shape
    most = shape.completion_length * len(batch["valid"]) * shape.slots // rows
    if shape.packed or most >= length:
        return None
    elsewhere = batch["owner"] < 0
    return jnp.argsort(elsewhere, axis=1, stable=True)[:, :most]


def _at(hidden: jax.Array, positions: jax.Array | None) -> jax.Array:
    if positions is None:
        return hidden
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def slot_tokens(batch: Batch, shape: SlotShape, values: jax.Array) -> jax.Array:
    """Brings values of positions [R, T] to the tokens of their slots [P, S, L], 0 elsewhere."""
    examples = len(batch["valid"])
    size = (examples * shape.slots, shape.completion_length)
    owner = jnp.where(batch["owner"] >= 0, batch["owner"], size[0])
    empty = jnp.zeros(size, values.dtype)
    found = empty.at[owner, batch["place"]].set(values, mode="drop")
    return found.reshape(examples, shape.slots, -1)


def slot_lengths(batch: Batch, shape: SlotShape) -> jax.Array:
    """Tokens of each slot, int32 [P, S]."""
    return slot_sums(batch, shape, jnp.ones_like(batch["owner"]))


def slot_sums(batch: Batch, shape: SlotShape, values: jax.Array) -> jax.Array:
    """Sums of values [R, T] over each slot [P, S]."""
    examples = len(batch["valid"])
    total = _sum_by(batch["owner"], values, examples * shape.slots)
    return total.reshape(examples, shape.slots)


def _prompt_sums(batch: Batch, values: jax.Array) -> jax.Array:
    return _sum_by(batch["prompt_owner"], values, len(batch["valid"]))


def _sum_by(owner: jax.Array, values: jax.Array, count: int) -> jax.Array:
    # A product with a mask would not stop what padding gives, should it not be finite.
    kept = jnp.where(owner >= 0, values, 0).reshape(-1)
    return jax.ops.segment_sum(kept, jnp.maximum(owner, 0).reshape(-1), count)


def _beliefs(
    model: Decoder, hidden: jax.Array, batch: Batch, shape: SlotShape, logps: jax.Array
) -> jax.Array:
    """Log p of each belief [P, M], of whole strings where beliefs have several tokens."""
    if shape.belief_strings:
        return logps[:, shape.completions : shape.completions + shape.belief_strings]
    at = hidden[batch["belief_row"], batch["belief_position"]]
    return belief_log_probs(model.logits(at), batch["belief_ids"])


def vocabulary_sums(
    model: Decoder, hidden: jax.Array, reference: tuple[Decoder, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Sums over the vocabulary at every position, a chunk of tokens at a time.

    Args:
      model: The model p that made `hidden`.
      hidden: [R, T, D].
      reference: The model q and its activations; no gradient reaches it.

    Returns:
      log sum_v p(v)^2 and, with a reference, KL(q || p) in nats, float32 [R, T] each.
    """
    cap, shape = model.config.logit_soft_cap, hidden.shape[:2]
    kernel = model.head_kernel()
    arrays = [hidden]
    if reference is not None:
        arrays.append(jax.lax.stop_gradient(reference[1]))

    @jax.checkpoint
    def one(parts: list[jax.Array]) -> list[jax.Array]:
        logits = vocabulary_logits(parts[0], kernel, cap)
        total = jax.nn.logsumexp(logits, -1)
        found = [jax.nn.logsumexp(2 * logits, -1) - 2 * total]
        if reference is not None:
            other = jax.lax.stop_gradient(reference[0].logits(parts[1]))
            log_q = jax.nn.log_softmax(other, -1)
            found.append(jnp.sum(jnp.exp(log_q) * (log_q - logits), -1) + total)
        return found

    count = shape[0] * shape[1]
    parts = [split_chunks(x.reshape(count, -1), min(CHUNK, count)) for x in arrays]
    flat = [join_chunks(part, count).reshape(shape) for part in jax.lax.map(one, parts)]
    return flat[0], flat[1] if reference is not None else None


# -- statistics ----------------------------------------------------------------------------------


def statistics(
    kind: Kind,
    policy: SlotScores,
    reference: SlotScores | None,
    batch: Batch,
    shape: SlotShape,
    running: RunningMean | None = None,
) -> Stats:
    """Returns what an algorithm reads of a batch.

    Args:
      kind: What the examples are.
      policy: Scores of the policy, with gradient.
      reference: Scores of the reference on the same batch, None without one.
      batch: The batch.
      shape: Its shape.
      running: BCO's running mean.
    """
    all_slots = _sequences(policy, reference, batch, shape)

    def slot(which: Any) -> Sequences:
        return jax.tree.map(lambda x: x[:, which], all_slots)

    beliefs = None
    if policy.beliefs is not None:
        beliefs = Beliefs(policy.beliefs, batch["belief_target"], batch["belief_mask"])
    valid = batch["valid"]
    if kind == "lists":
        listed = slot(slice(0, shape.completions))
        return ListStats(listed, batch["scores"], valid=valid)
    first = _with_prompt(slot(0), policy, batch)
    if kind == "pairs":
        margins = batch["margin"][:, None] if "margin" in batch else None
        return PairStats(
            chosen=first,
            rejected=_with_prompt(slot(1), policy, batch),
            target=slot(shape.slots - 1 - shape.mismatched) if shape.supervised else None,
            objective_margins=margins,
            beliefs=beliefs,
            running=running,
            valid=valid,
        )
    return PointStats(
        completions=first,
        desirable=batch.get("desirable"),
        rewards=batch["scores"][:, 0] if "scores" in batch else None,
        mismatched=slot(shape.slots - 1) if shape.mismatched else None,
        density_ratio=batch.get("density_ratio"),
        beliefs=beliefs,
        running=running,
        valid=valid,
    )


def _sequences(
    policy: SlotScores, reference: SlotScores | None, batch: Batch, shape: SlotShape
) -> Sequences:
    lengths = slot_lengths(batch, shape)
    mask = span = None
    if policy.token_logps is not None:
        mask = jnp.arange(shape.completion_length) < lengths[..., None]
        if "belief_span" in batch:
            span = jnp.broadcast_to(batch["belief_span"][:, None], (*lengths.shape, 2))
    return Sequences(
        logps=policy.logps,
        lengths=lengths,
        ref_logps=None if reference is None else reference.logps,
        token_logps=policy.token_logps,
        ref_token_logps=None if reference is None else reference.token_logps,
        mask=mask,
        kl=policy.kl,
        collision=policy.collision,
        belief_span=span,
    )


def _with_prompt(sequences: Sequences, policy: SlotScores, batch: Batch) -> Sequences:
    if policy.prompt_logps is None:
        return sequences
    lengths = _prompt_sums(batch, jnp.ones_like(batch["prompt_owner"]))
    return sequences.replace(  # type: ignore[attr-defined]
        prompt_logps=policy.prompt_logps, prompt_lengths=lengths
    )


def check_needs(need: Need, shape: SlotShape, given: Collection[str]) -> None:
    """Refuses an algorithm that reads what these examples do not have.

    Args:
      need: What it reads.
      shape: Of the batches.
      given: Names of the arrays of a batch.

    Raises:
      InputError: Naming the first thing that is missing and where it would come from.
    """
    sources = {
        "desirable": ("desirable", "a `label` of 0 or 1 in every record"),
        "rewards": ("scores", "feedback that scores the completions"),
        "objective_margins": ("margin", "a `margin` in every record"),
        "density_ratio": ("density_ratio", "a `density_ratio` in every record"),
        "beliefs": ("belief_target", "a stated belief with its `probabilities` in every record"),
        "belief_span": ("belief_target", "a stated belief with its `probabilities`"),
    }
    for name, (array, source) in sources.items():
        if name in need and array not in given:
            raise InputError(f"the algorithm reads {name}, which needs {source}")
    if "target" in need and not shape.supervised:
        raise InputError("the algorithm reads target, which needs a `target` in every record")
    if "mismatched" in need and not shape.mismatched:
        raise InputError("the algorithm reads mismatched completions, which these rows do not have")
