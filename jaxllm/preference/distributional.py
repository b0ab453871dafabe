"""Group distributional preference optimisation (GDPO, arXiv:2412.20299): calibrate, then prefer.

A response states a belief first, then an answer: pi(y, b | x) = pi(b | x) pi(y | b, x). The loss is
the sum of three terms, with weights 1 in the paper:

    KL(target || pi(b | x))  +  mean NLL of the belief's tokens  +  preference loss after the belief

where both completions of a pair begin with the same belief. Three methods are called GDPO; the
group reward-decoupled one is `policy_gradient.multi_objective_advantages`. In the released code
this loss is called `mpo`, its `cdpo` is `belief_conditioned_dpo` here, its `mft` is `belief_only`,
and its training script for GDPO starts plain DPO.

What the released code does otherwise, and how to have it: a response without the end mark of a
belief counts whole as the belief, and the last mark of a text is taken, also one inside the answer
(`find_belief_span(..., released=True)`); its KTO variant scores the belief too
(`score_belief=True`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxllm.errors import InputError
from jaxllm.preference.options import Options, at_least
from jaxllm.preference.pairwise import DPO
from jaxllm.preference.pointwise import BCO, KTO
from jaxllm.preference.registry import algorithm_of, needs, preference_loss, register
from jaxllm.preference.statistics import (
    Loss,
    Metrics,
    PairStats,
    PointStats,
    Sequences,
    masked_mean,
)
from jaxllm.preference.wrappers import PairLoss


@dataclass(frozen=True)
class GroupDistributionalPO(Options):
    """Options of `group_distributional_po`; the defaults are the paper's preset.

    Attributes:
      preference: Loss after the belief: a pair loss, or KTO or BCO for single completions.
      kl_weight: Weight of the belief KL.
      nll_weight: Weight of the NLL of the belief's tokens.
      preference_weight: Weight of the preference loss.
      renormalise: Let the beliefs' probabilities sum to 1 before the KL. Without it (the paper) the
        KL also draws the mass of all beliefs to 1.
      score_belief: Let the preference loss see the belief's tokens too.
    """

    preference: PairLoss | KTO | BCO = DPO()
    kl_weight: float = at_least(0, 1.0)
    nll_weight: float = at_least(0, 1.0)
    preference_weight: float = at_least(0, 1.0)
    renormalise: bool = False
    score_belief: bool = False


@register(
    "group_distributional_po",
    GroupDistributionalPO,
    PairStats,
    PointStats,
    aliases=("gdpo",),
    needs=lambda c: (
        *(name for name in needs(c.preference) if c.preference_weight > 0),
        "beliefs",
        "belief_span",
        "token_logps",
        "ref_token_logps",
        "mask",
    ),
)
def group_distributional_po(stats: PairStats | PointStats, config: GroupDistributionalPO) -> Loss:
    """Group distributional preference optimisation; see the module's text.

    Statistics hold `beliefs`, and every completion its `belief_span` on the token axis: the NLL
    runs over the span, of pairs that of the chosen one, and the preference loss sums from the
    span's end on. A completion that ends with its belief has no preference term. beta 0.1 is that
    of the preference loss. Section 3 of arXiv:2412.20299.

    Raises:
      InputError: The preference loss does not take these statistics.
    """
    beliefs, keep = stats.beliefs, stats.kept()
    first = stats.chosen if isinstance(stats, PairStats) else stats.completions
    kl = beliefs.divergence(renormalise=config.renormalise)
    nll = -_in_span(first, first.token_logps) / jnp.maximum(_in_span(first, first.mask), 1)
    loss = config.kl_weight * kl + config.nll_weight * nll
    metrics = {"belief/nll": masked_mean(nll, keep)}
    if config.preference_weight > 0:
        inner = replace(after_belief(stats) if not config.score_belief else stats, beliefs=None)
        preference, found = preference_loss(inner, config.preference)
        loss = loss + config.preference_weight * preference
        name = algorithm_of(config.preference).name
        metrics |= {**found, f"loss/{name}": masked_mean(preference, inner.kept())}
    if isinstance(stats, PairStats):
        metrics |= margin_shares(stats)
    return loss, metrics


def after_belief(stats: PairStats | PointStats) -> PairStats | PointStats:
    """The same rows with log-probs and lengths summed over the tokens after the belief only.

    Statistics that cannot be cut there (full-vocabulary sums) are dropped.
    """
    if isinstance(stats, PairStats):
        return replace(stats, chosen=_rest(stats.chosen), rejected=_rest(stats.rejected))
    others = None if stats.mismatched is None else _rest(stats.mismatched)
    return replace(stats, completions=_rest(stats.completions), mismatched=others)


def margin_shares(stats: PairStats) -> Metrics:
    """Which part of Delta lies in the belief's tokens, and which in the text after it; means."""
    keep = stats.kept()

    def shares(sequences: Sequences) -> tuple[jax.Array, jax.Array]:
        log_ratio = sequences.token_logps - sequences.ref_token_logps
        belief = _in_span(sequences, log_ratio)
        return belief, jnp.sum(jnp.where(sequences.mask, log_ratio, 0.0), -1) - belief

    pairs = zip(shares(stats.chosen), shares(stats.rejected), strict=True)
    belief, text = (masked_mean(w - l, keep) for w, l in pairs)  # noqa: E741
    return {"margins/belief": belief, "margins/text": text}


