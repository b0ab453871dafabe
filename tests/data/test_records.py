"""JSONL records: whole files out, checked lines in."""

import pytest

from jaxllm.data.records import check_target, read_jsonl, write_jsonl
from jaxllm.errors import InputError


def test_records_round_trip(tmp_path):
    rows = [{"id": "ä", "text": "line\u2028end"}, {"n": 1, "deep": {"x": [1.5, None, True]}}]
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    assert "ä" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"old": 1}])

    def rows():
        yield {"new": 1}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_jsonl(path, rows())
    assert read_jsonl(path) == [{"old": 1}]


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (b'{"a": 1}\n\n{"a": ', "rows:3: not JSON"),
        (b'{"a": 1}\n"text"', "rows:2: expected a JSON object, found str"),
        (b'{"a": 1}\nnull', "rows:2: expected a JSON object, found NoneType"),
        (b'{"a": "\xff"}', "rows: not UTF-8 text at byte 7"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, text, culprit):
    (tmp_path / "rows").write_bytes(text)
    with pytest.raises(InputError, match=culprit) as error:
        read_jsonl(tmp_path / "rows")
    assert "\n" not in str(error.value)


def test_missing_files_and_impossible_targets(tmp_path):
    with pytest.raises(InputError, match="gone: no such file"):
        read_jsonl(tmp_path / "gone")
    with pytest.raises(InputError, match="no such file"):
        read_jsonl(tmp_path)
    (tmp_path / "file").write_text("x")
    for target, culprit in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "deep" / "out", "file is a file, expected a folder"),
    ):
        with pytest.raises(InputError, match=culprit):
            write_jsonl(target, [{}])
    check_target(tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
