"""Image sources, their splits, and the preparation of images."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxllm.data.images import (
    FASHION_CLASSES,
    ImageDataConfig,
    PrepareImage,
    balance,
    bundled,
    crop_scaled,
    fashion,
    normalise,
    open_images,
    pad_shifted,
    quickdraw,
    read_image,
    to_uint8,
)
from jaxllm.data.rendered_text import TextImageConfig
from jaxllm.errors import InputError

SPLITS = ("train", "validation", "test")


def labels_of(source) -> np.ndarray:
    return np.array([source[i]["label"] for i in range(len(source))])


# -- bundled -------------------------------------------------------------------------------------


def test_the_sprite_has_900_tiles_with_their_class_in_three_rows():
    data = fashion()
    assert data.images.shape == (900, 28, 28, 1) and data.images.dtype == np.uint8
    sheet = np.asarray(Image.open(bundled("fashion_mnist_sprite", "fashion-mnist-sprite.png")))
    assert sheet.shape[:2] == (840, 840)
    for index in (0, 29, 30, 457, 899):
        row, column = divmod(index, 30)
        tile = sheet[28 * row : 28 * row + 28, 28 * column : 28 * column + 28, 0]
        np.testing.assert_array_equal(data[index]["image"][..., 0], tile)
        assert data[index]["label"] == row // 3
    assert np.bincount(data.labels).tolist() == [90] * 10
    assert data.class_names == FASHION_CLASSES
    # Trousers leave the space between the legs dark; pullovers fill the middle column.
    middle = data.images[:, 20:27, 13:15].mean(axis=(1, 2, 3))
    assert middle[data.labels == 1].mean() < 0.75 * middle[data.labels == 2].mean()


def test_quickdraw_has_a_thousand_bright_drawings_a_class():
    data = quickdraw()
    assert data.images.shape == (3000, 28, 28, 1)
    assert np.bincount(data.labels).tolist() == [1000] * 3
    assert data.class_names == ("cat", "rainbow", "train")
    assert 0 < data.images.mean() < 100 and data.images.max() == 255
    assert data.images.reshape(3000, -1).max(axis=1).min() > 0


@pytest.mark.parametrize(
    ("source", "sizes"), [("fashion", (63, 9, 18)), ("quickdraw", (700, 100, 200))]
)
def test_splits_are_disjoint_whole_and_stable(source, sizes):
    config = ImageDataConfig(source=source, balance=0.0)
    parts = {split: open_images(config, split) for split in SPLITS}
    rows = {split: part.rows for split, part in parts.items()}
    everything = np.concatenate(list(rows.values()))
    assert sorted(everything) == list(range(len(everything)))
    for split, size in zip(SPLITS, sizes, strict=True):
        assert set(np.bincount(labels_of(parts[split]))) == {size}
        np.testing.assert_array_equal(rows[split], open_images(config, split).rows)


def test_the_rare_classes_are_repeated_for_training_only():
    config = ImageDataConfig(source="fashion+quickdraw")
    train = open_images(config, "train")
    assert np.bincount(labels_of(train)).tolist() == [700] * 13
    assert train.class_names[9:11] == ["ankle boot", "cat"]
    test = np.bincount(labels_of(open_images(config, "test")))
    assert test.tolist() == [18] * 10 + [200] * 3
    counts = np.bincount(train.rows[: 10 * 700], minlength=900)
    assert set(counts[counts > 0]) == {11, 12}  # 700 = 63 x 11 + 7
    assert balance([np.array([4, 5]), np.array([7, 8, 9])], 1.0).tolist() == [4, 5, 4, 7, 8, 9]
    rare, common = np.arange(2), np.arange(18)
    sizes = {share: len(balance([rare, common], share)) - 18 for share in (0.0, 0.5, 1.0)}
    assert sizes == {0.0: 2, 0.5: 6, 1.0: 18}
    with pytest.raises(InputError, match="balance 1.5 must be between 0"):
        ImageDataConfig(balance=1.5)
    free = open_images(ImageDataConfig(source="quickdraw", unconditional=True), "test")
    assert set(labels_of(free)) == {0} and free.class_names == ("image",)


# -- folders and lists ---------------------------------------------------------------------------


def write_image(path: Path, value: int, *, size=(5, 4), mode="L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def values_of(source) -> list[tuple[int, int]]:
    rows = [source[i] for i in range(len(source))]
    return sorted((int(row["image"][0, 0, 0]), row["label"]) for row in rows)


def test_a_folder_without_splits_is_cut_per_class(tmp_path):
    for i in range(20):
        write_image(tmp_path / "b" / f"{i:02d}.png", i)
        write_image(tmp_path / "a" / f"{i:02d}.PNG", 100 + i)
    write_image(tmp_path / ".hidden" / "0.png", 0)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    config = ImageDataConfig(folder=str(tmp_path))
    found = {split: values_of(open_images(config, split)) for split in SPLITS}
    assert [len(rows) for rows in found.values()] == [28, 4, 8]
    everything = sorted(sum(found.values(), []))
    assert everything == [(i, 1) for i in range(20)] + [(100 + i, 0) for i in range(20)]
    source = open_images(config, "test")
    assert source.class_names == ["a", "b"] and source[0]["image"].shape == (4, 5, 1)


@pytest.mark.parametrize("held", [("validation", "test"), ("test",), ("validation",)])
def test_a_folder_with_splits_is_used_as_it_is(tmp_path, held):
    for number, part in enumerate(("train", *held)):
        for label, name in enumerate(("a", "b")):
            write_image(tmp_path / part / name / "x.png", 10 * number + label)
    write_image(tmp_path / "train" / "a" / "y.png", 5)
    config = ImageDataConfig(folder=str(tmp_path))
    # The rarer class is repeated in training.
    assert values_of(open_images(config, "train")) == [(0, 0), (1, 1), (1, 1), (5, 0)]
    for split in ("validation", "test"):
        number = 10 * (1 + held.index(split)) if split in held else 10
        assert values_of(open_images(config, split)) == [(number, 0), (number + 1, 1)]


def test_labels_of_a_list_are_numbers_or_names(tmp_path):
    for i in range(24):
        write_image(tmp_path / "pictures" / f"{i}.png", i)
    for labels, names, expected in (
        ([1, 0], ["0", "1"], [1, 0]),
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["dog", 7], ["7", "dog"], [1, 0]),
    ):
        rows = [{"image": f"pictures/{i}.png", "label": labels[i % 2]} for i in range(24)]
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        config = ImageDataConfig(jsonl=str(tmp_path / "list.jsonl"))
        found = sum((values_of(open_images(config, split)) for split in SPLITS), [])
        assert sorted(found) == [(i, expected[i % 2]) for i in range(24)]
        assert list(open_images(config, "test").class_names) == names


def test_folder_and_list_exclude_each_other():
    config = ImageDataConfig(folder="a", jsonl="b")
    with pytest.raises(InputError, match="are both set; choose one"):
        open_images(config, "train")


# -- TFDS ----------------------------------------------------------------------------------------


def test_tfds_is_read_from_array_record_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    def png(value: int) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(np.full((6, 5, 3), value, np.uint8)).save(file, "PNG")
        return io.BytesIO(file.getvalue())

    class JaxllmTiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(6, 5, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(0), "validation": self._generate_examples(100)}

        def _generate_examples(self, first):
            for i in range(6):
                yield i, {"image": png(first + i), "label": i % 2}

    builder = JaxllmTiny(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    config = ImageDataConfig(
        source="tfds", tfds="jaxllm_tiny", tfds_dir=str(tmp_path), channels=3, image_size=(6, 6)
    )
    train = open_images(config, "train")
    assert values_of(train) == [(i, i % 2) for i in range(6)]
    assert train[0]["image"].shape == (6, 5, 3) and list(train.class_names) == ["cat", "dog"]
    for split in ("validation", "test"):
        assert values_of(open_images(config, split)) == [(100 + i, i % 2) for i in range(6)]
    free = ImageDataConfig(**{**vars(config), "unconditional": True})
    assert set(labels_of(open_images(free, "train"))) == {0}
    assert "tensorflow" not in sys.modules
    absent = ImageDataConfig(source="tfds", tfds="jaxllm_absent", tfds_dir=str(tmp_path))
    with pytest.raises(InputError, match="'jaxllm_absent' is not available as array_rec") as error:
        open_images(absent, "train")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# -- rendered text -------------------------------------------------------------------------------


def test_rendered_words_have_one_class_and_disjoint_splits():
    config = ImageDataConfig(source="words", image_size=(16, 32))
    texts = {}
    for split in SPLITS:
        source = open_images(config, split)
        rows = [source[i] for i in range(0, len(source), 7)]
        assert source.class_names == ("text",) and {row["label"] for row in rows} == {0}
        assert rows[0]["image"].shape == (16, 32, 1)
        texts[split] = {row["text"] for row in rows}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_rendered_pages_have_one_class_and_disjoint_splits(tmp_path):
    words = [f"w{i:03d}" for i in range(200)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    pages = TextImageConfig(size=64, font_size=10, margin=2, max_words=4, channels=1)
    config = ImageDataConfig(
        source="pages", text_file=str(tmp_path / "text.txt"), pages=pages, image_size=(64, 64)
    )
    seen = []
    for split, count in zip(SPLITS, (40, 5, 5), strict=True):
        source = open_images(config, split)
        rows = [source[i] for i in range(len(source))]
        assert len(rows) == count and {row["label"] for row in rows} == {0}
        assert rows[0]["image"].shape == (64, 64, 1) and rows[0]["image"].min() < 128
        seen += " ".join(row["text"] for row in rows).split()
    assert sorted(seen) == words


# -- preparation ---------------------------------------------------------------------------------


def test_every_level_survives_normalisation():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    values = normalise(levels)
    assert values.dtype == np.float32 and values.min() == -1.0 and values.max() == 1.0
    assert values[0, 1, 0] == pytest.approx(1 / 127.5 - 1, abs=1e-7)
    np.testing.assert_array_equal(to_uint8(values), levels)
    assert to_uint8(np.array([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]


def test_padding_centres_shifts_and_never_cuts():
    image = np.arange(1, 7, dtype=np.uint8).reshape(2, 3, 1)
    centred = pad_shifted(image, 6, 6)[..., 0]
    expected = np.zeros((6, 6), np.uint8)
    expected[2:4, 1:4] = image[..., 0]  # 3 free columns: the odd one is at the right.
    np.testing.assert_array_equal(centred, expected)
    moved = pad_shifted(image, 6, 6, (1, -1))[..., 0]
    np.testing.assert_array_equal(moved, np.roll(expected, (1, -1), (0, 1)))
    for shift in ((-9, 9), (9, -9)):
        assert pad_shifted(image, 6, 6, shift).sum() == image.sum()


def test_crops_are_inside_and_central_without_a_generator():
    ramp = np.arange(40, dtype=np.uint8)[:, None] * 2 + np.zeros((1, 30), np.uint8)
    tall = np.repeat(ramp[..., None], 3, axis=2)
    middle = crop_scaled(tall, 30, 30, None)
    np.testing.assert_array_equal(middle, tall[5:35])  # Scale 1: 10 rows free, half above.
    starts = set()
    for seed in range(60):
        crop = crop_scaled(tall, 30, 30, np.random.default_rng(seed))
        start = int(crop[0, 0, 0]) // 2
        np.testing.assert_array_equal(crop, tall[start : start + 30])
        starts.add(start)
    assert starts == set(range(11))
    for height, width in ((7, 9), (1, 50), (33, 33)):
        odd = np.zeros((height, width, 1), np.uint8)
        assert crop_scaled(odd, 16, 8, np.random.default_rng(0)).shape == (16, 8, 1)
        assert crop_scaled(odd, 16, 8, None).shape == (16, 8, 1)


def test_training_images_vary_and_depend_on_the_generator_only():
    config = ImageDataConfig(image_size=(32, 32), jitter=2)
    example = {"image": quickdraw().images[0], "label": 2}
    train, held = PrepareImage(config, train=True), PrepareImage(config, train=False)
    plain = held(example, np.random.default_rng(0))
    assert plain["image"].shape == (32, 32, 1) and plain["label"] == 2
    np.testing.assert_array_equal(to_uint8(plain["image"])[2:30, 2:30], example["image"])
    np.testing.assert_array_equal(held(example, np.random.default_rng(1))["image"], plain["image"])
    whole = to_uint8(plain["image"])
    wanted = {
        view[:, ::flip].tobytes()
        for flip in (1, -1)
        for dy in range(-2, 3)
        for dx in range(-2, 3)
        for view in [np.roll(whole, (dy, dx), (0, 1))]
    }
    drawn = [train(example, np.random.default_rng(seed))["image"] for seed in range(500)]
    assert {to_uint8(image).tobytes() for image in drawn} == wanted
    assert all(image.min() >= -1 and image.max() <= 1 for image in drawn)
    np.testing.assert_array_equal(train(example, np.random.default_rng(3))["image"], drawn[3])
    still = PrepareImage(ImageDataConfig(flip=False, jitter=0), train=True)
    np.testing.assert_array_equal(still(example, np.random.default_rng(5))["image"], plain["image"])


def test_cropped_training_images_and_channels(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for channels in (1, 3):
        config = ImageDataConfig(image_size=(16, 16), channels=channels, resize="crop")
        for seed in range(20):
            prepare = PrepareImage(config, train=bool(seed))
            out = prepare({"image": colours, "label": 0}, np.random.default_rng(seed))["image"]
            assert out.shape == (16, 16, channels) and -1 <= out.min() <= out.max() <= 1
    # Luma of ITU-R 601: red counts 0.299, green 0.587, blue 0.114.
    square = np.zeros((4, 4, 3), np.uint8)
    square[..., 0], square[..., 1] = 200, 100
    grey = PrepareImage(ImageDataConfig(image_size=(4, 4)), train=False)
    out = to_uint8(grey({"image": square, "label": 0}, np.random.default_rng(0))["image"])
    assert set(out.reshape(-1)) == {round(200 * 0.299 + 100 * 0.587)}
    rgb = PrepareImage(ImageDataConfig(image_size=(4, 4), channels=3), train=False)
    one = np.full((4, 4, 1), 77, np.uint8)
    out = to_uint8(rgb({"image": one, "label": 0}, np.random.default_rng(0))["image"])
    assert out.shape == (4, 4, 3) and set(out.reshape(-1)) == {77}
    Image.fromarray(square).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1).shape == (4, 4, 1)
    Image.new("P", (3, 2), 1).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png", 3).shape == (2, 3, 3)


def test_an_image_too_large_to_pad_is_refused():
    prepare = PrepareImage(ImageDataConfig(image_size=(32, 32)), train=True)
    with pytest.raises(InputError, match="image of 33x20 does not fit 32x32; set --data.image-"):
        image = np.zeros((20, 33, 1), np.uint8)
        prepare({"image": image, "label": 0}, np.random.default_rng(0))


def test_an_absurdly_large_image_is_unreadable(tmp_path, monkeypatch):
    write_image(tmp_path / "bomb.png", 0, size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="bomb.png: not a readable image"):
        read_image(tmp_path / "bomb.png", 1)
