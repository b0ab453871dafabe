"""Image sources: bundled samples, a folder per class, JSONL, TFDS. All give the same examples.

An example is {"image": uint8 [H, W, channels], "label": int}. Sources are read lazily where the
data is on disk and are random access, so the pipeline can start at any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from jaxllm.data.pipeline import Example
from jaxllm.data.records import read_jsonl
from jaxllm.data.rendered_text import RenderedText, TextImageConfig, WordImageConfig
from jaxllm.errors import InputError

Split = Literal["train", "validation", "test"]

FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
QUICKDRAW_CLASSES = ("cat", "rainbow", "train")
# What Pillow raises for files that are no images, damaged, or absurdly large.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"}
# Fractions of each class for validation and test; the rest is for training.
_HELD_OUT = {"validation": 0.1, "test": 0.2}


class ImageSource(Protocol):
    """A labelled image data set."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, in label order."""
        ...

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def __getitem__(self, index: int, /) -> Example:
        """Returns {"image": uint8 [H, W, channels], "label": int}."""
        ...


@dataclass(frozen=True)
class ImageDataConfig:
    """Which images, at which size, and how they are varied in training."""

    source: Literal[
        "fashion", "quickdraw", "fashion+quickdraw", "words", "pages", "folder", "jsonl", "tfds"
    ] = "fashion+quickdraw"
    folder: str | None = None
    """A folder with one sub-folder per class; setting it chooses the source `folder`."""
    jsonl: str | None = None
    """A JSONL file of {"image": path, "label": int or name}; setting it chooses `jsonl`."""
    tfds: str = "imagenet2012"
    """Name of the TFDS data set for the source `tfds`, prepared as array_record."""
    tfds_dir: str | None = None
    text_file: str | None = None
    """UTF-8 text that `words` and `pages` render; None for the bundled Shakespeare."""
    words: WordImageConfig = field(default_factory=WordImageConfig)
    """Layout of the source `words`: one short word per image."""
    pages: TextImageConfig = field(default_factory=TextImageConfig)
    """Layout of the source `pages`: the paper's Text-Image recipe."""
    image_size: tuple[int, int] = (32, 32)
    channels: int = 1
    resize: Literal["pad", "crop"] = "pad"
    """`pad` centres images of one size on black; `crop` scales the shorter side and crops."""
    flip: bool = True
    """Mirror half of the training images."""
    jitter: int = 1
    """Largest shift in pixels of padded training images."""
    balance: float = 1.0
    """How far classes of unequal size are evened out, between 0, which draws every image equally
    often, and 1, every class: a class of n images is drawn in proportion to n^(1 - balance) (not
    for `tfds`, whose labels are not read beforehand)."""
    unconditional: bool = False
    """Give every image the label 0."""
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_balance(self.balance)

    @property
    def resolved_source(self) -> str:
        """The source after `folder` and `jsonl` have had their say."""
        if self.folder is not None and self.jsonl is not None:
            raise InputError("data.folder and data.jsonl are both set; choose one")
        return "folder" if self.folder else "jsonl" if self.jsonl else self.source


@dataclass(frozen=True)
class ImageArrays:
    """Images held in memory."""

    images: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}


@dataclass(frozen=True)
class ImageFiles:
    """Images read from disk when asked for."""

    paths: Sequence[Path]
    labels: Sequence[int]
    class_names: Sequence[str]
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        return {"image": read_image(self.paths[index], self.channels), "label": self.labels[index]}


