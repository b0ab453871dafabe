"""What algorithms read: log-probabilities of completions, and nothing of the model.

`l` is the sum of log p over the tokens of a completion, its end mark included and its prompt
excluded; `a` and `c` are the log-ratios to the reference of the chosen and of the rejected one.
Sums and everything after them are float32 (float64 where JAX runs with it): bfloat16 has a spacing
of 2 near 256, which at beta 0.1 moves a reward by 0.2.

A row counts when it is `valid` and none of its completions is empty. Rows that do not count are
replaced by zeros before any arithmetic, because a product with a mask does not stop a NaN.

Letters: B rows, K candidates of a list, T completion tokens, M beliefs.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

Given = Any
"""An array (or the class that the docstring names), or None where no algorithm in use reads it.

The registry checks that what an algorithm `needs` is there before the algorithm runs.
"""
Metrics = dict[str, jax.Array]
Loss = tuple[jax.Array, Metrics]
"""Loss of every row, float32 [B], and scalars to log. Average rows with `mean_over_rows`."""
Rows = TypeVar("Rows", bound="_Rows")


@struct.dataclass
class Sequences:
    """Completions of a batch, [B], or [B, K] for lists; optional fields are None when not needed.

    Attributes:
      logps: Summed log p under the policy, in nats.
      lengths: Completion tokens.
      ref_logps: Summed log p under the reference.
      token_logps: [..., T] per token under the policy.
      ref_token_logps: [..., T] per token under the reference.
      mask: bool [..., T], true at completion tokens.
      kl: Sum over tokens of KL(reference || policy), full vocabulary.
      collision: Sum over tokens of log sum_v p(v)^2 under the policy.
      prompt_logps: Summed log p of the prompt's tokens under the policy.
      prompt_lengths: Prompt tokens that `prompt_logps` sums.
      belief_span: int [..., 2], first and one past the last token of the belief, on the T axis.
    """

    logps: jax.Array
    lengths: jax.Array
    ref_logps: Given = None
    token_logps: Given = None
    ref_token_logps: Given = None
    mask: Given = None
    kl: Given = None
    collision: Given = None
    prompt_logps: Given = None
    prompt_lengths: Given = None
    belief_span: Given = None

    @classmethod
    def from_tokens(
        cls,
        token_logps: jax.Array,
        mask: jax.Array,
        ref_token_logps: Given = None,
        **others: Any,
    ) -> Sequences:
        """Sums per-token log-probs [..., T] over `mask`, and keeps them."""
        mask = mask.astype(bool)
        policy = jnp.where(mask, as_float(token_logps), 0.0)
        ref = None if ref_token_logps is None else jnp.where(mask, as_float(ref_token_logps), 0.0)
        return cls(
            logps=jnp.sum(policy, -1),
            lengths=jnp.sum(mask, -1),
            ref_logps=None if ref is None else jnp.sum(ref, -1),
            token_logps=policy,
            ref_token_logps=ref,
            mask=mask,
            **others,
        )

    @property
    def log_ratio(self) -> jax.Array:
        """Log of policy/reference; the reference gets no gradient."""
        return self.logps - jax.lax.stop_gradient(self.ref_logps)

    @property
    def safe_lengths(self) -> jax.Array:
        """Lengths, at least 1."""
        return jnp.maximum(self.lengths, 1).astype(self.logps.dtype)

    @property
    def mean_logps(self) -> jax.Array:
        """Mean log p per token."""
        return self.logps / self.safe_lengths

    @property
    def mean_log_ratio(self) -> jax.Array:
        """Mean log-ratio per token."""
        return self.log_ratio / self.safe_lengths


@struct.dataclass
class Beliefs:
    """What the policy believes at the position where it states its belief.

    Attributes:
      log_probs: [B, M] log p of each belief over the whole vocabulary, so exp sums to at most 1.
      target: [B, M] the group's distribution.
      mask: bool [B, M], false at beliefs that a row does not have; None when all rows have all.
    """

    log_probs: jax.Array
    target: jax.Array
    mask: Given = None

    @property
    def masked(self) -> jax.Array:
        """`log_probs` with a very low number where the row has no such belief."""
        return self.log_probs if self.mask is None else jnp.where(self.mask, self.log_probs, -1e30)

    def divergence(self, *, renormalise: bool) -> jax.Array:
        """KL(target || policy) in nats [B]; `renormalise` lets the policy's beliefs sum to 1."""
        log_q = jax.nn.log_softmax(self.masked, -1) if renormalise else self.masked
        return jnp.sum(jax.scipy.special.xlogy(self.target, self.target) - self.target * log_q, -1)

    def metrics(self, keep: jax.Array) -> Metrics:
        """Divergence from the target, belief mass, and JS distance of the renormalised beliefs."""
        q = jax.nn.softmax(self.masked, -1)
        middle = (self.target + q) / 2
        halves = (jax.scipy.special.rel_entr(x, middle).sum(-1) for x in (self.target, q))
        # Equal distributions give -1e-9 in float32, whose root is NaN.
        distance = jnp.sqrt(jnp.maximum(sum(halves) / 2, 0.0))
        return {
            "belief/kl": masked_mean(self.divergence(renormalise=False), keep),
            "belief/mass": masked_mean(jnp.exp(self.masked).sum(-1), keep),
            "belief/js_distance": masked_mean(distance, keep),
        }


