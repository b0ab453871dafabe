"""Algorithms by name, `preference_loss(stats, options)`, and delta of any of them.

Every loss takes (statistics, options) and returns (loss of every row, metrics); it knows no model.
`gradient_coefficient` is the delta of the unified view (arXiv:2409.02795): the gradient of any of
them is the expectation of delta times the gradient of the log-probability.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.preference.options import Options
from jaxllm.preference.statistics import Loss, Sequences, Stats

Needs = tuple[str, ...]
LossFunction = Callable[[Any, Any], Loss]


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    Attributes:
      name: Its name in configs.
      config: Class of its options.
      loss: (stats, options) -> (loss of every row [B], metrics).
      stats: Classes of statistics that it takes.
      needs_of: options -> names of the optional statistics that it reads.
    """

    name: str
    config: type[Options]
    loss: LossFunction
    stats: tuple[type, ...]
    needs_of: Callable[[Any], Needs]


ALGORITHMS: dict[str, Algorithm] = {}
_NAMES: dict[str, str] = {}
_BY_CONFIG: dict[type, Algorithm] = {}


def register(
    name: str,
    config: type[Options],
    *stats: type,
    aliases: tuple[str, ...] = (),
    needs: Needs | Callable[[Any], Needs] = (),
) -> Callable[[LossFunction], LossFunction]:
    """Makes a loss function known under `name`, and lets it see cleaned and checked input only."""

    def decorate(function: LossFunction) -> LossFunction:
        needs_of = needs if callable(needs) else (lambda _: needs)

        @functools.wraps(function)
        def loss(given: Stats, options: Options) -> Loss:
            _check(name, given, stats, needs_of(options))
            clean = given.clean()
            per_row, metrics = function(clean, options)
            keep = clean.valid
            beliefs = getattr(clean, "beliefs", None)
            if beliefs is not None:
                metrics = {**beliefs.metrics(keep), **metrics}
            dropped = len(keep) if given.valid is None else jnp.sum(given.valid)
            metrics = {**metrics, "rows/empty": dropped - jnp.sum(keep)}
            return jnp.where(keep, per_row, 0.0), jax.lax.stop_gradient(metrics)

        entry = Algorithm(name, config, loss, stats, needs_of)
        ALGORITHMS[name] = _BY_CONFIG[config] = entry
        _NAMES.update(dict.fromkeys((name, *aliases), name))
        return loss

    return decorate


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name or alias.

    Raises:
      InputError: No such name; the nearest ones are listed.
    """
    if name not in _NAMES:
        near = difflib.get_close_matches(name, _NAMES, n=3, cutoff=0.4)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise InputError(f"algorithm {name!r} is not known{hint}")
    return ALGORITHMS[_NAMES[name]]


def algorithm_of(options: Options) -> Algorithm:
    """The algorithm that takes these options."""
    return _BY_CONFIG[type(options)]


def needs(options: Options) -> Needs:
    """Names of the optional statistics that the algorithm of these options reads."""
    return algorithm_of(options).needs_of(options)


def preference_loss(stats: Stats, options: Options) -> Loss:
    """Loss of every row [B] and metrics, by the algorithm that takes these options.

    Raises:
      InputError: Statistics of another kind than the algorithm takes, or without one it reads.
    """
    return algorithm_of(options).loss(stats, options)


def gradient_coefficient(stats: Stats, options: Options, *, per_token_mean: bool = False) -> Stats:
    """Returns delta = -d(sum of row losses) / d(log-probability) in the shape of `stats`.

    Read it where the log-probabilities stand: `.chosen.logps` [B] for pairs, `.logps` [B, T] for
    rollouts. Where statistics hold `token_logps`, that field gets the whole delta of each token,
    including what reaches it through the sum. Above 0 the completion is pushed up.

    Args:
      stats: Statistics.
      options: Options of the algorithm.
      per_token_mean: Multiply by the length: the survey (its unified gradient) averages over the
        tokens of a completion before delta, the losses here sum.
    """

    def total(given: Stats) -> jax.Array:
        return -jnp.sum(preference_loss(given, options)[0])

    delta = jax.grad(total, allow_int=True)(stats)

    def spread(found: Any, given: Any) -> Any:
        if not isinstance(given, Sequences):
            return found
        if given.token_logps is not None:
            through_sum = jnp.where(given.mask, found.logps[..., None], 0.0)
            found = dataclasses.replace(found, token_logps=found.token_logps + through_sum)
        if not per_token_mean:
            return found
        lengths = given.safe_lengths
        tokens = None if found.token_logps is None else found.token_logps * lengths[..., None]
        return dataclasses.replace(found, logps=found.logps * lengths, token_logps=tokens)

    is_leaf = lambda x: isinstance(x, Sequences)  # noqa: E731
    return jax.tree.map(spread, delta, stats, is_leaf=is_leaf)


def _check(name: str, given: Stats, kinds: tuple[type, ...], wanted: Needs) -> None:
    if not isinstance(given, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{name} got {type(given).__name__}, expected {expected}")
    for field in wanted:
        holders = (given,) if hasattr(given, field) else given.sequences()
        if any(getattr(holder, field, None) is None for holder in holders):
            raise InputError(f"{name} needs {field}, which the statistics lack")
