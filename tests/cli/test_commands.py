"""Every subcommand on runs that were trained for a few steps, as a person calls it."""

import argparse
import functools
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

from jaxllm.cli import commands  # noqa: E402
from jaxllm.cli.main import build_parser, main  # noqa: E402
from jaxllm.cli.show import show, write_section  # noqa: E402
from jaxllm.data import provenance  # noqa: E402
from jaxllm.data.images import PrepareImage, bundled, quickdraw  # noqa: E402
from jaxllm.decoding.code_stacks import SamplingConfig  # noqa: E402
from jaxllm.images.code_models import CodeScorer  # noqa: E402
from jaxllm.images.codes import encode_images  # noqa: E402
from jaxllm.images.sample import Decoder, Generator  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny_runs.quick_compile():
        yield


@pytest.fixture(scope="module")
def loaded(tiny_demo):
    """Commands read each run once, so that programs are compiled once."""
    patch = pytest.MonkeyPatch()
    for kind in (Generator, Decoder):
        patch.setattr(kind, "load", functools.cache(kind.load))
    yield tiny_demo[0]
    patch.undo()


def output_of(capsys, *arguments):
    """Runs a command with --json; its output must be one JSON object."""
    assert main([str(a) for a in (*arguments, "--json")]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert isinstance(result, dict) and printed.count("\n") == 1
    return result


def drawing(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(quickdraw().images[number, ..., 0]).save(path)
    return path


# -- sample --------------------------------------------------------------------------------------


def test_sample_writes_a_grid_with_a_row_per_class(loaded, tmp_path, capsys):
    run, out = loaded / "code_model", tmp_path / "new" / "grid[1].png"
    arguments = ["sample", "--run", run, "--n", 2, "--seed", 3, "--out", out]
    result = output_of(capsys, *arguments)
    generator, decoder = Generator.load(run), Decoder.load((loaded / "tokenizer").resolve())
    codes, log_probs = generator.sample(np.repeat([0, 1, 2], 2), seed=3)
    assert generator.run.sampling == SamplingConfig(cfg_scale=(2.0,))
    means = log_probs.sum(axis=(1, 2)).reshape(3, 2).mean(axis=1)
    assert [row["class"] for row in result["classes"]] == ["cat", "rainbow", "train"]
    assert [row["class_id"] for row in result["classes"]] == [0, 1, 2]
    for row, mean in zip(result["classes"], means, strict=True):
        assert row["mean log-prob (nats)"] == pytest.approx(mean, abs=1e-5)
    picture = np.asarray(Image.open(out))
    # Pictures of 32 pixels are doubled, 2 pixels apart, after captions of up to 7 letters.
    left = 8 + 7 * len("rainbow")
    assert picture.shape == (2 + 3 * 66, left + 2 * 66, 3)
    shown = np.clip(np.rint((decoder(codes)[3] + 1) * 127.5), 0, 255)
    corner = picture[2 + 66 : 2 + 66 + 64 : 2, left + 66 : left + 66 + 64 : 2, 0]
    np.testing.assert_array_equal(corner, shown[..., 0])

    assert main([str(a) for a in arguments]) == 0
    table = capsys.readouterr().out
    assert "rainbow" in table and "grid[1].png" in table.replace("\n", "")
    again = output_of(capsys, *arguments, "--tokenizer", loaded / "tokenizer")
    assert again == result
    other = output_of(capsys, *arguments[:6], 4, *arguments[7:])
    assert other["classes"] != result["classes"]


def test_greedy_sampling_does_not_depend_on_the_seed(loaded, tmp_path, capsys):
    run, grids = loaded / "code_model", []
    one = ["sample", "--run", run, "--n", 2, "--class-id", 2, 0, 2, "--cfg-scale", 1]
    for seed, greedy in ((0, ["--temperature", 0]), (1, ["--temperature", 0]), (2, ["--top-k", 1])):
        out = tmp_path / f"{seed}.png"
        result = output_of(capsys, *one, *greedy, "--seed", seed, "--out", out)
        assert [row["class_id"] for row in result["classes"]] == [2, 0, 2]
        grids.append(np.asarray(Image.open(out)))
    np.testing.assert_array_equal(grids[0], grids[1])
    np.testing.assert_array_equal(grids[0], grids[2])


def test_every_sampling_option_reaches_the_sampler():
    def setting(*options):
        base = SamplingConfig(cfg_scale=(3.0,), temperature=(0.7,), top_k=(5,))
        required = ["sample", "--run", "r", "--out", "o"]
        return commands._sampling(base, build_parser().parse_args([*required, *options]))

    assert setting() == SamplingConfig(cfg_scale=(3.0,), temperature=(0.7,), top_k=(5,))
    given = setting(
        *"--cfg-scale 1 2.5 --cfg-schedule interval --cfg-interval 0.25 0.5".split(),
        *"--temperature 1 0 --top-k 0 3 --top-p 0.5 0.9".split(),
    )
    assert given == SamplingConfig(
        cfg_scale=(1.0, 2.5),
        cfg_schedule="interval",
        cfg_interval=(0.25, 0.5),
        temperature=(1.0, 0.0),
        top_k=(0, 3),
        top_p=(0.5, 0.9),
    )


def test_guidance_schedules_and_per_depth_settings_run(loaded, tmp_path, capsys):
    totals = set()
    for options in ("", "--cfg-schedule ramp", "--cfg-schedule interval --cfg-interval 0 0.1"):
        per_depth = "--cfg-scale 1 40 --temperature 1 0.1 --top-p 0.9 0.8"
        command = f"sample --run {loaded}/code_model --n 2 {per_depth} {options}"
        result = output_of(capsys, *command.split(), "--out", tmp_path / "a.png")
        totals.add(tuple(row["mean log-prob (nats)"] for row in result["classes"]))
    assert len(totals) == 3


def test_best_of_keeps_the_likelier_candidate(loaded, tmp_path, capsys):
    command = f"sample --run {loaded}/code_model --n 1 --best-of 2 --seed 5 --out {tmp_path}/b.png"
    result = output_of(capsys, *command.split())
    _, log_probs = Generator.load(loaded / "code_model").sample(np.repeat([0, 1, 2], 2), seed=5)
    best = log_probs.sum(axis=(1, 2)).reshape(3, 2).max(axis=1)
    found = [row["mean log-prob (nats)"] for row in result["classes"]]
    np.testing.assert_allclose(found, best, rtol=0, atol=1e-5)


def test_completion_keeps_the_top_rows_of_the_image(loaded, tmp_path, capsys, monkeypatch):
    image = drawing(tmp_path / "cat.png")
    drawn = []
    inner = Generator.sample

    def watch(self, *arguments, **named):
        drawn.append(inner(self, *arguments, **named))
        return drawn[-1]

    monkeypatch.setattr(Generator, "sample", watch)
    command = f"sample --run {loaded}/code_model --n 2 --complete {image} --rows 2"
    output_of(capsys, *command.split(), "--out", tmp_path / "c.png")
    (codes, _), decoder = drawn[0], Decoder.load((loaded / "tokenizer").resolve())
    prepare = PrepareImage(decoder.data, train=False)
    prepared = prepare({"image": quickdraw().images[0], "label": 0}, np.random.default_rng(0))
    own = encode_images(decoder.blueprint, decoder.params, decoder.extra, prepared["image"][None])
    assert codes.shape == (6, 16, 2)
    np.testing.assert_array_equal(codes[:, :8], np.repeat(own[:, :8], 6, axis=0))
    assert len(np.unique(codes[:, 8:], axis=0)) > 1
    assert Image.open(tmp_path / "c.png").size[1] == 2 + 3 * 66


# -- logprobs, eval, convert, plot ---------------------------------------------------------------


def test_logprobs_are_those_of_the_scorer_and_fields_are_carried(loaded, tmp_path, capsys):
    rng = np.random.default_rng(0)
    codes, classes = rng.integers(0, 8, (3, 16, 2)), [2, 0, 1]
    rows = [
        {"id": f"é{i}", "class_id": c, "codes": code.tolist(), "note": [i]}
        for i, (c, code) in enumerate(zip(classes, codes, strict=True))
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n\n".join(map(json.dumps, rows)))
    command = ["logprobs", "--model", loaded / "code_model", "--input", source, "--output", target]
    result = output_of(capsys, *command)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    generator = Generator.load(loaded / "code_model")
    scorer = CodeScorer(generator.sampler.build)
    expected, _ = scorer(generator.params, generator.extra, codes, np.array(classes))
    for row, out, values in zip(rows, written, expected, strict=True):
        assert {k: v for k, v in out.items() if k not in ("logprobs", "sum")} == row
        np.testing.assert_allclose(out["logprobs"], values, rtol=0, atol=1e-6)
        assert out["sum"] == pytest.approx(values.sum(), abs=1e-4)
    assert result["rows"] == 3 and sum(result["by depth"]) == pytest.approx(
        result["mean log-prob (nats per image)"], abs=1e-4
    )
    assert [p.name for p in target.parent.iterdir()] == ["out.jsonl"]
    assert main([str(a) for a in command]) == 0
    assert "by depth" in capsys.readouterr().out


def test_a_folder_is_at_distance_zero_from_itself(loaded, tmp_path, capsys):
    for number in range(12):
        drawing(tmp_path / "real" / str(number % 3) / f"{number}.png", 250 * number)
        drawing(tmp_path / "fake" / f"{number}.png", number)
    command = ["eval", "images", "--classifier", loaded / "scorer", "--splits", 2]
    same = output_of(capsys, *command, "--real", tmp_path / "real", "--fake", tmp_path / "real")
    assert abs(same["FD (not FID)"]) < 1e-4 and same["precision"] == same["recall"] == 1.0
    assert same["images"] == same["reference images"] == 12
    assert same["reference"] == str(tmp_path / "real")
    command += ["--real", tmp_path / "real", "--fake", tmp_path / "fake"]
    other = output_of(capsys, *command)
    assert other["FD (not FID)"] > 10 * abs(same["FD (not FID)"])
    assert main([str(a) for a in command]) == 0
    assert "FD (not FID)" in capsys.readouterr().out


def test_convert_makes_a_run_that_logprobs_reads(tmp_path, capsys):
    shape = dict(codes=7, dim=16, layers=2, class_rows=4, heads=2, kv_heads=2, hidden=24)
    save(tmp_path / "model.pt", {"model": fake_dnd(np.random.default_rng(0), depth=2, **shape)})
    command = f"convert --from dnd {tmp_path}/model.pt --to {tmp_path}/run --heads 2"
    result = output_of(capsys, *command.split(), *"--head-layers 0 1 --grid 2 2".split())
    assert result["kind"] == "dnd" and result["parameters"]["code_model"] > 0
    row = {"class_id": 2, "codes": [[0, 6]] * 4}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    command = f"logprobs --model {tmp_path}/run --input {tmp_path}/in.jsonl --output {tmp_path}/o"
    assert output_of(capsys, *command.split())["rows"] == 1
    assert main(command.split()) == 0


def test_plot_draws_runs_of_one_name_apart(tiny_demo, tmp_path, capsys, monkeypatch):
    import jaxllm.plots

    lines = []
    inner = jaxllm.plots.series
    monkeypatch.setattr(
        jaxllm.plots, "series", lambda rows, name: lines.append(name) or inner(rows, name)
    )
    copy = tmp_path / "tokenizer"
    copy.mkdir()
    shutil.copy(tiny_demo[0] / "tokenizer" / "metrics.jsonl", copy)
    runs = [tiny_demo[0] / "tokenizer", copy]
    out = tmp_path / "new" / "curves.png"
    result = output_of(capsys, "plot", *runs, "--metric", "train/loss", "--out", out)
    assert result == {"out": str(out), "metrics": ["train/loss"]}
    assert lines == ["train/loss"] * 2
    assert Image.open(out).format == "PNG" and [p.name for p in out.parent.iterdir()] == [out.name]
    assert main(["plot", str(runs[0]), "--out", str(tmp_path / "all.svg")]) == 0
    assert "train/psnr" in capsys.readouterr().out
    assert (tmp_path / "all.svg").read_text().lstrip().startswith("<?xml")


# -- data ----------------------------------------------------------------------------------------


def test_data_lists_describes_and_verifies(tmp_path, capsys, monkeypatch):
    listed = output_of(capsys, "data", "--verify")["data sets"]
    names = ["fashion_mnist_sprite", "gdpo_option_map", "pandalm", "quickdraw3"]
    names += ["stories260K", "text", "vader_reviews"]
    assert [row["name"] for row in listed] == names
    assert all(row["verified files"] == row["files"] for row in listed)
    described = output_of(capsys, "data", "quickdraw3")
    assert described["files"] == 5 and described["bytes"] > 3 * 784000
    assert main(["data"]) == 0 and main(["data", "text", "--verify"]) == 0
    assert "verified files" in capsys.readouterr().out

    shutil.copytree(bundled(), tmp_path / "bundled")
    monkeypatch.setattr(provenance, "bundled", lambda *parts: tmp_path.joinpath("bundled", *parts))
    cats = tmp_path / "bundled" / "quickdraw3" / "cats1000.bin"
    content = bytearray(cats.read_bytes())
    content[5] ^= 1
    cats.write_bytes(content)
    assert main(["data", "quickdraw3", "--verify"]) == 2
    assert f"{cats}: differs from the size or SHA-256" in capsys.readouterr().err
    cats.unlink()
    assert main(["data", "quickdraw3", "--verify"]) == 2
    assert f"{cats}: missing" in capsys.readouterr().err
    assert main(["data", "text", "--verify"]) == 0


def test_bench_prints_a_table_and_writes_a_page(capsys, monkeypatch, tmp_path):
    import jaxllm.images.bench

    rows = [{"side": "dnd", "images/s": 12.5}, {"side": "torch eager", "images/s": 3.0}]
    monkeypatch.setattr(
        jaxllm.images.bench, "bench_dnd", lambda **options: {"sampling": rows, **options}
    )
    found = output_of(capsys, "bench", "dnd", "--repeats", 2, "--batch", 3, "--threads", 1)
    assert found == {"sampling": rows, "repeats": 2, "batches": [3], "threads": 1}
    page = tmp_path / "bench.md"
    assert main(["bench", "dnd", "--output", str(page)]) == 0
    assert "torch eager" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("# Benchmarks\n\n## `jaxllm bench dnd`\n")
    assert "| side | images/s |\n|---|---|\n| dnd | 12.5 |\n| torch eager | 3 |\n" in text
    assert "* batches: 1, 4, 16" in text


def test_a_bench_replaces_its_own_section_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nProse.\n\n## `jaxllm bench a`\n\nold a\n\n## Other\n\nkept\n")
    write_section(page, "jaxllm bench a", {"new": 1})
    replaced = "# Title\n\nProse.\n\n## `jaxllm bench a`\n\n* new: 1\n\n## Other\n\nkept\n"
    assert page.read_text() == replaced
    write_section(page, "jaxllm bench b", {"rows": [{"x": 1}, {"x": 2}]})
    added = "\n## `jaxllm bench b`\n\n| x |\n|---|\n| 1 |\n| 2 |\n"
    assert page.read_text() == replaced + added


def test_tables_show_every_kind_of_value(capsys):
    rows = [{"a": 1, "b": None}, {"a": 2.34567, "b": [1, 2]}]
    show({"x": 1.23456789, "list": [1.5, 2], "tree": {"p": 0.5}, "rows": rows, "none": []})
    printed = capsys.readouterr().out
    for text in ("1.235", "1.5, 2", "p 0.5", "2.346", "1, 2", "None", "rows"):
        assert text in printed


def test_json_has_null_where_a_number_is_not_finite(capsys, monkeypatch):
    import jaxllm.images.bench

    rows = [{"side": "dnd", "ratio": float("nan"), "pair": (1.0, float("inf"))}]
    monkeypatch.setattr(jaxllm.images.bench, "bench_dnd", lambda **options: {"sampling": rows})
    found = output_of(capsys, "bench", "dnd")
    assert found == {"sampling": [{"side": "dnd", "ratio": None, "pair": [1.0, None]}]}


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    parser = build_parser()
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    assert set(actions[0].choices) == {
        "generate", "sample", "logprobs", "eval", "convert", "heads", "plot", "plan", "bench",
        "data",
    }  # fmt: skip
    for name, command in actions[0].choices.items():
        assert name in text and callable(getattr(commands, command.get_default("function")))
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
