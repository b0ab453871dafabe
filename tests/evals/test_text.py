"""Text metrics on cases worked out by hand and against the textbook table for subsequences."""

import math

import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.evals.text import (
    exact_match,
    normalise_answer,
    rouge_l,
    rouge_n,
    token_f1,
    token_perplexity,
    words,
)


def test_words_of_letters_and_digits():
    assert words("It's 3.14, snake_case; Ünïcode-Ärger!") == [
        *("it", "s", "3", "14", "snake", "case", "ünïcode", "ärger")
    ]


def test_rouge_by_hand():
    # The example of Lin (2004), section 3: LCS "police the gunman" vs reference of 4 words.
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == (3 / 4, 3 / 4, 3 / 4)
    assert rouge_l("the gunman kill police", reference) == (2 / 4, 2 / 4, 2 / 4)
    assert rouge_n("police kill the gunman", reference, 2) == (1 / 3, 1 / 3, 1 / 3)
    # Unequal lengths: 5 words against 3, both of "the" against one.
    assert rouge_n("The cat the cat sat.", "the cat ran", 1) == (2 / 5, 2 / 3, 4 / 8)
    assert rouge_l("The cat the cat sat.", "the cat ran") == (2 / 5, 2 / 3, 4 / 8)
    assert rouge_n("one", "one", 2) == (0, 0, 0)
    assert rouge_l("", "") == rouge_l("", "a") == (0, 0, 0)


def test_rouge_l_matches_the_textbook_table():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = (rng.integers(0, 5, rng.integers(1, 40)).astype(str).tolist() for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = (
                    table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
                )
        score = rouge_l(" ".join(a), " ".join(b))
        assert score.precision == table[-1, -1] / len(a)
        assert score.recall == table[-1, -1] / len(b)


def test_squad_normalisation_exact_match_and_f1():
    assert normalise_answer(" The  Eiffel-Tower, a theatre. ") == "eiffeltower theatre"
    assert exact_match("The Eiffel Tower!", "eiffel tower")
    assert not exact_match("Eiffel", "eiffel tower")
    assert token_f1("the big Eiffel tower", "Eiffel Tower") == (2 / 3, 1, 0.8)
    assert token_f1("", "the") == (1, 1, 1)
    assert token_f1("", "tower") == (0, 0, 0)


def test_perplexity_counts_tokens_not_rows():
    log_probs = np.log([[0.5, 0.25, 0.125], [0.5, 1e-9, 1e-9]])
    mask = [[1, 1, 1], [1, 0, 0]]
    # (1 + 2 + 3 + 1) bits over 4 tokens.
    assert token_perplexity(log_probs, mask) == pytest.approx(2 ** (7 / 4), rel=1e-12)
    assert token_perplexity([[math.log(0.1), np.nan]], [[True, False]]) == pytest.approx(10)


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: rouge_n("a", "a", 0), "ROUGE-0"),
        (lambda: token_perplexity([[-1.0]], [[0]]), "0 tokens"),
        (lambda: token_perplexity([[-np.inf]], [[1]]), "finite"),
        (lambda: token_perplexity([[0.5]], [[1]]), "<= 0"),
    ],
)
def test_bad_input_is_named(call, culprit):
    with pytest.raises(InputError, match=culprit):
        call()
