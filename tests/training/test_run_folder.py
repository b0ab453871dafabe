"""Config files, overrides, config.json and what a run folder refuses."""

import dataclasses
import json
import operator
from dataclasses import dataclass, field
from typing import Literal

import pytest
from linear_job import linear_job

from jaxllm.errors import InputError
from jaxllm.images import config as image_configs
from jaxllm.images.config import (
    AdversarialConfig,
    ClassifierRun,
    CodeModelRun,
    PerceptualConfig,
    RQTransformerRun,
    TokenizerRun,
)
from jaxllm.models.dnd import DnDConfig
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.models.rq_transformer import RQTransformerConfig
from jaxllm.quantize import BSQ, FSQ, LFQ, ResidualVQ, SimVQ
from jaxllm.training.job import LoopConfig
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.run_folder import (
    dotted_keys,
    first_difference,
    from_plain,
    load_config,
    open_run_folder,
    override,
    read_json,
    to_plain,
    write_json,
)

RUN = CodeModelRun(model=DnDConfig(layers=4))


def tokenizer_run(quantizer=None, **changes):
    quantizer = quantizer or ResidualVQ(codebook_size=32, code_dim=4, depth=2)
    model = ImageTokenizerConfig(
        image_size=(32, 32), channels=1, multipliers=(1, 2), quantizer=quantizer
    )
    return TokenizerRun(model=model, **changes)


# -- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        ("--loop.steps 7", "loop.steps", 7),
        ("--loop.steps=7", "loop.steps", 7),
        ("--loop.save-every 7", "loop.save_every", 7),
        ("--optimizer.learning_rate 3e-4", "optimizer.learning_rate", 3e-4),
        ("--optimizer.learning_rate 1", "optimizer.learning_rate", 1.0),
        ("--optimizer.name sgd", "optimizer.name", "sgd"),
        ("--optimizer.clip_norm None", "optimizer.clip_norm", None),
        ("--optimizer.clip_norm 0.5", "optimizer.clip_norm", 0.5),
        ("--optimizer.ema_decay 0.99", "optimizer.ema_decay", 0.99),
        ("--loop.keep_best nll", "loop.keep_best", "nll"),
        ("--loop.profile 3 5", "loop.profile", (3, 5)),
        ("--loop.profile None", "loop.profile", None),
        ("--loop.trackers tensorboard wandb", "loop.trackers", ("tensorboard", "wandb")),
        ("--loop.compile_cache False", "loop.compile_cache", False),
        ("--data.balance 0.5", "data.balance", 0.5),
        ("--model.grid 4 8", "model.grid", (4, 8)),
        ("--model.head_layers 1 3", "model.head_layers", (1, 3)),
        ("--model.head_layers None", "model.head_layers", None),
        ("--model.structure flat --loop.seed 1", "model.structure", "flat"),
        ("--mesh.fsdp -1 --mesh.data 1", "mesh.fsdp", -1),
    ],
)
def test_overrides(arguments, key, value):
    changed = override(RUN, arguments.split())
    found = operator.attrgetter(key)(changed)
    assert found == value and type(found) is type(value)
    # Nothing else changes.
    keys = {argument.split("=")[0][2:].replace("-", "_") for argument in arguments.split()}
    for other in dotted_keys(RUN):
        if other not in keys:
            same = operator.attrgetter(other)
            assert same(changed) == same(RUN)


def test_no_override_and_deep_ones():
    assert override(RUN, []) == RUN
    changed = override(tokenizer_run(), ["--model.quantizer.depth", "3", "--precision", "float32"])
    assert changed.model.quantizer == ResidualVQ(codebook_size=32, code_dim=4, depth=3)
    assert changed.precision == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loop.stepz 3", "unknown key --loop.stepz; did you mean --loop.steps"),
        ("--optimiser.name sgd", "unknown key --optimiser.name; did you mean --optimizer.name"),
        ("--layers 3", "unknown key --layers; did you mean --model.layers"),
        ("--zzz 3", "unknown key --zzz"),
        ("--loop.steps abc", "--loop.steps: invalid literal for int() with base 10: 'abc'"),
        ("--loop.steps 1.5", "--loop.steps: invalid literal for int() with base 10: '1.5'"),
        ("--loop.steps", "Missing value for argument '--loop.steps'"),
        ("--loop.steps 3 4", "Unrecognized options: 4"),
        ("--model.grid 4", "Missing value for argument '--model.grid'. Expected 2 values"),
        ("--optimizer.name lion", "invalid choice 'lion'"),
        ("--loop.compile_cache maybe", "'maybe'"),
        ("--optimizer.accumulate 0", "accumulate 0 must be at least 1"),
        ("--model.heads 7", "dim 768 over 7 heads"),
        ("steps", "Unrecognized options: steps"),
    ],
)
def test_bad_overrides_are_refused_on_one_line(arguments, message):
    with pytest.raises(InputError) as error:
        override(RUN, arguments.split())
    text = str(error.value)
    assert message in text and "\n" not in text
    assert not set(text) & set("│╭╮╰╯─") and "---" not in text and "helptext" not in text


# -- config.json ---------------------------------------------------------------------------------

RUNS = [
    ClassifierRun(loop=LoopConfig(trackers=("wandb",), profile=(1, 2))),
    RUN,
    CodeModelRun(
        model=DnDConfig(layers=4, depth=2, head_layers=(1, 3), kv_heads=4, structure="vertical"),
        optimizer=OptimizerConfig(clip_norm=None, ema_decay=0.99, learning_rate=1),
    ),
    RQTransformerRun(model=RQTransformerConfig(mlp_hidden=64)),
    tokenizer_run(adversarial=AdversarialConfig(weight=0.5), perceptual=PerceptualConfig("lpips")),
    *(
        tokenizer_run(quantizer)
        for quantizer in (
            FSQ(levels=(4, 4, 4)),
            LFQ(code_dim=4),
            BSQ(code_dim=4),
            SimVQ(codebook_size=8, code_dim=4),
        )
    ),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: type(run).__name__)
