"""The character n-gram model against hand computations."""

import itertools
import math
import pickle

import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.evals.character_model import END, UNKNOWN, CharacterModel

WORDS = ["the", "then", "hen", "tee", "net", "ten", "eve"]


def test_bigram_by_hand():
    # "ab", "a": unigrams a 2, b 1, end 2 (N = 5, T = 3); alphabet a, b, end, unknown.
    model = CharacterModel.fit(["ab", "a"])
    assert model.alphabet == ("a", "b", END, UNKNOWN)
    unigram = {s: (n + 3 * 0.25) / 8 for s, n in (("a", 2), ("b", 1), ("end", 2), ("unk", 0))}
    # Start: only a follows (N = 2, T = 1).
    start = [(2 + unigram["a"]) / 3, unigram["b"] / 3, unigram["end"] / 3, unigram["unk"] / 3]
    np.testing.assert_allclose(model.probabilities(), start, atol=1e-15)
    # After a: b once, end once (N = 2, T = 2).
    after_a = [
        2 * unigram["a"] / 4,
        (1 + 2 * unigram["b"]) / 4,
        (1 + 2 * unigram["end"]) / 4,
        2 * unigram["unk"] / 4,
    ]
    np.testing.assert_allclose(model.probabilities("bba"), after_a, atol=1e-15)
    np.testing.assert_allclose(
        model.log_probs("a"), [math.log(start[0]), math.log(after_a[2])], atol=1e-15
    )
    log_prob, tokens = model.score("a")
    assert tokens == 2
    assert log_prob == pytest.approx(math.log(start[0] * after_a[2]), abs=1e-14)


def test_unigram_model_ignores_the_context():
    model = CharacterModel.fit(["ab", "a"], order=1)
    expected = [2.75 / 8, 1.75 / 8, 2.75 / 8, 0.75 / 8]
    for context in ("", "a", "ba"):
        np.testing.assert_allclose(model.probabilities(context), expected, atol=1e-15)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sums_to_one_after_every_context(order):
    model = CharacterModel.fit(WORDS, order)
    symbols = "".join(s for s in model.alphabet if len(s) == 1) + "?"
    for length in range(4):
        for context in itertools.product(symbols, repeat=length):
            distribution = model.probabilities("".join(context))
            assert (distribution > 0).all()
            assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_probabilities_of_all_texts_sum_to_one():
    # With the end mark the model is a distribution over texts: what is not in texts of at most n
    # characters is the probability that the first n + 1 symbols hold no end mark.
    model = CharacterModel.fit(["ab", "a", "b"], order=3)
    symbols, n = "ab?", 5  # "?" stands for the unknown mark
    texts = ["".join(t) for k in range(n + 1) for t in itertools.product(symbols, repeat=k)]
    inside = sum(math.exp(model.score(text)[0]) for text in texts)
    outside = sum(
        math.exp(model.log_probs("".join(t))[:-1].sum())
        for t in itertools.product(symbols, repeat=n + 1)
    )
    assert inside + outside == pytest.approx(1, abs=1e-12)
    assert outside > 1e-6


def test_unknown_characters_share_one_mass():
    model = CharacterModel.fit(WORDS)
    assert model.score("z") == model.score("é")
    assert model.probabilities()[model.alphabet.index(UNKNOWN)] == pytest.approx(
        math.exp(model.log_probs("z")[0])
    )
    # After an unknown character there is nothing but the unigrams.
    unigram = CharacterModel.fit(WORDS, order=1).probabilities()
    np.testing.assert_allclose(model.probabilities("z"), unigram, atol=1e-15)


def test_perplexity_pools_symbols():
    model = CharacterModel.fit(WORDS)
    a, b = model.score("the"), model.score("nt")
    expected = math.exp(-(a[0] + b[0]) / (4 + 3))
    assert model.perplexity(["the", "nt"]) == pytest.approx(expected, rel=1e-12)
    assert model.perplexity(["the"]) < model.perplexity(["hht"]) < model.perplexity(["zzz"])


def test_counts_equal_repeated_words():
    weighted = CharacterModel.fit({"the": 3, "net": 1}, order=3)
    repeated = CharacterModel.fit(["the", "net", "the", "the"], order=3)
    for text in ("the", "net", "ten", ""):
        np.testing.assert_array_equal(weighted.log_probs(text), repeated.log_probs(text))
    copy = pickle.loads(pickle.dumps(weighted))
    np.testing.assert_array_equal(copy.log_probs("tent"), weighted.log_probs("tent"))


def test_a_longer_context_fits_the_training_words_better():
    perplexities = [CharacterModel.fit(WORDS, order).perplexity(WORDS) for order in (1, 2, 3)]
    assert perplexities[0] > perplexities[1] > perplexities[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CharacterModel.fit([]), "no words"),
        (lambda: CharacterModel.fit(["a"], order=0), "order is 0"),
        (lambda: CharacterModel.fit({"a": 0}), "'a' has count 0"),
        (lambda: CharacterModel.fit(["a"]).perplexity([]), "no texts"),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()
