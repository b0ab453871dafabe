"""Compares two folders of images: Fréchet distance, precision and recall, inception score.

With Inception weights the distance is FID; with a classifier of ours it is reported as FD. The
result names the reference folder, because comparing with the wrong one (validation instead of
training images, say) is the usual reason for numbers that cannot be reproduced.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.data.images import IMAGE_SUFFIXES, normalise, read_image
from jaxllm.data.pipeline import padded_batches
from jaxllm.errors import InputError
from jaxllm.evals.images import frechet_distance_of_features, inception_score, precision_recall
from jaxllm.images.classifier import Scorer

BATCH = 32
PART = 64 * BATCH
"""Images held in memory at a time."""
Measure = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def compare_folders(
    real: Path,
    fake: Path,
    *,
    inception: Path | None = None,
    classifier: Path | None = None,
    splits: int = 10,
) -> dict[str, Any]:
    """Returns the comparison of all images below two folders.

    Args:
      real: Folder of reference images.
      fake: Folder of images to judge.
      inception: Inception weights (`.pth` or `.safetensors`); exactly one of this and `classifier`.
      classifier: Run folder of a trained classifier.
      splits: Splits of the inception score.

    Raises:
      InputError: A missing or empty folder, an unreadable image, mixed sizes, fewer images than
        splits.
    """
    if (inception is None) == (classifier is None):
        raise InputError("give exactly one of Inception weights and a classifier run")
    if inception is not None:
        channels, measure, name = 3, _inception(inception), "FID"
    else:
        scorer = Scorer.load(Path(str(classifier)))
        channels, measure, name = scorer.config.channels, scorer.measure, "FD (not FID)"
    expected, _ = _measured(real, channels, measure)
    found, probabilities = _measured(fake, channels, measure)
    if len(found) < splits:
        raise InputError(f"{fake}: {len(found)} images are fewer than {splits} splits")
    neighbours = precision_recall(expected, found)
    score = inception_score(probabilities, splits=splits)
    return {
        "reference": str(real),
        "reference images": len(expected),
        "images": len(found),
        name: frechet_distance_of_features(expected, found),
        "precision": neighbours.precision,
        "recall": neighbours.recall,
        "inception score" if inception else "inception form": score.mean,
        "its standard deviation over splits": score.std,
    }


def _measured(folder: Path, channels: int, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Returns features and class probabilities of all images; a part of them is held at a time."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < 4:
        raise InputError(f"{folder}: holds {len(paths)} images, too few to compare")
    shape = read_image(paths[0], channels).shape
    parts = []
    for start in range(0, len(paths), PART):
        images = []
        for path in paths[start : start + PART]:
            image = read_image(path, channels)
            if image.shape != shape:
                raise InputError(
                    f"{path}: {image.shape[1]}x{image.shape[0]} pixels, but {paths[0]} has "
                    f"{shape[1]}x{shape[0]}"
                )
            images.append(normalise(image))
        parts.append(measure(np.stack(images)))
    features, probabilities = zip(*parts, strict=True)
    return np.concatenate(features), np.concatenate(probabilities)


def _inception(weights: Path) -> Measure:
    from jaxllm.hub.torch_files import load_state_dict
    from jaxllm.models.inception import import_inception

    model = import_inception(load_state_dict(weights))

    @jax.jit
    def run(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        pool = model.features(images).pool
        return pool, model.probabilities(pool)

    def measure(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for batch, real in padded_batches({"image": images}, BATCH):
            parts.append([np.asarray(x)[:real] for x in run(batch["image"])])
        pools, probabilities = zip(*parts, strict=True)
        return np.concatenate(pools), np.concatenate(probabilities)

    return measure
