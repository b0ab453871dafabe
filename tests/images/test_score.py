"""Scores of image sets by hand, with a stub in the classifier's place; picture sheets."""

import numpy as np
import pytest
from PIL import Image

from jaxllm.errors import InputError
from jaxllm.images.pictures import save_grid
from jaxllm.images.score import equal_per_class, score_images, score_table


class Stub:
    """Features are two pixels; the first class is likely where the first pixel is positive."""

    def measure(self, images):
        features = images[:, 0, :2, 0].astype(np.float32)
        first = np.where(features[:, :1] > 0, 0.8, 0.4)
        return features, np.concatenate([first, 1 - first], axis=1)


def examples(rows, labels):
    images = np.zeros((len(rows), 1, 2, 1), np.float32)
    images[:, 0, :, 0] = rows
    return {"image": images, "label": np.array(labels)}


def test_accuracy_distance_and_inception_form_by_hand():
    square = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    moved = [(x + 3, y) for x, y in square]
    reference = np.array(square, np.float32)
    real = score_images(Stub(), examples(square, [0, 1, 1, 1]), reference)
    assert real.images == 4 and real.accuracy == 0.75
    # Wilson's interval of 3 of 4 at 95 %.
    z = 1.959964
    centre, half = 0.75 + z * z / 8, z * np.sqrt(0.75 * 0.25 / 4 + z * z / 64)
    assert real.accuracy_low == pytest.approx((centre - half) / (1 + z * z / 4), abs=1e-6)
    assert real.accuracy_high == pytest.approx((centre + half) / (1 + z * z / 4), abs=1e-6)
    assert abs(real.frechet) < 1e-6 and real.precision == real.recall == 1.0
    # Posteriors (0.8, 0.2) and (0.4, 0.6), two of each; their mean is (0.6, 0.4).
    kl = 0.5 * (0.8 * np.log(0.8 / 0.6) + 0.2 * np.log(0.2 / 0.4))
    kl += 0.5 * (0.4 * np.log(0.4 / 0.6) + 0.6 * np.log(0.6 / 0.4))
    assert real.inception_form == pytest.approx(np.exp(kl), rel=1e-6)

    far = score_images(Stub(), examples(moved, [0, 0, 1, 1]), reference)
    assert far.accuracy == 0.5  # All four are now of the first class.
    assert far.frechet == pytest.approx(9.0, abs=1e-5)  # Equal covariances, means 3 apart.
    assert far.inception_form == pytest.approx(1.0)


def test_every_set_is_compared_with_the_same_training_images():
    square = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    train = examples([(2 * x, 2 * y) for x, y in square], [0, 0, 1, 1])
    table = score_table(Stub(), {"a": examples(square, [0, 0, 1, 1]), "b": train}, train)
    assert list(table) == ["a", "b"] and abs(table["b"].frechet) < 1e-6
    # Unbiased variances 4/3 and 16/3 in both directions: 2 (2/sqrt 3 - 4/sqrt 3)^2 = 8/3.
    assert table["a"].frechet == pytest.approx(8 / 3, rel=1e-5)


def test_equal_counts_take_the_first_of_each_class():
    labels = np.array([2, 0, 2, 0, 0, 2, 5, 5])
    found = equal_per_class({"label": labels, "n": np.arange(8)})
    assert found["label"].tolist() == [0, 0, 2, 2, 5, 5]
    assert found["n"].tolist() == [1, 3, 0, 2, 6, 7]
    assert equal_per_class({"label": labels, "n": np.arange(8)}, 1)["n"].tolist() == [1, 0, 6]


# -- picture sheets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "scale", "chosen"), [((32, 32), None, 2), ((10, 20), None, 3), ((80, 8), None, 1),
                                  ((4, 6), 5, 5), ((4, 6), 1, 1)],
)  # fmt: skip
def test_sheet_sizes(tmp_path, size, scale, chosen):
    rows = [np.zeros((2, *size, 1)), np.zeros((3, *size, 1))]
    width, height = 3 * (size[1] * chosen + 2), 2 * (size[0] * chosen + 2)
    for names, columns, left, top in (
        (None, None, 2, 2),
        (["a", "four"], None, 8 + 7 * 4, 2),
        (None, ["x", "y", "z"], 2, 18),
    ):
        path = tmp_path / "new" / "sheet.png"
        save_grid(path, rows, row_names=names, column_names=columns, scale=scale)
        with Image.open(path) as sheet:
            assert sheet.size == (left + width, top + height) and sheet.mode == "RGB"
        assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_pictures_keep_their_place_and_colour(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5, 3))
    save_grid(tmp_path / "a.png", list(images), scale=2)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    for r in range(2):
        for c in range(3):
            y, x = 2 + r * 10, 2 + c * 12
            cell = sheet[y : y + 8, x : x + 10]
            expected = np.rint((images[r, c] + 1) * 127.5)
            np.testing.assert_array_equal(cell[::2, ::2], expected)
            np.testing.assert_array_equal(cell[1::2, 1::2], expected)
    assert set(sheet[:2].reshape(-1)) == set(sheet[:, :2].reshape(-1)) == {255}
    with pytest.raises(InputError, match="is a folder"):
        save_grid(tmp_path, list(images))
