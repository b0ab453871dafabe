"""The cell grid and its exact reader."""

import matplotlib
import numpy as np
import pytest

from jaxllm.data.rendered_text import WordImageConfig, count_words, render_word
from jaxllm.errors import InputError
from jaxllm.evals.glyphs import GlyphGrid, GlyphReader, font_characters, font_path, load_font

SHAKESPEARE = "jaxllm/data/bundled/text/tinyshakespeare.txt"
GRIDS = {
    "16x32": GlyphGrid(),
    "16x32 four": GlyphGrid(font_size=11, cell_width=7, columns=4),
    "16x32 six": GlyphGrid(font_size=8, cell_width=5, columns=6),
    "16x48 six": GlyphGrid(font_size=11, cell_width=7, columns=6, width=48),
}


@pytest.fixture(scope="module")
def words(pytestconfig):
    path = pytestconfig.rootpath / SHAKESPEARE
    return {n: list(count_words(path, max_length=n, min_count=2)) for n in (4, 5, 6)}


def character_accuracy(texts, references):
    """Share of the reference characters read correctly in their place."""
    pairs = list(zip(texts, references, strict=True))
    hits = sum(sum(a == b for a, b in zip(text, ref, strict=False)) for text, ref in pairs)
    return hits / sum(len(ref) for _, ref in pairs)


@pytest.mark.parametrize("name", GRIDS)
def test_every_word_is_read_exactly(name, words):
    grid = GRIDS[name]
    vocabulary = words[grid.columns]
    assert len(vocabulary) > 1000
    images = np.stack([grid.draw(word) for word in vocabulary])
    readings = GlyphReader(grid).read(images)
    assert [reading.text for reading in readings] == vocabulary
    assert all(reading.distance < 1e-6 for reading in readings)
    assert all(min(reading.confidence) > 1 - 1e-6 for reading in readings)


@pytest.mark.parametrize("align", ["left", "center"])
def test_every_word_is_read_exactly_under_jitter(align, words):
    config = WordImageConfig(jitter=1, align=align)
    rng = np.random.default_rng(0)
    images = np.stack([render_word(word, config, rng) for word in words[5]])
    assert len({image.tobytes() for image in images[:200]}) == 200
    assert GlyphReader(config.grid, jitter=1)(images) == words[5]
    # Without the search over shifts the same pictures cannot all be read.
    assert GlyphReader(config.grid)(images) != words[5]


def test_noise_degrades_gracefully(words):
    grid = GlyphGrid()
    vocabulary = words[5]
    clean = np.stack([grid.draw(word) for word in vocabulary]) / 255
    reader = GlyphReader(grid)
    noise = np.random.default_rng(0).normal(size=clean.shape)
    accuracy, confidence = {}, {}
    for sd in (0.2, 0.5, 1.0):
        readings = reader.read(clean + sd * noise)
        accuracy[sd] = character_accuracy([r.text for r in readings], vocabulary)
        confidence[sd] = np.mean(np.concatenate([r.confidence for r in readings]))
        np.testing.assert_allclose(np.mean([r.distance for r in readings]), sd, rtol=0.05)
    assert accuracy[0.2] >= 0.99
    assert 0.7 < accuracy[0.5] < 0.95
    assert accuracy[1.0] < 0.6
    assert confidence[0.2] > confidence[0.5] > confidence[1.0] > 0


def test_batch_equals_a_loop_over_cells_and_templates():
    grid = GlyphGrid()
    alphabet = "abcxyz"
    images = np.random.default_rng(1).uniform(size=(3, 16, 32))
    images[:2] = 0.6 * images[:2] + 0.4 * np.stack([grid.draw("abc"), grid.draw("xyz")]) / 255
    for image, reading in zip(images, GlyphReader(grid, alphabet).read(images), strict=True):
        text, confidences, squares = "", [], 0.0
        for column in range(grid.columns):
            x = 1 + 6 * column  # two spare columns in all, one on either side
            cell = image[2:14, x : x + 6]  # four spare rows
            distances = {
                c: np.sqrt(np.sum((cell - grid.cell(c) / 255) ** 2)) for c in " " + alphabet
            }
            first, second = sorted(distances.values())[:2]
            text += min(distances, key=distances.__getitem__)
            confidences.append(1 - first / second)
            squares += first**2
        outside = image.copy()
        outside[2:14, 1:31] = 1
        squares += np.sum((outside - 1) ** 2)
        start = len(text) - len(text.lstrip())
        assert reading.text == text.strip()
        np.testing.assert_allclose(
            reading.confidence, confidences[start : start + len(text.strip())], atol=1e-9
        )
        np.testing.assert_allclose(reading.distance, np.sqrt(squares / (16 * 32)), atol=1e-9)


