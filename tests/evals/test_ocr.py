"""rOCR and PPL_OCR against hand computations."""

import math

import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.evals.character_model import CharacterModel
from jaxllm.evals.glyphs import GlyphGrid, GlyphReader
from jaxllm.evals.ocr import _rouge_l_f1, ppl_ocr, rocr


def reads(*texts):
    """Pictures and a reader that reads these texts."""
    return np.zeros((len(texts), 4, 4, 1), np.uint8), lambda images: list(texts)


@pytest.mark.parametrize(
    ("candidate", "reference", "unit", "expected"),
    [
        # Lin 2004, section 3: LCS "police the gunman" has 3 of 4 words; then 2 of 4.
        ("police kill the gunman", "police killed the gunman", "word", 3 / 4),
        ("the gunman kill police", "police killed the gunman", "word", 2 / 4),
        # LCS 2, precision 2/3, recall 2/5: F1 = 2 * 2 / (3 + 5).
        ("a c x", "a b c d e", "word", 1 / 2),
        ("The CAT, sat!", "the cat sat", "word", 1.0),
        ("cat", "cart", "word", 0.0),
        # LCS c-a-t: 2 * 3 / (3 + 4).
        ("cat", "cart", "char", 6 / 7),
        ("abcd", "dcba", "char", 2 / 8),
        # Spaces are no characters: "ab" + "c" against "a" + "bc".
        ("ab c", "a bc", "char", 1.0),
        ("42 élan", "42 Élan", "word", 1.0),
        ("", "cat", "word", 0.0),
        ("cat", "...", "word", 0.0),
        ("", "", "char", 0.0),
    ],
)
def test_rouge_l_by_hand(candidate, reference, unit, expected):
    assert _rouge_l_f1(candidate, reference, unit) == pytest.approx(expected, abs=1e-15)
    assert _rouge_l_f1(reference, candidate, unit) == pytest.approx(expected, abs=1e-15)


def test_rouge_l_equals_exhaustive_search():
    rng = np.random.default_rng(0)

    def subsequences(words):
        masks = range(2 ** len(words))
        return {tuple(w for i, w in enumerate(words) if mask >> i & 1) for mask in masks}

    for _ in range(50):
        a, b = (["xyz"[k] for k in rng.integers(3, size=rng.integers(1, 7))] for _ in range(2))
        longest = max(map(len, subsequences(a) & subsequences(b)))
        assert _rouge_l_f1(" ".join(a), " ".join(b)) == pytest.approx(2 * longest / len(a + b))


def test_rocr_by_hand():
    images, reader = reads("to be or", "", "not to be")
    result = rocr(images, ["to be", "or not", "not to be"], reader)
    assert result.per_image == pytest.approx((4 / 5, 0, 1))
    assert result.f1 == pytest.approx(0.6)
    assert result.exact == pytest.approx(1 / 3)
    assert result.empty == 1
    assert result.texts == ("to be or", "", "not to be")
    by_letter = rocr(images, ["to be", "or not", "not to be"], reader, unit="char")
    assert by_letter.per_image == pytest.approx((8 / 10, 0, 1))


def test_rocr_of_drawn_words_falls_with_blur():
    grid = GlyphGrid()
    words = ["thou", "gods", "sweet", "king", "love"]
    images = np.stack([grid.draw(word) for word in words])[..., None]
    reader = GlyphReader(grid)
    assert rocr(images, words, reader).f1 == 1.0
    noise = np.random.default_rng(0).normal(size=images.shape)
    noisy = [rocr(images / 255 + sd * noise, words, reader, unit="char").f1 for sd in (0.5, 1.5)]
    assert 1 > noisy[0] > noisy[1] > 0
    assert rocr(np.full_like(images, 255), words, reader).empty == 5


def test_ppl_ocr_by_hand():
    # A model that charges ln 2 a letter and ln 8 for the end mark.
    def language_model(text):
        return -len(text) * math.log(2) - math.log(8), len(text) + 1

    images, reader = reads("abc", "", " ", "a")
    result = ppl_ocr(images, reader, language_model)
    # 3 ln 2 + ln 8 over 4 symbols, and ln 2 + ln 8 over 2: 10 ln 2 over 6 together.
    assert result.perplexity == pytest.approx(2 ** (10 / 6))
    assert result.per_image == pytest.approx((2 ** (6 / 4), math.nan, math.nan, 4.0), nan_ok=True)
    assert result.mean_image_perplexity == pytest.approx((2 ** (6 / 4) + 4) / 2)
    assert (result.tokens, result.images, result.scored, result.empty) == (6, 4, 2, 2)

    scored = ppl_ocr(images[:3], lambda images: ["abc", "", "a"], language_model, on_empty="score")
    assert scored.perplexity == pytest.approx(2 ** (13 / 7))
    assert scored.per_image[1] == pytest.approx(8.0)
    assert (scored.tokens, scored.scored, scored.empty) == (7, 3, 1)

    with pytest.raises(InputError, match=r"image 1 has no readable text \(2 of 4\)"):
        ppl_ocr(images, reader, language_model, on_empty="raise")


def test_ppl_ocr_of_blank_pictures_is_undefined_not_good():
    images, reader = reads("", "")
    result = ppl_ocr(images, reader, lambda text: (0.0, 1))
    assert math.isnan(result.perplexity) and math.isnan(result.mean_image_perplexity)
    assert (result.tokens, result.scored, result.empty) == (0, 0, 2)


def test_ppl_ocr_of_an_impossible_text_is_infinite():
    images, reader = reads("a", "b")
    result = ppl_ocr(images, reader, lambda text: (-math.inf if text == "b" else -1.0, 1))
    assert result.per_image == pytest.approx((math.e, math.inf))
    assert result.perplexity == math.inf
    assert ppl_ocr(images, reader, lambda text: (-1e6, 1)).perplexity == math.inf


def test_ppl_ocr_with_the_exact_pair_is_the_perplexity_of_the_words():
    grid = GlyphGrid()
    words = ["thou", "gods", "sweet", "king", "love"]
    model = CharacterModel.fit(words)
    images = np.stack([grid.draw(word) for word in words])
    real = ppl_ocr(images, GlyphReader(grid), model.score)
    assert real.perplexity == pytest.approx(model.perplexity(words), rel=1e-12)
    assert real.tokens == sum(len(word) + 1 for word in words)
    shuffled = np.stack([grid.draw(word[::-1]) for word in words])
    assert ppl_ocr(shuffled, GlyphReader(grid), model.score).perplexity > 1.5 * real.perplexity


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, r: rocr(i, ["a"], r), "2 images but 1 reference"),
        (lambda i, r: rocr(i[:1], ["a"], r), "returned 2 texts for 1 images"),
        (lambda i, r: rocr(i[:0], [], r), "no images"),
        (lambda i, r: rocr(i, ["a", "b"], r, unit="line"), "unit is 'line'"),
        (lambda i, r: ppl_ocr(i, r, lambda t: (-1.0, 1), on_empty="drop"), "on_empty is 'drop'"),
        (lambda i, r: ppl_ocr(i, r, lambda t: (math.nan, 1)), "image 0: .* scored 'a'"),
        (lambda i, r: ppl_ocr(i, r, lambda t: (0.5, 1)), "log-probability 0.5"),
        (lambda i, r: ppl_ocr(i, r, lambda t: (-1.0, 0)), "over 0 tokens"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call(*reads("a", "b"))
