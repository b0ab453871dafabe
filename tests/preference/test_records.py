"""Preference records: every format, and one test for each way they go wrong."""

import gzip
import json
import logging

import pytest

from jaxllm.data.chat import ChatTemplate
from jaxllm.data.images import bundled
from jaxllm.data.text_tokenizers import byte_tokenizer, train_bpe
from jaxllm.errors import InputError
from jaxllm.preference.formats import (
    Record,
    StatedBelief,
    option_beliefs,
    parse_preference,
    recognise,
)
from jaxllm.preference.records import (
    Belief,
    Example,
    Examples,
    Limits,
    RecordConfig,
    encode_records,
    read_examples,
    shorten,
)

BYTES = byte_tokenizer()
BOS, EOS = 256, 257
CHAT = ChatTemplate(
    "{{ bos_token }}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    BYTES.names,
)
GDPO = {
    "prompt": "Why?",
    "accept_response": "So.",
    "reject_response": "No > so.",
    "accept_choice": "Yes",
    "reject_choice": "No",
    "accept_choice_id": 4,
    "reject_choice_id": 2,
    "probabilities": [0, 0, 0.3, 0, 0.7, 0],
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows, template=None, tokenizer=BYTES, **config):
    path = write(tmp_path / "p.jsonl", *rows)
    return read_examples(path, tokenizer, RecordConfig(**config), template)


def text(ids):
    return BYTES.decode(ids)


def turn(role, content):
    return {"role": role, "content": content}


# -- formats -------------------------------------------------------------------------------------


def test_standard_pairs_get_bos_and_eos_once(tmp_path):
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 2}
    (example,) = read(tmp_path, row)
    assert example == Example(
        (BOS, *b"2+2="),
        ((*b"4", EOS), (*b"5", EOS)),
        margin=2.0,
        identity=f"{tmp_path / 'p.jsonl'}:1",
    )


def test_an_implicit_prompt_ends_with_whole_words():
    record = parse_preference({"chosen": "Q: hi A: great", "rejected": "Q: hi A: good, sure"})
    assert (record.prompt, record.completions) == ("Q: hi A:", (" great", " good, sure"))
    # One response may begin with the other.
    record = parse_preference({"chosen": "Q\nyes", "rejected": "Q\nyes, sure"})
    assert (record.prompt, record.completions) == ("Q\n", ("yes", "yes, sure"))
    with pytest.raises(InputError, match="share no first word"):
        parse_preference({"chosen": "great", "rejected": "good"})


def test_hh_dialogues_split_before_the_last_answer():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: joke\n\nAssistant:"
    record = parse_preference({"chosen": start + " ha", "rejected": start + " hm"})
    assert (record.prompt, record.completions) == (start, (" ha", " hm"))
    other = start.replace("hello", "hey")
    with pytest.raises(InputError, match="prompt mismatch: .* differ before their last answers"):
        parse_preference({"chosen": start + " ha", "rejected": other + " hm"})
    with pytest.raises(InputError, match="does not end with an answer"):
        parse_preference({"chosen": start + " ha\n\nHuman: bye", "rejected": start + " hm"})


@pytest.mark.parametrize("form", ["explicit", "implicit", "text prompt", "repeated prompt"])
def test_conversational_pairs(tmp_path, form):
    ask, good, bad = turn("user", "q"), turn("assistant", "yes"), turn("assistant", "no")
    row = {
        "explicit": {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        "implicit": {"chosen": [ask, good], "rejected": [ask, bad]},
        "text prompt": {"prompt": "q", "chosen": [good], "rejected": [bad]},
        "repeated prompt": {"prompt": "q", "chosen": [ask, good], "rejected": [ask, bad]},
    }[form]
    (example,) = read(tmp_path, row, template=CHAT)
    assert example.prompt_ids == (BOS, *b"<u>q", EOS, *b"\n<a>")
    # The line end that the template writes after the mark is not part of the response.
    assert example.completion_ids == ((*b"yes", EOS), (*b"no", EOS))


def test_a_template_without_end_mark_gets_eos(tmp_path):
    plain = ChatTemplate(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}",
        {},
    )
    row = {"prompt": "q", "completion": [turn("assistant", "yes")], "label": True}
    (example,) = read(tmp_path, row, template=plain)
    assert example.completion_ids == ((*b"yes\n", EOS),)


