"""A small decoder on the world of opinions: rows as arrays, training in one scan, exact measures.

Every row of `opinions.py` has 6 prompt and 10 response tokens, so nothing is padded:

    <bos> <Q> style topic topic <A>   d < label > w w w w w <eos>

The losses are the library's own (`registry.preference_loss`); log-probs of the frozen reference
are computed once per row. Letters: R rows, M beliefs, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.preference.distributional import (
    GroupDistributionalPO,
    belief_log_probs,
    margin_shares,
)
from jaxllm.preference.opinions import BELIEFS, OpinionWorld, Prompt, Row, vocabulary
from jaxllm.preference.options import Options
from jaxllm.preference.pointwise import KTO, SFT
from jaxllm.preference.registry import preference_loss
from jaxllm.preference.statistics import Beliefs, PairStats, PointStats, Sequences, mean_over_rows

PROMPT, RESPONSE = 6, 10
BELIEF_SPAN = (0, 3)
"""Digit, `<` and label; `>` belongs to the text."""
Rejected = Literal["different", "conditioned"]
Batch = dict[str, Any]
SCORE_ROWS = 256


@dataclass(frozen=True)
class Table:
    """Rows of one split.

    Attributes:
      tokens: int32 [R, 16] of `chosen`, and of both kinds of rejected completion.
      target: float32 [R, M], the group's distribution.
      estimated: float32 [R, M], the shares among the prompt's own accepted rows.
      last: int [prompts], the last row of each prompt.
      majority: bool [R], whether the accepted belief is the group's most frequent one.
    """

    tokens: dict[str, np.ndarray]
    target: np.ndarray
    estimated: np.ndarray
    last: np.ndarray
    majority: np.ndarray


class Words:
    """Ids of the words of a world."""

    def __init__(self, world: OpinionWorld):
        self.words = vocabulary(world.topics_count)
        self.ids = {word: number for number, word in enumerate(self.words)}
        self.digits = jnp.asarray([self.ids[str(number)] for number in range(BELIEFS)])

    def encode(self, text: str) -> list[int]:
        """Ids of a text whose words are separated by spaces."""
        return [self.ids[word] for word in text.split()]

    def prompts(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Prompts as int32 [P, 6]."""
        return np.asarray([self.encode(f"<bos> <Q> {p.text} <A>") for p in prompts], np.int32)

    def table(self, rows: Sequence[Row]) -> Table:
        """Rows as arrays."""
        tokens: dict[str, list[list[int]]] = {"chosen": [], "different": [], "conditioned": []}
        counts: dict[str, np.ndarray] = {}
        for row in rows:
            start = f"<bos> <Q> {row['prompt']} <A>"
            accepted = f"{row['accept_choice_id']} < {row['accept_choice']} >"
            other = f"{row['reject_choice_id']} < {row['reject_choice']} >"
            said, unsaid = row["accept_response"], row["reject_response"]
            for name, stated, answer in (
                ("chosen", accepted, said),
                ("different", other, unsaid),
                ("conditioned", accepted, unsaid),
            ):
                tokens[name].append(self.encode(f"{start} {stated} {answer} <eos>"))
            counts.setdefault(row["prompt"], np.zeros(BELIEFS))[row["accept_choice_id"]] += 1
        target = np.asarray([row["probabilities"] for row in rows], np.float32)
        return Table(
            {name: np.asarray(found, np.int32) for name, found in tokens.items()},
            target,
            np.asarray([counts[r["prompt"]] / counts[r["prompt"]].sum() for r in rows], np.float32),
            np.asarray(list({row["prompt"]: place for place, row in enumerate(rows)}.values())),
            target.argmax(-1) == [row["accept_choice_id"] for row in rows],
        )


