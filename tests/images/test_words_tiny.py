"""The rendered-words run from text to report, at the smallest size."""

import json
import math

import pytest
import tiny_runs
from PIL import Image

from jaxllm.errors import InputError
from jaxllm.images.runs import replace_in
from jaxllm.images.sample import Generator
from jaxllm.images.words import pictures_and_texts, run_words


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    with tiny_runs.small_programs():
        return folder, run_words(tiny_runs.words(), folder)


def test_the_report_reads_real_words_exactly(finished):
    folder, result = finished
    saved = json.loads((folder / "report" / "report.json").read_text())
    assert saved == json.loads(json.dumps(result))
    real, rebuilt, samples = (
        saved["ppl_ocr"][name] for name in ("real test words", "their reconstructions", "samples")
    )
    assert real["empty"] == 0 and 1 < real["perplexity"] < math.inf
    assert real["images"] == samples["images"] == rebuilt["images"] == 16
    assert set(saved["rocr"]) == {"depth 1-1", "depth 1-2"}
    assert all(0 <= row["f1"] <= 1 and 0 <= row["exact"] <= 1 for row in saved["rocr"].values())
    assert saved["nll"]["nll"] == pytest.approx(16 * math.log(8), rel=0.05)
    assert len(saved["first samples read as"]) == 16
    page = (folder / "report" / "report.md").read_text()
    assert "| real test words |" in page and "| depth 1-2 |" in page


def test_the_report_has_its_pictures(finished):
    for name in ("samples", "reconstructions", "tokenizer_curves", "code_model_curves"):
        with Image.open(finished[0] / "report" / f"{name}.png") as picture:
            assert min(picture.size) > 90


def test_the_saved_model_samples_without_guidance_by_default(finished):
    generator = Generator.load(finished[0] / "code_model")
    assert generator.run.sampling.cfg_scale == (1.0,) and generator.run.model.null_class is None
    assert generator.class_names == ["text"]


def test_pictures_come_with_their_texts():
    data = tiny_runs.words().tokenizer.data
    images, texts = pictures_and_texts(data, "test", 5)
    assert images.shape == (5, 16, 32, 1) and len(set(texts)) == 5
    assert all(text.isalpha() for text in texts)
    held = set(pictures_and_texts(data, "test", 10**6)[1])
    assert not held & set(pictures_and_texts(data, "train", 2000)[1])


def test_other_images_are_refused():
    with pytest.raises(InputError, match="tokenizer.data.source is 'pages'; this needs 'words'"):
        replace_in(tiny_runs.words(), tokenizer__data__source="pages")
