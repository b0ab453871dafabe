"""Rendered text pages and words: what is drawn, what is recorded, and who gets which text."""

import codecs
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest
from PIL import Image, ImageDraw

from jaxllm.data.rendered_text import (
    SPLITS,
    RenderedText,
    TextImageConfig,
    WordImageConfig,
    count_words,
    page_fault,
    render_page,
    render_word,
)
from jaxllm.errors import InputError
from jaxllm.evals.glyphs import GlyphGrid, GlyphReader, font_path, load_font

SMALL_PAGE = TextImageConfig(size=96, font_size=12, margin=8, max_words=6, channels=1)


@pytest.fixture(scope="module")
def shakespeare(pytestconfig):
    return pytestconfig.rootpath / "jaxllm/data/bundled/text/tinyshakespeare.txt"


def write(folder, text):
    path = folder / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def same(a, b):
    return a["text"] == b["text"] and np.array_equal(a["image"], b["image"])


def test_the_papers_page(shakespeare):
    config = TextImageConfig()
    assert (config.size, config.font_size, config.margin, config.max_words) == (512, 32, 20, 100)
    source = RenderedText(config, shakespeare, fractions=(1, 0, 0))
    words = shakespeare.read_text().split()
    assert len(source) == -(-len(words) // 100)
    for i in (0, 7, len(source) - 1):
        image, text = source[i]["image"], source[i]["text"]
        assert image.shape == (512, 512, 3) and image.dtype == np.uint8
        assert (image[:20] == 255).all() and (image[-20:] == 255).all()
        assert (image[:, :20] == 255).all() and (image[:, -20:] == 255).all()
        assert image.min() == 0
        visible = text.split()
        assert visible == words[100 * i : 100 * i + len(visible)]
    assert len(source[0]["text"].split()) < 100  # cut at the bottom margin


def test_the_record_is_the_visible_text(shakespeare):
    # The page of the recorded words alone is the same picture, and needs all of them.
    words = shakespeare.read_text().split()[:100]
    image, text = render_page(words, TextImageConfig())
    visible = text.split()
    again, text_again = render_page(visible, TextImageConfig())
    np.testing.assert_array_equal(again, image)
    assert text_again == text
    assert not np.array_equal(render_page(visible[:-1], TextImageConfig())[0], image)


def test_page_layout_by_hand():
    config = SMALL_PAGE
    font = load_font(config.font, 12)
    ascent, descent = font.getmetrics()
    pitch = ascent + descent + 4
    words = ["wide", "words", "wrap", "here"]
    image, text = render_page(words, config)
    assert font.getlength("wide words") <= 80 < font.getlength("wide words wrap")
    page = Image.new("L", (96, 96), 255)
    draw = ImageDraw.Draw(page)
    for k, line in enumerate(["wide words", "wrap here"]):
        draw.text((8, 8 + ascent + k * pitch), line, 0, font, anchor="ls")
    np.testing.assert_array_equal(image[..., 0], np.asarray(page))
    assert text == "wide words wrap here"


def test_page_is_cut_at_max_words_and_at_the_bottom():
    assert render_page(["a"] * 9, SMALL_PAGE)[1] == "a a a a a a"
    ascent, descent = load_font("DejaVuSans", 12).getmetrics()
    lines = (80 + 4) // (ascent + descent + 4)
    config = TextImageConfig(size=96, font_size=12, margin=8, max_words=50)
    words = [f"{k}wwwwww" for k in range(10, 30)]  # one a line
    assert render_page(words, config)[1].split() == words[:lines]


def test_letters_that_start_left_of_the_pen_stay_inside_the_margin():
    config = TextImageConfig(size=96, font="DejaVuSans-Oblique", font_size=24, margin=8)
    image, text = render_page(["jjf", "ff", "jf"], config)
    assert (image[:, :8] == 255).all() and (image[:, -8:] == 255).all()
    assert text == "jjf ff jf"


def test_any_utf8_text_and_font_file(tmp_path):
    path = write(tmp_path, codecs.BOM_UTF8 + "Ćwiczę\u2003słowa\n\n  Привет, мир! ½ λόγος".encode())
    config = TextImageConfig(size=256, font=str(font_path("DejaVuSerif")), font_size=20)
    source = RenderedText(config, path, fractions=(1, 0, 0))
    assert source[0]["text"] == "Ćwiczę\u2003słowa Привет, мир! ½ λόγος"


def test_pages_of_a_file_equal_pages_of_its_words(tmp_path):
    path = write(tmp_path, "one two  three\tfour\r\nfive\n\nsix seven eight nine\nten")
    from_file = RenderedText(SMALL_PAGE, path, fractions=(1, 0, 0))
    from_words = RenderedText(SMALL_PAGE, path.read_text().split(), fractions=(1, 0, 0))
    assert len(from_file) == len(from_words) == 2
    assert all(same(from_words[i], from_file[i]) for i in range(2))
    assert from_file[0]["text"] == "one two three four five six"
    assert from_file[1]["text"] == "seven eight nine ten"


@pytest.mark.parametrize("sampling", ["each", "frequency"])
def test_examples_depend_on_seed_and_index_only(shakespeare, sampling):
    config = WordImageConfig(jitter=1)
    make = dict(sampling=sampling, num_examples=400)
    source = RenderedText(config, shakespeare, seed=3, **make)
    forward = [source[i] for i in range(40)]
    fresh = pickle.loads(pickle.dumps(RenderedText(config, shakespeare, seed=3, **make)))
    assert all(same(fresh[i], forward[i]) for i in reversed(range(40)))
    assert same(fresh[np.int64(5)], forward[5])
    with ThreadPoolExecutor(8) as pool:
        assert all(map(same, pool.map(source.__getitem__, range(40)), forward))
    other = RenderedText(config, shakespeare, seed=4, **make)
    assert not all(same(other[i], forward[i]) for i in range(40))


def test_grain_reads_it(shakespeare):
    source = RenderedText(WordImageConfig(), shakespeare, split="validation")
    data = grain.MapDataset.source(source).shuffle(seed=0).batch(4)
    batch = data[0]
    assert batch["image"].shape == (4, 16, 32, 1) and batch["image"].dtype == np.uint8
    assert GlyphReader(GlyphGrid())(batch["image"]) == list(batch["text"])
    words = ["word"] * 60
    pages = grain.MapDataset.source(RenderedText(SMALL_PAGE, words)).batch(2)
    assert pages[1]["image"].shape == (2, 96, 96, 1)


def test_splits_by_text_share_no_word_and_cover_all(shakespeare):
    config = WordImageConfig(min_count=5)
    vocabulary = count_words(shakespeare, max_length=5, min_count=5)
    parts = {}
    for split in SPLITS:
        source = RenderedText(config, shakespeare, split=split, seed=9)
        parts[split] = [source[i]["text"] for i in range(len(source))]
        drawn = RenderedText(
            config, shakespeare, split=split, sampling="frequency", num_examples=300
        )
        assert {drawn[i]["text"] for i in range(300)} <= set(parts[split])
    assert sum(map(len, parts.values())) == len(vocabulary)
    assert set().union(*parts.values()) == set(vocabulary)
    assert abs(len(parts["train"]) - 0.8 * len(vocabulary)) <= 1
    assert abs(len(parts["test"]) - 0.1 * len(vocabulary)) <= 1
    other = RenderedText(config, shakespeare, split="test", split_seed=1)
    assert {other[i]["text"] for i in range(len(other))} != set(parts["test"])


def test_splits_of_pages_share_no_passage(shakespeare):
    words = shakespeare.read_text().split()[:600]
    config = TextImageConfig(size=128, font_size=10, margin=4, max_words=6, channels=1)
    pages = []
    for split in SPLITS:
        source = RenderedText(config, words, split=split)
        pages += [source[i]["text"] for i in range(len(source))]
    assert Counter(pages) == Counter(" ".join(words[k : k + 6]) for k in range(0, 600, 6))


def test_splits_by_seed_share_all_words():
    words = ["one", "two", "three", "four"]
    config = WordImageConfig(jitter=1)
    kinds = dict(split_by="seed", sampling="frequency", num_examples=60)
    train, test = (RenderedText(config, words, split=s, **kinds) for s in ("train", "test"))
    texts = [[source[i]["text"] for i in range(60)] for source in (train, test)]
    assert set(texts[0]) == set(texts[1]) == set(words)
    assert texts[0] != texts[1]


def test_each_goes_round_and_frequency_follows_the_counts():
    counts = {"the": 6, "and": 3, "of": 1}
    each = RenderedText(WordImageConfig(), counts, fractions=(1, 0, 0), num_examples=7)
    assert [each[i]["text"] for i in range(7)] == ["the", "and", "of"] * 2 + ["the"]
    drawn = RenderedText(
        WordImageConfig(), counts, fractions=(1, 0, 0), sampling="frequency", num_examples=2000
    )
    found = Counter(drawn[i]["text"] for i in range(2000))
    for word, share in (("the", 0.6), ("and", 0.3), ("of", 0.1)):  # 4 standard errors
        assert abs(found[word] / 2000 - share) < 4 * np.sqrt(share * (1 - share) / 2000)


def test_count_words(tmp_path):
    path = write(tmp_path, "The cat, the DOG; I'll the-dog r2d2 elephant cat--cat a_b Éve éve\n")
    assert count_words(path, max_length=4) == {"cat": 3, "the": 2, "éve": 2, "dog": 1}
    assert list(count_words(path, max_length=4, min_count=2)) == ["cat", "the", "éve"]
    with pytest.raises(InputError, match="no word of at most 4 letters occurs 9 times"):
        count_words(path, max_length=4, min_count=9)


def test_jitter_and_alignment():
    config = WordImageConfig(align="center", jitter=1, channels=3)
    image = render_word("hat", config)
    assert image.shape == (16, 32, 3)
    np.testing.assert_array_equal(image[..., 0], config.grid.draw("hat", column=1))
    rng = np.random.default_rng(0)
    shifted = {render_word("hat", config, rng).tobytes() for _ in range(200)}
    assert len(shifted) == 9


def test_bad_words_are_raised_or_counted(tmp_path):
    wide = "w" * 20
    path = write(tmp_path, f"good 語 words {wide} and\n語 more 語言\n")
    with pytest.raises(InputError, match=r"text.txt line 1: word '語': font 'DejaVuSans' has no"):
        RenderedText(SMALL_PAGE, path)
    source = RenderedText(SMALL_PAGE, path, on_bad_word="skip", fractions=(1, 0, 0))
    assert source[0]["text"] == "good words and more" and len(source) == 1
    assert source.skipped == {"語": 2, wide: 1, "語言": 1}
    assert page_fault(wide, SMALL_PAGE).endswith("pixels wide, the page has 80")
    with pytest.raises(InputError, match="has no glyph for '語'"):
        render_page(["語"], SMALL_PAGE)
    with pytest.raises(InputError, match="pixels wide, the page has 80"):
        render_page([wide], SMALL_PAGE)

    with pytest.raises(InputError, match="'longer': .* too wide"):
        RenderedText(WordImageConfig(), ["short", "longer"])
    kinds = dict(on_bad_word="skip", fractions=(1, 0, 0))
    words = RenderedText(WordImageConfig(), ["short", "longer", "a b", "", "語", "語"], **kinds)
    assert words.texts == 1
    assert words.skipped == {"longer": 1, "a b": 1, "": 1, "語": 2}


def test_a_page_boundary_ignores_skipped_words():
    config = TextImageConfig(size=96, font_size=12, margin=8, max_words=2, channels=1)
    words = ["a", "語", "b", "語", "c", "d", "語"]
    source = RenderedText(config, words, on_bad_word="skip", fractions=(1, 0, 0))
    assert [source[i]["text"] for i in range(len(source))] == ["a b", "c d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text to render"),
        (b" \n\t\n", "no text to render"),
        (b"fine\nbad \xff byte\n", "text.txt line 2: not UTF-8"),
    ],
)
def test_bad_text_files(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        RenderedText(SMALL_PAGE, write(tmp_path, content))
    with pytest.raises(InputError, match="text.txt"):
        RenderedText(WordImageConfig(), write(tmp_path, content))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RenderedText(SMALL_PAGE, "no/such.txt"), "no/such.txt: cannot read"),
        (lambda: RenderedText(WordImageConfig(), "no/such.txt"), "no/such.txt: cannot read"),
        (lambda: TextImageConfig(font="no/such.ttf"), "no/such.ttf"),
        (lambda: TextImageConfig(size=60), "has no room for a line"),
        (lambda: TextImageConfig(max_words=0), "max_words"),
        (lambda: WordImageConfig(jitter=2), "jitter is 2, the grid leaves 0 to 1"),
        (lambda: WordImageConfig(align="right"), "align is 'right'"),
        (lambda: WordImageConfig(channels=0), "channels"),
        (lambda: RenderedText(SMALL_PAGE, {"a": 1}), "not counts"),
        (lambda: RenderedText(WordImageConfig(), {"a": 0}), "'a' has count 0"),
        (lambda: RenderedText(WordImageConfig(), []), "no word to render"),
        (lambda: RenderedText(WordImageConfig(), ["a"], split="dev"), "split is 'dev'"),
        (lambda: RenderedText(WordImageConfig(), ["a"], split="test"), "test split has none"),
        (lambda: RenderedText(WordImageConfig(), ["a"], split_by="seed"), "splits are equal"),
        (lambda: RenderedText(WordImageConfig(), ["a"], fractions=(1, 1, 0)), "sum to 1"),
        (lambda: RenderedText(WordImageConfig(), ["a"], num_examples=0), "num_examples is 0"),
        (lambda: RenderedText(WordImageConfig(), ["a"], seed=-1), "seed"),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_index_out_of_range():
    source = RenderedText(WordImageConfig(), ["a", "b"], fractions=(1, 0, 0))
    for index in (2, -1):
        with pytest.raises(IndexError, match="of 2"):
            source[index]
    assert [example["text"] for example in source] == ["a", "b"]