def small_decoder(words: int, width: int = 64, layers: int = 2) -> DecoderConfig:
    """The policy: 4 heads, an MLP of four times the width, a tied head."""
    return DecoderConfig(
        vocab_size=words,
        dim=width,
        layers=layers,
        attention=AttentionConfig(4, 4, width // 4),
        mlp=MlpConfig(4 * width),
        max_positions=PROMPT + RESPONSE,
        tie_embeddings=True,
    )


class OpinionTrainer:
    """Compiled functions of one model; programs are shared by all arms of the same loss."""

    def __init__(self, config: DecoderConfig, words: Words):
        self.words, self.blueprint = words, decoder(config)
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(10.0), optax.adamw(1.0)
        )  # The step scales the update by the learning rate.
        self.init = jax.jit(lambda key: self.blueprint.init(key)[0])
        self.score = jax.jit(self._score)
        self.steps = jax.jit(self._steps, static_argnames="options", donate_argnums=(0, 1))
        self.loss = jax.jit(
            lambda params, ref, batch, options: self._loss(params, ref, batch, options),
            static_argnames="options",
        )
        self.sample = jax.jit(self._sample)
        self.believe = jax.jit(self._believe)

    # -- training ----------------------------------------------------------------------------------

    def _score(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probs of the response's tokens [R, 10] and of the beliefs [R, M]."""
        model = self.blueprint.build(params, {})
        hidden = model.hidden(tokens[:, :-1])[:, PROMPT - 1 :]
        beliefs = belief_log_probs(model.logits(hidden[:, 0]), self.words.digits)
        logps: Any = model.token_logprobs(hidden, tokens[:, PROMPT:])
        return logps, beliefs

    def _loss(self, params: Any, ref: Any, batch: Batch, options: Options) -> jax.Array:
        """Mean loss of the rows of a batch."""
        chosen, rejected = batch["chosen"], batch["rejected"]
        if isinstance(options, SFT) or (
            isinstance(options, GroupDistributionalPO) and options.preference_weight == 0
        ):
            logps, beliefs = self._score(params, chosen)
            stats: Any = PointStats(sequences(logps), beliefs=Beliefs(beliefs, batch["target"]))
        else:
            logps, beliefs = self._score(params, jnp.concatenate([chosen, rejected]))
            both = sequences(logps, jnp.concatenate([batch["ref_chosen"], batch["ref_rejected"]]))
            rows = len(chosen)
            if isinstance(options, KTO):
                # Each prompt with the completion of the next one, whose KL needs no gradient.
                tokens = jnp.concatenate([chosen, rejected])
                other = jnp.concatenate(
                    [tokens[:, :PROMPT], jnp.roll(tokens[:, PROMPT:], -1, axis=0)], axis=1
                )
                mismatched = sequences(
                    jax.lax.stop_gradient(self._score(params, other)[0]), self._score(ref, other)[0]
                )
                desirable = jnp.arange(2 * rows) < rows
                stats = PointStats(both, desirable=desirable, mismatched=mismatched)
            else:
                first, second = (
                    jax.tree.map(lambda x, part=part: x[part], both)
                    for part in (slice(None, rows), slice(rows, None))
                )
                stats = PairStats(first, second, beliefs=Beliefs(beliefs[:rows], batch["target"]))
        return mean_over_rows(preference_loss(stats, options)[0], stats)

    def _steps(
        self, params: Any, state: Any, ref: Any, batches: Batch, rate: jax.Array, options: Options
    ) -> tuple[Any, Any, jax.Array]:
        """One step for each of the stacked batches; returns the mean loss too."""

        def step(carry: Any, batch: Batch) -> Any:
            params, state = carry
            loss, gradient = jax.value_and_grad(self._loss)(params, ref, batch, options)
            updates, state = self.optimiser.update(gradient, state, params)
            updates = jax.tree.map(lambda update: rate * update, updates)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(step, (params, state), batches)
        return params, state, losses.mean()

    def reference_logps(self, params: Any, tokens: np.ndarray) -> np.ndarray:
        """Log-probs [R, 10] in blocks of one shape."""
        count = -(-len(tokens) // SCORE_ROWS) * SCORE_ROWS
        padded = tokens[np.arange(count) % len(tokens)].reshape(-1, SCORE_ROWS, tokens.shape[1])
        found = [np.asarray(self.score(params, part)[0]) for part in padded]
        return np.concatenate(found)[: len(tokens)]

    # -- measures ----------------------------------------------------------------------------------

    def _believe(self, params: Any, prompts: jax.Array) -> jax.Array:
        """Log-probs [P, M] of the beliefs over the whole vocabulary."""
        model = self.blueprint.build(params, {})
        return belief_log_probs(model.logits(model.hidden(prompts)[:, -1]), self.words.digits)

    def _sample(self, params: Any, prompts: jax.Array, key: jax.Array) -> jax.Array:
        """Samples responses [P, 10] at temperature 1; recomputes, since rows have 16 tokens."""
        model = self.blueprint.build(params, {})
        tokens = jnp.pad(prompts, ((0, 0), (0, RESPONSE)))

        def step(place: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = model.logits(model.hidden(tokens)[:, place])
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits)
            return tokens.at[:, place + 1].set(drawn)

        length = PROMPT + RESPONSE
        return jax.lax.fori_loop(PROMPT - 1, length - 1, step, tokens)[:, PROMPT:]

    def texts(self, params: Any, prompts: np.ndarray, key: jax.Array) -> list[str]:
        """Sampled responses as text, up to the end mark."""
        end = self.words.ids["<eos>"]
        found = np.asarray(self.sample(params, prompts, key)).tolist()
        cut = [row[: row.index(end)] if end in row else row for row in found]
        return [" ".join(self.words.words[token] for token in row) for row in cut]

    def pair_measures(self, params: Any, ref: Any, table: Table) -> dict[str, float]:
        """Margins against both kinds of rejected completion, in nats of the log-ratio.

        `belief` and `text` are the shares of the margin in tokens before and after the belief's
        end for pairs of different beliefs; `accuracy` and `margin` of majority and minority are of
        belief-conditioned pairs; `text_nll` is the NLL of the accepted answer given its belief.
        """
        scored = {
            name: sequences(
                jnp.asarray(self.reference_logps(params, tokens)),
                jnp.asarray(self.reference_logps(ref, tokens)),
            )
            for name, tokens in table.tokens.items()
        }
        shares = margin_shares(PairStats(scored["chosen"], scored["different"]))
        margin = np.asarray(PairStats(scored["chosen"], scored["conditioned"]).margin)
        text = np.asarray(scored["chosen"].token_logps)[:, BELIEF_SPAN[1] :]
        found = {name.split("/")[1] + "_margin": float(x) for name, x in shares.items()}
        found["text_nll"] = float(-text.sum(-1).mean())
        for name, rows in (("majority", table.majority), ("minority", ~table.majority)):
            if rows.any():
                found[f"{name}_margin"] = float(margin[rows].mean())
                found[f"{name}_accuracy"] = float((margin[rows] > 0).mean())
        return found


def sequences(logps: jax.Array, reference: jax.Array | None = None) -> Sequences:
    """Statistics of responses of one length, with the place of their belief."""
    span = jnp.broadcast_to(jnp.asarray(BELIEF_SPAN), (len(logps), 2))
    return Sequences.from_tokens(logps, jnp.ones(logps.shape, bool), reference, belief_span=span)


@dataclass(frozen=True)
class RowSource:
    """Batches of a table: which rejected completions, and which distribution is the target."""

    arrays: Batch
    rows: np.ndarray

    @classmethod
    def of(
        cls,
        table: Table,
        rejected: Rejected,
        reference: dict[str, np.ndarray],
        *,
        estimated: bool = False,
        last: bool = False,
    ) -> RowSource:
        """Names the arrays as the losses read them."""
        arrays = {
            "chosen": table.tokens["chosen"],
            "rejected": table.tokens[rejected],
            "ref_chosen": reference["chosen"],
            "ref_rejected": reference[rejected],
            "target": table.estimated if estimated else table.target,
        }
        return cls(arrays, table.last if last else np.arange(len(table.target)))

    def batches(self, rng: np.random.Generator, steps: int, size: int) -> Batch:
        """Stacked batches [steps, size, ...] of rows drawn with replacement."""
        picked = rng.choice(self.rows, (steps, size))
        return {name: array[picked] for name, array in self.arrays.items()}


def no_reference(table: Table) -> dict[str, np.ndarray]:
    """Zeros where a loss reads no reference."""
    zeros = np.zeros((len(table.target), RESPONSE), np.float32)
    return dict.fromkeys(table.tokens, zeros)


def resized(table: Table, count: int, seed: int = 0) -> Table:
    """The table with `count` rows in a random order, repeated where it has fewer."""
    order = np.resize(np.random.default_rng(seed).permutation(len(table.target)), count)
    picked = partial(np.take, indices=order, axis=0)
    return replace(
        table,
        tokens={name: picked(x) for name, x in table.tokens.items()},
        target=picked(table.target),
        estimated=picked(table.estimated),
        majority=picked(table.majority),
        last=np.arange(count),
    )
