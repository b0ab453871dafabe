"""Pictures of text, rendered on demand: the Text-Image set of the DnD-Transformer paper.

The recipe of arXiv:2410.01912, section 4.1 (512x512 pages of at most 100 words, size 32, margin
20), whose data were never released, is the default of `TextImageConfig`. `WordImageConfig` is the
small analogue: one short word on a cell grid of 16x32 pixels, which `evals.glyphs.GlyphReader`
reads exactly. `RenderedText` serves both as a random-access source.
"""

from __future__ import annotations

import codecs
import io
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxllm.errors import InputError
from jaxllm.evals.glyphs import WHITE, GlyphGrid, font_characters, load_font

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TextImageConfig:
    """A square white page of black text; the defaults are the paper's.

    Attributes:
      size: height and width in pixels.
      font: TrueType file, or the name of a font shipped with matplotlib.
      font_size: pixels per em, which is what Pillow's font size means.
      margin: white pixels on every side.
      max_words: words of a page at most; fewer are visible if the page is full before.
      line_spacing: pixels between the lines, on top of the font's ascent and descent.
      channels: equal channels of the image.
    """

    size: int = 512
    font: str = "DejaVuSans"
    font_size: int = 32
    margin: int = 20
    max_words: int = 100
    line_spacing: int = 4
    channels: int = 3

    def __post_init__(self) -> None:
        if min(self.max_words, self.channels) < 1 or min(self.margin, self.line_spacing) < 0:
            raise InputError(
                f"max_words, channels, margin, line_spacing are {self.max_words}, {self.channels}, "
                f"{self.margin}, {self.line_spacing}, expected at least 1, 1, 0, 0"
            )
        ascent, descent = load_font(self.font, self.font_size).getmetrics()
        if self.text_width < 1 or ascent + descent > self.text_width:
            raise InputError(
                f"a page of {self.size} pixels with margins of {self.margin} has no room for a "
                f"line of {ascent + descent} pixels"
            )

    @property
    def text_width(self) -> int:
        """Pixels between the margins."""
        return self.size - 2 * self.margin


@dataclass(frozen=True)
class WordImageConfig:
    """One word of at most `grid.columns` letters on a small picture.

    Attributes:
      grid: geometry and font.
      align: "left", or "center" to the nearest whole cell (the left one of two).
      jitter: largest shift of the word in pixels, drawn uniformly for each example and direction;
        at most `grid.slack`, which is 1 for the default grid.
      min_count: a word of a text file enters the vocabulary if it occurs this often.
      channels: equal channels of the image.
    """

    grid: GlyphGrid = field(default_factory=GlyphGrid)
    align: Literal["left", "center"] = "left"
    jitter: int = 0
    min_count: int = 2
    channels: int = 1

    def __post_init__(self) -> None:
        if self.align not in ("left", "center"):
            raise InputError(f"align is {self.align!r}, expected 'left' or 'center'")
        if min(self.min_count, self.channels) < 1:
            raise InputError(
                f"min_count and channels are {self.min_count} and {self.channels}, "
                "expected at least 1 each"
            )
        if not 0 <= self.jitter <= self.grid.slack:
            raise InputError(f"jitter is {self.jitter}, the grid leaves 0 to {self.grid.slack}")


def render_page(words: Sequence[str], config: TextImageConfig) -> tuple[np.ndarray, str]:
    """Renders words as a page, wrapped at the right margin and cut at the bottom margin.

    Args:
      words: words in order; those after the first `max_words` are ignored.
      config: the page.

    Returns:
      Image, uint8 [size, size, channels], and the visible words joined by spaces.

    Raises:
      InputError: a word without a glyph in the font, or wider than the page (see `page_fault`).
    """
    words = words[: config.max_words]
    for word in words:
        fault = page_fault(word, config)
        if fault:
            raise InputError(f"word {word!r}: {fault}")
    font = load_font(config.font, config.font_size)
    ascent, descent = font.getmetrics()
    page = Image.new("L", (config.size, config.size), WHITE)
    draw = ImageDraw.Draw(page)
    visible = []
    baseline = config.margin + ascent
    for line in _wrap(words, font, config.text_width):
        if baseline + descent > config.size - config.margin:
            break
        x = config.margin - min(_ink(font, line)[0], 0)
        draw.text((x, baseline), line, 0, font, anchor="ls")
        visible.append(line)
        baseline += ascent + descent + config.line_spacing
    return _with_channels(np.asarray(page), config.channels), " ".join(visible)