def _in_span(sequences: Sequences, values: jax.Array) -> jax.Array:
    inside, _ = _regions(sequences)
    return jnp.sum(jnp.where(inside, values, 0), -1)


def _regions(sequences: Sequences) -> tuple[jax.Array, jax.Array]:
    """Masks [B, T] of the belief's tokens and of those after it."""
    span, mask = sequences.belief_span, sequences.mask
    if span is None or mask is None:
        raise InputError("group_distributional_po needs belief_span and mask of every completion")
    position = jnp.arange(mask.shape[-1])
    inside = mask & (position >= span[:, :1]) & (position < span[:, 1:])
    return inside, mask & (position >= span[:, 1:])


def _rest(sequences: Sequences) -> Sequences:
    _, after = _regions(sequences)
    return Sequences.from_tokens(sequences.token_logps, after, sequences.ref_token_logps)


# -- belief statistics ---------------------------------------------------------------------------


def belief_log_probs(logits: jax.Array, belief_ids: jax.Array) -> jax.Array:
    """Log p of one-token beliefs [B, M] over the whole vocabulary, float32.

    Args:
      logits: [B, V] at the position that predicts the belief.
      belief_ids: int [M], or [B, M] when rows have beliefs of their own.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -1)
    ids = jnp.broadcast_to(belief_ids, (len(logits), belief_ids.shape[-1]))
    return jnp.take_along_axis(log_probs, ids, -1)


def belief_string_log_probs(token_logps: jax.Array, mask: jax.Array) -> jax.Array:
    """Log p of beliefs of several tokens [B, M]: sums of teacher-forced log-probs [B, M, S].

    Belief strings must not be prefixes of each other, or their probabilities overlap: end each with
    the mark that ends a belief. Costs a forward pass over M S tokens a row, where one-token beliefs
    cost a gather.
    """
    wide = token_logps.astype(jnp.promote_types(token_logps.dtype, jnp.float32))
    return jnp.sum(jnp.where(mask, wide, 0.0), -1)


def find_belief_span(
    tokens: Sequence[int], end_mark: int, *, released: bool = False
) -> tuple[int, int]:
    """The belief's tokens at the start of a response: (0, position of the end mark).

    Args:
      tokens: The response.
      end_mark: Id of the token that closes the belief, which itself belongs to the text after it.
      released: As the released code: the last mark, and the whole response if there is none.

    Raises:
      InputError: No mark, unless `released`.
    """
    places = [i for i, token in enumerate(tokens) if token == end_mark]
    if not places and not released:
        raise InputError(f"a response of {len(tokens)} tokens has no belief end mark {end_mark}")
    if not places:
        return 0, len(tokens)
    return 0, places[-1 if released else 0]


# -- what DPO converges to -----------------------------------------------------------------------


def dpo_optimum(
    target: ArrayLike,
    reference: ArrayLike,
    beta: float,
    rejected: Literal["uniform", "target"] = "uniform",
) -> np.ndarray:
    """The belief distribution [M] that DPO converges to when chosen beliefs are drawn from p.

    A pair {i, j} is won by i with probability p_i/(p_i + p_j) for uniform rejection, a
    Bradley-Terry model of scores log p, so q is proportional to ref p^(1/beta): at beta 0.1 the
    majority takes nearly all, by construction. With rejection from p it is ref (1 - p)^(-1/beta).

    Args:
      target: [M], p.
      reference: [M], the reference's beliefs.
      beta: DPO's beta.
      rejected: "uniform" over the other beliefs, or "target", p restricted to the others.

    Raises:
      InputError: beta is not above 0.
    """
    if not beta > 0:
        raise InputError(f"beta is {beta}, expected above 0")
    p, ref = np.asarray(target, np.float64), np.asarray(reference, np.float64)
    with np.errstate(divide="ignore"):
        scores = np.log(p) if rejected == "uniform" else -np.log1p(-p)
        logits = np.log(ref) + scores / beta
    q = np.exp(logits - logits.max())
    return q / q.sum()
