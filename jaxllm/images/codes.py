"""Code caches: what a tokenizer makes of a data set, in packed uint16 shards.

A cache folder holds `meta.json` and pairs `codes-00000.npy` [n, crops, cells, C] and
`labels-00000.npy` [n]. The crop axis keeps the paper's ten crops (five crops, each mirrored too) of
every image, one of which is drawn per visit; d = 2 of ImageNet is 13 GB instead of the 52 GB of one
int64 file an image. Index 0 is the centre crop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxllm.data.images import (
    ImageDataConfig,
    ImageSource,
    Subset,
    balance,
    crop_scaled,
    normalise,
    open_images,
    pad_shifted,
)
from jaxllm.data.pipeline import Example, padded_batches
from jaxllm.decoding.sampling import check_range
from jaxllm.errors import InputError
from jaxllm.models.image_tokenizer import ImageTokenizer
from jaxllm.nn.module import Blueprint
from jaxllm.training.run_folder import read_json, to_plain, write_json

SHARD = 16384
_META = {"images", "shards", "shard_size", "crops", "grid", "depth", "codebook_size", "class_names"}
Crops = Literal["one", "flip", "ten"]


@dataclass(frozen=True)
class CodeSource:
    """A code cache opened for random access; codes are memory-mapped."""

    meta: dict[str, Any]
    shards: tuple[np.ndarray, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        shard, row = divmod(index, self.meta["shard_size"])
        return {"codes": self.shards[shard][row], "label": np.int32(self.labels[index])}

    def balanced(self, share: float) -> Subset:
        """Returns the codes with those of rare classes repeated (see `balance`)."""
        rows = [np.flatnonzero(self.labels == i) for i in range(len(self.class_names))]
        return Subset(self, balance([part for part in rows if len(part)], share))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes."""
        return self.meta["class_names"]

    @property
    def codebook(self) -> np.ndarray | None:
        """The tokenizer's vectors [C, K, E], where the quantizer has them."""
        return self.meta.get("codebook_array")

    def first_crops(self) -> dict[str, np.ndarray]:
        """Returns all centre crops: {"codes": int32 [n, cells, C], "label": int32 [n]}."""
        codes = np.concatenate([shard[:, 0] for shard in self.shards]).astype(np.int32)
        return {"codes": codes, "label": self.labels.astype(np.int32)}