def page_fault(word: str, config: TextImageConfig) -> str | None:
    """Returns why a word cannot be put on a page, or None."""
    missing = set(word) - font_characters(config.font)
    if missing:
        return f"font {config.font!r} has no glyph for {min(missing)!r}"
    left, right = _ink(load_font(config.font, config.font_size), word)
    if right - min(left, 0) > config.text_width:
        return f"{right - min(left, 0)} pixels wide, the page has {config.text_width}"
    return None


def render_word(
    word: str, config: WordImageConfig, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Renders a word, shifted at random if the configuration has jitter and `rng` is given.

    Returns:
      uint8 [height, width, channels].

    Raises:
      InputError: see `GlyphGrid.draw`.
    """
    free = config.grid.columns - len(word)
    column = max(free // 2, 0) if config.align == "center" else 0
    right, down = (0, 0)
    if config.jitter and rng is not None:
        right, down = rng.integers(-config.jitter, config.jitter, size=2, endpoint=True).tolist()
    image = config.grid.draw(word, column=column, shift=(right, down))
    return _with_channels(image, config.channels)


def word_fault(word: str, config: WordImageConfig) -> str | None:
    """Returns why a word cannot be put on a word picture, or None."""
    if not word or any(map(str.isspace, word)):
        return "empty or with white space"
    try:
        config.grid.draw(word)
    except InputError as error:
        return str(error)
    return None


def _ink(font: ImageFont.FreeTypeFont, line: str) -> tuple[int, int]:
    """First and last column of a line's ink, relative to the pen's start."""
    left, _, right, _ = font.getbbox(line, anchor="ls")
    return int(left), int(right)


def _wrap(words: Sequence[str], font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    line = ""
    for word in words:
        longer = f"{line} {word}" if line else word
        left, right = _ink(font, longer)
        if line and right - min(left, 0) > width:
            yield line
            line = word
        else:
            line = longer
    if line:
        yield line


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    return np.repeat(image[:, :, None], channels, axis=2)


def count_words(path: str | Path, *, max_length: int, min_count: int = 1) -> dict[str, int]:
    """Counts the short words of a UTF-8 text, lower-cased.

    A word is a run of letters; runs that also hold digits, apostrophes or hyphens (`i'll`) are not
    words, rather than two.

    Args:
      path: text file.
      max_length: longest word, in characters.
      min_count: a rarer word is left out.

    Returns:
      Word to count, most frequent first, ties in alphabetical order.

    Raises:
      InputError: the file is missing, is not UTF-8, or has no such word.
    """
    counts: Counter[str] = Counter()
    with _open(path) as file:
        for line, _ in _lines(file, str(path)):
            runs = re.findall(r"\w+(?:['’-]\w+)*", line.decode().lower())
            counts.update(run for run in runs if run.isalpha() and len(run) <= max_length)
    kept = {word: n for word, n in counts.items() if n >= min_count}
    if not kept:
        raise InputError(
            f"{path}: no word of at most {max_length} letters occurs {min_count} times or more"
        )
    return dict(sorted(kept.items(), key=lambda item: (-item[1], item[0])))


def _open(path: str | Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot read the text file ({error.strerror})") from error


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[bytes, int]]:
    """Yields the lines of a UTF-8 file, without a byte order mark, with their byte offsets."""
    position = 0
    for number, line in enumerate(file, start=1):
        start = position
        position += len(line)
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            start += len(codecs.BOM_UTF8)
            line = line[len(codecs.BOM_UTF8) :]
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name} line {number}: not UTF-8 ({error.reason})") from error
        yield line, start


class _Pages(Sequence[list[str]]):
    """The words of a text in consecutive pages, held as byte offsets so that any size will do."""

    def __init__(self, source: str | Path | Sequence[str], config: TextImageConfig, skip: bool):
        self.skipped: Counter[str] = Counter()
        self._path = Path(source) if isinstance(source, str | Path) else None
        self._words = b"" if isinstance(source, str | Path) else "\n".join(source).encode()
        name = str(source) if self._path else "the words"
        faults: dict[str, str | None] = {}
        offsets, words, end = [], 0, 0
        with self._file() as file:
            for number, (line, start) in enumerate(_lines(file, name), start=1):
                for match in re.finditer(rb"\S+", line):
                    word = match[0].decode()
                    if word not in faults:
                        faults[word] = page_fault(word, config)
                    if faults[word]:
                        _refuse(f"{name} line {number}", word, faults[word], skip)
                        self.skipped[word] += 1
                        continue
                    if words % config.max_words == 0:
                        offsets.append(start + match.start())
                    words += 1
                    end = start + match.end()
        if not offsets:
            raise InputError(f"{name}: no text to render ({self.skipped.total()} words skipped)")
        self._offsets = np.array([*offsets, end], np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        start, stop = self._offsets[index : index + 2].tolist()
        with self._file() as file:
            file.seek(start)
            words = file.read(stop - start).split()
        return [word for word in map(bytes.decode, words) if word not in self.skipped]

    def _file(self) -> BinaryIO:
        return _open(self._path) if self._path else io.BytesIO(self._words)


def _refuse(name: str, word: str, fault: str | None, skip: bool) -> None:
    if not skip:
        raise InputError(f"{name}: word {word!r}: {fault}")


def _vocabulary(
    source: str | Path | Sequence[str] | Mapping[str, int], config: WordImageConfig, skip: bool
) -> tuple[dict[str, int], Counter[str]]:
    """Returns the renderable words with their counts, and the skipped ones."""
    counts: Mapping[str, int]
    if isinstance(source, str | Path):
        name = str(source)
        counts = count_words(source, max_length=config.grid.columns, min_count=config.min_count)
    else:
        name = "the words"
        counts = source if isinstance(source, Mapping) else Counter(source)
    kept, skipped = {}, Counter[str]()
    for word, count in counts.items():
        if count < 1:
            raise InputError(f"{name}: word {word!r} has count {count}, expected at least 1")
        fault = word_fault(word, config)
        if fault:
            _refuse(name, word, fault, skip)
            skipped[word] += count
        else:
            kept[word] = count
    if not kept:
        raise InputError(f"{name}: no word to render ({len(skipped)} skipped)")
    return kept, skipped


class RenderedText:
    """Random-access source of text pictures: `{"image": uint8 [H, W, channels], "text": str}`.

    An example is a function of the arguments and its index alone, so the source can be read in any
    order, by any number of processes, and pickled. It is what `grain.MapDataset.source` asks for.

    Args:
      config: `TextImageConfig` for pages, `WordImageConfig` for single words.
      source: path of a UTF-8 text file, a sequence of words, or (word pictures only) a mapping from
        word to count. A page holds `max_words` consecutive words.
      split: "train", "validation" or "test".
      split_by: "text" gives every word (every page of the text) to exactly one split; "seed" lets
        all splits use all texts and differ in the random numbers of `sampling` and jitter only.
      fractions: shares of the texts of the three splits under `split_by="text"`.
      sampling: "each" goes through the split's texts in order, again and again; "frequency" draws
        a text for each index, words in proportion to their counts and pages uniformly.
      num_examples: length; by default the number of texts of the split.
      seed: of the drawn texts and the jitter; it does not move texts between splits.
      split_seed: of the assignment of texts to splits.
      on_bad_word: what a word without a glyph in the font, or too wide, does: "raise", or "skip",
        which leaves it out and counts it in `skipped`. Words of a text file that `count_words`
        does not take up (too long, too rare, with digits) are not part of the vocabulary and are
        not counted.

    Attributes:
      skipped: skipped words with their number of occurrences.
      texts: number of texts (words, or pages) of the split.

    Raises:
      InputError: a bad argument; a missing, undecodable or empty text or font; a bad word under
        "raise"; a split without texts; splits that would be identical.
    """

    def __init__(
        self,
        config: TextImageConfig | WordImageConfig,
        source: str | Path | Sequence[str] | Mapping[str, int],
        *,
        split: Literal["train", "validation", "test"] = "train",
        split_by: Literal["text", "seed"] = "text",
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        sampling: Literal["each", "frequency"] = "each",
        num_examples: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
        on_bad_word: Literal["raise", "skip"] = "raise",
    ):
        for key, value, allowed in (
            ("split", split, SPLITS),
            ("split_by", split_by, ("text", "seed")),
            ("sampling", sampling, ("each", "frequency")),
            ("on_bad_word", on_bad_word, ("raise", "skip")),
        ):
            if value not in allowed:
                raise InputError(f"{key} is {value!r}, expected one of {', '.join(allowed)}")
        if min(seed, split_seed) < 0:
            raise InputError(f"seed and split_seed are {seed}, {split_seed}, expected at least 0")
        self.config = config
        self._sampling = sampling
        self._stream = (seed, SPLITS.index(split))
        self._all_texts: Sequence[Any]
        if isinstance(config, TextImageConfig):
            if isinstance(source, Mapping):
                raise InputError("pages are made from a text file or words in order, not counts")
            self._all_texts = pages = _Pages(source, config, on_bad_word == "skip")
            self.skipped, weights = pages.skipped, np.ones(len(pages), np.int64)
        else:
            counts, self.skipped = _vocabulary(source, config, on_bad_word == "skip")
            self._all_texts, weights = list(counts), np.array(list(counts.values()), np.int64)
        if split_by == "text":
            self._indices = _split(len(self._all_texts), split, fractions, split_seed)
        else:
            jitter = isinstance(config, WordImageConfig) and config.jitter
            if sampling == "each" and not jitter:
                raise InputError(
                    "split_by='seed' needs sampling='frequency' or jitter, or all splits are equal"
                )
            self._indices = np.arange(len(self._all_texts))
        self._cumulative = np.cumsum(weights[self._indices])
        self.texts = len(self._indices)
        self._length = self.texts if num_examples is None else num_examples
        if self._length < 1:
            raise InputError(f"num_examples is {num_examples}, expected at least 1")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        rng = np.random.default_rng([*self._stream, index])
        if self._sampling == "each":
            k = index % self.texts
        else:
            draw = rng.integers(self._cumulative[-1])
            k = int(np.searchsorted(self._cumulative, draw, side="right"))
        text = self._all_texts[int(self._indices[k])]
        if isinstance(self.config, TextImageConfig):
            image, text = render_page(text, self.config)
        else:
            image = render_word(text, self.config, rng)
        return {"image": image, "text": text}


def _split(size: int, split: str, fractions: tuple[float, float, float], seed: int) -> np.ndarray:
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError(f"fractions are {fractions}, expected three shares that sum to 1")
    bounds = np.rint(np.cumsum([0.0, *fractions]) * size).astype(int)
    part = SPLITS.index(split)
    chosen = np.random.default_rng(seed).permutation(size)[bounds[part] : bounds[part + 1]]
    if not len(chosen):
        raise InputError(f"the {split} split has none of the {size} texts, fractions {fractions}")
    return np.sort(chosen)
