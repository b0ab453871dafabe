"""Bad input is one line that names the culprit, exit code 2, and nothing written."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from torch_reference import fake_dnd  # noqa: E402
from torch_writer import save  # noqa: E402

from jaxllm.cli.main import main  # noqa: E402
from jaxllm.data.images import quickdraw  # noqa: E402


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(p.relative_to(folder)): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def complaint(capsys, folder: Path, arguments) -> str:
    """Runs a command that must fail; returns its only line."""
    before = contents(folder)
    with tiny_runs.small_programs():
        code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 2, (arguments, captured)
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert captured.err.startswith("error: ")
    assert contents(folder) == before
    return captured.err


def edit_config(run: Path, change) -> Path:
    saved = json.loads((run / "config.json").read_text())
    change(saved)
    (run / "config.json").write_text(json.dumps(saved))
    return run


@pytest.fixture(scope="module")
def runs(tiny_demo, tmp_path_factory):
    """Damaged copies of a run folder beside the whole ones."""
    folder = tmp_path_factory.mktemp("runs")
    demo = tiny_demo[0]
    for name in ("no_checkpoint", "corrupt", "no_job", "bad_model", "no_dropout"):
        parts = () if name == "no_dropout" else ("checkpoints", "best")
        ignore = shutil.ignore_patterns(*parts)
        shutil.copytree(demo / "code_model", folder / name, ignore=ignore)
    (folder / "corrupt" / "config.json").write_text('{"job": "dnd", "conf')
    edit_config(folder / "no_job", lambda saved: saved.pop("job"))
    edit_config(folder / "bad_model", lambda saved: saved["config"]["model"].update(depth="2"))
    edit_config(
        folder / "no_dropout", lambda saved: saved["config"]["model"].update(class_dropout=0.0)
    )
    for name in ("scorer", "tokenizer", "code_model"):
        (folder / name).symlink_to(demo / name)
    return folder


SAMPLE = [
    ("--run no_checkpoint", "no_checkpoint/checkpoints: no checkpoint"),
    ("--run corrupt", "corrupt/config.json: not valid JSON"),
    ("--run no_job", "no_job/config.json: not a run's config"),
    ("--run bad_model", "config.json.model.depth: expected int, found '2'"),
    ("--run absent", "absent: no such run folder"),
    ("--run scorer", "scorer: a 'classifier' run; expected one of dnd, rq_transformer"),
    ("--run code_model --tokenizer scorer", "a 'classifier' run; expected a 'tokenizer' run"),
    ("--run code_model --class-id 0 3", "class id 3 is outside 0 .. 2"),
    ("--run code_model --class-id -1", "class id -1 is outside 0 .. 2"),
    ("--run code_model --class-id cat", "invalid int value: 'cat'"),
    ("--run code_model --top-p 0", "top_p 0.0 must be above 0"),
    ("--run code_model --top-p 1.5", "top_p 1.5 must be above 0 and at most 1"),
    ("--run code_model --top-k -1", "top_k -1 must be 0"),
    ("--run code_model --temperature -0.5", "temperature -0.5 must be 0"),
    ("--run code_model --temperature nan", "temperature nan must be 0"),
    ("--run code_model --temperature 1 1 1", "needs 1 value or one per depth (2)"),
    ("--run code_model --cfg-scale 0.5", "cfg_scale 0.5 must be 1 (off) or more"),
    ("--run code_model --cfg-schedule interval --cfg-interval 0.5 0.5", "guidance interval"),
    ("--run code_model --cfg-schedule cosine", "invalid choice: 'cosine'"),
    ("--run no_dropout", "cfg_scale 2.0 needs a model trained with class dropout"),
    ("--run code_model --n 0", "--n 0 must be at least 1"),
    ("--run code_model --best-of 0", "--best-of 0 must be at least 1"),
    ("--run code_model --rows 2", "--rows 2 needs --complete"),
    ("--run code_model --complete cat.png", "--rows 0 must be between 1 and 4"),
    ("--run code_model --complete cat.png --rows 5", "--rows 5 must be between 1 and 4"),
    ("--run code_model --complete absent.png --rows 1", "absent.png: not a readable image"),
    ("--run code_model --complete torn.png --rows 1", "torn.png: not a readable image"),
    ("--run code_model --complete large.png --rows 1", "large.png: image of 40x33 does not fit"),
    ("--run code_model --complete cat.png --rows 1 --best-of 2", "cannot be combined"),
    ("--out grid.png", "required: --run"),
]


@pytest.mark.parametrize(("options", "culprit"), SAMPLE)
def test_sample(runs, capsys, monkeypatch, options, culprit):
    monkeypatch.chdir(runs)
    cat = quickdraw().images[0, ..., 0]
    Image.fromarray(cat).save("cat.png")
    Path("torn.png").write_bytes(Path("cat.png").read_bytes()[:200])
    Image.new("L", (40, 33)).save("large.png")
    out = [] if "--out" in options else ["--out", "new/grid.png"]
    assert culprit in complaint(capsys, runs, ["sample", *options.split(), *out])
    assert not Path("new").exists()


def test_sample_to_a_place_that_cannot_be_written(runs, capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    run = ["sample", "--run", runs / "code_model", "--out"]
    assert f"{tmp_path}: is a folder" in complaint(capsys, tmp_path, [*run, tmp_path])
    line = complaint(capsys, tmp_path, [*run, tmp_path / "file" / "a.png"])
    assert f"{tmp_path}/file is a file, expected a folder" in line


def test_sample_of_codes_whose_tokenizer_is_not_known(runs, capsys, tmp_path):
    run = shutil.copytree(runs / "code_model", tmp_path / "run")
    edit_config(run, lambda saved: saved["config"]["data"].update(cache=str(tmp_path / "gone")))
    line = complaint(capsys, tmp_path, ["sample", "--run", run, "--out", tmp_path / "a.png"])
    assert "does not name a tokenizer; give --tokenizer" in line


GOOD = [[0, 7]] * 16
RECORDS = [
    ({"class_id": 3, "codes": GOOD}, "record 2: class_id 3 is outside 0 .. 2"),
    ({"class_id": -1, "codes": GOOD}, "record 2: class_id -1 is outside"),
    ({"class_id": True, "codes": GOOD}, "record 2: class_id True is outside"),
    ({"class_id": 1.0, "codes": GOOD}, "record 2: class_id 1.0 is outside"),
    ({"class_id": "1", "codes": GOOD}, "record 2: class_id '1' is outside"),
    ({"class_id": None, "codes": GOOD}, "record 2: class_id None is outside"),
    ({"codes": GOOD}, "record 2: has no field 'class_id'"),
    ({"class_id": 1}, "record 2: has no field 'codes'"),
    ({"class_id": 1, "codes": GOOD[:15]}, "record 2: codes has 15 positions, expected 16"),
    ({"class_id": 1, "codes": GOOD[:15] + [[1]]}, "record 2: position 15 is [1], expected 2"),
    ({"class_id": 1, "codes": GOOD[:15] + [3]}, "record 2: position 15 is 3, expected 2"),
    ({"class_id": 1, "codes": "01"}, "record 2: codes has '01' positions"),
    ({"class_id": 1, "codes": GOOD[:15] + [[0, 8]]}, "code 8 at position 15 is outside 0 .. 7"),
    ({"class_id": 1, "codes": [[-1, 0]] + GOOD[1:]}, "code -1 at position 0 is outside"),
    ({"class_id": 1, "codes": [[1.0, 0]] + GOOD[1:]}, "code 1.0 at position 0 is outside"),
    ({"class_id": 1, "codes": [[False, 0]] + GOOD[1:]}, "code False at position 0 is outside"),
    ({"class_id": 1, "codes": [["1", 0]] + GOOD[1:]}, "code '1' at position 0 is outside"),
    ([1, 2], "in.jsonl:2: expected a JSON object, found list"),
    ("{torn", "in.jsonl:2: not JSON"),
]


@pytest.mark.parametrize(("record", "culprit"), RECORDS)
def test_logprobs_records(runs, capsys, tmp_path, record, culprit):
    last = record if isinstance(record, str) else json.dumps(record)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"class_id": 0, "codes": GOOD}) + "\n" + last + "\n")
    command = ["logprobs", "--model", runs / "code_model", "--input", source, "--output"]
    line = complaint(capsys, tmp_path, [*command, tmp_path / "out.jsonl"])
    assert culprit in line and str(source) in line


def test_logprobs_files(runs, capsys, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b'{"id": "\xe9"}')
    for name, culprit in (
        ("empty", "empty: holds no records"),
        ("absent", "absent: no such file"),
        ("latin", "latin: not UTF-8 text at byte 8"),
    ):
        command = ["logprobs", "--model", runs / "code_model", "--input", tmp_path / name]
        assert culprit in complaint(capsys, tmp_path, [*command, "--output", tmp_path / "out"])
    command = ["logprobs", "--model", runs / "tokenizer", "--input", tmp_path / "empty"]
    line = complaint(capsys, tmp_path, [*command, "--output", tmp_path / "out"])
    assert "tokenizer: a 'tokenizer' run; expected one of dnd" in line
    line = complaint(capsys, tmp_path, [*command, "--output", tmp_path])
    assert f"{tmp_path}: is a folder" in line


def test_eval_folders(runs, capsys, tmp_path):
    for number in range(5):
        for folder in ("good", "mixed", "unreadable", "torn"):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9), np.uint8))
            picture.save(tmp_path / folder / f"{number}.png")
    Image.new("L", (9, 8)).save(tmp_path / "mixed" / "4.png")
    (tmp_path / "unreadable" / "4.png").write_text("no image")
    (tmp_path / "torn" / "4.png").write_bytes((tmp_path / "good/4.png").read_bytes()[:-60])
    (tmp_path / "few").mkdir()
    command = ["eval", "images", "--real", tmp_path / "good", "--fake"]
    judge = ["--classifier", runs / "scorer"]
    for name, options, culprit in (
        ("mixed", judge, "mixed/4.png: 9x8 pixels"),
        ("unreadable", judge, "unreadable/4.png: not a readable image"),
        ("torn", judge, "torn/4.png: not a readable image"),
        ("few", judge, "few: holds 0 images, too few"),
        ("absent", judge, "absent: no such folder"),
        ("good", judge, "good: 5 images are fewer than 10 splits"),
        ("good", [*judge, "--splits", "0"], "0 splits of 5 images"),
        ("good", ["--classifier", runs / "tokenizer"], "a 'tokenizer' run; expected a 'class"),
        ("good", ["--inception", tmp_path / "gone.pth"], "gone.pth"),
        ("good", [], "--inception --classifier is required"),
        ("good", [*judge, "--inception", "x"], "not allowed with argument"),
    ):
        assert culprit in complaint(capsys, tmp_path, [*command, tmp_path / name, *options])


def test_other_commands(runs, capsys, tmp_path):
    shape = dict(codes=7, dim=16, layers=2, class_rows=4, heads=2, kv_heads=2, hidden=24)
    save(tmp_path / "model.pt", {"model": fake_dnd(np.random.default_rng(0), depth=2, **shape)})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    convert = ["convert", "--from", "dnd", tmp_path / "model.pt", "--to"]
    plot = ["plot", runs / "code_model", "--out", tmp_path / "a.png"]
    for command, culprit in (
        ([*convert, tmp_path / "full"], "full: exists and is not an empty folder"),
        ([*convert, tmp_path / "new", "--heads", 2, "--head-layers", 1, 0], "head_layers"),
        ([*convert[:3], tmp_path / "gone.pt", "--to", tmp_path / "new"], "gone.pt: no such file"),
        (["convert", "--from", "vqgan", "x", "--to", "y"], "invalid choice: 'vqgan'"),
        ([*plot, "--metric", "train/magic"], "train/magic: not in"),
        (["plot", tmp_path, "--out", tmp_path / "a.png"], "metrics.jsonl: no such file"),
        ([*plot[:-1], tmp_path / "a.xyz"], "a.xyz: its ending must be one of png, svg, pdf"),
        ([*plot[:-1], tmp_path], "is a folder"),
        (["data", "mnist"], "data set 'mnist' is not one of fashion_mnist_sprite, gdpo"),
        (["bench", "dnd", "--repeats", 0], "--repeats, --batch and --threads must be at least 1"),
        (["paint"], "invalid choice: 'paint'"),
        (["sample", "--runs", "x"], "required"),
    ):
        assert culprit in complaint(capsys, tmp_path, command)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "model.pt"]