@dataclass(frozen=True)
class Subset:
    """Some rows of a source, repeats allowed."""

    source: ImageSource
    rows: np.ndarray
    unconditional: bool = False

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, or the one name of unconditional training."""
        return ("image",) if self.unconditional else self.source.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        example = self.source[int(self.rows[index])]
        return {**example, "label": 0} if self.unconditional else example


def open_images(config: ImageDataConfig, split: Split) -> ImageSource:
    """Returns the images of one split.

    Bundled images, folders and JSONL files without splits of their own are cut per class, by a
    permutation that depends on nothing but the class size: 70 % train, 10 % validation, 20 % test.
    A folder that has sub-folders named train and validation or test is used as it is; a held-out
    split that it lacks is the other one.
    """
    kind = config.resolved_source
    if kind in ("words", "pages"):
        return rendered(config, split)
    if kind == "tfds":
        return _tfds(config, split)
    if kind == "folder":
        return _open_folder(config, split)
    if kind == "jsonl":
        return _finish(config, split, read_jsonl_images(Path(config.jsonl or ""), config))
    parts = [_BUNDLED[name]() for name in kind.split("+")]
    return _finish(config, split, _concatenate(parts))


def _open_folder(config: ImageDataConfig, split: Split) -> ImageSource:
    root = Path(config.folder or "")
    held = [name for name in ("validation", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not held:
        return _finish(config, split, read_folder(root, config))
    part = root / (split if split == "train" or split in held else held[0])
    source = read_folder(part, config)
    wanted = [path.name for path in _class_folders(root / "train")]
    for name in sorted({*wanted, *source.class_names}):
        if name not in wanted or name not in source.class_names:
            raise InputError(f"{root}: class {name!r} is in only one of train and {part.name}")
    return _finish(config, split, source, cut=False)


@dataclass(frozen=True)
class RenderedImages:
    """Rendered text as images of one class; the text stays in each example under "text"."""

    source: RenderedText
    class_names: Sequence[str] = ("text",)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return {**self.source[index], "label": 0}


def rendered(config: ImageDataConfig, split: Split) -> RenderedImages:
    """Returns the rendered words or pages of one split; no word or page is in two splits.

    Words are drawn by their frequency in the text, pages in order.
    """
    words = config.resolved_source == "words"
    layout = config.words if words else config.pages
    path = config.text_file or bundled("text", "tinyshakespeare.txt")
    source = RenderedText(layout, path, split=split, on_bad_word="skip")
    if words and split == "train":
        source = RenderedText(
            layout,
            path,
            split=split,
            sampling="frequency",
            num_examples=8 * source.texts,
            on_bad_word="skip",
        )
    return RenderedImages(source)


def _finish(
    config: ImageDataConfig, split: Split, source: ImageSource, *, cut: bool = True
) -> ImageSource:
    labels = np.asarray(source.labels)  # type: ignore[attr-defined]
    names = source.class_names
    if len(names) < 2 and not config.unconditional:
        raise InputError(
            f"{config.folder or config.jsonl}: has one class, {names[0]!r}; a class-conditional "
            "model needs two or more (or set --data.unconditional True)"
        )
    rows = []
    for label in range(len(names)):
        mine = np.flatnonzero(labels == label)
        rows.append(_rows_of_split(mine, split) if cut else mine)
        if not len(rows[-1]):
            raise InputError(
                f"{config.folder or config.jsonl}: class {names[label]!r} has {len(mine)} images, "
                f"too few for {split}"
            )
    chosen = balance(rows, config.balance if split == "train" else 0.0)
    return Subset(source, chosen, config.unconditional)


def check_balance(share: float) -> None:
    """Raises InputError unless `share` is between 0 and 1."""
    if not 0 <= share <= 1:
        raise InputError(f"data.balance {share} must be between 0 (by image) and 1 (by class)")


def balance(rows: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Returns the rows of all classes, those of rarer ones repeated.

    Args:
      rows: Row numbers of each class; n of the largest.
      share: A class of m rows is repeated to `m (n / m)^share`: 0 not at all, 1 up to n.
    """
    most = max(len(part) for part in rows)
    sizes = [round(len(part) * (most / len(part)) ** share) for part in rows]
    return np.concatenate([np.resize(part, size) for part, size in zip(rows, sizes, strict=True)])


def _rows_of_split(rows: np.ndarray, split: Split) -> np.ndarray:
    order = np.random.default_rng(len(rows)).permutation(rows)
    test = round(_HELD_OUT["test"] * len(rows))
    validation = round(_HELD_OUT["validation"] * len(rows))
    cuts = {
        "test": order[:test],
        "validation": order[test : test + validation],
        "train": order[test + validation :],
    }
    return cuts[split]


