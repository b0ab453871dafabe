"""Two folders of images compared, by hand on features of a stub and with Inception weights."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxllm.errors import InputError
from jaxllm.images import compare
from jaxllm.images.compare import compare_folders


class Stub:
    """A classifier whose features are the first two pixels, in grey levels."""

    class config:
        channels = 1

    def measure(self, images):
        features = np.rint((images[:, 0, :2, 0] + 1) * 127.5).astype(np.float32)
        first = np.where(features[:, :1] > 100, 0.9, 0.1)
        return features, np.concatenate([first, 1 - first], axis=1)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(compare.Scorer, "load", staticmethod(lambda run: Stub()))


def write(folder: Path, rows, mode="L") -> Path:
    folder.mkdir(parents=True)
    for i, row in enumerate(rows):
        image = Image.new("L", (4, 3))
        image.putpixel((0, 0), row[0])
        image.putpixel((1, 0), row[1])
        image.convert(mode).save(folder / f"{i:02d}.png")
    return folder


SQUARE = [(60, 60), (60, 80), (80, 60), (80, 80)]


def test_distance_and_scores_by_hand(tmp_path, stub):
    real = write(tmp_path / "real", SQUARE)
    fake = write(tmp_path / "fake", [(x + 60, y) for x, y in SQUARE], mode="RGB")
    found = compare_folders(real, fake, classifier=tmp_path, splits=2)
    assert found["reference"] == str(real)
    assert found["images"] == found["reference images"] == 4
    assert found["FD (not FID)"] == pytest.approx(3600, rel=1e-6)
    assert found["precision"] == found["recall"] == 0.0
    assert found["inception form"] == pytest.approx(1.0)  # All of one class.
    half = write(tmp_path / "half", [(60, 60), (160, 60)] * 2)
    found = compare_folders(real, half, classifier=tmp_path, splits=1)
    kl = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert found["inception form"] == pytest.approx(np.exp(kl), rel=1e-6)
    assert "FID" not in found and "inception score" not in found


def test_images_are_measured_in_parts(tmp_path, stub, monkeypatch):
    real = write(tmp_path / "real", SQUARE)
    fake = write(tmp_path / "fake", [(x + 60, y) for x, y in SQUARE])
    whole = compare_folders(real, fake, classifier=tmp_path, splits=2)
    monkeypatch.setattr(compare, "PART", 3)
    assert compare_folders(real, fake, classifier=tmp_path, splits=2) == whole


def test_images_are_found_in_sub_folders(tmp_path, stub):
    real = write(tmp_path / "real", SQUARE)
    write(tmp_path / "nested" / "a", SQUARE[:2])
    write(tmp_path / "nested" / "b" / "c", SQUARE[2:])
    (tmp_path / "nested" / "notes.txt").write_text("no image")
    found = compare_folders(real, tmp_path / "nested", classifier=tmp_path, splits=1)
    assert found["images"] == 4 and abs(found["FD (not FID)"]) < 1e-6


def test_inception_weights_make_it_fid(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_inception", lambda path: Stub().measure)
    real = write(tmp_path / "real", SQUARE)
    found = compare_folders(real, real, inception=tmp_path / "weights.pth", splits=1)
    assert abs(found["FID"]) < 1e-6 and found["inception score"] == pytest.approx(1.0)


def test_exactly_one_source_of_features(tmp_path):
    for both in ({}, {"inception": tmp_path, "classifier": tmp_path}):
        with pytest.raises(InputError, match="give exactly one of"):
            compare_folders(tmp_path, tmp_path, **both)
