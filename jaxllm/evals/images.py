"""Image metrics that need no network of ours: pixels, features and probabilities are given.

PSNR; SSIM (Wang et al., 2004); the Fréchet distance of Gaussian fits to features (Heusel et al.,
arXiv:1706.08500); the Inception score (Salimans et al., arXiv:1606.03498); improved precision and
recall (Kynkäänniemi et al., arXiv:1904.06991); the information compression ratio (Eq. 1 and 3 of
arXiv:2410.01912).

A Fréchet distance may be called FID, an exponentiated KL an Inception score, only when the
features or probabilities are those of the Inception network of `jaxllm.models.inception`. With
any other network say which one ("FD of digit-classifier features").
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from jaxllm.errors import InputError

SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


def psnr(a: jax.Array, b: jax.Array, data_range: float) -> jax.Array:
    """Peak signal-to-noise ratio of each image, in dB; infinite for equal images.

    Args:
      a: [B, h, w, c] images.
      b: [B, h, w, c] images.
      data_range: largest minus smallest possible value (1 for [0, 1], 2 for [-1, 1], 255).

    Returns:
      [B] float32.

    Raises:
      InputError: shapes differ or are not [B, h, w, c].
    """
    _check_images(a, b)
    error = jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)
    return 20 * math.log10(data_range) - 10 * jnp.log10(jnp.mean(error**2, axis=(1, 2, 3)))


def ssim(a: jax.Array, b: jax.Array, data_range: float) -> jax.Array:
    """Structural similarity of each image, mean over channels and over whole windows.

    Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, weighted population
    variances, only windows that lie inside the image (Wang et al., 2004, Eq. 13-16).

    Args:
      a: [B, h, w, c] images, h and w at least 11.
      b: [B, h, w, c] images.
      data_range: largest minus smallest possible value.

    Returns:
      [B] float32 in [-1, 1].

    Raises:
      InputError: shapes differ, are not [B, h, w, c], or are smaller than the window.
    """
    _check_images(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise InputError(f"images of shape {a.shape}, expected at least {SSIM_WINDOW} pixels")
    x, y = (jnp.asarray(image, jnp.float32) / data_range for image in (a, b))
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    cov = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _window_mean(x: jax.Array) -> jax.Array:
    """Gaussian-weighted mean over each whole window; [B, h, w, c] -> [B, h-10, w-10, c]."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    # Sums of shifted slices rather than a convolution: float32 on every backend.
    for axis in (1, 2):
        size, total = x.shape[axis] - SSIM_WINDOW + 1, jnp.float32(0)
        for i, weight in enumerate(weights):
            total += float(weight) * jax.lax.slice_in_dim(x, i, i + size, axis=axis)
        x = total
    return x


def _check_images(a: jax.Array, b: jax.Array) -> None:
    if a.shape != b.shape or len(a.shape) != 4:
        raise InputError(f"images of shapes {a.shape} and {b.shape}, expected equal [B, h, w, c]")