# -- bundled images ------------------------------------------------------------------------------


def bundled(*parts: str) -> Path:
    """Returns the path of a file that ships with the package."""
    return Path(str(resources.files("jaxllm").joinpath("data", "bundled", *parts)))


def fashion() -> ImageArrays:
    """The 900 Fashion-MNIST images of the authors' sprite: 30 x 30 tiles, class = tile row // 3."""
    sheet = np.asarray(Image.open(bundled("fashion_mnist_sprite", "fashion-mnist-sprite.png")))
    tiles = sheet[..., 0].reshape(30, 28, 30, 28).transpose(0, 2, 1, 3).reshape(900, 28, 28, 1)
    return ImageArrays(tiles, np.arange(900) // 90, FASHION_CLASSES)


def quickdraw() -> ImageArrays:
    """3,000 QuickDraw drawings of cats, rainbows and trains, strokes bright on black."""
    parts = [
        np.fromfile(bundled("quickdraw3", f"{name}1000.bin"), np.uint8).reshape(1000, 28, 28, 1)
        for name in ("cats", "rainbows", "trains")
    ]
    return ImageArrays(np.concatenate(parts), np.arange(3000) // 1000, QUICKDRAW_CLASSES)


_BUNDLED = {"fashion": fashion, "quickdraw": quickdraw}


def _concatenate(parts: Sequence[ImageArrays]) -> ImageArrays:
    offsets = np.cumsum([0, *(len(part.class_names) for part in parts)])
    labels = [part.labels + offset for part, offset in zip(parts, offsets, strict=False)]
    names = [name for part in parts for name in part.class_names]
    images = np.concatenate([part.images for part in parts])
    return ImageArrays(images, np.concatenate(labels), names)


# -- the user's own images -----------------------------------------------------------------------


def read_image(path: Path, channels: int) -> np.ndarray:
    """Returns one image as uint8 [H, W, channels]; InputError names an unreadable file."""
    try:
        with Image.open(path) as image:
            array = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable image ({error})") from None
    return array if channels == 3 else array[..., None]


def read_folder(root: Path, config: ImageDataConfig) -> ImageFiles:
    """Opens a folder with one sub-folder per class, checking every file's header.

    Raises:
      InputError: No such folder, no images, an unreadable image, or mixed sizes where `resize` is
        `pad`.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected one sub-folder of images per class")
    classes = _class_folders(root)
    paths, labels = [], []
    for label, folder in enumerate(classes):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise InputError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise InputError(f"{root}: holds no sub-folders; expected one per class")
    _check_files(paths, config)
    return ImageFiles(paths, labels, [path.name for path in classes], config.channels)


def _class_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def read_jsonl_images(path: Path, config: ImageDataConfig) -> ImageFiles:
    """Opens a JSONL file of {"image": path relative to the file, "label": int or name}."""
    paths: list[Path] = []
    raw: list[int | str] = []
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        where = f"{path}: record {number}"
        image, label = row.get("image"), row.get("label")
        if not isinstance(image, str) or label is None:
            raise InputError(f'{where}: expected {{"image": path, "label": int or name}}')
        if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
            raise InputError(f"{where}: label {label!r} is neither a name nor an int")
        if isinstance(label, int) and not 0 <= label < len(rows):
            raise InputError(f"{where}: label {label} is outside 0 .. {len(rows) - 1}")
        if not (path.parent / image).is_file():
            raise InputError(f"{where}: image {path.parent / image}: no such file")
        paths.append(path.parent / image)
        raw.append(label)
    if all(isinstance(label, int) for label in raw):
        names = [str(i) for i in range(max(int(label) for label in raw) + 1)]
        labels = [int(label) for label in raw]
    else:
        names = sorted({str(label) for label in raw})
        numbers = {name: i for i, name in enumerate(names)}
        labels = [numbers[str(label)] for label in raw]
    _check_files(paths, config)
    return ImageFiles(paths, labels, names, config.channels)


def _check_files(paths: Sequence[Path], config: ImageDataConfig) -> None:
    first: tuple[Path, tuple[int, int]] | None = None
    for path in paths:
        try:
            with Image.open(path) as image:
                size = image.size
                image.verify()
        except _UNREADABLE as error:
            raise InputError(f"{path}: not a readable image ({error})") from None
        first = first or (path, size)
        if config.resize == "pad" and size != first[1]:
            raise InputError(
                f"{path}: {size[0]}x{size[1]} pixels, but {first[0]} has "
                f"{first[1][0]}x{first[1][1]}; give images of one size or --data.resize crop"
            )


class _Tfds:
    def __init__(self, data: Any, names: Sequence[str]):
        self._data, self.class_names = data, names

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        record = self._data[index]
        image = np.asarray(record["image"])
        return {
            "image": image if image.ndim == 3 else image[..., None],
            "label": int(record["label"]),
        }


def _tfds(config: ImageDataConfig, split: Split) -> ImageSource:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(
            config.tfds, data_dir=config.tfds_dir, file_format=tfds.core.FileFormat.ARRAY_RECORD
        )
        names = builder.info.features["label"].names
        held = "validation" if "validation" in builder.info.splits else "test"
        data = builder.as_data_source(split="train" if split == "train" else held)
    except Exception as error:  # TFDS raises many types; each means "not prepared here".
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"TFDS data set {config.tfds!r} is not available as array_record in "
            f"{config.tfds_dir or 'the default folder'}: {reason}"
        ) from None
    source = _Tfds(data, names)
    return Subset(source, np.arange(len(source)), True) if config.unconditional else source


# -- transforms ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareImage:
    """uint8 image to float32 in [-1, 1] at the configured size; random only when `train`."""

    config: ImageDataConfig
    train: bool

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns {"image": float32 [H, W, channels], "label": int32}."""
        config, image = self.config, _channels(example["image"], self.config.channels)
        height, width = config.image_size
        if config.resize == "crop":
            image = crop_scaled(image, height, width, rng if self.train else None)
        else:
            free = height - image.shape[0], width - image.shape[1]
            if min(free) < 0:
                raise InputError(
                    f"image of {image.shape[1]}x{image.shape[0]} does not fit "
                    f"{width}x{height}; set --data.image-size or --data.resize crop"
                )
            shift = rng.integers(-config.jitter, config.jitter + 1, 2) if self.train else (0, 0)
            image = pad_shifted(image, height, width, (int(shift[0]), int(shift[1])))
        if self.train and config.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return {"image": normalise(image), "label": np.int32(example["label"])}


def normalise(image: np.ndarray) -> np.ndarray:
    """Maps uint8 to float32 in [-1, 1]."""
    return np.ascontiguousarray(image, np.float32) / 127.5 - 1.0


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Maps [-1, 1] to uint8, rounding to nearest (truncation would darken by half a level)."""
    return np.clip(np.rint((np.asarray(image, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def pad_shifted(
    image: np.ndarray, height: int, width: int, shift: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Centres `image` on a black [height, width] canvas, moved by `shift` as far as it fits."""
    out = np.zeros((height, width, image.shape[2]), image.dtype)
    free = height - image.shape[0], width - image.shape[1]
    top, left = (int(np.clip(f // 2 + s, 0, f)) for f, s in zip(free, shift, strict=True))
    out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out


def crop_scaled(
    image: np.ndarray, height: int, width: int, rng: np.random.Generator | None
) -> np.ndarray:
    """Scales so that the target just fits, then crops at random, or centrally without `rng`."""
    scale = max(height / image.shape[0], width / image.shape[1])
    size = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    scaled = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    scaled = scaled if scaled.ndim == 3 else scaled[..., None]
    free = scaled.shape[0] - height, scaled.shape[1] - width
    top, left = (rng.integers(0, f + 1) if rng else f // 2 for f in free)
    return scaled[top : top + height, left : left + width]


def _channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image[..., :1], 3, axis=2)
    return np.asarray(Image.fromarray(image[..., :3]).convert("L"))[..., None]
