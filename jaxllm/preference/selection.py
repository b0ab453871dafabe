"""Training-free choice among sampled candidates: best-of-n, MBR, weighted voting, ICDPO.

NumPy on the host: the candidates are texts that exist already. B prompts, N candidates each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxllm.errors import InputError


def best_of_n(rewards: ArrayLike) -> np.ndarray:
    """Index of the highest reward of each prompt [B], the first one at ties; rewards [B, N]."""
    return np.argmax(_finite(rewards, "rewards"), -1)


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats of KL(best-of-n || policy): log n - (n - 1)/n (arXiv:2401.01879).

    Exact for a continuous reward without ties.

    Raises:
      InputError: n below 1.
    """
    if n < 1:
        raise InputError(f"best-of-n with n {n}, expected at least 1")
    return math.log(n) - (n - 1) / n


def regularised_best_of_n(rewards: ArrayLike, proximity: ArrayLike, beta: float) -> np.ndarray:
    """Index of the largest r + beta proximity [B], against overoptimisation of the reward.

    `proximity` [B, N] is log p of the reference (KL-regularised) or the mean utility against the
    other candidates (MBR-BoN), arXiv:2404.01054. beta weighs staying near; 0 is best-of-n.

    Raises:
      InputError: beta below 0, or unequal shapes.
    """
    r, near = _finite(rewards, "rewards"), _finite(proximity, "proximity")
    if beta < 0 or r.shape != near.shape:
        raise InputError(
            f"beta {beta} with rewards {r.shape} and proximity {near.shape}, "
            "expected beta >= 0 and equal shapes"
        )
    return np.argmax(r + beta * near, -1)


def mbr(utilities: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Minimum Bayes risk: index of the candidate with the highest expected utility [B].

    Args:
      utilities: [B, N, M], of candidate n when m is the truth, such as ROUGE or a similarity; M is
        usually N, the candidates themselves.
      weights: [B, M], how probable m is; None takes samples as equally probable.
    """
    return np.argmax(mbr_utility(utilities, weights), -1)


def mbr_utility(utilities: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Expected utility of every candidate [B, N]; arguments as in `mbr`."""
    u = _finite(utilities, "utilities")
    w = np.full(u.shape[::2], 1.0) if weights is None else _finite(weights, "weights")
    return np.einsum("bnm,bm->bn", u, w / w.sum(-1, keepdims=True))


def weighted_vote(
    answers: Sequence[Hashable | None], scores: ArrayLike | None = None
) -> Hashable | None:
    """The answer with the largest sum of scores, the one seen first at ties.

    Args:
      answers: Normalised answer of each candidate; None is no answer and has no vote.
      scores: [N], of a verifier; None counts votes (self-consistency, arXiv:2203.11171).

    Returns:
      The answer; None when there is none.

    Raises:
      InputError: Another number of scores than of answers.
    """
    weights = np.ones(len(answers)) if scores is None else _finite(scores, "scores")
    if len(weights) != len(answers):
        raise InputError(f"{len(answers)} answers with {len(weights)} scores, expected equal")
    sums: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + float(weight)
    return max(sums, key=lambda answer: sums[answer], default=None)


def icdpo(with_examples: ArrayLike, without: ArrayLike) -> np.ndarray:
    """In-context DPO: index of the largest log p(y | examples, x) - log p(y | x) [B].

    The examples make a better model of the same weights, and the log-ratio to the bare model is
    the implicit reward of DPO. Arguments [B, N], summed log-probs. arXiv:2402.09320.
    """
    return np.argmax(_finite(with_examples, "log-probs") - _finite(without, "log-probs"), -1)


def distinct(completions: Sequence[Hashable]) -> np.ndarray:
    """Bool [N]: the first of equal completions, for the union of samples of RFT."""
    seen: set[Hashable] = set()
    first = np.zeros(len(completions), bool)
    for i, completion in enumerate(completions):
        first[i] = completion not in seen
        seen.add(completion)
    return first


def _finite(values: ArrayLike, what: str) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.shape[-1:] in ((), (0,)) or not np.isfinite(x).all():
        raise InputError(f"{what} of shape {x.shape}, expected finite values and some candidates")
    return x
