"""Head scores: the file format, shares and groups, Eq. 1 and Eq. 2 against loops, spans, gates."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
from kv_reference import DUO, LLAMA, MISTRAL, needs

from jaxllm.errors import InputError
from jaxllm.kvcompress.scores import (
    find_span,
    generating_rows,
    passes_argmax,
    passes_qa_f1,
    passes_rouge,
    read_duo_scores,
    read_scores,
    reasoning_scores,
    reduce_groups,
    retrieval_scores,
    shares,
    top_heads,
    write_scores,
)

# -- files ----------------------------------------------------------------------------------------


def test_a_score_file_is_one_line_in_row_major_order(tmp_path):
    runs = np.array([[[0.0, 0.5], [1.25, 1e-7]], [[2.0, 0.1], [0.0, 0.3]]])
    path = tmp_path / "deep" / "scores.json"
    write_scores(path, runs)
    assert path.read_text() == (
        '{"0-0": [0, 0.5], "0-1": [1.25, 1e-07], "1-0": [2, 0.1], "1-1": [0, 0.3]}'
    )
    np.testing.assert_array_equal(read_scores(path), runs)
    # Heads are found by name, not by place.
    path.write_text('{"0-1": [2], "0-0": [1]}\n')
    np.testing.assert_array_equal(read_scores(path), [[[1], [2]]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0-0": [1], "0-0": [2]}', "head '0-0' is there twice"),
        ('{"0-0": [1], "1-1": [2], "1-0": [2]}', "head '0-1' is missing of 2x2"),
        ('{"0-0": [1, 2], "0-1": [2]}', "head '0-1' has 1 runs, expected 2"),
        ('{"0-0": [], "0-1": []}', "head '0-0' has 0 runs, expected some"),
        ('{"0-0": 3}', "head '0-0' has int runs"),
        ('{"0-0": [1], "0-1": [NaN]}', "head '0-1' run 0 is nan"),
        ('{"0-0": [1], "0-1": [Infinity]}', "head '0-1' run 0 is inf"),
        ('{"0-0": [true]}', "head '0-0' run 0 is True"),
        ('{"0-0": ["1"]}', "head '0-0' run 0 is '1'"),
        ('{"0_0": [1]}', "key '0_0', expected 'layer-head'"),
        ('{"00-0": [1]}', "key '00-0', expected '0-0'"),
        ("[1]", "expected a JSON object of heads"),
        ("{}", "expected a JSON object of heads"),
        ('{"0-0": [1]', "not JSON"),
    ],
)
def test_a_bad_score_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        read_scores(path)


def test_bad_scores_are_not_written(tmp_path):
    for runs, message in [
        (np.ones((2, 2)), "shape"),
        (np.ones((2, 2, 0)), "shape"),
        (np.array([[[1.0], [np.nan]]]), "head '0-1' run 0 is nan"),
    ]:
        with pytest.raises(InputError, match=message):
            write_scores(tmp_path / "scores.json", runs)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no such file"):
        read_scores(tmp_path / "scores.json")


def test_duo_scores_are_a_line_per_layer(tmp_path):
    path = tmp_path / "heads.tsv"
    path.write_text("0.5\t-1e-3\n1.0\t0.25\n")
    np.testing.assert_array_equal(read_duo_scores(path), [[0.5, -0.001], [1.0, 0.25]])
    for content, message in [
        ("0.5\t1\n0.5\n", ":2: 1 heads, expected 2"),
        ("0.5\tx\n", ":1: could not convert"),
        ("0.5\tnan\n", ":1: holds a value"),
        ("", "holds no heads"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_duo_scores(path)


@needs(LLAMA)
def test_the_released_llama_scores(tmp_path):
    runs = read_scores(LLAMA)
    assert runs.shape == (32, 32, 74)
    mean = runs.mean(axis=-1)
    assert top_heads(mean, 10) == [
        *((15, 30), (8, 11), (16, 1), (8, 1), (20, 1)),
        *((24, 27), (20, 26), (17, 29), (13, 18), (20, 14)),
    ]
    best = [mean[head] for head in top_heads(mean, 6)]
    np.testing.assert_allclose(best, [0.3443, 0.3292, 0.3010, 0.2546, 0.2391, 0.2362], atol=5e-5)
    np.testing.assert_allclose(mean.sum(), 22.873, atol=5e-4)
    assert np.sum(mean == 0) == 2
    share = np.sort(shares(mean), axis=None)[::-1]
    held = [int(np.searchsorted(share.cumsum(), mass)) + 1 for mass in (0.5, 0.8, 0.9)]
    assert held == [76, 187, 263]
    write_scores(tmp_path / "again.json", runs)
    assert (tmp_path / "again.json").read_bytes() == LLAMA.read_bytes()


@needs(MISTRAL)
def test_the_released_mistral_scores():
    runs = read_scores(MISTRAL)
    assert runs.shape == (32, 32, 76)
    assert top_heads(runs.mean(axis=-1), 10) == [
        *((18, 0), (7, 18), (19, 9), (18, 2), (12, 7)),
        *((18, 22), (18, 3), (15, 27), (28, 0), (19, 8)),
    ]


@needs(DUO)
def test_the_released_duo_scores():
    scores = read_duo_scores(DUO)
    assert scores.shape == (32, 8) and -0.1 < scores.min() < scores.max() < 1.1
    np.testing.assert_allclose(scores[0, :3], [0.60546875, 0, 0.96875])


# -- shares and groups ----------------------------------------------------------------------------


def test_shares_sum_to_one_and_sharpen_with_the_exponent():
    scores = np.array([[1.0, 3.0], [0.0, 4.0]])
    np.testing.assert_allclose(shares(scores), [[1 / 8, 3 / 8], [0, 4 / 8]])
    np.testing.assert_allclose(shares(scores, 2.0), [[1 / 26, 9 / 26], [0, 16 / 26]])
    np.testing.assert_allclose(shares(scores - [[0, 0], [2, 0]]), shares(scores))
    for bad, temperature in [(scores * 0, 1), (scores * np.nan, 1), (scores, 0)]:
        with pytest.raises(InputError):
            shares(bad, temperature)


def test_query_heads_of_a_group_become_one_kv_head():
    scores = np.array([[1.0, 3.0, 0.0, 4.0]])
    for reduction, expected in [("mean", [[2, 2]]), ("max", [[3, 4]]), ("sum", [[4, 4]])]:
        np.testing.assert_array_equal(reduce_groups(scores, 2, reduction), expected)
    np.testing.assert_array_equal(reduce_groups(scores, 4), scores)
    with pytest.raises(InputError, match="do not fit 3 KV heads"):
        reduce_groups(scores, 3)
    with pytest.raises(InputError, match="reduction 'median'"):
        reduce_groups(scores, 2, "median")
    assert top_heads(scores, 3) == [(0, 3), (0, 1), (0, 0)]


# -- estimators -----------------------------------------------------------------------------------


def rows(seed=0, batch=3, heads=4, steps=6, keys=20):
    rng = np.random.default_rng(seed)
    # Coarse weights, so that ties and hits occur.
    raw = rng.integers(0, 6, (batch, heads, steps, keys)).astype(np.float32)
    attention = raw / raw.sum(-1, keepdims=True)
    ids = rng.integers(0, 4, (batch, keys))
    generated = rng.integers(0, 4, (batch, steps))
    span = np.array([[3, 7], [0, 5], [18, 20]])
    there = np.arange(steps) < np.array([[6], [4], [6]])
    return attention, ids, generated, span, there


@pytest.mark.parametrize("beyond", [False, True])
def test_eq_1_equals_a_loop(beyond):
    attention, ids, generated, span, there = rows()
    found = retrieval_scores(
        *map(jnp.asarray, (attention, ids, generated, span, there)), beyond_answer=beyond
    )
    expected = np.zeros((3, 4))
    for b, h, t in np.ndindex(3, 4, 6):
        start, end = span[b]
        if not there[b, t] or (t >= end - start and not beyond):
            continue
        best = int(np.argmax(attention[b, h, t]))
        if start <= best < end and ids[b, best] == generated[b, t]:
            expected[b, h] += 1 / (end - start)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected.max() > 0


def test_eq_1_exceeds_one_only_beyond_the_answer():
    """A head that looks at the right copy in all six steps, for an answer of two tokens."""
    attention = np.zeros((1, 1, 6, 8), np.float32)
    attention[..., 4] = 1
    ids, generated = np.full((1, 8), 5), np.full((1, 6), 5)
    args = (attention, ids, generated, np.array([[4, 6]]), np.ones((1, 6), bool))
    args = tuple(map(jnp.asarray, args))
    assert retrieval_scores(*args) == 1 and retrieval_scores(*args, beyond_answer=True) == 3


def test_eq_2_equals_a_loop():
    attention, _, _, span, there = rows(1)
    found = reasoning_scores(*map(jnp.asarray, (attention, span, there)))
    expected = np.zeros((3, 4))
    for b, h, t in np.ndindex(3, 4, 6):
        start, end = span[b]
        length = end - start
        if not there[b, t] or t >= length:
            continue
        order = np.argsort(-attention[b, h, t], kind="stable")[:length]
        for place in order:
            if start <= place < end:
                expected[b, h] += attention[b, h, t, place] / length
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0 < expected.max() <= 1


def test_eq_2_is_at_most_one_and_ignores_other_tokens():
    attention = np.zeros((1, 2, 3, 9), np.float32)
    attention[0, 0, :, 5:8] = 1 / 3  # All on the answer,
    attention[0, 1, :, 0:3] = 0.3  # three larger weights elsewhere.
    attention[0, 1, :, 5] = 0.1
    found = reasoning_scores(jnp.asarray(attention), jnp.array([[5, 8]]), jnp.ones((1, 3), bool))
    np.testing.assert_allclose(found, [[1, 0]], atol=1e-6)


def test_the_row_before_a_token_generates_it():
    np.testing.assert_array_equal(generating_rows(5, 3), [4, 5, 6])
    with pytest.raises(InputError, match="index 0"):
        generating_rows(0, 3)


# -- spans and gates ------------------------------------------------------------------------------


def test_a_span_is_found_exactly_or_by_the_released_rules():
    ids = [1, 7, 8, 9, 5, 5, 7, 8, 2, 7, 8]
    assert find_span(ids, [7, 8, 9]) == (1, 4)
    assert find_span(ids, [7, 8, 2]) == (6, 9)
    # Over 90 % of three tokens is all three, in any order: the first window wins.
    assert find_span(ids, [9, 8, 7], "overlap90") == (1, 4)
    # [7, 8, 4]: two of three at 0, 1, 5, 6, 7 and 8; the last window counts.
    assert find_span(ids, [7, 8, 4], "largest_overlap") == (8, 11)
    for needle, rule, message in [
        ([7, 8], "exact", "there 3 times"),
        ([4, 4], "exact", "there 0 times"),
        ([], "exact", "empty needle"),
        ([7, 8, 4], "overlap90", "overlaps the needle enough"),
        ([4, 6], "largest_overlap", "overlaps the needle enough"),
        ([7, 8], "first", "rule 'first'"),
    ]:
        with pytest.raises(InputError, match=message):
            find_span(ids, needle, rule)


def test_gates_ask_for_more_than_half():
    assert passes_rouge("he hid the key", "the copper key")  # 2 of 3 words.
    assert not passes_rouge("key", "copper key")  # 1 of 2 is not more than half.
    assert passes_qa_f1("copper key", "the copper key in it")  # 2 * 2 / (2 + 4)
    assert not passes_qa_f1("key", "copper key lies")
    predicted = np.array([[1, 2, 3, 9], [1, 2, 9, 9], [1, 2, 9, 4]])
    answer = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 0]])
    steps = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(passes_argmax(predicted, answer, steps), [True, False, True])
