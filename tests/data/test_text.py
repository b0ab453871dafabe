"""Text sources: splits, kinds of records, the token cache, resuming, and bad records."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxllm.data import line_file, text
from jaxllm.data.images import bundled
from jaxllm.data.line_file import LineFile
from jaxllm.data.pipeline import Batches
from jaxllm.data.text import TextDataConfig, encode_record, open_text, read_records, record_texts
from jaxllm.data.text_tokenizers import byte_tokenizer, save_tokenizer, train_bpe
from jaxllm.data.token_cache import Document, cached_tokens
from jaxllm.errors import InputError

BYTES = byte_tokenizer()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def config(tmp_path):
    return TextDataConfig(cache=str(tmp_path / "cache"), row_length=16, batch_size=2)


def write(path: Path, *records) -> str:
    lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def documents(rows):
    return [rows.cache.tokens(i).tolist() for i in range(len(rows.cache))]


# -- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_lines_of_a_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(line_file, "BLOCK", block)
    path = tmp_path / "a.txt"
    for content, expected in (
        ("a\n\nbc\n", [b"a", b"", b"bc"]),
        ("a\u2028b\r\nc", ["a\u2028b\r".encode(), b"c"]),
        ("\ufeffa\n", [b"a"]),
        ("\n", [b""]),
    ):
        path.write_bytes(content.encode())
        lines = LineFile(path)
        assert [lines[i] for i in range(len(lines))] == expected
        with pytest.raises(IndexError):
            lines[len(expected)]
    assert lines.where(0) == f"{path}:1"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="a.txt: is empty"):
        LineFile(path)
    with pytest.raises(InputError, match="gone.txt: no such file"):
        LineFile(tmp_path / "gone.txt")
    path.write_bytes(b"abc\n")
    lines = LineFile(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="became shorter while it was read"):
        lines[0]


# -- a text file ---------------------------------------------------------------------------------


def test_the_bundled_text_is_cut_at_a_line_end_and_returned_whole(config):
    whole = bundled("text", "tinyshakespeare.txt").read_text()
    parts = {}
    for split in ("train", "validation"):
        rows = open_text(config, BYTES, split)
        parts[split] = "".join(BYTES.decode(ids) for ids in documents(rows))
        assert rows.cache.text_bytes == len(parts[split].encode())
        assert all(ids[0] == 256 and ids[-1] == 257 for ids in documents(rows))
        assert not rows.cache.weighted
        targets = sum(int(rows[i]["weights"].sum()) for i in range(0, len(rows), 500))
        assert targets > 0 and rows.plan.filled > 0.99
    assert parts["train"] + parts["validation"] == whole
    assert parts["train"].endswith("\n") and 0.1 > len(parts["validation"]) / len(whole) > 0.0999


@pytest.mark.parametrize("content", ["你" * 50, "ab\ncd\n" * 30, "x" * 7 + "\n" + "你" * 20, "a\n"])
def test_streams_are_cut_at_lines_or_characters(config, tmp_path, monkeypatch, content):
    """Whatever the lines are like, the parts make up the file, and none is long."""
    monkeypatch.setattr(text, "DOCUMENT_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_text(content)
    for fraction in (0.0, 0.3):
        one = replace(config, file=str(path), validation_fraction=fraction)
        splits = [[r["text"] for _, r in read_records(one, s)] for s in ("train", "validation")]
        assert "".join(splits[0] + splits[1]) == content
        assert all(len(part.encode()) <= 22 for part in splits[0] + splits[1])
        assert bool(splits[1]) == bool(fraction)
        if content.startswith("ab"):
            assert all(part.endswith("\n") for part in splits[0] + splits[1])
        assert list(record_texts(one)) == splits[0]


def test_a_document_a_line_and_a_validation_file(config, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\ntwo\nthree\n" + b"x\n" * 16)
    lines = replace(config, file=str(path), documents="line", validation_fraction=0.25)
    train, held_out = (open_text(lines, BYTES, split) for split in ("train", "validation"))
    found = [BYTES.decode(ids) for rows in (train, held_out) for ids in documents(rows)]
    assert sorted(found) == sorted(["one", "two", "three"] + ["x"] * 16)
    assert 0 < len(held_out.cache) <= 5
    again = open_text(replace(lines, cache=str(tmp_path / "c2")), BYTES, "validation")
    assert documents(again) == documents(held_out)
    other = open_text(replace(lines, split_seed=1), BYTES, "validation")
    assert other.cache.lines.tolist() != held_out.cache.lines.tolist()
    two = replace(lines, validation_file=str(path))
    assert len(open_text(two, BYTES, "train").cache) == 19
    assert documents(open_text(two, BYTES, "train")) == documents(
        open_text(two, BYTES, "validation")
    )


# -- records -------------------------------------------------------------------------------------


def test_which_tokens_of_each_kind_of_record_count(config, tmp_path):
    save_tokenizer(BYTES, tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text(TEMPLATE)
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "né"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "k"},
    ]
    file = write(
        tmp_path / "a.jsonl",
        {"text": "ab", "id": 7},
        {"prompt": "q ", "completion": "a"},
        "",
        {"prompt_ids": [256, 5], "completion_ids": [6, 7]},
        {"prompt": "q", "completion_ids": [6, 257]},
        {"prompt_ids": [1, 2], "completion": "b"},
        {"messages": talk},
    )
    both = replace(
        config,
        file=file,
        validation_fraction=0.0,
        chat_template=str(tmp_path / "chat"),
        packing="none",
        row_length=32,
    )
    rows = open_text(both, BYTES, "train")
    b, e = 256, 257
    turns = [b, *b"u:q", e, *b"a:", *"né".encode(), e, *b"u:r", e, *b"a:", *b"k", e]
    expected = [
        ([b, 97, 98, e], [1, 2, 3]),
        ([b, *b"q a", e], [3, 4]),
        ([b, 5, 6, 7], [2, 3]),
        ([b, *b"q", 6, e], [2, 3]),
        ([1, 2, 98, e], [2, 3]),
        (turns, [7, 8, 9, 10, 17, 18]),
    ]
    assert len(rows) == len(rows.cache) == len(expected) and rows.cache.lines[2] == 3
    for i, (ids, counted) in enumerate(expected):
        row, n = rows[i], len(ids) - 1
        assert row["tokens"][:n].tolist() == ids[:-1] and row["targets"][:n].tolist() == ids[1:]
        assert (np.flatnonzero(row["weights"]) + 1).tolist() == counted
        assert row["segment_ids"].tolist() == [1] * n + [0] * (32 - n)
    # ab; a; the bytes 6 7; 6; b; and what the assistant wrote with its end mark, twice.
    assert rows.cache.text_bytes == 2 + 1 + 2 + 1 + 1 + (3 + 7) + (1 + 7)


def test_where_a_text_begins():
    """With EOS where there is no BOS; without either, its first token is no target."""
    assert encode_record({"text": "ab"}, replace(BYTES, bos=None), None).ids == [257, 97, 98, 257]
    bare = encode_record({"text": "éb"}, replace(BYTES, bos=None, eos=None), None)
    assert bare == Document([0xC3, 0xA9, 98], None, 3 - len("\ufffd".encode()))
    assert encode_record({"text": "a"}, replace(BYTES, bos=None, eos=None), None) is None
    prompt = {"prompt": "a", "completion": "b"}
    assert encode_record(prompt, replace(BYTES, adds_bos=False), None).ids == [97, 98, 257]


def test_records_with_nothing_to_predict_are_counted_and_named(config, tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", {"text": ""}, {"text": "a"}, {"text": ""})
    with caplog.at_level(logging.WARNING):
        found = open_text(replace(config, file=file, validation_fraction=0), BYTES, "train")
    assert found.cache.skipped == [0, 2] and len(found.cache) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("2 records have no token to predict") and f"{file}:1, {file}:3" in line


BAD_RECORDS = {
    '{"text": 3}': "`text` is a int, expected text",
    '{"text": "a", "prompt": "b"}': "expected `text`, `messages`, or .* found text and prompt",
    '{"prompt": "b"}': "found prompt$",
    '{"x": "b"}': "found none of them",
    '{"prompt": "b", "prompt_ids": [1]}': "found prompt and prompt_ids",
    '{"prompt": "b", "completion": null}': "`completion` is a NoneType",
    '{"prompt_ids": [1, 259], "completion": "a"}': "`prompt_ids` holds 259, outside .* of 259",
    '{"prompt": "a", "completion_ids": [true]}': "`completion_ids` must be a list of token ids",
    '{"prompt": "a", "completion_ids": []}': "`completion_ids` must be a list of token ids",
    '{"messages": [{"role": "user", "content": "x"}]}': "hold no turn of the assistant",
    '{"messages": "x"}': "messages is a str, expected a list",
    '{"text": "\\ud800"}': "lone surrogate",
    "[1]": "expected a JSON object, found list",
    "{": "not JSON",
}


@pytest.mark.parametrize("record", BAD_RECORDS)
def test_a_bad_record_is_named_by_its_line(config, tmp_path, record):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    file = write(tmp_path / "a.jsonl", {"text": "fine"}, record)
    bad = replace(config, file=file, validation_fraction=0, chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(InputError, match=BAD_RECORDS[record]) as error:
        open_text(bad, BYTES, "train")
    assert str(error.value).startswith(f"{file}:2: ") and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_refusals(config, tmp_path):
    talk = {"messages": [{"role": "assistant", "content": "x"}]}
    file = write(tmp_path / "a.jsonl", talk, {"text": "0123456789abcdef"})
    with pytest.raises(InputError, match="a.jsonl:1: `messages` need a chat template"):
        open_text(replace(config, file=file, validation_fraction=0), BYTES, "train")
    file = write(tmp_path / "b.jsonl", {"text": "a"}, {"text": "0123456789abcdef"})
    whole = replace(config, file=file, validation_fraction=0)
    assert len(open_text(whole, BYTES, "train")) == 2
    with pytest.raises(InputError, match="b.jsonl:2 has 18 tokens, rows of 16 hold 17"):
        open_text(replace(whole, long_documents="refuse"), BYTES, "train")
    with pytest.raises(InputError, match="b.jsonl: the validation split has no document"):
        open_text(replace(whole, validation_fraction=0.1), BYTES, "validation")
    with pytest.raises(InputError, match="gone.txt: no such file"):
        open_text(replace(config, file=str(tmp_path / "gone.txt")), BYTES, "train")
    (tmp_path / "c.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(InputError, match="c.txt:1: not UTF-8 text at byte 5 from there"):
        open_text(replace(config, file=str(tmp_path / "c.txt")), BYTES, "train")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match="d.jsonl:1: not UTF-8 text at byte 10 of the line"):
        open_text(replace(whole, file=str(tmp_path / "d.jsonl")), BYTES, "train")
    with pytest.raises(InputError, match=r"validation_fraction 1.0 is outside \[0, 1\)"):
        TextDataConfig(validation_fraction=1.0)
    with pytest.raises(InputError, match="row_length 0 must be at least 1"):
        TextDataConfig(row_length=0)
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(InputError, match="cannot hold tokens .* set data.cache or JAXLLM_CACHE"):
        open_text(replace(whole, cache=str(tmp_path / "blocked/cache")), BYTES, "train")


# -- the cache -----------------------------------------------------------------------------------


def test_text_is_tokenised_once_for_a_file_and_a_tokenizer(config, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", {"text": "abab"}, {"prompt": "a", "completion": "b"})
    whole = replace(config, file=file, validation_fraction=0)
    first = open_text(whole, BYTES, "train")

    def refuse(*_):
        raise RuntimeError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(text, "encode_record", refuse)
        again = open_text(replace(whole, row_length=3, packing="none"), BYTES, "train")
        assert documents(again) == documents(first)
        bpe = train_bpe(["abab"] * 2, 258)
        for changed in ((whole, bpe), (replace(whole, validation_fraction=0.5), BYTES)):
            with pytest.raises(RuntimeError, match="tokenised again"):
                open_text(*changed, "train")
    write(tmp_path / "a.jsonl", {"text": "xyz"})
    assert documents(open_text(whole, BYTES, "train")) == [[256, *b"xyz", 257]]


@pytest.mark.parametrize("name", ["tokens.bin", "weights.bin", "documents.npy", "meta.json"])
def test_a_damaged_cache_is_made_again(config, tmp_path, name, caplog):
    file = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "bcd"})
    whole = replace(config, file=file, validation_fraction=0)
    expected = open_text(whole, BYTES, "train")[0]
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-2])
    with caplog.at_level(logging.WARNING):
        found = open_text(whole, BYTES, "train")[0]
    assert "damaged" in caplog.text and "made again" in caplog.text
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_are_stored_in_the_smallest_type(tmp_path, vocabulary, dtype):
    document = Document([0, vocabulary - 1], None, 1)
    cache = cached_tokens(str(tmp_path), ["x"], vocabulary, lambda: iter([(0, document)]), "x")
    assert cache.tokens(0).tolist() == [0, vocabulary - 1] and cache.tokens(0).dtype == np.int32
    (meta,) = tmp_path.glob("*/meta.json")
    assert json.loads(meta.read_text())["dtype"] == dtype


def test_batches_depend_on_the_step_only(config):
    """A resumed run reads what an uninterrupted one would have read."""
    rows = open_text(config, BYTES, "validation")
    whole = Batches(rows, 4, seed=3).iterate()
    expected = [next(whole) for _ in range(6)]
    whole.close()
    resumed = Batches(open_text(config, BYTES, "validation"), 4, seed=3).iterate(4)
    for batch in expected[4:]:
        found = next(resumed)
        assert found.keys() == batch.keys() and batch["tokens"].shape == (4, 16)
        for name in batch:
            np.testing.assert_array_equal(found[name], batch[name])
    resumed.close()
