"""Code caches: what is written, what is read back, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_runs
from PIL import Image

from jaxllm.data.images import ImageDataConfig, crop_scaled, normalise, open_images, pad_shifted
from jaxllm.errors import InputError
from jaxllm.images import codes as codes_module
from jaxllm.images.classifier import held_out
from jaxllm.images.codes import (
    DrawCrop,
    crops_of,
    encode_images,
    extract_codes,
    open_codes,
    origin,
)
from jaxllm.images.tokenizer import tokenizer_blueprint
from jaxllm.quantize import FSQ

BATCH = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six images of class a and ten of class b, of sizes that must be cropped."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in (("a", 6), ("b", 10)):
        for part in ("train", "test"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40 + i, 44, 1), np.uint8)
                Image.fromarray(pixels[..., 0]).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def tokenizer():
    blueprint = tokenizer_blueprint(tiny_runs.tokenizer().model)
    with tiny_runs.small_programs():
        params, extra = jax.jit(blueprint.init)(jax.random.key(0))
    return blueprint, params, extra


def settings(root, **changes) -> ImageDataConfig:
    return ImageDataConfig(folder=str(root), image_size=(32, 32), resize="crop", **changes)


def extract(tokenizer, data, split, folder, crops):
    with tiny_runs.small_programs():
        return extract_codes(*tokenizer, data, split, folder, crops=crops, batch_size=BATCH)


@pytest.fixture(scope="module")
def cache(tokenizer, folders, tmp_path_factory):
    """The training split in shards of five images, ten crops each."""
    folder = tmp_path_factory.mktemp("codes") / "train"
    patch = pytest.MonkeyPatch()
    patch.setattr(codes_module, "SHARD", 5)
    extract(tokenizer, settings(folders), "train", folder, "ten")
    patch.undo()
    return folder


def encoded(tokenizer, images: np.ndarray) -> np.ndarray:
    """Codes by the tokenizer itself, in batches padded to the size used above."""
    parts = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        filled = np.concatenate([part, np.zeros((BATCH - len(part), *part.shape[1:]), part.dtype)])
        with tiny_runs.small_programs():
            parts.append(encode_images(*tokenizer, filled)[: len(part)])
    return np.concatenate(parts)


def test_held_out_codes_are_those_of_the_prepared_images(tokenizer, folders, tmp_path):
    source = extract(tokenizer, settings(folders), "test", tmp_path / "codes", "one")
    images = held_out(settings(folders), "test")
    first = source.first_crops()
    expected = encoded(tokenizer, images["image"])
    assert expected.shape == (16, 16, 2) and len(np.unique(expected)) > 1
    np.testing.assert_array_equal(first["codes"], expected)
    np.testing.assert_array_equal(first["label"], images["label"])
    assert first["codes"].dtype == first["label"].dtype == np.int32
    stored = np.load(tmp_path / "codes" / "codes-00000.npy")
    assert stored.dtype == np.uint16 and stored.shape == (16, 1, 16, 2)
    blueprint, params, extra = tokenizer
    model = blueprint.build(params, extra)
    codebook = model.config.quantizer.codebook(*model.quantizer_parts())
    np.testing.assert_array_equal(source.codebook, codebook)
    meta = json.loads((tmp_path / "codes" / "meta.json").read_text())
    assert meta["grid"] == [4, 4] and meta["depth"] == 2 and meta["codebook_size"] == 8
    assert meta["class_names"] == ["a", "b"] and meta["crops"] == 1 and meta["images"] == 16


def test_several_shards_are_one_source(tokenizer, folders, cache):
    source = open_codes(cache)
    assert len(source) == 16 and [len(s) for s in source.shards] == [5, 5, 5, 1]
    images = open_images(settings(folders, balance=0.0), "train")
    views = np.stack([crops_of(images[i]["image"], settings(folders), "ten") for i in range(16)])
    expected = encoded(tokenizer, normalise(views.reshape(160, 32, 32, 1)))
    for index in range(16):
        example = source[index]
        np.testing.assert_array_equal(example["codes"], expected[10 * index : 10 * index + 10])
        assert example["label"] == images[index]["label"] == (index >= 6)
    np.testing.assert_array_equal(source.first_crops()["codes"], expected[::10])


def test_balanced_codes_repeat_the_rarer_class(cache):
    source = open_codes(cache)
    assert len(source.balanced(0.0)) == len(source)
    drawn = source.balanced(1.0)
    assert [drawn[i]["label"] for i in range(len(drawn))] == [0] * 10 + [1] * 10
    np.testing.assert_array_equal(drawn[7]["codes"], source[1]["codes"])


def test_training_draws_every_crop_and_evaluation_the_first(cache):
    example = open_codes(cache)[0]
    kinds = {crop.tobytes(): i for i, crop in enumerate(example["codes"].astype(np.int32))}
    draws = [DrawCrop(True)(example, np.random.default_rng(seed)) for seed in range(200)]
    assert {kinds[draw["codes"].tobytes()] for draw in draws} == set(kinds.values())
    assert len(kinds) > 5 and draws[0]["codes"].dtype == np.int32
    first = DrawCrop(False)(example, np.random.default_rng(0))
    np.testing.assert_array_equal(first["codes"], example["codes"][0])
    again = DrawCrop(True)(example, np.random.default_rng(5))
    np.testing.assert_array_equal(again["codes"], draws[5]["codes"])


# -- crops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_crops_start_with_the_centre_and_end_with_mirrors(resize):
    image = np.random.default_rng(0).integers(0, 256, (30, 28, 1), np.uint8)
    config = ImageDataConfig(image_size=(32, 32), resize=resize, jitter=2)
    if resize == "crop":
        centre = crop_scaled(image, 32, 32, None)
        large = crop_scaled(image, 35, 35, None)  # 1.1 times 32
        corners = [large[t : t + 32, x : x + 32] for t, x in ((1, 1), (0, 0), (0, 3), (3, 0))]
        corners += [large[3:, 3:]]
    else:
        centre = pad_shifted(image, 32, 32)
        shifts = [(0, 0), (-2, -2), (-2, 2), (2, -2), (2, 2)]
        corners = [pad_shifted(image, 32, 32, shift) for shift in shifts]
    one, flip = crops_of(image, config, "one"), crops_of(image, config, "flip")
    np.testing.assert_array_equal(one, centre[None])
    np.testing.assert_array_equal(flip, np.stack([centre, centre[:, ::-1]]))
    ten = crops_of(image, config, "ten")
    assert ten.shape == (10, 32, 32, 1)
    np.testing.assert_array_equal(ten[:5], np.stack(corners))
    np.testing.assert_array_equal(ten[5:], ten[:5, :, ::-1])
    assert len({crop.tobytes() for crop in ten}) == 10


# -- faults --------------------------------------------------------------------------------------


def test_an_interrupted_extraction_is_not_taken_for_whole(
    tokenizer, folders, cache, tmp_path, monkeypatch
):
    folder = tmp_path / "train"
    folder.mkdir()
    for path in cache.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(codes_module, "SHARD", 5)
    inner = codes_module._in_batches

    def stops(source, start, batch_size):
        if start:  # The first shard is written.
            raise KeyboardInterrupt
        yield from inner(source, start, batch_size)

    monkeypatch.setattr(codes_module, "_in_batches", stops)
    with pytest.raises(KeyboardInterrupt):
        extract(tokenizer, settings(folders), "train", folder, "ten")
    assert not (folder / "meta.json").exists()
    with pytest.raises(InputError, match="meta.json: no such file"):
        open_codes(folder)


def test_damaged_caches_are_named(cache, tmp_path):
    def damaged(name: str, content) -> str:
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        for path in cache.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, np.ndarray):
            np.save(folder / name, content)
        else:
            (folder / name).write_bytes(content((folder / name).read_bytes()))
        with pytest.raises(InputError) as error:
            open_codes(folder)
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(folder), "cache")

    codes, labels = (np.load(cache / f"{kind}-00001.npy") for kind in ("codes", "labels"))
    name = "codes-00001.npy"
    assert damaged(name, None).startswith(f"cache/{name}: not a readable array")
    assert damaged(name, lambda b: b[:-7]).startswith(f"cache/{name}: not a readable array")
    assert damaged(name, lambda b: b"").startswith(f"cache/{name}: not a readable array")
    assert damaged(name, lambda b: b"junk" + b).startswith(f"cache/{name}: not a readable array")
    assert f"cache/{name}: shape (4, 10, 16, 2), expected (5, 10, 16, 2)" == damaged(
        name, codes[:4]
    )
    assert f"cache/{name}: shape (5, 10, 16), expected" in damaged(name, codes[..., 0])
    outside = codes.copy()
    outside[3, 9, 15, 1] = 8
    expected = f"cache/{name}: image 3 holds code 8, outside the codebook of 8"
    assert damaged(name, outside) == expected
    name = "labels-00001.npy"
    assert damaged(name, lambda b: b[:40]).startswith(f"cache/{name}: not a readable array")
    assert damaged(name, labels[:4]) == f"cache/{name}: shape (4,), expected (5,)"
    assert damaged(name, labels + 2) == "cache: label 2 is outside 0 .. 1"
    assert damaged("codebook.npy", lambda b: b[:90]).startswith("cache/codebook.npy: not a read")
    assert "cache/meta.json: not valid JSON" in damaged("meta.json", lambda b: b[:-9])
    assert damaged("meta.json", lambda b: b"{}") == "cache/meta.json: has no 'class_names'"
    assert damaged("meta.json", lambda b: b"3") == "cache/meta.json: has no 'class_names'"
    fewer = json.loads((cache / "meta.json").read_text()) | {"shards": 3}
    assert damaged("meta.json", lambda b: json.dumps(fewer).encode()).endswith(
        "15 images, meta.json says 16"
    )


def test_a_codebook_beyond_uint16_is_refused(tokenizer, folders, tmp_path):
    model = dataclasses.replace(tiny_runs.tokenizer().model, quantizer=FSQ(levels=(17, 17, 17, 17)))
    blueprint = tokenizer_blueprint(model)
    params, extra = jax.eval_shape(blueprint.init, jax.random.key(0))
    with pytest.raises(InputError, match="codebook of 83521 do not fit uint16"):
        build = tokenizer_blueprint(model).build
        with jax.ensure_compile_time_eval():
            params, extra = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (params, extra))
        assert build(params, extra).config.quantizer.size == 83521
        extract_codes(blueprint, params, extra, settings(folders), "test", tmp_path / "codes")
    assert not (tmp_path / "codes").exists()


def test_the_origin_of_codes_tells_tokenizers_and_data_apart(tokenizer, folders):
    _, params, extra = tokenizer
    data = settings(folders)
    known = origin(params, extra, data, "ten")
    assert known == origin(params, extra, dataclasses.replace(data, batch_size=3), "ten")
    assert json.loads(json.dumps(known)) == known
    other = jax.tree.map(lambda x: x, params)
    other["decoder"] = jax.tree.map(lambda x: x + 1, other["decoder"])
    assert origin(other, extra, data, "ten") != known
    assert origin(params, extra, dataclasses.replace(data, channels=3), "ten") != known
    assert origin(params, extra, data, "one") != known