def test_every_config_survives_json(run):
    plain = json.loads(json.dumps(to_plain(run)))
    assert from_plain(type(run), plain) == run


def test_every_run_config_of_the_images_room_is_tried():
    found = {name for name in vars(image_configs) if name.endswith("Run")}
    assert found == {type(run).__name__ for run in RUNS}


def test_quantizers_are_told_apart_by_kind():
    plain = [to_plain(tokenizer_run(kind(code_dim=4))) for kind in (LFQ, BSQ)]
    kinds = [run["model"]["quantizer"].pop("kind") for run in plain]
    assert kinds == ["LFQ", "BSQ"]
    plain[1]["model"]["quantizer"] = {**plain[0]["model"]["quantizer"], "kind": "BSQ"}
    plain[0]["model"]["quantizer"]["kind"] = "LFQ"
    assert first_difference(*plain) == ("model.model.quantizer.kind", "LFQ", "BSQ")


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Outer:
    need: int
    inner: Inner = field(default_factory=Inner)
    pair: tuple[int, int] | None = None
    many: tuple[str, ...] = ()
    rate: float = 0.0
    flag: bool = False
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"config: expected an object, found \[\]"),
        ({}, "config: .*missing.*'need'"),
        ({"need": 1, "nead": 2}, "config: unknown key 'nead'"),
        ({"need": "1"}, "config.need: expected int, found '1'"),
        ({"need": True}, "config.need: expected int, found True"),
        ({"need": 1, "inner": {"size": None}}, "config.inner.size: expected int, found None"),
        ({"need": 1, "pair": [1]}, r"config.pair: expected a list for tuple\[int, int\]"),
        ({"need": 1, "pair": [1, "2"]}, "config.pair: expected int, found '2'"),
        ({"need": 1, "many": "ab"}, "config.many: expected a list"),
        ({"need": 1, "rate": "fast"}, "config.rate: expected float, found 'fast'"),
        ({"need": 1, "flag": 1}, "config.flag: expected bool, found 1"),
        ({"need": 1, "kind": "c"}, "config.kind: 'c' is not one of a, b"),
    ],
)
def test_json_of_another_type_is_refused_by_its_place(value, message):
    with pytest.raises(InputError, match=message):
        from_plain(Outer, value)


def test_an_unknown_quantizer_is_refused():
    plain = to_plain(tokenizer_run())
    plain["model"]["quantizer"]["kind"] = "VQ"
    with pytest.raises(InputError, match="quantizer: kind 'VQ' is not one of ResidualVQ, FSQ"):
        from_plain(TokenizerRun, plain)


# -- config files --------------------------------------------------------------------------------


def test_config_files(tmp_path):
    good = tmp_path / "dnd_small.py"
    good.write_text(
        "from jaxllm.training.job import LoopConfig\n"
        "def get_config():\n    return LoopConfig(steps=3)\n"
    )
    assert load_config(good) == LoopConfig(steps=3)
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "plain.py").write_text("def get_config():\n    return {'steps': 3}\n")
    (tmp_path / "config.json").write_text("{}")
    for name, message in {
        "dnd_smal.py": r"no such file; near it: dnd_small.py",
        "empty.py": r"defines no get_config\(\)",
        "plain.py": r"get_config\(\) returns dict, not a dataclass",
        "config.json": "not a Python file",
        "absent/folder.py": "no such file$",
    }.items():
        with pytest.raises(InputError, match=message):
            load_config(tmp_path / name)


def test_json_files(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert read_json(path) == {"a": [1, 2.5, None]} and list(tmp_path.iterdir()) == [path]
    path.write_text('{"a": ')
    with pytest.raises(InputError, match=r"x.json: not valid JSON"):
        read_json(path)
    with pytest.raises(InputError, match=r"y.json: no such file"):
        read_json(tmp_path / "y.json")


# -- run folders ---------------------------------------------------------------------------------


def job(**changes):
    return linear_job(LoopConfig(steps=1), **changes)


def test_another_model_or_job_is_refused_and_leaves_the_folder_as_it_was(tmp_path):
    open_run_folder(tmp_path, job(identity=DnDConfig(layers=4)))
    # Without a checkpoint the model may still change.
    open_run_folder(tmp_path, job(identity=DnDConfig(layers=2)))
    before = (tmp_path / "config.json").read_text()
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    for changes, message in (
        (dict(identity=DnDConfig(layers=3)), "another model: model.layers is 2 there and 3 here"),
        (dict(identity=None), "another model: model is {"),
        (dict(name="tokenizer", identity=DnDConfig(layers=2)), "a 'linear' run, not 'tokenizer'"),
    ):
        with pytest.raises(InputError) as error:
            open_run_folder(tmp_path, job(**changes))
        assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert (tmp_path / "config.json").read_text() == before
    longer = dataclasses.replace(job(identity=DnDConfig(layers=2)), config=LoopConfig(steps=9))
    open_run_folder(tmp_path, longer)
    assert read_json(tmp_path / "config.json")["config"]["steps"] == 9


def test_foreign_folders(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: a file is where the run folder should be"):
        open_run_folder(tmp_path / "file", job())
    for text, message in (("[]", r"holds a \[\] run"), ("{", "not valid JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            open_run_folder(tmp_path, job())
