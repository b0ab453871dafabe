"""The configs that need no download, shrunk by overrides, through the real scripts: two steps each.

Images of one's own (folder64, and the RQ-Transformer on their codes) and rendered pages
(text_image384) go from pixels to samples.
"""

import json
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs
from PIL import Image

from jaxllm.cli.main import main as jaxllm
from jaxllm.images.codes import open_codes
from jaxllm.images.sample import Decoder, Generator
from jaxllm.training import loop
from jaxllm.training.loop import train

ROOT = Path(__file__).parents[2]
CLASSES, PER_CLASS = ("blue", "red"), 12
LOOP = "--loop.steps 2 --loop.log-every 1 --loop.compile-cache False "
TOKENIZER = (
    "--model.width 8 --model.groups 4 --model.res-blocks 1 --model.patch 8 --model.multipliers 1 "
    "--model.latent-dim 8 --model.quantizer.codebook-size 16 --model.quantizer.code-dim 4 "
    "--data.batch-size 8 --optimizer.warmup-steps 1 "
) + LOOP
CODE_MODEL = (
    "--model.codebook-size 16 --model.layers 2 --model.heads 2 --model.dim 16 --data.batch-size 8 "
    "--optimizer.warmup-steps 1 "
) + LOOP


def start(script, config, options, monkeypatch):
    """Runs `python train/SCRIPT configs/images/CONFIG OPTIONS` in this process, on one device."""
    monkeypatch.setattr(loop, "train", partial(train, devices=jax.devices()[:1]))
    config = str(ROOT / "configs" / "images" / f"{config}.py")
    monkeypatch.setattr(sys, "argv", [script, config, *shlex.split(options)])
    with pytest.raises(SystemExit) as end, tiny_runs.quick_compile():
        runpy.run_path(str(ROOT / "train" / script), run_name="__main__")
    assert end.value.code == 0


def last_metrics(folder):
    """The last value of every metric, without its prefix."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name.split("/")[-1]: value for row in rows for name, value in row.items()}


def write_images(folder):
    """Noise around one colour per class, of several sizes."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = rng.integers(0, 80, (70 + i, 64 + 3 * i, 3), np.uint8)
            pixels[..., 2 * (1 - label)] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    """The folder of images, and the runs of tokenizer and codes made from it."""
    root = tmp_path_factory.mktemp("own")
    write_images(root / "images")
    with pytest.MonkeyPatch.context() as monkeypatch:
        data = f"--data.folder {root}/images "
        options = f"{data} {TOKENIZER} --kmeans-start 16 --workdir {root}/tokenizer"
        start("tokenizer.py", "folder64", options, monkeypatch)
        options = f"{data} --tokenizer {root}/tokenizer --batch-size 16 --workdir {root}/codes"
        start("extract_codes.py", "folder64_codes", options, monkeypatch)
    return root


def test_own_images_become_codes(own_images):
    assert np.isfinite(last_metrics(own_images / "tokenizer")["psnr"])
    source = open_codes(own_images / "codes" / "train")
    assert source.class_names == list(CLASSES)
    assert (source.meta["crops"], source.meta["grid"], source.meta["depth"]) == (10, [8, 8], 2)
    assert len(source) == 2 * (PER_CLASS - round(0.1 * PER_CLASS) - round(0.2 * PER_CLASS))
    assert open_codes(own_images / "codes" / "validation").meta["crops"] == 1


def test_own_images_are_sampled(own_images, monkeypatch, capsys):
    root = own_images
    options = f"--model.num-classes 2 --model.head-layers 0 1 {CODE_MODEL}"
    options += f" --data.cache {root}/codes --workdir {root}/dnd"
    start("code_model.py", "folder64_dnd", options, monkeypatch)
    assert 0 < last_metrics(root / "dnd")["bits_per_code"] < 5
    grid = root / "grid.png"
    assert jaxllm(["sample", "--run", str(root / "dnd"), "--n", "3", "--out", str(grid)]) == 0
    assert Image.open(grid).size[0] >= 3 * 64
    assert "red" in capsys.readouterr().out


def test_rq_transformer_trains_on_the_same_codes(own_images, monkeypatch):
    options = "--model.depth 2 --model.depth-layers 1 --model.code-dim 4 --model.num-classes 2 "
    options += f"{CODE_MODEL} --data.cache {own_images}/codes --workdir {own_images}/rq"
    start("code_model.py", "imagenet256_rq_transformer", options, monkeypatch)
    codes, _ = Generator.load(own_images / "rq").sample(np.array([0, 1]))
    assert codes.shape == (2, 64, 2) and codes.max() < 16


def test_rendered_pages_become_samples(tmp_path, monkeypatch):
    pages = "--data.image-size 32 32 --data.pages.size 32 --data.pages.font-size 10 "
    pages += f"--data.pages.margin 2 --data.text-file {tmp_path}/text.txt "
    (tmp_path / "text.txt").write_text("to be or not to be so it is as we do go on " * 400)
    options = "--model.image-size 32 32 --perceptual.kind none --adversarial.model.width 8 "
    options += f"{pages} {TOKENIZER} --workdir {tmp_path}/tokenizer"
    start("tokenizer.py", "text_image384_tokenizer", options, monkeypatch)
    assert {"adversarial", "adaptive_weight"} <= last_metrics(tmp_path / "tokenizer").keys()
    options = f"{pages} --tokenizer {tmp_path}/tokenizer --workdir {tmp_path}/codes --batch-size 16"
    start("extract_codes.py", "text_image384_codes", options, monkeypatch)
    options = f"{CODE_MODEL} --model.head-layers 1 --model.grid 4 4 "
    options += f"--data.cache {tmp_path}/codes --workdir {tmp_path}/dnd"
    start("code_model.py", "text_image384_dnd", options, monkeypatch)
    generator, decoder = Generator.load(tmp_path / "dnd"), Decoder.load(tmp_path / "tokenizer")
    codes, _ = generator.sample(np.zeros(2, int))  # temperature 0.1, no guidance, by its config
    images = decoder(codes)
    assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all()
