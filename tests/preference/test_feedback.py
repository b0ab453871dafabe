"""Feedback sources, what scores become, and the review data."""

import numpy as np
import pytest

from jaxllm.data.text_tokenizers import byte_tokenizer
from jaxllm.errors import InputError
from jaxllm.preference.feedback import (
    Given,
    Judge,
    Pair,
    RewardModel,
    Rule,
    accepted,
    label_examples,
    list_examples,
    pair_examples,
    ranking,
    rejection_sample,
    scores_to_labels,
    scores_to_pairs,
)
from jaxllm.preference.records import Example, encode_records
from jaxllm.preference.reviews import (
    bucket,
    lexicon_reward,
    lexicon_score,
    load_snippets,
    review_records,
)

PROMPTS, TEXTS = ["a", "b"], [["x", "xx", "xxx"], ["yyyy", "y", ""]]
LENGTHS = [[1, 2, 3], [4, 1, 0]]


# -- sources -------------------------------------------------------------------------------------


def test_every_source_gives_scores_per_prompt_and_completion():
    given = {(p, c): len(c) for p, row in zip(PROMPTS, TEXTS, strict=True) for c in row}
    calls = []

    def model(prompts, completions):
        calls.append(list(prompts))
        return [len(completion) for completion in completions]

    sources = (Given(given), Rule(lambda _, c: len(c)), RewardModel(model, batch_size=4))
    for source in sources:
        np.testing.assert_array_equal(source(PROMPTS, TEXTS), LENGTHS)
    assert calls == [["a", "a", "a", "b"], ["b", "b"]]
    with pytest.raises(InputError, match="no score is given for 'z' after 'a'"):
        Given(given)(["a"], [["z"]])


def test_a_judge_sees_both_orders():
    longer = Judge(lambda _, first, second: len(first) > len(second))
    np.testing.assert_allclose(longer(PROMPTS, TEXTS), [[0, 0.5, 1], [1, 0.5, 0]])
    # One that always prefers the first place, or never decides, prefers nothing.
    for verdict in (True, None):
        judge = Judge(lambda *_, verdict=verdict: verdict)
        np.testing.assert_allclose(judge(PROMPTS, TEXTS), np.full((2, 3), 0.5))
    with pytest.raises(InputError, match="a judge needs at least two completions"):
        longer(["a"], [["x"]])


def test_bad_scores_are_named():
    with pytest.raises(InputError, match="the score of completion 1 of prompt 0 is nan"):
        Rule(lambda _, c: float("nan") if c == "xx" else 1.0)(PROMPTS, TEXTS)
    with pytest.raises(InputError, match=r"gave scores \(1,\) for 6 texts"):
        RewardModel(lambda p, c: [1.0])(PROMPTS, TEXTS)
    for texts in (TEXTS[:1], [["x"], ["y", "z"]], [[], []]):
        with pytest.raises(InputError, match="expected equally long lists"):
            Rule(lambda _, c: 0.0)(PROMPTS, texts)
    with pytest.raises(InputError, match=r"scores have shape \(2,\)"):
        ranking([1.0, 2.0])


# -- what scores become --------------------------------------------------------------------------

SCORES = [[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, 0.25, 0.0]]


def test_pairs_from_scores():
    assert scores_to_pairs(SCORES) == [Pair(0, 1, 0, 2.0), Pair(2, 1, 0, 0.25)]
    assert scores_to_pairs(SCORES, min_margin=0.25) == [Pair(0, 1, 0, 2.0)]
    every = scores_to_pairs(SCORES, "all")
    assert {(p.prompt, p.chosen, p.rejected) for p in every} == {
        (0, 1, 0), (0, 1, 2), (0, 2, 0), (2, 1, 0), (2, 1, 2),
    }  # fmt: skip
    drawn = [scores_to_pairs(SCORES, "random", seed=seed) for seed in range(40)]
    assert all(len(d) == 2 and set(d) <= set(every) for d in drawn)
    assert {pair for d in drawn for pair in d} == set(every)
    assert scores_to_pairs(SCORES, "random", seed=7) == drawn[7]


def test_labels_rankings_and_selections_from_scores():
    desirable, clear = scores_to_labels(SCORES, 2.0, gap=0.5)
    assert desirable.tolist() == [[False, True, True], [True] * 3, [False] * 3]
    assert clear.tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert ranking(SCORES).tolist() == [[1, 2, 0], [0, 1, 2], [1, 0, 2]]
    assert accepted(SCORES, 3.0) == [(0, 1), (1, 0), (1, 1), (1, 2)]


def test_rejection_sampling_draws_from_the_tilted_policy():
    """The first accepted candidate of many is r with probability exp(r/beta) / sum."""
    beta, prompts = 0.5, 20_000
    scores = np.tile([0.0, 0.5, 1.0], (prompts, 1))
    found = rejection_sample(scores, beta, 3)
    share = np.bincount(found[:, 0]) / prompts
    wanted = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    # Three standard errors of a share of 20,000 are at most 0.0107.
    np.testing.assert_allclose(share, wanted, atol=0.0107)
    assert (np.sort(found, axis=1) == np.arange(3)).all()  # Without replacement.
    assert (rejection_sample(scores[:9], 1e-6, 1) == 2).all()
    for beta, count in ((0.0, 1), (1.0, 0), (1.0, 4)):
        with pytest.raises(InputError, match="expected > 0 and 1 to 3"):
            rejection_sample(SCORES, beta, count)