@struct.dataclass
class RunningMean:
    """Mean of all numbers seen so far; the trainer carries it from step to step."""

    mean: jax.Array
    count: jax.Array

    @classmethod
    def start(cls) -> RunningMean:
        """Nothing seen yet."""
        return cls(jnp.zeros(()), jnp.zeros(()))

    def update(self, values: jax.Array, keep: jax.Array) -> RunningMean:
        """Adds the kept `values`; no gradient passes."""
        values = jax.lax.stop_gradient(values)
        count = self.count + jnp.sum(keep)
        change = jnp.sum(jnp.where(keep, values - self.mean, 0.0)) / jnp.maximum(count, 1)
        return RunningMean(self.mean + change, count)


class _Rows(abc.ABC):
    """Which rows count, and the same statistics without what does not count."""

    valid: Given

    @abc.abstractmethod
    def kept(self) -> jax.Array:
        """Bool [B]: rows that are valid and have no empty completion."""

    def clean(self: Rows) -> Rows:
        """Float32, zeros in rows that do not count, `valid` always an array."""
        keep = self.kept()
        return _with(_zero_rows(self, keep), valid=keep)


@struct.dataclass
class PointStats(_Rows):
    """Single completions with a label or a reward.

    Attributes:
      completions: [B].
      desirable: bool [B], the label of unpaired feedback.
      rewards: [B], for methods that select.
      mismatched: `Sequences` of other prompts [B], from which KTO estimates the KL.
      density_ratio: [B], p(desirable)/p(undesirable) of the prompt, for BCO.
      beliefs: See `Beliefs`.
      running: Running mean of rewards, for BCO.
      valid: bool [B]; None means all.
    """

    completions: Sequences
    desirable: Given = None
    rewards: Given = None
    mismatched: Given = None
    density_ratio: Given = None
    beliefs: Given = None
    running: RunningMean | None = None
    valid: Given = None

    def kept(self) -> jax.Array:
        """Bool [B]."""
        return _valid(self.valid, self.completions.lengths > 0)

    def sequences(self) -> tuple[Sequences, ...]:
        """The completions whose log-probs an algorithm reads."""
        return (self.completions,)


@struct.dataclass
class PairStats(_Rows):
    """Pairs of completions of which the first is preferred.

    Attributes:
      chosen: [B].
      rejected: [B].
      target: `Sequences` [B], a supervised answer, for SLiC-HF.
      objective_margins: [B, J], score of the chosen minus score of the rejected completion under
        the other objectives, for MODPO.
      beliefs: See `Beliefs`.
      running: Running mean of rewards, for BCO.
      valid: bool [B]; None means all.
    """

    chosen: Sequences
    rejected: Sequences
    target: Given = None
    objective_margins: Given = None
    beliefs: Given = None
    running: RunningMean | None = None
    valid: Given = None

    def kept(self) -> jax.Array:
        """Bool [B]."""
        return _valid(self.valid, (self.chosen.lengths > 0) & (self.rejected.lengths > 0))

    def sequences(self) -> tuple[Sequences, ...]:
        """The completions whose log-probs an algorithm reads."""
        return self.chosen, self.rejected

    @property
    def margin(self) -> jax.Array:
        """Delta = a - c."""
        return self.chosen.log_ratio - self.rejected.log_ratio


@struct.dataclass
class ListStats(_Rows):
    """K candidates of each prompt with scores.

    Attributes:
      candidates: [B, K].
      scores: [B, K], higher is better.
      present: bool [B, K]; None means all.
      valid: bool [B]; None means all.
    """

    candidates: Sequences
    scores: jax.Array
    present: Given = None
    valid: Given = None

    def kept(self) -> jax.Array:
        """Bool [B]: at least two candidates that are not empty."""
        return _valid(self.valid, self._present().sum(-1) > 1)

    def _present(self) -> jax.Array:
        filled = self.candidates.lengths > 0
        return filled if self.present is None else self.present & filled

    def clean(self) -> ListStats:
        """As for the others; candidates that do not count are zeroed too."""
        keep = self.kept()
        present = self._present() & keep[:, None]
        return ListStats(
            candidates=_zero_rows(self.candidates, present),
            scores=jnp.where(present, as_float(self.scores), 0.0),
            present=present,
            valid=keep,
        )

    def sequences(self) -> tuple[Sequences, ...]:
        """The completions whose log-probs an algorithm reads."""
        return (self.candidates,)


