"""The scripts in train/: overrides, run folders and data of a person's own, good and bad."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from PIL import Image

from jaxllm.data.images import quickdraw

ROOT = Path(__file__).parents[2]
HEAD = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nimport tiny_runs\n"
CONFIGS = {
    "classifier": "tiny_runs.classifier(1)",
    "tokenizer": "tiny_runs.tokenizer()",
    "code_model": "tiny_runs.code_model()",
    "demo": "tiny_runs.demo()",
    "words": "tiny_runs.words()",
}


@pytest.fixture
def script(tmp_path, capsys, monkeypatch):
    """Runs train/NAME.py in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name, body in CONFIGS.items():
        Path(f"{name}.py").write_text(f"{HEAD}def get_config():\n    return {body}\n")

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop, tiny_runs.quick_compile():
            runpy.run_path(str(ROOT / "train" / f"{name}.py"), run_name="__main__")
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def refusal(script, *arguments) -> str:
    """Runs a script that must refuse before it makes a run folder; returns the line."""
    code, out, err = script(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: "), err
    assert not Path("runs").exists() and not Path("out").exists()
    return err


@pytest.mark.parametrize(
    ("command", "culprit"),
    [
        ("classifier", "usage: CONFIG.py"),
        ("classifier --loop.steps 3", "usage: CONFIG.py"),
        ("classifier absent.py", "config absent.py: no such file"),
        ("classifier classifer.py", "near it: classifier.py"),
        ("classifier tokenizer.py", "is a TokenizerRun, this script needs ClassifierRun"),
        ("code_model demo.py", "this script needs CodeModelRun or RQTransformerRun"),
        ("classifier classifier.py --workdir", "--workdir needs a folder"),
        (
            "classifier classifier.py --loop.step 3",
            "unknown key --loop.step; did you mean --loop.steps",
        ),
        ("classifier classifier.py --loop.steps many", "bad override --loop.steps many"),
        ("classifier classifier.py --data.source mnist", "bad override --data.source mnist"),
        ("classifier classifier.py --data.folder a --data.jsonl b", "are both set; choose one"),
        (
            "classifier classifier.py --model.num-classes 4",
            "model.num_classes is 4, the data has 3",
        ),
        (
            "demo demo.py --code-model.model.head-layers 1 0",
            "head_layers (1, 0) must be 2 strictly",
        ),
        (
            "demo demo.py --code-model.model.head-layers 0 0",
            "head_layers (0, 0) must be 2 strictly",
        ),
        ("code_model code_model.py --model.layers 3", "end at the last one, 2"),
        ("demo demo.py --tokenizer.perceptual.kind none", "keep kind 'classifier'"),
        (
            "demo demo.py --code-model.model.codebook-size 9",
            "the tokenizer makes codes of codebook_size 8, the code model has 9",
        ),
        ("words words.py --code-model.model.grid 4 2", "codes of grid (2, 4), the code model has"),
        ("tokenizer tokenizer.py --data.image-size 16 16", "data.image_size (16, 16) differ"),
        ("tokenizer tokenizer.py --perceptual.kind classifier", "needs perceptual.path"),
        ("code_model code_model.py --data.cache gone", "gone/train/meta.json: no such file"),
        ("extract_codes extract.py", "--tokenizer is needed"),
        ("extract_codes extract.py --tokenizer gone", "gone: no such run folder"),
        ("words words.py --tokenizer.data.source quickdraw", "this needs 'words'"),
        (
            "classifier classifier.py --data.source tfds --data.tfds-dir .",
            "TFDS data set 'imagenet2012' is not available",
        ),
    ],
)
def test_refusals_of_configs(script, command, culprit):
    body = (
        "from jaxllm.images.extract import ExtractRun\ndef get_config():\n    return ExtractRun()\n"
    )
    Path("extract.py").write_text(body)
    assert culprit in refusal(script, *command.split())


def write_classes(root: Path, *, size=28, each=10, suffix="png") -> Path:
    """Two classes of drawings, rainbows and cats."""
    for name, first in (("cats", 0), ("rainbows", 1000)):
        (root / name).mkdir(parents=True)
        for number in range(each):
            picture = Image.fromarray(quickdraw().images[first + number, ..., 0])
            picture.resize((size, size)).save(root / name / f"{number}.{suffix}")
    return root


def test_refusals_of_folders(script):
    for name in ("unreadable", "torn", "mixed", "empty", "few"):
        write_classes(Path(name), each=10 if name != "few" else 4)
    Path("unreadable/cats/3.png").write_text("no image")
    torn = Path("torn/cats/3.png")
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    Image.new("L", (27, 28)).save("mixed/rainbows/3.png")
    Path("empty/dogs").mkdir()
    Path("empty/.cache").mkdir()
    write_classes(Path("one"))
    shutil.rmtree("one/cats")
    Path("none").mkdir()
    write_classes(Path("parts/train"))
    write_classes(Path("parts/test"))
    Path("parts/test/cats").rename("parts/test/dogs")
    for folder, culprit in (
        ("unreadable", "unreadable/cats/3.png: not a readable image"),
        ("torn", "torn/cats/3.png: not a readable image"),
        ("mixed", "mixed/rainbows/3.png: 27x28 pixels, but mixed/cats/0.png has 28x28"),
        ("one", "one: has one class, 'rainbows'"),
        ("empty", "empty/dogs: holds no images"),
        ("few", "few: class 'cats' has 4 images, too few for validation"),
        ("none", "none: holds no sub-folders; expected one per class"),
        ("gone", "gone: no such folder"),
        ("parts", "parts: class 'cats' is in only one of train and test"),
    ):
        options = ["--data.folder", folder, "--model.num-classes", 2]
        assert culprit in refusal(script, "classifier", "classifier.py", *options)


def test_refusals_of_image_lists(script):
    write_classes(Path("own"))

    def rows(*last):
        labels = {"cats": 0, "rainbows": 1}
        good = [
            {"image": f"own/{name}/{i}.png", "label": label}
            for name, label in labels.items()
            for i in range(10)
        ]
        return "\n".join([*map(json.dumps, good), *last])

    def one(**row):
        return json.dumps(row)

    image = "own/cats/1.png"
    for last, culprit in (
        (one(image="own/gone.png", label=0), "record 21: image own/gone.png: no such file"),
        (one(image="own", label=0), "record 21: image own: no such file"),
        (one(image=image, label=-1), "record 21: label -1 is outside"),
        (one(image=image, label=500), "record 21: label 500 is outside"),
        (one(image=image, label=1.5), "record 21: label 1.5 is neither a name nor an int"),
        (one(image=image, label=True), "record 21: label True is neither"),
        (one(image=image), 'record 21: expected {"image": path, "label": int or name}'),
        (one(label=0), 'record 21: expected {"image": path'),
        (one(image=3, label=0), 'record 21: expected {"image": path'),
        ("[1]", ":21: expected a JSON object"),
        ("{", ":21: not JSON"),
        (one(image=image, label=3), "class '2' has 0 images"),
    ):
        Path("list.jsonl").write_text(rows(last))
        options = ["--data.jsonl", "list.jsonl", "--model.num-classes", 2]
        line = refusal(script, "classifier", "classifier.py", *options)
        assert culprit in line and "list.jsonl" in line, line
    Path("list.jsonl").write_text("")
    assert "holds no records" in refusal(script, "classifier", "classifier.py", *options)


def test_a_jpeg_torn_in_the_middle_is_named_when_it_is_read(script):
    """Headers alone are checked beforehand, so this one is found while training."""
    write_classes(Path("own"), each=8, suffix="jpg")
    for torn in Path("own/cats").iterdir():
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    options = ["--data.folder", "own", "--model.num-classes", 2, "--workdir", "out"]
    code, _, err = script("classifier", "classifier.py", *options)
    assert code == 2 and err.count("\n") == 1, err
    assert "own/cats/" in err and "not a readable image" in err
    assert not list(Path("out").rglob("metrics.jsonl"))


def test_a_classifier_trains_on_a_folder_and_resumes(script):
    write_classes(Path("own"))
    options = ["--data.folder", "own", "--model.num-classes", 2, "--loop.steps"]
    code, out, err = script("classifier", "classifier.py", *options, 2)
    assert code == 0 and err == "" and "classifier 2/2 100%" in out
    run = Path("runs/classifier")
    assert {p.name for p in run.iterdir()} >= {"config.json", "metrics.jsonl", "summary.json"}
    assert json.loads((run / "config.json").read_text())["config"]["data"]["folder"] == "own"
    code, out, _ = script("classifier", "classifier.py", *options, 3, "--workdir=runs/classifier")
    assert code == 0 and "3/3" in out and "1/3" not in out
    code, _, err = script("classifier", "classifier.py", *options, 3, "--model.widths", 16)
    assert code == 2 and err.count("\n") == 1
    assert "runs/classifier holds a checkpoint of another model: model.widths is [8]" in err
    code, _, err = script("tokenizer", "tokenizer.py", "--workdir", run)
    assert code == 2 and "holds a 'classifier' run, not 'tokenizer'" in err


def test_codes_of_a_folder_are_extracted_and_a_bad_cache_is_refused(script, tiny_demo):
    write_classes(Path("own"))
    Path("extract.py").write_text(
        f"{HEAD}from jaxllm.images.extract import ExtractRun\n"
        "def get_config():\n    return ExtractRun(data=tiny_runs.DATA)\n"
    )
    options = ["--tokenizer", tiny_demo[0] / "tokenizer", "--data.folder", "own"]
    code, out, err = script("extract_codes", "extract.py", *options, "--workdir", "codes")
    assert code == 0 and err == ""
    assert [line.split(" in ")[0] for line in out.splitlines()] == [
        "train: 14 images x 10 crops",
        "validation: 2 images x 1 crops",
        "test: 4 images x 1 crops",
    ]
    shard = Path("codes/train/codes-00000.npy")
    good = np.load(shard)
    train = ["code_model", "code_model.py", "--data.cache", "codes"]
    line = refusal(script, *train)
    assert "codes: the codes have classes 2, the model has 3" in line
    train += ["--model.num-classes", 2]
    line = refusal(script, *train, "--model.codebook-size", 9)
    assert "the codes have codebook_size 8, the model has 9" in line
    bad = good.copy()
    bad[5, 3, 2, 1] = 8
    np.save(shard, bad)
    line = refusal(script, *train)
    assert "codes/train/codes-00000.npy: image 5 holds code 8, outside the codebook of 8" in line