def test_blank_and_inner_blank_cells():
    grid = GlyphGrid()
    reader = GlyphReader(grid)
    images = np.stack([grid.draw(""), grid.draw("a b", column=1), grid.draw("it", column=3)])
    assert reader(images) == ["", "a b", "it"]
    assert reader.read(images)[0].confidence == ()
    assert len(reader.read(images)[1].confidence) == 3
    assert reader(images[:0]) == []


def test_channels_are_averaged_and_bytes_equal_floats():
    grid = GlyphGrid()
    image = grid.draw("words")
    stacked = np.stack([image, image, image], -1)[None]
    reader = GlyphReader(grid)
    assert reader(stacked) == reader(stacked[..., :1]) == reader(image[None] / 255) == ["words"]
    # White everywhere in one channel of two leaves the ink at half grey: not enough to be read.
    faint = np.stack([image, np.full_like(image, 255)], -1)[None]
    assert reader.read(faint)[0].distance > 0.05


def test_cells_stay_where_they_belong():
    grid = GlyphGrid()
    image = grid.draw("wm", column=1)
    ink = np.flatnonzero((image < 255).any(0))
    assert 1 + 6 <= ink.min() and ink.max() < 1 + 18
    np.testing.assert_array_equal(
        grid.draw("wm", column=1, shift=(1, -1)), np.roll(image, (-1, 1), axis=(0, 1))
    )


def test_fonts(tmp_path):
    path = font_path("DejaVuSansMono")
    assert path.name == "DejaVuSansMono.ttf" and matplotlib.get_data_path() in str(path)
    assert font_path(str(path)) == path
    assert {"a", "é", "Ж"} <= font_characters("DejaVuSansMono")
    assert "語" not in font_characters("DejaVuSansMono")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    with pytest.raises(InputError, match="broken.ttf: not a TrueType font"):
        load_font(str(broken), 10)
    with pytest.raises(InputError, match="broken.ttf: not a TrueType font"):
        font_characters(str(broken))
    with pytest.raises(InputError, match="NoSuchFont"):
        load_font("NoSuchFont", 10)
    with pytest.raises(InputError, match="font_size is 0"):
        load_font("DejaVuSans", 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlyphGrid(columns=6), "6 cells of 6x12 pixels do not fit"),
        (lambda: GlyphGrid(cell_height=17), "do not fit"),
        (lambda: GlyphGrid(columns=0), "expected at least 1"),
        (lambda: GlyphGrid().draw("sixsix"), "'sixsix' is too wide: 6 characters"),
        (lambda: GlyphGrid().draw("five", column=2), "too wide"),
        (lambda: GlyphGrid().draw("a", shift=(0, 2)), "leaves the picture"),
        (lambda: GlyphGrid().draw("語"), "no glyph for '語'"),
        (lambda: GlyphGrid(font_size=14).draw("w"), "does not fit its cell"),
        (lambda: GlyphGrid(baseline=11).draw("g"), "does not fit its cell"),
        (lambda: GlyphReader(GlyphGrid(), " "), "alphabet is empty"),
        (lambda: GlyphReader(GlyphGrid(), jitter=2), "jitter is 2"),
        (lambda: GlyphReader(GlyphGrid(), "aа"), "look the same"),  # Latin and Cyrillic a
        (lambda: GlyphReader(GlyphGrid())(np.zeros((2, 16, 16))), r"\[2, 16, 16\]"),
        (lambda: GlyphReader(GlyphGrid())(np.zeros((2, 16, 32), np.int32)), "int32"),
        (
            lambda: GlyphReader(GlyphGrid())(
                np.stack([np.zeros((16, 32)), np.full((16, 32), np.nan)])
            ),
            "image 1 has a value that is not finite",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()