@dataclass(frozen=True)
class DrawCrop:
    """Takes one crop of an example's codes: at random in training, else the first."""

    random: bool

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns {"codes": int32 [cells, C], "label": int32}."""
        crops = example["codes"]
        crop = rng.integers(len(crops)) if self.random else 0
        return {"codes": crops[crop].astype(np.int32), "label": example["label"]}


def open_codes(folder: Path) -> CodeSource:
    """Opens one split of a code cache; InputError names what is missing, torn or out of range."""
    meta = read_json(folder / "meta.json")
    missing = _META - set(meta if isinstance(meta, dict) else ())
    if missing:
        raise InputError(f"{folder}/meta.json: has no {min(missing)!r}")
    shards, labels = [], []
    shape = (meta["crops"], meta["grid"][0] * meta["grid"][1], meta["depth"])
    for number in range(meta["shards"]):
        rows = min(meta["shard_size"], meta["images"] - number * meta["shard_size"])
        shards.append(_read_array(folder / f"codes-{number:05d}.npy", (rows, *shape)))
        labels.append(_read_array(folder / f"labels-{number:05d}.npy", (rows,)))
    everything = np.concatenate(labels) if labels else np.zeros(0, np.int32)
    for number, shard in enumerate(shards):
        if len(shard) and int(shard.max()) >= meta["codebook_size"]:
            row = int(np.argmax(shard.reshape(len(shard), -1).max(axis=1)))
            raise InputError(
                f"{folder}/codes-{number:05d}.npy: image {row} holds code {int(shard.max())}, "
                f"outside the codebook of {meta['codebook_size']}"
            )
    if len(everything) != meta["images"]:
        raise InputError(f"{folder}: {len(everything)} images, meta.json says {meta['images']}")
    check_range(f"{folder}: label", np.asarray(everything), len(meta["class_names"]))
    codebook = folder / "codebook.npy"
    if codebook.exists():
        meta = {**meta, "codebook_array": _read_array(codebook)}
    return CodeSource(meta, tuple(shards), everything)


def _read_array(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not a readable array ({error})") from None
    if shape is not None and array.shape != shape:
        raise InputError(f"{path}: shape {array.shape}, expected {shape}")
    return array


def crops_of(
    image: np.ndarray, config: ImageDataConfig, mode: Crops, margin: float = 1.1
) -> np.ndarray:
    """Returns the crops of one uint8 image, [crops, H, W, channels].

    `one` is the centre crop, `flip` adds its mirror image. `ten` is the paper's: four corners and
    the centre of an image scaled to 1.1 times the size, and their mirror images; the centre comes
    first. Images that are padded instead of cropped are moved by `jitter` pixels in place of the
    corners.
    """
    height, width = config.image_size
    if config.resize == "crop":
        scale = margin if mode == "ten" else 1.0
        large = crop_scaled(image, round(height * scale), round(width * scale), None)
        free = large.shape[0] - height, large.shape[1] - width
        corners = [(free[0] // 2, free[1] // 2)]
        if mode == "ten":
            corners += [(top, left) for top in (0, free[0]) for left in (0, free[1])]
        crops = [large[top : top + height, left : left + width] for top, left in corners]
    else:
        step = config.jitter
        shifts = [(0, 0)]
        if mode == "ten":
            shifts += [(top, left) for top in (-step, step) for left in (-step, step)]
        crops = [pad_shifted(image, height, width, shift) for shift in shifts]
    if mode != "one":
        crops += [crop[:, ::-1] for crop in crops]
    return np.stack(crops)


def encode_images(
    tokenizer: Blueprint[ImageTokenizer], params: Any, extra: Any, images: np.ndarray
) -> np.ndarray:
    """Returns the codes int32 [n, cells, C] of prepared images float32 [n, H, W, channels]."""
    return np.asarray(_encode(tokenizer, params, extra, images))


@partial(jax.jit, static_argnums=0)
def _encode(
    tokenizer: Blueprint[ImageTokenizer], params: Any, extra: Any, images: jax.Array
) -> jax.Array:
    return tokenizer.build(params, extra).to_codes(images)


def extract_codes(
    tokenizer: Blueprint[ImageTokenizer],
    params: Any,
    extra: Any,
    data: ImageDataConfig,
    split: Literal["train", "validation", "test"],
    folder: Path,
    *,
    crops: Crops = "ten",
    batch_size: int = 64,
    tokenizer_run: Path | None = None,
) -> CodeSource:
    """Writes the code cache of one split and opens it.

    Args:
      tokenizer: Blueprint.
      params: Tokenizer parameters.
      extra: Its buffers.
      data: The images; rare classes are stored once, they are repeated when codes are drawn.
      split: Which of them.
      folder: Where the cache goes.
      crops: How many views of each image are stored, see `crops_of`.
      batch_size: Images encoded at once.
      tokenizer_run: Its run folder, remembered so that samples can be decoded later.
    """
    model = tokenizer.build(params, extra)
    quantizer = model.config.quantizer
    if quantizer.size > 2**16:
        raise InputError(f"codes of a codebook of {quantizer.size} do not fit uint16")
    source = open_images(dataclasses.replace(data, balance=0.0), split)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # Written last: its presence means whole.
    shards = range(0, len(source), SHARD)
    for number, start in enumerate(shards):
        parts, labels = [], []
        for rows in _in_batches(source, start, batch_size):
            images = np.stack([crops_of(row["image"], data, crops) for row in rows])
            flat = {"image": images.reshape(-1, *images.shape[2:])}
            codes = [
                encode_images(tokenizer, params, extra, normalise(batch["image"]))[:real]
                for batch, real in padded_batches(flat, batch_size)
            ]
            packed = np.concatenate(codes).astype(np.uint16)
            parts.append(packed.reshape(*images.shape[:2], *packed.shape[1:]))
            labels += [row["label"] for row in rows]
        np.save(folder / f"codes-{number:05d}.npy", np.concatenate(parts))
        np.save(folder / f"labels-{number:05d}.npy", np.asarray(labels, np.int32))
    if hasattr(quantizer, "codebook"):
        np.save(folder / "codebook.npy", np.asarray(quantizer.codebook(*model.quantizer_parts())))
    write_json(
        folder / "meta.json",
        {
            "split": split,
            "images": len(source),
            "shards": len(shards),
            "shard_size": SHARD,
            "crops": {"one": 1, "flip": 2, "ten": 10}[crops],
            "grid": list(model.config.grid),
            "depth": quantizer.depth,
            "codebook_size": quantizer.size,
            "class_names": list(source.class_names),
            "made_from": origin(params, extra, data, crops),
            "tokenizer": None if tokenizer_run is None else os.path.relpath(tokenizer_run, folder),
        },
    )
    return open_codes(folder)


def origin(params: Any, extra: Any, data: ImageDataConfig, crops: Crops) -> dict[str, Any]:
    """Returns what the codes of a split depend on, as JSON values; the tokenizer by its SHA-256."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path((params, extra)):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    read = {k: v for k, v in to_plain(data).items() if k not in ("batch_size", "balance", "flip")}
    return {"tokenizer": digest.hexdigest(), "data": read, "crops": crops}


def _in_batches(source: ImageSource, start: int, batch_size: int) -> Iterator[list[Example]]:
    # Pixels of one batch at a time: ten crops of a shard of ImageNet would be 32 GB.
    stop = min(len(source), start + SHARD)
    for first in range(start, stop, batch_size):
        yield [source[i] for i in range(first, min(stop, first + batch_size))]