def test_unpaired_lists_and_ids(tmp_path):
    one, other = read(
        tmp_path,
        {"prompt": "p", "completion": "c", "label": 0},
        {"prompt_ids": [1], "completion_ids": [2, EOS], "label": True},
    )
    assert (one.desirable, other.desirable) == (False, True)
    assert other.prompt_ids == (1,) and other.completion_ids == ((2, EOS),)
    (listed,) = read(
        tmp_path, {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2.5]}
    )
    assert listed.scores == (1.0, 3.0, 2.5) and len(listed.completion_ids) == 3
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    (pair,) = read(tmp_path, row, tokenizer=None)  # A model without a tokenizer.
    assert pair.completion_ids == ((2,), (3,))


def test_gdpo_rows_state_the_accepted_belief_or_their_own(tmp_path):
    (example,) = read(tmp_path, GDPO)
    assert text(example.prompt_ids) == "<Q>Why?<A>"
    assert [text(ids) for ids in example.completion_ids] == ["4<Yes>So.", "4<Yes>No > so."]
    # Up to the first end mark, wherever the answer has another one.
    assert example.belief.span == (0, 5) and text(example.completion_ids[0][:5]) == "4<Yes"
    assert example.belief.ids == tuple((ord(d),) for d in "012345")
    assert example.belief.target == pytest.approx((0, 0, 0.3, 0, 0.7, 0))
    (own,) = read(tmp_path, {**GDPO, "context": "US "}, belief_pairs="different")
    assert (
        text(own.prompt_ids) == "US <Q>Why?<A>" and text(own.completion_ids[1]) == "2<No>No > so."
    )
    review = {k: v for k, v in GDPO.items() if not k.endswith("_choice")}
    (example,) = read(tmp_path, review)
    assert text(example.completion_ids[0]) == "4So." and example.belief.span == (0, 1)


def test_pandalm_votes_give_pairs_or_soft_labels(tmp_path):
    path = bundled("pandalm", "testset-v1.json")
    pairs = read_examples(path, BYTES, RecordConfig(skip_bad=True))
    rows = json.loads(path.read_text())
    assert len(pairs) + len(pairs.skipped) == len(rows) == 999
    reasons = [line.rsplit(": ", 1)[1] for line in pairs.skipped]
    tied = sum(
        [r[f"annotator{i}"] for i in (1, 2, 3)].count(1)
        == [r[f"annotator{i}"] for i in (1, 2, 3)].count(2)
        for r in rows
    )
    assert reasons.count("the annotators prefer neither response (a tie)") == tied > 50
    row = {"instruction": "Add.", "input": "1 2", "response1": "3", "response2": "4"}
    votes = {"annotator1": 2, "annotator2": 2, "annotator3": 0}
    record = parse_preference(row | votes)
    assert record.prompt == "Add.\n\n1 2\n\n" and record.completions == ("4", "3")
    assert record.margin == pytest.approx(2 / 3)
    soft = parse_preference(row | votes, "pandalm_soft")
    assert soft.completions == ("3", "4") and soft.scores == pytest.approx((1 / 6, 5 / 6))
    with pytest.raises(InputError, match="vote is 3, expected 1, 2 or 0"):
        parse_preference(row | {**votes, "annotator3": 3})


def test_llmbar_and_recognition():
    row = {"input": "q", "output_1": "a", "output_2": "b", "label": 2}
    assert parse_preference(row).completions == ("b", "a")
    assert recognise(GDPO) == "gdpo"
    with pytest.raises(InputError, match="expected `chosen` and `rejected`.*found text"):
        recognise({"text": "a"})


