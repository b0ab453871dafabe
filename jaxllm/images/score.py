"""Scores sets of images against real ones: class accuracy, Fréchet distance, precision and recall.

Features come from a classifier that took no part in training the generator. Distances over its
features are called FD, never FID. Every set that is compared has the same number of images per
class, because all of these measures depend on sample size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.data.pipeline import Batch
from jaxllm.evals.images import (
    frechet_distance_of_features,
    inception_score,
    precision_recall,
)
from jaxllm.evals.statistics import wilson_interval
from jaxllm.images.classifier import Scorer


@dataclass(frozen=True)
class ImageScore:
    """Measures of one set of labelled images against real training images."""

    images: int
    accuracy: float
    """Share whose intended class is the classifier's first choice."""
    accuracy_low: float
    accuracy_high: float
    frechet: float
    inception_form: float
    """exp of the mean divergence between class posteriors and their mean."""
    precision: float
    recall: float


def score_images(scorer: Scorer, examples: Batch, reference: np.ndarray) -> ImageScore:
    """Scores `examples` {"image": [n, H, W, c], "label": [n]} against reference features [m, F]."""
    features, probabilities = scorer.measure(examples["image"])
    correct = int(np.sum(np.argmax(probabilities, -1) == examples["label"]))
    count = len(features)
    interval = wilson_interval(correct, count)
    neighbours = precision_recall(reference, features)
    return ImageScore(
        images=count,
        accuracy=correct / count,
        accuracy_low=interval.low,
        accuracy_high=interval.high,
        frechet=frechet_distance_of_features(reference, features),
        inception_form=inception_score(probabilities, splits=1).mean,
        precision=neighbours.precision,
        recall=neighbours.recall,
    )


def equal_per_class(examples: Batch, per_class: int | None = None) -> Batch:
    """Returns the first `per_class` examples of every class (default: of the smallest class)."""
    labels = examples["label"]
    counts = np.bincount(labels)
    take = int(counts[counts > 0].min()) if per_class is None else per_class
    rows = np.concatenate([np.flatnonzero(labels == c)[:take] for c in np.unique(labels)])
    return {name: value[rows] for name, value in examples.items()}


def score_table(scorer: Scorer, sets: Mapping[str, Batch], train: Batch) -> dict[str, ImageScore]:
    """Scores every named set against the features of `train`."""
    reference, _ = scorer.measure(train["image"])
    return {name: score_images(scorer, examples, reference) for name, examples in sets.items()}