def test_scored_completions_become_examples():
    prompts, completions = [[1], [2]], [[[3], [4, 4], [3]], [[5], [6], [7]]]
    scores = [[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]
    pairs = scores_to_pairs(scores, "all")
    found = pair_examples(prompts, completions, pairs)
    assert found[0] == Example((1,), ((4, 4), (3,)), margin=2.0, identity="prompt 0")
    assert len(found) == len(pairs) - 1  # Completions 2 and 0 of the first prompt are equal.
    listed = list_examples(prompts, completions, scores)
    assert listed[1] == Example((2,), ((5,), (6,), (7,)), scores=(1, 0, 0), identity="prompt 1")
    labelled = label_examples(prompts, completions, scores, 1.0, gap=0.5)
    assert [(e.completion_ids[0], e.desirable) for e in labelled] == [
        ((3,), False), ((4, 4), True), ((6,), False), ((7,), False),
    ]  # fmt: skip


# -- reviews -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def movies():
    return load_snippets("movie")


def test_the_snippets_have_the_published_counts(movies):
    """10,605 film snippets with 198,810 ratings, 3,708 product snippets with 74,160."""
    amazon = load_snippets("amazon")
    for found, count, ratings, mixed in (
        (movies, 10_605, 198_810, 4_041),
        (amazon, 3_708, 74_160, 1_043),
    ):
        assert len(found) == count and sum(len(s.ratings) for s in found) == ratings
        assert sum(min(s.ratings) < 0 < max(s.ratings) for s in found) == mixed
    assert movies[2].text == "Effective but too tepid biopic"
    # Ratings -1 (nine), 0 (three), -2, 1 (two).
    np.testing.assert_allclose(movies[2].beliefs, np.array([0, 10, 3, 2, 0]) / 15)
    assert movies[2].mean == pytest.approx(-0.6)


def test_every_rating_has_one_bucket():
    assert [bucket(r) for r in range(-4, 5)] == [0, 0, 1, 1, 2, 3, 3, 4, 4]
    assert [bucket(r) for r in (-2.6, -0.4, 0.6, 2.4)] == [0, 2, 3, 3]


def test_review_pairs_are_drawn_by_the_raters_shares(movies):
    few = movies[:40]
    by_text = {s.text: bucket(s.mean) for s in movies}
    for form in ("conditioned", "different"):
        records = review_records(few, replies=movies, seed=1, belief_pairs=form)
        wanted = sum(int(np.floor(10 * share + 1e-9)) for s in few for share in s.beliefs)
        assert len(records) == wanted
        for record in records:
            beliefs = [int(c[0]) - 1 for c in record.completions]
            replies = [by_text[c.split(">", 1)[1]] for c in record.completions]
            assert beliefs[0] == replies[0] != replies[1]
            assert beliefs[1] == (beliefs[0] if form == "conditioned" else replies[1])
    assert review_records(few, replies=movies, seed=1) == review_records(
        few, replies=movies, seed=1
    )
    (example, *_) = encode_records(records, byte_tokenizer())
    assert example.belief.target == pytest.approx(few[0].beliefs.tolist())
    assert example.belief.ids == tuple((ord(d),) for d in "12345")
    with pytest.raises(InputError, match="no sentence has a mean rating in the bucket 'very bad'"):
        review_records(few[:1])


def test_the_lexicon_score_is_the_mean_over_all_words(movies):
    # great 3.1 twice, :) 2.0, and two words that are not listed.
    assert lexicon_score("A GREAT, great film :)") == pytest.approx((3.1 + 3.1 + 2.0) / 5)
    assert lexicon_score("awful!") == -2.0 and lexicon_score("") == 0.0
    assert Rule(lexicon_reward)(["p"], [["good", "table"]]).tolist() == [[1.9, 0.0]]
    scores = [lexicon_score(s.text) for s in movies]
    # It follows the raters: 0.405 measured, 0.03 would be three standard errors from none.
    assert np.corrcoef(scores, [s.mean for s in movies])[0, 1] > 0.4


def test_damaged_review_files_are_named(tmp_path):
    texts, ratings = (
        tmp_path / f"movieReviewSnippets_{part}.txt" for part in ("GroundTruth", "anonDataRatings")
    )
    texts.write_text("1\t0.5\tfine\n")
    for line, reason in (
        ("1\t0.5\t0.5\t[0, 2]", "the ratings have mean 1.0000"),
        ("1\t0.5\t0.5\t[0, 9]", "rating 9 is outside -4 to 4"),
        ("1\t0.5\t0.5\tzero", "'zero' is no list of ratings"),
        ("1\t0.5", "2 fields, expected 4"),
    ):
        ratings.write_text(line + "\n")
        with pytest.raises(InputError, match=f"anonDataRatings.txt:1: {reason}"):
            load_snippets("movie", tmp_path)
    ratings.write_text("2\t0.5\t0.5\t[0, 1]\n")
    with pytest.raises(InputError, match="GroundTruth.txt:1: no ratings of mean 0.5 for 1"):
        load_snippets("movie", tmp_path)
    ratings.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_snippets("movie", tmp_path)