@dataclass(frozen=True)
class FeatureStatistics:
    """Gaussian fit to a set of features: all that a Fréchet distance needs of a reference set.

    Attributes:
      mean: [F] float64.
      covariance: [F, F] float64, unbiased (divided by n - 1).
      count: number of feature vectors; 0 when a file does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz with `mu`, `sigma`, `count`: the names pytorch-fid and ADM read."""
        temporary = Path(f"{os.fspath(path)}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, count=self.count)
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Reads an .npz with `mu` and `sigma`, ours or a published reference set.

        Raises:
          InputError: the file is missing, unreadable, or lacks one of the two arrays.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                mean, covariance = (np.asarray(arrays[k], np.float64) for k in ("mu", "sigma"))
                count = int(arrays["count"]) if "count" in arrays else 0
        except Exception as error:  # whatever a foreign file can make NumPy raise
            raise InputError(f"{path}: not an .npz with mu and sigma: {error}") from error
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise InputError(
                f"{path}: mu {mean.shape} and sigma {covariance.shape}, expected [F] and [F, F]"
            )
        return cls(mean, covariance, count)


@dataclass
class RunningStatistics:
    """Accumulates `FeatureStatistics` over batches in float64, with the pairwise update of Chan.

    Attributes:
      count: vectors seen.
      mean: [F] mean so far.
      scatter: [F, F] sum of outer products of deviations from the mean.
    """

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def update(self, features: ArrayLike) -> None:
        """Adds a batch of features [B, F].

        Raises:
          InputError: not two axes, another F than before, or a non-finite value.
        """
        x = _features(features)
        mean = x.mean(0)
        self.merge(RunningStatistics(len(x), mean, (x - mean).T @ (x - mean)))

    def merge(self, other: RunningStatistics) -> None:
        """Adds what another accumulator saw, for instance on another host.

        Raises:
          InputError: another F than before.
        """
        if self.count == 0 or other.count == 0:
            if other.count:
                self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return
        if self.mean.shape != other.mean.shape:
            raise InputError(f"features of size {other.mean.size}, expected {self.mean.size}")
        count = self.count + other.count
        delta = other.mean - self.mean
        weight = self.count * other.count / count
        self.scatter = self.scatter + other.scatter + weight * np.outer(delta, delta)
        self.mean = self.mean + delta * (other.count / count)
        self.count = count

    def result(self) -> FeatureStatistics:
        """The statistics so far.

        Raises:
          InputError: fewer than two vectors seen.
        """
        if self.count < 2:
            raise InputError(f"statistics of {self.count} feature vectors, expected at least 2")
        return FeatureStatistics(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(
    mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike
) -> float:
    """Squared Fréchet distance of two Gaussians; call it FID only with Inception features.

    |mean_a - mean_b|² + tr A + tr B - 2 tr (A^½ B A^½)^½ (Eq. 6 of arXiv:1706.08500). The last
    trace is computed in float64 as the sum of singular values of A^½ B^½, whose squares are the
    eigenvalues of A^½ B A^½: no square root of rounding noise is taken, so singular covariances
    (fewer images than feature dimensions) need no jitter and give no complex part.

    Args:
      mean_a: [F] mean.
      cov_a: [F, F] symmetric positive semi-definite covariance.
      mean_b: [F] mean.
      cov_b: [F, F] covariance.

    Returns:
      The distance, in squared feature units; at least 0.

    Raises:
      InputError: shapes that do not fit, or a non-finite value.
    """
    means = [np.atleast_1d(np.asarray(m, np.float64)) for m in (mean_a, mean_b)]
    covs = [np.atleast_2d(np.asarray(c, np.float64)) for c in (cov_a, cov_b)]
    size = means[0].size
    if any(m.shape != (size,) for m in means) or any(c.shape != (size, size) for c in covs):
        shapes = [x.shape for x in (*means, *covs)]
        raise InputError(f"means and covariances of shapes {shapes}, expected [F] and [F, F]")
    if not all(np.isfinite(x).all() for x in (*means, *covs)):
        raise InputError("a mean or covariance holds a non-finite value, expected finite values")
    root_a, root_b = (_symmetric_root(c) for c in covs)
    cross = scipy.linalg.svdvals(root_a @ root_b).sum()
    difference = means[0] - means[1]
    distance = difference @ difference + np.trace(covs[0]) + np.trace(covs[1]) - 2 * cross
    return max(float(distance), 0.0)


def frechet_distance_of_features(a: ArrayLike, b: ArrayLike) -> float:
    """Fréchet distance of Gaussian fits to features [M, F] and [N, F]; see `frechet_distance`."""
    first, second = RunningStatistics(), RunningStatistics()
    first.update(a)
    second.update(b)
    one, two = first.result(), second.result()
    return frechet_distance(one.mean, one.covariance, two.mean, two.covariance)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


class InceptionScore(NamedTuple):
    """Mean and standard deviation (population, over splits) of exp(mean KL)."""

    mean: float
    std: float


def inception_score(probabilities: ArrayLike, splits: int = 10, seed: int = 0) -> InceptionScore:
    """Exponential of the mean KL of class probabilities from their mean, averaged over splits.

    The images are shuffled before they are split: generators write them class by class, and a
    split that holds few classes has a marginal close to its rows, so a far too small score.
    Call it the Inception score only with Inception probabilities.

    Args:
      probabilities: [N, classes] rows that sum to one.
      splits: number of parts; 50,000 images in 10 parts are the usual 5,000 a part.
      seed: seed of the shuffle.

    Raises:
      InputError: rows that are not distributions, or fewer images than splits.
    """
    p = _features(probabilities)
    if not 1 <= splits <= len(p):
        raise InputError(f"{splits} splits of {len(p)} images, expected 1 to {len(p)}")
    row_sums = p.sum(1)
    bad = np.flatnonzero((np.abs(row_sums - 1) > 1e-3) | (p < 0).any(1))
    if bad.size:
        raise InputError(
            f"row {bad[0]} sums to {row_sums[bad[0]]:.4g} (minimum {p[bad[0]].min():.4g}), "
            "expected probabilities"
        )
    p = p[np.random.default_rng(seed).permutation(len(p))]
    scores = []
    for part in np.array_split(p, splits):
        marginal = np.broadcast_to(part.mean(0), part.shape)
        # 0 log 0 = 0; where a row is positive so is the marginal.
        ratio = np.divide(part, marginal, out=np.ones_like(part), where=part > 0)
        scores.append(math.exp((part * np.log(ratio)).sum(1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]: fakes on the real manifold, reals on the fake manifold."""

    precision: float
    recall: float


def precision_recall(
    real: ArrayLike, fake: ArrayLike, k: int = 3, chunk: int = 1024
) -> PrecisionRecall:
    """Improved precision and recall (Eq. 1 and 2 of arXiv:1904.06991).

    A set's manifold is the union of balls around its vectors, each reaching the k-th nearest other
    vector of the set. Distances are float32 of centred features, `chunk` rows at a time, so device
    memory holds `chunk` x N distances beside the features.

    Args:
      real: [M, F] features of real images.
      fake: [N, F] features of generated images.
      k: neighbour that sets a ball's radius; 3 in the paper.
      chunk: rows a step.

    Raises:
      InputError: sizes that differ in F, at most k vectors in a set, or a non-finite value.
    """
    x, y = _features(real), _features(fake)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"features of sizes {x.shape[1]} and {y.shape[1]}, expected equal")
    if not 1 <= k < min(len(x), len(y)):
        raise InputError(f"k is {k}, expected 1 <= k < {min(len(x), len(y))} (the smaller set)")
    centre = x.mean(0)  # distances do not change, their float32 rounding error shrinks
    device_x, device_y = (jnp.asarray(features - centre, jnp.float32) for features in (x, y))

    return PrecisionRecall(
        _fraction_covered(device_y, device_x, k, chunk),
        _fraction_covered(device_x, device_y, k, chunk),
    )


def _fraction_covered(points: jax.Array, centres: jax.Array, k: int, chunk: int) -> float:
    rows = range(0, len(centres), chunk)
    radii = jnp.concatenate([_squared_radii(centres[i : i + chunk], centres, k) for i in rows])
    rows = range(0, len(points), chunk)
    inside = sum(int(_count_inside(points[i : i + chunk], centres, radii)) for i in rows)
    return inside / len(points)


@partial(jax.jit, static_argnames="k")
def _squared_radii(rows: jax.Array, points: jax.Array, k: int) -> jax.Array:
    # The nearest of the k + 1 is the vector itself.
    return -jax.lax.top_k(-_squared_distances(rows, points), k + 1)[0][:, k]


@jax.jit
def _count_inside(rows: jax.Array, centres: jax.Array, squared_radii: jax.Array) -> jax.Array:
    return jnp.sum(jnp.any(_squared_distances(rows, centres) <= squared_radii, axis=1))


def _squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    cross = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.sum(a * a, 1)[:, None] - 2 * cross + jnp.sum(b * b, 1)
    return jnp.maximum(squared, 0)


def _features(features: ArrayLike) -> np.ndarray:
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not len(x):
        raise InputError(f"array of shape {x.shape}, expected [N, F] with N >= 1")
    if not np.isfinite(x).all():
        raise InputError(f"row {np.argwhere(~np.isfinite(x))[0, 0]} holds a non-finite value")
    return x


def compression_ratio(codebook_size: int, factor: int, depth: int) -> float:
    """Bits of the codes over bits of 8-bit RGB pixels (Eq. 1 and 3 of arXiv:2410.01912).

    ICR = d log2 N / (24 f²) for a codebook of N entries, spatial down-sampling f, d codes a
    position. The paper's numbers:

    >>> f"{compression_ratio(8192, 16, 1):.2%}"
    '0.21%'
    >>> [f"{compression_ratio(16384, 16, depth):.3%}" for depth in (1, 2)]
    ['0.228%', '0.456%']
    >>> f"{compression_ratio(16384, 16, 8):.2%}"
    '1.82%'

    A continuous latent counts its bits as code depth: SD-VAE has f = 8 and 4 float32 channels.

    >>> f"{compression_ratio(2**32, 8, 4):.1%}"
    '8.3%'

    Raises:
      InputError: a codebook below 2 entries, a factor or depth below 1.
    """
    if codebook_size < 2 or factor < 1 or depth < 1:
        raise InputError(
            f"codebook {codebook_size}, factor {factor}, depth {depth}, expected >= 2, >= 1, >= 1"
        )
    return depth * math.log2(codebook_size) / (24 * factor**2)