def test_files_may_be_json_lists_or_compressed(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "p.json").write_text(json.dumps([row, row]))
    assert len(read_examples(tmp_path / "p.json", BYTES)) == 2
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert len(read_examples(tmp_path / "p.jsonl.gz", BYTES)) == 1
    (tmp_path / "p.json").write_text(json.dumps([row, 3]))
    with pytest.raises(InputError, match=r"p.json:2: expected a JSON object, found int"):
        read_examples(tmp_path / "p.json", BYTES)
    (tmp_path / "p.jsonl.gz").write_bytes(b"text")
    for name, reason in (("p.jsonl.gz", "not a whole gzip"), ("gone.json", "no such file")):
        with pytest.raises(InputError, match=reason):
            read_examples(tmp_path / name, BYTES)


def test_beliefs_of_several_tokens(tmp_path):
    row = {"prompt": "q ", "chosen": "yes. ok", "rejected": "yes. eh", "belief": "yes"}
    row |= {"beliefs": ["yes.", "no."], "probabilities": [0.8, 0.2]}
    (example,) = read(tmp_path, row)
    assert example.belief == Belief((0, 3), (0.8, 0.2), (tuple(b"yes."), tuple(b"no.")))
    with pytest.raises(InputError, match="one belief's tokens begin another's"):
        read(tmp_path, {**row, "beliefs": ["yes", "yes."]})
    with pytest.raises(InputError, match="must begin with the belief 'no'"):
        read(tmp_path, {**row, "belief": "no"})


def test_the_option_map_has_the_published_classes():
    found = list(option_beliefs().values())
    counts = {belief: found.count(belief) for belief in set(found)}
    assert counts == {0: 4, 1: 42, 2: 118, 3: 33, 4: 126, 5: 50} and len(found) == 373


# -- what goes wrong -----------------------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
LABELLED = {"prompt": "p", "completion": "c", "label": 1}
LIST = {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "rejected": "a"}, "chosen and rejected are equal"),
        ({"chosen": "a b", "rejected": "a b"}, "chosen and rejected are equal"),
        ({**PAIR, "rejected": " \n"}, "a response is empty"),
        ({**PAIR, "chosen": ""}, "a response is empty"),
        ({"prompt": "p", "chosen": "a"}, "field `rejected` is missing"),
        ({"completion": "a", "label": 1}, "field `prompt` is missing"),
        ({**PAIR, "prompt": 3}, "`prompt` is a int, expected text or messages"),
        ({**PAIR, "prompt_ids": [1]}, "both `prompt` and `prompt_ids` are given"),
        ({**PAIR, "margin": float("nan")}, "`margin` holds nan, expected finite numbers"),
        ({**PAIR, "chosen": [turn("assistant", "x")]}, "are of different forms"),
        ({**LABELLED, "label": 2}, "`label` is 2, expected true, false, 0 or 1"),
        ({**LABELLED, "label": "yes"}, "`label` is 'yes', expected"),
        ({**LABELLED, "label": None}, "`label` is None, expected"),
        ({**LABELLED, "density_ratio": 0}, "`density_ratio` is 0, expected above 0"),
        ({**LABELLED, "density_ratio": "x"}, "`density_ratio` holds 'x', expected finite"),
        ({**PAIR, "target": " "}, "`target` is empty"),
        ({**PAIR, "target_ids": [1]}, "`target` and `chosen` are of different forms"),
        ({"chosen": "a b", "rejected": "a c", "target": "d"}, "`target` needs `prompt`"),
        ({**LIST, "scores": [1]}, "`scores` must be a list of 2 numbers"),
        ({**LIST, "scores": [1, float("inf")]}, "`scores` holds inf"),
        ({**LIST, "completions": ["a"]}, "at least two completions"),
        ({**GDPO, "probabilities": [0, 0, 0.3, 0, 0.5, 0]}, "`probabilities` sum to 0.8"),
        ({**GDPO, "probabilities": [-0.1, 0, 0.3, 0, 0.8, 0]}, "with least -0.1"),
        ({**GDPO, "accept_choice_id": 6}, "`accept_choice_id` is 6, expected 0 to 5"),
        ({**GDPO, "reject_response": ""}, "a response is empty"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [999]}, "token id 999 is outside"),
        ({"prompt_ids": [], "completion_ids": [2], "label": 1}, "the prompt is empty"),
    ],
)
def test_bad_records_are_one_line_with_file_and_row(tmp_path, row, reason):
    with pytest.raises(InputError) as caught:
        read(tmp_path, PAIR, row)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'p.jsonl'}:2: ") and "\n" not in message
    assert reason in message


