"""Preference learning: every algorithm as a pure function of log-probabilities.

`preference_loss(stats, options)` gives the loss of every row; `algorithm(name)` finds one by name.
"""

from __future__ import annotations

from jaxllm.preference.mixture import AlgorithmConfig, Part, WeightedSum, preset
from jaxllm.preference.registry import (
    ALGORITHMS,
    Algorithm,
    algorithm,
    algorithm_of,
    gradient_coefficient,
    needs,
    preference_loss,
)
from jaxllm.preference.statistics import (
    Beliefs,
    ListStats,
    PairStats,
    PointStats,
    RewardPairs,
    RolloutStats,
    RunningMean,
    Sequences,
    Stats,
    mean_over_rows,
)

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmConfig",
    "Beliefs",
    "ListStats",
    "PairStats",
    "Part",
    "PointStats",
    "RewardPairs",
    "RolloutStats",
    "RunningMean",
    "Sequences",
    "Stats",
    "WeightedSum",
    "algorithm",
    "algorithm_of",
    "gradient_coefficient",
    "mean_over_rows",
    "needs",
    "preference_loss",
    "preset",
]
