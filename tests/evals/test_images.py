"""Image metrics on cases with a known answer, and against NumPy/scipy written another way."""

import doctest
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import distance

from jaxllm.errors import InputError
from jaxllm.evals import images
from jaxllm.evals.images import (
    FeatureStatistics,
    RunningStatistics,
    frechet_distance,
    frechet_distance_of_features,
    inception_score,
    precision_recall,
    psnr,
    ssim,
)


def test_compression_ratio_doctests_hold():
    result = doctest.testmod(images)
    assert result.attempted >= 4 and result.failed == 0


def test_psnr_by_hand():
    a = jnp.zeros((2, 4, 4, 1))
    b = jnp.stack([jnp.full((4, 4, 1), 0.1), jnp.zeros((4, 4, 1)).at[0, 0].set(1)])
    # Mean squared errors 0.01 and 1/16; peak 1, then peak 2 (6.0206 dB more).
    np.testing.assert_allclose(psnr(a, b, 1.0), [20, 10 * math.log10(16)], rtol=1e-5)
    np.testing.assert_allclose(psnr(a, b, 2.0) - psnr(a, b, 1.0), 20 * math.log10(2), rtol=1e-5)
    assert np.isposinf(psnr(a, a, 1.0)).all()


def ssim_scipy(a, b, data_range):
    def blur(x):
        # truncate 3.5 sigma = radius 5; inside the margin the border mode plays no part.
        return ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    channels = []
    for c in range(a.shape[-1]):
        x, y = a[..., c].astype(np.float64), b[..., c].astype(np.float64)
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        channels.append(
            ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        )
    return np.mean(channels)


def test_ssim_matches_scipy():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 17, 23, 3)).astype(np.float32)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.float32)
    expected = [ssim_scipy(x, y, 255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b, 255), expected, atol=1e-5)
    np.testing.assert_allclose(ssim(a / 255, b / 255, 1), expected, atol=1e-5)
    np.testing.assert_allclose(ssim(a, a, 255), 1, atol=1e-6)


def test_frechet_distance_of_known_gaussians():
    # One dimension: (m1 - m2)² + (s1 - s2)².
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1, abs=1e-12)
    # Commuting covariances: the same per axis; here 0 + (1-2)² + (3-1)² in a rotated basis.
    angle = np.deg2rad(30)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    a, b = turn @ np.diag([1.0, 9.0]) @ turn.T, turn @ np.diag([4.0, 1.0]) @ turn.T
    assert frechet_distance([0, 0], a, [0, 0], b) == pytest.approx(5, abs=1e-12)
    # Not commuting, 2 x 2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) with M = A B.
    a, b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    trace_root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = 4 + 4 - 2 * trace_root
    assert frechet_distance([0, 0], a, [0, 0], b) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance([0, 0], b, [0, 0], a) == pytest.approx(expected, abs=1e-12)


def test_frechet_distance_to_itself_is_zero_even_when_singular():
    x = np.random.default_rng(0).normal(size=(10, 40)) * 10  # rank 9 of 40
    assert frechet_distance_of_features(x, x) < 1e-9
    y = x + np.array([3.0] + [0] * 39)
    assert frechet_distance_of_features(x, y) == pytest.approx(9, rel=1e-9)


def test_running_statistics_equal_one_pass_and_survive_storage(tmp_path):
    x = np.random.default_rng(0).normal(5, 2, (101, 6))
    parts = [RunningStatistics(), RunningStatistics()]
    for i in range(0, 101, 7):
        parts[i % 2].update(x[i : i + 7])
    parts[0].merge(parts[1])
    result = parts[0].result()
    np.testing.assert_allclose(result.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(x, rowvar=False), rtol=1e-10)
    path = tmp_path / "reference.npz"
    result.save(path)
    loaded = FeatureStatistics.load(path)
    assert loaded.count == 101 and [p.name for p in tmp_path.iterdir()] == ["reference.npz"]
    np.testing.assert_array_equal(loaded.covariance, result.covariance)
    # Published reference sets hold no count.
    np.savez(path, mu=result.mean, sigma=result.covariance)
    assert FeatureStatistics.load(path).count == 0


def test_inception_score_of_balanced_one_hot_is_the_class_count():
    one_hot = np.eye(10)[np.repeat(np.arange(10), 50)]
    assert inception_score(one_hot, splits=1).mean == pytest.approx(10, rel=1e-12)
    assert inception_score(np.full((30, 4), 0.25), splits=3).mean == pytest.approx(1, rel=1e-12)


def test_inception_score_by_hand():
    # Rows (0.9, 0.1), (0.1, 0.9): marginal (0.5, 0.5); KL = ln 2 - H(0.9).
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    score = inception_score([[0.9, 0.1], [0.1, 0.9]], splits=1)
    assert score.mean == pytest.approx(2 * math.exp(-entropy), rel=1e-12) and score.std == 0


def test_inception_score_of_class_sorted_images_is_not_fooled():
    one_hot = np.eye(10)[np.repeat(np.arange(10), 500)]
    # Without the shuffle each of the ten splits would hold one class and score exactly 1.
    sorted_score = inception_score(one_hot, splits=10)
    assert sorted_score.mean > 9.8 and 0 < sorted_score.std < 0.2
    mixed = one_hot[np.random.default_rng(1).permutation(5000)]
    assert sorted_score.mean == pytest.approx(inception_score(mixed, splits=10).mean, abs=0.1)


def test_precision_recall_of_disjoint_and_identical_sets():
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (50, 5))
    assert precision_recall(real, real + 100, chunk=16) == (0, 0)
    assert precision_recall(real, real, chunk=16) == (1, 1)
    # A generator stuck on one mode: everything it makes is real, half of the reals are out of it.
    two_modes = np.concatenate([real, real + 100])
    assert precision_recall(two_modes, real) == (1, 0.5)


def test_precision_recall_matches_a_direct_computation_for_any_chunk():
    rng = np.random.default_rng(1)
    real, fake = rng.normal(10, 1, (40, 3)), rng.normal(10.7, 1.2, (30, 3))

    def covered(points, centres):
        radii = np.sort(distance.cdist(centres, centres), axis=1)[:, 3]
        return (distance.cdist(points, centres) <= radii).any(1).mean()

    expected = (covered(fake, real), covered(real, fake))
    assert 0 < min(expected) < max(expected) < 1
    for chunk in (7, 64):
        np.testing.assert_allclose(precision_recall(real, fake, chunk=chunk), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: psnr(np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 3, 3)), 1), r"\(1, 2, 3, 3\)"),
        (lambda: ssim(np.zeros((1, 10, 20, 3)), np.zeros((1, 10, 20, 3)), 1), "11 pixels"),
        (lambda: frechet_distance([0], [[1]], [0, 0], np.eye(2)), r"expected \[F\]"),
        (lambda: frechet_distance_of_features(np.ones((1, 2)), np.ones((1, 2))), "at least 2"),
        (lambda: inception_score([[0.5, 0.4]], splits=1), "row 0 sums to 0.9"),
        (lambda: inception_score(np.eye(3), splits=4), "4 splits of 3"),
        (lambda: precision_recall(np.eye(3), np.eye(3)), "k is 3"),
        (lambda: RunningStatistics().update([[0.0, np.inf]]), "non-finite"),
        (lambda: FeatureStatistics.load("absent.npz"), "absent.npz"),
    ],
)
def test_bad_input_is_named(call, culprit):
    with pytest.raises(InputError, match=culprit):
        call()
