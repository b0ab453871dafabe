"""The synthetic world of opinions: its numbers, its split, its exact evaluation."""

from collections import Counter

import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.preference.opinions import (
    LABELS,
    OPTIONS,
    STYLES,
    OpinionWorld,
    belief_words,
    classify,
    draw_distribution,
    last_per_prompt,
    option_beliefs,
    verdicts,
    vocabulary,
    with_estimated_probabilities,
)
from jaxllm.preference.records import read_examples


@pytest.fixture(scope="module")
def world():
    return OpinionWorld(seed=0)


def test_distributions_have_the_mean_largest_share_of_the_specification():
    rng = np.random.default_rng(0)
    draws = [draw_distribution(rng) for _ in range(20_000)]
    # The standard error of the mean is 0.0013.
    assert np.mean([p.max() for _, p in draws]) == pytest.approx(0.583, abs=0.004)
    counts = Counter(len(beliefs) for beliefs, _ in draws)
    for size, share in {2: 0.16, 3: 0.20, 4: 0.33, 5: 0.31}.items():
        assert counts[size] / 20_000 == pytest.approx(share, abs=0.01)
    assert all(beliefs == OPTIONS[len(p)] for beliefs, p in draws)


def test_the_language_has_175_words_and_one_id_each(world):
    words = vocabulary()
    assert len(words) == len(set(words)) == 175 == world.tokenizer.vocab_size
    tokenizer = world.tokenizer
    assert tokenizer.encode("<Q> plain t0 t1<A>4<favour>") == [
        words.index(w) for w in ("<Q>", "plain", "t0", "t1", "<A>", "4", "<", "favour", ">")
    ]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 0) and tokenizer.adds_bos


def test_every_topic_is_seen_and_every_combination_of_the_test_is_not(world):
    splits = world.splits
    assert {name: len(prompts) for name, prompts in splits.items()} == {
        "train": 173, "eval": 19, "test": 48,
    }  # fmt: skip
    every = [prompt.text for prompts in splits.values() for prompt in prompts]
    assert len(set(every)) == 240
    assert sorted(p.topic for p in splits["test"]) == list(range(48))
    assert {p.topic for p in splits["train"]} == set(range(48))
    assert {p.style for p in splits["test"]} == set(STYLES)


def test_pairs_per_belief_are_floors_of_n_p(world):
    for pairs in (10, 100):
        found = Counter((r["prompt"], r["accept_choice_id"]) for r in world.rows("test", pairs))
        for prompt in world.splits["test"]:
            topic = world.topics[prompt.topic]
            for belief, share in enumerate(topic.probabilities):
                assert found[prompt.text, belief] == int(np.floor(pairs * share + 1e-9))
    assert sum(found.values()) > 48 * 95


def test_rejected_beliefs_are_even_over_the_others(world):
    counts = Counter()
    for row in world.rows("train", 100):
        assert row["reject_choice_id"] != row["accept_choice_id"]
        others = [LABELS.index(o) for o in row["options"] if o != row["accept_choice"]]
        assert row["reject_choice_id"] in others
        if len(others) == 4:
            counts[others.index(row["reject_choice_id"])] += 1
    total = sum(counts.values())
    # Four standard errors of a quarter of some 5,000.
    assert total > 3000
    assert all(abs(c / total - 0.25) < 4 * np.sqrt(0.1875 / total) for c in counts.values())


def test_rows_have_the_fields_of_gdpo_and_are_read_as_such(world, tmp_path):
    rows = world.rows("train")
    assert rows == OpinionWorld(seed=0).rows("train") != OpinionWorld(seed=1).rows("train")
    row = rows[0]
    assert set(row) == {
        "prompt", "accept_response", "reject_response", "accept_choice", "reject_choice", "style",
        "question", "options", "selections", "answers", "probabilities", "accept_choice_id",
        "reject_choice_id", "options_map",
    }  # fmt: skip
    assert sum(row["selections"]) == pytest.approx(1) == pytest.approx(sum(row["probabilities"]))
    world.write("train", tmp_path / "train.jsonl")
    examples = read_examples(tmp_path / "train.jsonl", world.tokenizer)
    assert len(examples) == len(rows) and not examples.joined
    for row, example in zip(rows, examples, strict=True):
        chosen, rejected = example.completion_ids
        assert len(example.prompt_ids) + len(chosen) == 16
        assert len(chosen) == len(rejected) == 10 and chosen[:4] == rejected[:4]
        # d < label, as one token each; the end mark belongs to the text after the belief.
        assert example.belief.span == (0, 3)
        assert example.belief.ids[row["accept_choice_id"]] == chosen[:1]
        assert example.belief.target == pytest.approx(row["probabilities"])


def test_the_classifier_is_exact(world):
    for belief in range(6):
        assert classify(" ".join(belief_words(belief)[:3])) == belief
    for row in world.rows("eval", 100):
        assert classify(row["accept_response"]) == row["accept_choice_id"]
        assert classify(row["reject_response"]) == row["reject_choice_id"]
        assert [LABELS[classify(answer)] for answer in row["answers"]] == row["options"]
    one, other = belief_words(1)[0], belief_words(2)[0]
    assert classify("so t0") is None and classify(f"{one} {other}") is None
    assert classify(f"{one} {other} {one} so") == 1


def test_verdicts_compare_the_answer_with_the_option_it_states(world):
    row = world.rows("test")[0]
    own, other = (f"{row['accept_choice_id']} < {row['accept_choice']} > {row[key]}" for key in (
        "accept_response", "reject_response"))  # fmt: skip
    unread = f"{row['accept_choice_id']} < maybe > {row['accept_response']}"
    assert verdicts([own, other, unread, own.replace(">", "")]) == [True, False, False, False]
    assert option_beliefs()[row["accept_choice"]] == row["accept_choice_id"]


def test_other_views_of_the_rows(world):
    rows = world.rows("train")
    last = last_per_prompt(rows)
    assert len(last) == len({row["prompt"] for row in rows})
    assert last[0] == [row for row in rows if row["prompt"] == rows[0]["prompt"]][-1]
    estimated = with_estimated_probabilities(rows)
    mine = [row["accept_choice_id"] for row in rows if row["prompt"] == rows[0]["prompt"]]
    wanted = np.bincount(mine, minlength=6) / len(mine)
    np.testing.assert_allclose(estimated[0]["probabilities"], wanted)
    assert [{**row, "probabilities": 0} for row in estimated] == [
        {**row, "probabilities": 0} for row in rows
    ]


def test_bad_requests():
    with pytest.raises(InputError, match="split 'dev' is not one of train, eval, test"):
        OpinionWorld().rows("dev")
    with pytest.raises(InputError, match="topics_count 0"):
        OpinionWorld(topics_count=0)
