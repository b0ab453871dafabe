"""The demo from pixels to report, at the smallest size."""

import dataclasses
import json
import math
import shutil
import time

import numpy as np
import pytest
import tiny_runs
from PIL import Image

from jaxllm.errors import InputError
from jaxllm.images.classifier import held_out
from jaxllm.images.codes import open_codes
from jaxllm.images.demo import SPLITS, run_demo, unigram_nats
from jaxllm.images.runs import replace_in


def numbers(value):
    """Every number of a JSON tree."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_the_report_has_floor_ceiling_and_finite_numbers(tiny_demo):
    folder, report = tiny_demo
    saved = json.loads((folder / "report" / "report.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert len(numbers(saved)) > 40 and all(math.isfinite(x) for x in numbers(saved))
    sets = saved["scores"]
    assert list(sets) == ["real test images", "their reconstructions", "samples"]
    assert {row["images"] for row in sets.values()} == {600}
    assert all(0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
               for row in sets.values())  # fmt: skip
    assert abs(sets["real test images"]["frechet"]) < abs(sets["samples"]["frechet"])
    nll = saved["nll"]
    assert nll["nll"] == pytest.approx(nll["nll_depth1"] + nll["nll_depth2"], rel=1e-5)
    assert nll["bits_per_code"] == pytest.approx(nll["nll"] / math.log(2) / 32, rel=1e-5)
    # Three steps from zero heads are next to the uniform distribution over 8 codes.
    assert nll["nll"] == pytest.approx(32 * math.log(8), rel=0.05)
    seconds = saved["seconds"]
    assert set(seconds) == {
        "scorer", "perceptual", "tokenizer", "codes", "code_model", "sample and score", "total"
    }  # fmt: skip
    page = (folder / "report" / "report.md").read_text()
    uniform = f"{32 * math.log(8):.1f}"
    for text in ("real test images", "their reconstructions", "samples", uniform):
        assert text in page
    assert "nan" not in page and "inf" not in page.replace("information", "")


def test_the_report_has_its_pictures(tiny_demo):
    report = tiny_demo[0] / "report"
    sizes = {}
    for name in (
        "samples", "real", "reconstructions", "tokenizer_curves", "code_model_curves"
    ):  # fmt: skip
        with Image.open(report / f"{name}.png") as picture:
            sizes[name] = picture.size
            assert len(np.unique(np.asarray(picture))) > 2
        assert f"{name}.png" in (report / "report.md").read_text() or "tokenizer" in name
    left = 8 + 7 * len("rainbow")
    assert sizes["samples"] == sizes["real"] == (left + 4 * 66, 2 + 3 * 66)


def test_unigram_nats_are_those_of_the_frequencies(tiny_demo):
    folder = tiny_demo[0] / "codes"
    train, test = (open_codes(folder / split).first_crops()["codes"] for split in SPLITS[::2])
    expected = []
    for depth in range(2):
        counts = [1 + int(np.sum(train[..., depth] == code)) for code in range(8)]
        nats = [-math.log(counts[c] / sum(counts)) for c in test[..., depth].reshape(-1)]
        expected.append(sum(nats) / len(test))
    np.testing.assert_allclose(unigram_nats(folder), expected, rtol=1e-6)


def test_codes_belong_to_the_images_of_their_split(tiny_demo):
    for split, count, crops in zip(SPLITS, (2100, 300, 600), (2, 1, 1), strict=True):
        source = open_codes(tiny_demo[0] / "codes" / split)
        assert len(source) == count and source.meta["crops"] == crops
        if split != "train":
            labels = held_out(tiny_runs.DATA, split)["label"]
            np.testing.assert_array_equal(source.labels, labels)


def stamps(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for part in ("checkpoints", "codes", "best")
        for path in folder.rglob(f"{part}/**/*")
        if path.is_file()
    }


def test_a_finished_demo_runs_again_quickly_to_the_same_numbers(tiny_demo, capsys):
    folder, report = tiny_demo
    before = stamps(folder)
    start = time.process_time()
    with tiny_runs.small_programs():
        again = run_demo(tiny_runs.demo(), folder)
    assert time.process_time() - start < 60
    assert stamps(folder) == before
    out = capsys.readouterr().out
    assert out.count("already at step 3 of 3") == 4 and "1/3" not in out
    for part in ("tokenizer", "nll", "unigram_nats", "scores"):
        assert again[part] == report[part]
    assert again["seconds"]["codes"] < report["seconds"]["codes"] + 1


def test_codes_of_another_tokenizer_or_of_other_images_are_refused(tiny_demo, tmp_path):
    folder = shutil.copytree(tiny_demo[0], tmp_path / "demo")
    meta = folder / "codes" / "validation" / "meta.json"
    saved = json.loads(meta.read_text())
    saved["made_from"]["tokenizer"] = "0" * 64
    meta.write_text(json.dumps(saved))
    with pytest.raises(InputError, match="codes/validation: holds codes of another tokenizer"):
        run_demo(tiny_runs.demo(), folder)
    other = replace_in(tiny_runs.demo(), tokenizer__data__jitter=3)
    with pytest.raises(InputError, match="codes/train: holds codes of another tokenizer or of"):
        run_demo(other, folder)


def test_stages_that_do_not_fit_are_refused_before_training():
    run = tiny_runs.demo()
    for change, culprit in (
        ({"codebook_size": 9}, "codes of codebook_size 8, the code model has 9"),
        ({"grid": (8, 8)}, r"codes of grid \(4, 4\), the code model has \(8, 8\)"),
        ({"depth": 1, "head_layers": (1,)}, "codes of depth 2, the code model has 1"),
    ):
        model = dataclasses.replace(run.code_model.model, **change)
        with pytest.raises(InputError, match=culprit):
            replace_in(run, code_model__model=model)