def test_probabilities_within_the_tolerance_are_normalised(tmp_path):
    (example,) = read(tmp_path, {**GDPO, "probabilities": [0, 0, 0.301, 0, 0.7, 0]})
    assert sum(example.belief.target) == pytest.approx(1, abs=1e-12)


def test_skipped_records_are_counted_and_listed(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, PAIR, {**PAIR, "chosen": "b"}, {"prompt": "x"}, skip_bad=True)
    assert len(found) == 1 and len(found.skipped) == 2
    path = tmp_path / "p.jsonl"
    assert found.skipped[0] == f"{path}:2: chosen and rejected are equal"
    assert found.skipped[1].startswith(f"{path}:3: expected `chosen`")
    assert "2 records are left out" in caplog.text
    with pytest.raises(InputError, match="p.jsonl: holds no usable preference records"):
        read(tmp_path, {"prompt": "x"}, skip_bad=True)


def test_double_eos_of_a_text_that_spells_the_end_mark(tmp_path):
    with pytest.raises(InputError, match="its end mark would be double"):
        read(tmp_path, {**PAIR, "chosen": "a<|eos|>"})


def test_double_eos_of_a_chat(tmp_path):
    said = [turn("assistant", "x<|eos|>")]
    with pytest.raises(InputError, match="p.jsonl:1: a response ends with two end marks"):
        read(tmp_path, {"prompt": "q", "completion": said, "label": 1}, template=CHAT)


def test_double_eos_of_ids(tmp_path):
    with pytest.raises(InputError, match="two end marks"):
        read(tmp_path, {"prompt_ids": [1], "completion_ids": [2, EOS, EOS], "label": 1})


def test_a_space_at_the_end_of_a_prompt_joins_the_response(tmp_path, caplog):
    """`tell me ` + `yes` is not tokenised as its parts are: the space belongs to the next word."""
    bpe = train_bpe(["tell me yes tell me no " * 20], 300)
    row = {"prompt": "tell me ", "chosen": "yes", "rejected": "no"}
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, row, tokenizer=bpe)
    (example,) = found
    for ids, said in zip(example.completion_ids, ("yes", "no"), strict=True):
        assert [*example.prompt_ids, *ids] == bpe.encode(f"tell me {said}", bos=True, eos=True)
    assert found.joined == [example.identity] and "across the end of the prompt" in caplog.text
    with pytest.raises(InputError, match="p.jsonl:1: prompt mismatch: its last token merges"):
        read(tmp_path, row, tokenizer=bpe, boundary="refuse")
    clean = read(tmp_path, {**row, "prompt": "tell me", "chosen": " yes"}, tokenizer=bpe)
    assert clean.joined == []