@struct.dataclass
class RolloutStats(_Rows):
    """Sampled completions with rewards, token by token; groups are neighbouring rows.

    Attributes:
      logps: [B, T] log p of each token under the policy.
      mask: bool [B, T], true at the tokens that the policy wrote.
      rewards: [B], of whole completions.
      old_logps: [B, T] under the policy that sampled; None means the policy itself.
      ref_logps: [B, T] under the reference.
      values: [B, T] of the critic, with gradient.
      old_values: [B, T] of the critic when the tokens were sampled.
      advantages: [B] or [B, T]; None lets the algorithm compute them from this batch. Give them
        when a step sees a part of the batch over which they are normalised.
      returns: [B, T], targets of the critic; goes with `advantages`.
      baselines: [B], reward of the greedy completion (ReMax) or any other baseline.
      valid: bool [B]; None means all.
    """

    logps: jax.Array
    mask: jax.Array
    rewards: jax.Array
    old_logps: Given = None
    ref_logps: Given = None
    values: Given = None
    old_values: Given = None
    advantages: Given = None
    returns: Given = None
    baselines: Given = None
    valid: Given = None

    def kept(self) -> jax.Array:
        """Bool [B]: at least one token."""
        return _valid(self.valid, self.mask.astype(bool).any(-1))

    def clean(self) -> RolloutStats:
        """As for the others; [B, T] arrays are zeroed outside `mask` too."""
        keep = self.kept()
        mask = self.mask.astype(bool) & keep[:, None]
        rows = _with(_zero_rows(self, keep), valid=keep)
        rows = jax.tree.map(lambda x: jnp.where(mask, x, 0) if x.ndim > 1 else x, rows)
        return _with(rows, mask=mask)

    def sequences(self) -> tuple[Sequences, ...]:
        """Rollouts hold their arrays themselves."""
        return ()


@struct.dataclass
class RewardPairs(_Rows):
    """Scores that a reward model gives pairs.

    Attributes:
      chosen: [B], or [B, J] with a score for each of J objectives.
      rejected: As `chosen`.
      margin: [B] or [B, J], by how much the chosen one should win; None means 0.
      valid: bool [B]; None means all.
    """

    chosen: jax.Array
    rejected: jax.Array
    margin: Given = None
    valid: Given = None

    def kept(self) -> jax.Array:
        """Bool [B]."""
        return _valid(self.valid, jnp.ones(len(self.chosen), bool))

    def sequences(self) -> tuple[Sequences, ...]:
        """Reward models score texts as a whole."""
        return ()


Stats = PointStats | PairStats | ListStats | RolloutStats | RewardPairs


# -- helpers -------------------------------------------------------------------------------------


def as_float(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked_mean(values: jax.Array, keep: jax.Array) -> jax.Array:
    """Mean of `values` where `keep`, over all axes; 0 when nothing is kept."""
    return jnp.sum(jnp.where(keep, values, 0.0)) / jnp.maximum(jnp.sum(keep), 1)


def mean_over_rows(per_row: jax.Array, stats: Stats) -> jax.Array:
    """The scalar to differentiate: mean of the losses [B] over the rows that count."""
    return masked_mean(per_row, stats.kept())


def pair_metrics(stats: PairStats, chosen: jax.Array, rejected: jax.Array) -> Metrics:
    """Metrics of pairs under the names of TRL, of implicit rewards [B]."""
    keep = stats.kept()
    return {
        "rewards/chosen": masked_mean(chosen, keep),
        "rewards/rejected": masked_mean(rejected, keep),
        "rewards/accuracies": masked_mean(chosen > rejected, keep),
        "rewards/margins": masked_mean(chosen - rejected, keep),
        "logps/chosen": masked_mean(stats.chosen.logps, keep),
        "logps/rejected": masked_mean(stats.rejected.logps, keep),
    }


def ratio_metrics(stats: PairStats, beta: float) -> Metrics:
    """`pair_metrics` of the rewards beta a and beta c."""
    return pair_metrics(stats, beta * stats.chosen.log_ratio, beta * stats.rejected.log_ratio)


def _with(rows: Any, **fields: Any) -> Any:
    return dataclasses.replace(rows, **fields)


def _valid(valid: jax.Array | None, filled: jax.Array) -> jax.Array:
    return filled if valid is None else valid.astype(bool) & filled


def _zero_rows(tree: Any, keep: jax.Array) -> Any:
    """Zeroes every array where `keep` is false on its first axes; floats become float32."""

    def one(x: jax.Array) -> jax.Array:
        if x.ndim < keep.ndim:  # A scalar carried along.
            return x
        wide = keep.reshape(keep.shape + (1,) * (x.ndim - keep.ndim))
        x = as_float(x) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jnp.where(wide, x, jnp.zeros((), x.dtype))

    return jax.tree.map(one, tree)
