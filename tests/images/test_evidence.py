"""The evidence page, from pixels to verdicts, at the smallest size."""

import json
import math
from functools import partial

import pytest
import tiny_runs
from PIL import Image

from jaxllm.errors import InputError
from jaxllm.images import evidence
from jaxllm.images.evidence import EvidenceRun, dnd_evidence

TINY = EvidenceRun(
    seeds=(0, 1), codebook_size=4, depths=(2,), steps=2, eval_every=1, batch_size=8, dim=16
)


def test_every_structure_is_scored_on_the_same_codes(tmp_path, monkeypatch):
    whole = evidence._patches
    monkeypatch.setattr(
        evidence, "_patches", lambda split: {k: v[::40] for k, v in whole(split).items()}
    )
    monkeypatch.setattr(evidence, "_speed", partial(evidence._speed, batch=4))
    with tiny_runs.small_programs():
        dnd_evidence(TINY, tmp_path)
    saved = json.loads((tmp_path / "dnd.json").read_text())
    names = ["flattened", "dnd", "vertical", "parallel", "rq-transformer"]
    assert [row["model"] for row in saved["likelihood"]] == names
    for row in saved["likelihood"]:
        assert len(row["nll"]) == 2 and set(row["chosen_step"]) <= {1, 2}
        for nll, by_depth in zip(row["nll"], row["nll_by_depth"], strict=True):
            assert nll == pytest.approx(sum(by_depth), rel=1e-5)
            # Two steps from zero heads are next to uniform: 16 cells, 2 codes of 4.
            assert nll == pytest.approx(32 * math.log(4), rel=0.1)
    quality = {(r["codebook_size"], r["depth"], r["codebook"]): r["psnr"]
               for r in saved["reconstruction"]}  # fmt: skip
    assert set(quality) == {
        (4, 1, "separate"), (4, 2, "separate"), (4, 2, "shared"), (4, 4, "separate"),
        (4, 4, "shared"), (2, 2, "separate"), (16, 1, "separate"),
    }  # fmt: skip
    for seed in range(2):
        assert quality[4, 1, "separate"][seed] < quality[4, 2, "separate"][seed]
        assert quality[4, 2, "separate"][seed] < quality[4, 4, "separate"][seed]
    page = (tmp_path / "dnd.md").read_text()
    assert "vertical minus DnD" in page and "1x16 against 2x4" in page and "nan" not in page
    with Image.open(tmp_path / "dnd.png") as picture:
        assert picture.size[0] > 500


def test_one_seed_gives_no_interval():
    with pytest.raises(InputError, match="an interval needs two seeds"):
        EvidenceRun(seeds=(0,))