def test_a_prompt_that_a_template_renders_otherwise(tmp_path):
    fickle = ChatTemplate(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", {}
    )
    row = {"prompt": "q", "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]}
    with pytest.raises(InputError, match="prompt mismatch: the template renders"):
        read(tmp_path, row, template=fickle)
    with pytest.raises(InputError, match="messages need a chat template"):
        read(tmp_path, row)


def test_turns_that_are_not_the_assistants(tmp_path):
    ask, good, bad = turn("user", "q"), turn("assistant", "yes"), turn("assistant", "no")
    for chosen, rejected, reason in (
        ([ask, good, ask, good], [ask, bad], "holds a turn of 'user'"),
        ([good], [bad], "do not end with a question"),
        ([ask, good, good], [ask, good, bad], "do not end with a question"),
    ):
        with pytest.raises(InputError, match=reason):
            read(tmp_path, {"chosen": chosen, "rejected": rejected}, template=CHAT)


def test_an_empty_prompt_begins_with_bos_or_eos():
    (example,) = encode_records([Record("", ("a", "b"))], BYTES)
    assert example.prompt_ids == (BOS,) and example.completion_ids[0] == (*b"a", EOS)


def test_supervised_answers_and_density_ratios(tmp_path):
    (pair,) = read(tmp_path, {**PAIR, "target": "best"})
    assert pair.target_ids == (*b"best", EOS) and len(pair.completion_ids) == 2
    assert shorten(pair, Limits(max_completion=2)).target_ids == (*b"be",)
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "target_ids": [4, 5]}
    assert read(tmp_path, ids, tokenizer=None)[0].target_ids == (4, 5)
    ask, best = turn("user", "q"), turn("assistant", "best")
    row = {
        "prompt": [ask],
        "chosen": [turn("assistant", "a")],
        "rejected": [turn("assistant", "b")],
    }
    (chat,) = read(tmp_path, {**row, "target": [ask, best]}, template=CHAT)
    assert chat.target_ids == (*b"best", EOS)
    (label,) = read(tmp_path, {**LABELLED, "density_ratio": 3})
    assert label.density_ratio == 3.0 and label.target_ids is None


# -- limits --------------------------------------------------------------------------------------

LONG = Example((1, 2, 3, 4), ((5, 6, 7, EOS), (5, 8, EOS)), identity="x:1")


def test_limits_cut_prompts_at_either_end_and_responses_at_theirs():
    assert shorten(LONG, Limits()) == LONG
    assert shorten(LONG, Limits(max_prompt=2)).prompt_ids == (3, 4)
    assert shorten(LONG, Limits(max_prompt=2, keep_prompt="start")).prompt_ids == (1, 2)
    cut = shorten(LONG, Limits(max_completion=3))
    assert cut.completion_ids == ((5, 6, 7), (5, 8, EOS))  # No EOS where it was not the end.
    assert shorten(LONG, Limits(max_length=6)).completion_ids == ((5, 6), (5, 8))
    with pytest.raises(InputError, match="max_prompt 0 is too small"):
        Limits(max_prompt=0)


def test_truncation_that_empties_a_response(tmp_path):
    with pytest.raises(InputError, match="a prompt of 4 tokens fills max_length 4"):
        shorten(LONG, Limits(max_length=4))
    with pytest.raises(InputError, match=r"p.jsonl:1: truncation empties .* hold only the belief"):
        read(tmp_path, GDPO, limits=Limits(max_completion=5))
    (kept,) = read(tmp_path, {**GDPO, "accept_response": "xo"}, limits=Limits(max_completion=7))
    assert text(kept.completion_ids[0]) == "4<Yes>x"


def test_truncation_that_makes_a_pair_equal():
    with pytest.raises(InputError, match="equal in their first 1 tokens"):
        shorten(LONG, Limits(max_completion=1))


def test_examples_are_kept_as_they_are():
    belief = Belief((0, 1), (0.5, 0.5), ((1,), (2,)))
    given = [
        LONG,
        Example((1,), ((2,),), desirable=True),
        Example((1, 2), ((3, 4), (5,), (6,)), scores=(1.0, 0.0, 2.0), belief=belief),
    ]
    kept = Examples(given)
    assert list(kept) == given and kept[-1] == given[-1] and list(kept[1:]) == given[1:]


def test_beliefs_made_in_memory():
    stated = StatedBelief("1<a", ("0", "1"), (0.25, 0.75))
    (example,) = encode_records([Record("q", ("1<a>x", "1<a>y"), belief=stated)], BYTES)
    assert example.belief == Belief((0, 3), (0.25, 0.75), ((ord("0"),), (ord("1"),)))
    assert example.identity == "record:1"
    with pytest.raises(InputError, match="record:1: a response does not begin with '1<a'"):
        encode_records([Record("q", ("1<b>x", "1<a>y"), belief=stated)], BYTES)
