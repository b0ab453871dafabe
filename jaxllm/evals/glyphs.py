"""Words on a fixed cell grid, and the exact template reader that plays OCR for them.

The DnD-Transformer paper (arXiv:2410.01912, section 4.1) reads its text images with a 72B
vision-language model. For small pictures of one monospaced word the same question, "which letters
are visible?", has an exact answer: every glyph sits in a known cell, so the reader renders each
candidate letter with the same font and takes the nearest one. This file holds the fonts, the grid
both sides share, and the reader.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxllm.errors import InputError

WHITE = 255


def font_path(font: str) -> Path:
    """Returns the file of a font.

    Args:
      font: path of a TrueType file, or the name of a font that matplotlib ships, such as
        `DejaVuSans` or `DejaVuSansMono`.

    Raises:
      InputError: neither a file nor a shipped font.
    """
    if Path(font).is_file():
        return Path(font)
    import matplotlib  # a fifth of a second, only where a shipped font is wanted

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    shipped = {file.stem: file for file in sorted(folder.glob("*.ttf"))}
    if font not in shipped:
        raise InputError(
            f"font {font!r} is neither a file nor a font shipped with matplotlib "
            f"(DejaVuSans, DejaVuSansMono, ...; see {folder})"
        )
    return shipped[font]


@functools.lru_cache(maxsize=32)
def load_font(font: str, size: int) -> ImageFont.FreeTypeFont:
    """Loads a font at `size` pixels per em.

    The basic layout engine is used because the other one is present in some Pillow builds only and
    places letters differently; it does not join letters, so Arabic and Indic scripts are drawn as
    separate letters.

    Raises:
      InputError: the font is missing or unreadable, or the size is not positive.
    """
    if size < 1:
        raise InputError(f"font_size is {size}, expected at least 1 pixel")
    path = font_path(font)
    try:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise InputError(f"{path}: not a TrueType font that Pillow can read ({error})") from error


@functools.lru_cache(maxsize=32)
def font_characters(font: str) -> frozenset[str]:
    """Returns the characters for which the font has a glyph of its own.

    Raises:
      InputError: the font is missing or unreadable.
    """
    from matplotlib.ft2font import FT2Font

    path = font_path(font)
    try:
        return frozenset(map(chr, FT2Font(str(path)).get_charmap()))
    except RuntimeError as error:
        raise InputError(f"{path}: not a TrueType font ({error})") from error


@dataclass(frozen=True)
class GlyphGrid:
    """A picture with one row of equal character cells in its middle.

    The default is the smallest combination in which DejaVu Sans Mono stays readable with five
    letters. With the same font, 16x48 pixels take six letters at `font_size=11, cell_width=7`, and
    at 16x32 four letters fit at `font_size=11, cell_width=7`, six at `font_size=8, cell_width=5`.

    Attributes:
      font: monospaced TrueType file, or the name of a font shipped with matplotlib.
      font_size: pixels per em.
      height: picture height in pixels; a multiple of the tokenizer's patch.
      width: picture width in pixels; a multiple of the tokenizer's patch.
      columns: number of cells, that is, the longest word.
      cell_width: pixels, the advance of the font.
      cell_height: pixels.
      baseline: rows of a cell above the baseline.
    """

    font: str = "DejaVuSansMono"
    font_size: int = 10
    height: int = 16
    width: int = 32
    columns: int = 5
    cell_width: int = 6
    cell_height: int = 12
    baseline: int = 9

    def __post_init__(self) -> None:
        if min(self.columns, self.cell_width, self.cell_height) < 1:
            raise InputError(
                f"columns, cell_width, cell_height are {self.columns}, {self.cell_width}, "
                f"{self.cell_height}, expected at least 1 each"
            )
        row = self.columns * self.cell_width
        if row > self.width or self.cell_height > self.height:
            raise InputError(
                f"{self.columns} cells of {self.cell_width}x{self.cell_height} pixels do not fit "
                f"in a picture {self.width} pixels wide and {self.height} high"
            )

    @property
    def left(self) -> int:
        """Pixels left of the first cell."""
        return (self.width - self.columns * self.cell_width) // 2

    @property
    def top(self) -> int:
        """Pixels above the cells."""
        return (self.height - self.cell_height) // 2

    @property
    def slack(self) -> int:
        """Pixels by which the row of cells can move in every direction and stay in the picture."""
        return min(self.left, self.top)

    def cell(self, character: str) -> np.ndarray:
        """Renders one character as black on white, uint8 [cell_height, cell_width]; read-only.

        Raises:
          InputError: the font has no glyph for the character, or its ink leaves the cell.
        """
        return _cell(self, character)

    def draw(self, text: str, *, column: int = 0, shift: tuple[int, int] = (0, 0)) -> np.ndarray:
        """Renders a word, one character per cell.

        Args:
          text: at most `columns - column` characters; a space leaves its cell white.
          column: cell of the first character.
          shift: pixels (right, down) by which the whole row moves, at most `slack` each way.

        Returns:
          uint8 [height, width], black (0) on white (255).

        Raises:
          InputError: the word is too wide, the shift leaves the picture, or see `cell`.
        """
        if column < 0 or column + len(text) > self.columns:
            raise InputError(
                f"{text!r} is too wide: {len(text)} characters from cell {column} on, "
                f"the grid has {self.columns} cells"
            )
        right, down = shift
        if max(abs(right), abs(down)) > self.slack:
            raise InputError(f"shift {shift} leaves the picture, expected at most {self.slack}")
        image = np.full((self.height, self.width), WHITE, np.uint8)
        y = self.top + down
        for i, character in enumerate(text):
            x = self.left + right + (column + i) * self.cell_width
            image[y : y + self.cell_height, x : x + self.cell_width] = self.cell(character)
        return image


@functools.lru_cache(maxsize=8192)
def _cell(grid: GlyphGrid, character: str) -> np.ndarray:
    if character != " " and character not in font_characters(grid.font):
        raise InputError(f"font {grid.font!r} has no glyph for {character!r}")
    pad = 2 * grid.font_size  # room to see ink that leaves the cell
    canvas = Image.new("L", (grid.cell_width + 2 * pad, grid.cell_height + 2 * pad), WHITE)
    font = load_font(grid.font, grid.font_size)
    ImageDraw.Draw(canvas).text((pad, pad + grid.baseline), character, 0, font, anchor="ls")
    pixels = np.array(canvas)
    cell = pixels[pad : pad + grid.cell_height, pad : pad + grid.cell_width].copy()
    if np.sum(WHITE - pixels, dtype=np.int64) != np.sum(WHITE - cell, dtype=np.int64):
        raise InputError(
            f"{character!r} in {grid.font!r} at {grid.font_size} pixels does not fit its cell of "
            f"{grid.cell_width}x{grid.cell_height} pixels with baseline {grid.baseline}"
        )
    cell.flags.writeable = False
    return cell


@dataclass(frozen=True)
class Reading:
    """What the reader saw in one picture.

    Attributes:
      text: the characters, without the blank cells before and after them.
      confidence: one value in [0, 1] per character of `text`: `1 - nearest / second` of the
        distances to the two nearest templates; 1 is an exact match, 0 a tie.
      distance: root-mean-square difference, in units of the black-to-white range, between the
        picture and the drawing of the reading; 0 is an exact match.
    """

    text: str
    confidence: tuple[float, ...]
    distance: float


class GlyphReader:
    """Reads pictures drawn on a `GlyphGrid` by the nearest template of each cell.

    Distances are Euclidean over the pixels of a cell, in units of the black-to-white range, which
    under Gaussian pixel noise makes the nearest template the most likely character. Brightness and
    contrast are deliberately not normalised: ink fainter than half grey is read as blank.

    Args:
      grid: the geometry and font of the pictures.
      alphabet: candidate characters; the blank is added.
      jitter: largest shift of the row in pixels; every shift up to it is tried on each picture and
        the one with the smallest distance over the whole picture is taken.

    Raises:
      InputError: two characters look the same in this font, the alphabet is empty, the jitter
        exceeds `grid.slack`, or see `GlyphGrid.cell`.
    """

    def __init__(
        self, grid: GlyphGrid, alphabet: str = "abcdefghijklmnopqrstuvwxyz", *, jitter: int = 0
    ):
        characters = " " + "".join(dict.fromkeys(alphabet.replace(" ", "")))
        if len(characters) < 2:
            raise InputError("the reader's alphabet is empty, expected at least one character")
        if not 0 <= jitter <= grid.slack:
            raise InputError(f"jitter is {jitter}, the grid leaves 0 to {grid.slack} pixels")
        self.grid = grid
        self.characters = characters
        cells = [grid.cell(character) for character in characters]
        for (a, cell_a), (b, cell_b) in itertools.combinations(
            zip(characters, cells, strict=True), 2
        ):
            if np.array_equal(cell_a, cell_b):
                raise InputError(f"{a!r} and {b!r} look the same in {grid.font!r}")
        self._templates = np.stack(cells).reshape(len(cells), -1).astype(np.float64) / WHITE
        offsets = range(-jitter, jitter + 1)
        # Smallest shift first: argmin keeps the first of equal distances.
        self._shifts = sorted(
            ((right, down) for right in offsets for down in offsets),
            key=lambda shift: abs(shift[0]) + abs(shift[1]),
        )

    def __call__(self, images: np.ndarray) -> list[str]:
        """Returns the text of each picture; arguments and errors as in `read`."""
        return [reading.text for reading in self.read(images)]

    def read(self, images: np.ndarray) -> list[Reading]:
        """Reads a batch.

        Args:
          images: [B, height, width] or [B, height, width, channels] (channels are averaged), uint8
            in 0..255 or floating point with 0 as black and 1 as white; floating-point values may
            leave that range.

        Returns:
          One `Reading` per picture.

        Raises:
          InputError: wrong shape or type, or a value that is not finite.
        """
        pixels = self._pixels(images)
        if not len(pixels):
            return []
        ink_total = np.sum((1 - pixels) ** 2, axis=(1, 2))  # distance to an empty picture
        squared, misfit = [], []
        for shift in self._shifts:
            cells = self._cells(pixels, shift)
            distances = np.maximum(  # [B, columns, characters]
                np.sum(cells**2, -1, keepdims=True)
                - 2 * cells @ self._templates.T
                + np.sum(self._templates**2, -1),
                0,
            )
            squared.append(distances)
            ink_inside = np.sum((1 - cells) ** 2, axis=(1, 2))
            misfit.append(ink_total - ink_inside + np.sum(distances.min(-1), -1))
        # Rounding keeps float64 dust from choosing between shifts that fit equally well.
        best = np.argmin(np.round(misfit, 9), axis=0)
        rows = np.arange(len(pixels))
        chosen = np.sqrt(np.stack(squared)[best, rows])
        rms = np.sqrt(np.maximum(np.stack(misfit)[best, rows], 0) / pixels[0].size)
        nearest = np.argmin(chosen, -1)
        first, second = np.moveaxis(np.partition(chosen, 1, axis=-1)[..., :2], -1, 0)
        confidence = 1 - first / second  # `second` > 0, as no two templates are equal
        return [
            self._reading(*parts) for parts in zip(nearest, confidence, rms.tolist(), strict=True)
        ]

    def _reading(self, nearest: np.ndarray, confidence: np.ndarray, distance: float) -> Reading:
        inked = np.flatnonzero(nearest)
        if not len(inked):
            return Reading("", (), distance)
        span = slice(inked[0], inked[-1] + 1)
        text = "".join(self.characters[k] for k in nearest[span])
        return Reading(text, tuple(confidence[span].tolist()), distance)

    def _cells(self, pixels: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
        grid = self.grid
        x, y = grid.left + shift[0], grid.top + shift[1]
        row = pixels[:, y : y + grid.cell_height, x : x + grid.columns * grid.cell_width]
        cells = row.reshape(len(pixels), grid.cell_height, grid.columns, grid.cell_width)
        return cells.transpose(0, 2, 1, 3).reshape(len(pixels), grid.columns, -1)

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        shape = (self.grid.height, self.grid.width)
        if images.ndim not in (3, 4) or images.shape[1:3] != shape:
            raise InputError(
                f"images have shape {list(images.shape)}, expected [B, {shape[0]}, {shape[1]}] or "
                f"[B, {shape[0]}, {shape[1]}, channels]"
            )
        if images.dtype == np.uint8:
            pixels = images.astype(np.float64) / WHITE
        elif np.issubdtype(images.dtype, np.floating):
            pixels = images.astype(np.float64)
        else:
            raise InputError(f"images have type {images.dtype}, expected uint8 or floating point")
        if not np.isfinite(pixels).all():
            bad = int(np.flatnonzero(~np.isfinite(pixels).reshape(len(pixels), -1).all(1))[0])
            raise InputError(f"image {bad} has a value that is not finite")
        return pixels.mean(-1) if pixels.ndim == 4 else pixels
