"""Official checkpoint files become run folders that sampling and decoding read."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from torch_reference import (  # noqa: E402
    Tokenizer,
    discriminate,
    dnd_logits,
    fake_discriminator,
    fake_dnd,
    fake_tokenizer,
    share_codebook,
)
from torch_writer import save  # noqa: E402

from jaxllm.errors import InputError  # noqa: E402
from jaxllm.hub.official import ImportOptions, export_dnd  # noqa: E402
from jaxllm.images.code_models import CodeScorer  # noqa: E402
from jaxllm.images.config import CodeModelRun, TokenizerRun  # noqa: E402
from jaxllm.images.convert import convert, released_sampling  # noqa: E402
from jaxllm.images.runs import load_params  # noqa: E402
from jaxllm.images.sample import Decoder, Generator  # noqa: E402
from jaxllm.images.tokenizer import discriminator_blueprint  # noqa: E402
from jaxllm.models.dnd import DnDConfig  # noqa: E402

CODE_MODEL = dict(codes=7, dim=16, layers=2, class_rows=4, heads=2, kv_heads=2, hidden=24)
TOKENIZER = dict(
    width=4, multipliers=(1, 2), blocks=1, attention=(), latent=4, code_dim=3, codes=7, depth=2
)
OPTIONS = ImportOptions(heads=2, head_layers=(0, 1), grid=(2, 2), image_size=(4, 4), groups=2)


def prefixed(tensors, prefix):
    return {prefix + name: x for name, x in tensors.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Training checkpoints as the two official trainers write them."""
    folder, rng = tmp_path_factory.mktemp("official"), np.random.default_rng(0)
    model, ema = (fake_dnd(rng, depth=2, **CODE_MODEL) for _ in range(2))
    tokenizer = share_codebook(fake_tokenizer(rng, **TOKENIZER))
    discriminator = fake_discriminator(rng, width=4)
    adam = {"state": {0: {"step": 9, "exp_avg": np.ones(3, np.float32)}}, "param_groups": []}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "config.yaml").write_text("arch: {}\n")
    code_file = {
        "model": prefixed(model, "_orig_mod."),
        "optimizer": adam,
        "steps": 1234,
        "args": argparse.Namespace(gpt_model="GPT-XXL", lr=1e-4),
        "ema": prefixed(ema, "module."),
    }
    tokenizer_file = {
        "epoch": 5,
        "state_dict": prefixed(tokenizer, "module."),
        "discriminator": prefixed(discriminator, "module."),
        "optimizer": adam,
        "scheduler": {"last_epoch": 5},
    }
    save(folder / "code_model.pt", code_file)
    save(folder / "tokenizer" / "epoch5_model.pt", tokenizer_file)
    return folder, model, ema, tokenizer, discriminator


def test_code_model_becomes_a_run_that_samples(files, tmp_path, capfd):
    folder, model, ema, _, _ = files
    report = convert("dnd", folder / "code_model.pt", tmp_path / "new" / "run", options=OPTIONS)
    numbers = sum(x.size for x in model.values())
    assert report == {
        "kind": "dnd",
        "source": str(folder / "code_model.pt"),
        "step": 1234,
        "tensors": {"code_model": len(model)},
        "parameters": {"code_model": numbers},
    }
    assert capfd.readouterr().out == ""
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run"]
    generator = Generator.load(tmp_path / "new" / "run")
    assert generator.run.model.null_class == 3 and generator.class_names == ["0", "1", "2"]
    exported = export_dnd(generator.params, generator.extra, generator.run.model)
    for name, x in model.items():
        np.testing.assert_array_equal(exported[name], x)

    codes, log_probs = generator.sample(np.array([0, 2]), seed=1)
    assert codes.shape == log_probs.shape == (2, 4, 2) and codes.max() < 7
    logits = dnd_logits(
        model, codes, np.array([0, 2]), heads=2, kv_heads=2, head_layers=(0, 1), grid=2
    )
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(expected, codes[..., None], -1)[..., 0]
    score = CodeScorer(generator.sampler.build)
    scored, _ = score(generator.params, generator.extra, codes, np.array([0, 2]))
    np.testing.assert_allclose(scored, expected, rtol=0, atol=1e-5)

    averaged = ImportOptions(**{**vars(OPTIONS), "ema": True})
    convert("dnd", folder / "code_model.pt", tmp_path / "averaged", options=averaged)
    run, params, extra = load_params(tmp_path / "averaged", CodeModelRun)
    exported = export_dnd(params, extra, run.model)
    for name, x in ema.items():
        np.testing.assert_array_equal(exported[name], x)


def test_tokenizer_and_discriminator_become_a_run_that_decodes(files, tmp_path):
    folder, _, _, tokenizer, discriminator = files
    (tmp_path / "run").mkdir()
    report = convert("dnd", folder / "tokenizer", tmp_path / "run", options=OPTIONS)
    assert report["step"] == 5 and report["source"].endswith("epoch5_model.pt")
    # Two counters of the discriminator are not used.
    expected = {"tokenizer": len(tokenizer), "discriminator": len(discriminator) - 2}
    assert report["tensors"] == expected
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["job"] == "tokenizer" and saved["identity"]["model"] == saved["config"]["model"]
    assert saved["identity"]["adversarial"]["norm"] == "batch"

    codes = np.random.default_rng(1).integers(0, 7, (3, 4, 2))
    images = Decoder.load(tmp_path / "run")(codes)
    decoded = Tokenizer(tokenizer, groups=2, levels=2, depth=2).decode(codes.reshape(3, 2, 2, 2))
    decoded = np.clip(decoded, -1, 1).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(images, decoded, rtol=0, atol=1e-4)

    run, params, extra = load_params(tmp_path / "run", TokenizerRun)
    assert run.adversarial.weight == 0.75 and run.model.quantizer.shared
    blueprint = discriminator_blueprint(run.adversarial.model)
    model = blueprint.build(params["discriminator"], extra["discriminator"])
    pictures = np.random.default_rng(2).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    expected = discriminate(discriminator, pictures.transpose(0, 3, 1, 2))
    actual = np.asarray(model(pictures, train=False))
    np.testing.assert_allclose(actual, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_llamagen_from_safetensors(tmp_path):
    rng = np.random.default_rng(3)
    tensors = fake_dnd(rng, depth=1, llamagen=True, **CODE_MODEL)
    path = tmp_path / "c2i_B.safetensors"
    save_file(tensors, path)
    options = ImportOptions(**{**vars(OPTIONS), "head_layers": None})
    report = convert("llamagen", path, tmp_path / "run", options=options)
    assert report["step"] == 0 and report["tensors"] == {"code_model": len(tensors)}
    run, params, extra = load_params(tmp_path / "run", CodeModelRun)
    assert run.model.depth == 1
    exported = export_dnd(params, extra, run.model, llamagen=True)
    for name, x in tensors.items():
        np.testing.assert_array_equal(exported[name], x)
    with pytest.raises(InputError, match="a llamagen code model, not dnd"):
        convert("dnd", path, tmp_path / "other", options=options)
    averaged = ImportOptions(**{**vars(options), "ema": True})
    with pytest.raises(InputError, match="holds one set of weights"):
        convert("llamagen", path, tmp_path / "other", options=averaged)


def test_bad_sources_and_targets_leave_nothing_behind(files, tmp_path):
    folder, model, _, _, _ = files
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    broken = {n: x for n, x in model.items() if n != "norm.1.weight"}
    save(tmp_path / "broken.pt", {"model": broken})
    save(tmp_path / "other.pt", {"model": {"conv.weight": np.zeros(3, np.float32)}})
    save(tmp_path / "alone.pt", {"model": model})
    averaged = ImportOptions(**{**vars(OPTIONS), "ema": True})
    code_model = folder / "code_model.pt"
    cases = [
        ("dnd", code_model, kept, OPTIONS, "kept: exists and is not an empty folder"),
        ("dnd", folder / "absent.pt", None, OPTIONS, "absent.pt: no such file or folder"),
        ("dnd", kept, None, OPTIONS, "found none"),
        ("dnd", tmp_path, None, OPTIONS, "found alone.pt, broken.pt, other.pt"),
        ("llamagen", code_model, None, OPTIONS, "a dnd code model, not llamagen"),
        ("llamagen", folder / "tokenizer", None, OPTIONS, "a dnd tokenizer, not llamagen"),
        ("dnd", tmp_path / "other.pt", None, OPTIONS, "neither a code model .* conv.weight"),
        ("dnd", tmp_path / "alone.pt", None, averaged, "under one of ema, state_dict_ema"),
        # The second norm names the depth, so without it the second head has no place.
        ("dnd", tmp_path / "broken.pt", None, OPTIONS, "broken.pt: .*head_layers"),
    ]
    for kind, source, target, options, culprit in cases:
        with pytest.raises(InputError, match=culprit) as error:
            convert(kind, source, target or tmp_path / "run", options=options)
        assert "\n" not in str(error.value)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"kept", "alone.pt", "broken.pt", "other.pt"}
    assert [p.name for p in kept.iterdir()] == ["notes.txt"]


def test_sampling_defaults_are_the_released_ones():
    common = dict(head_layers=(39, 47), depth=2)
    assert released_sampling(DnDConfig.of_size("XXL", **common)).cfg_scale == (2.0,)
    assert released_sampling(DnDConfig.of_size("XXXL", **common)).cfg_scale == (1.7,)
    alone = DnDConfig.of_size("XXL", **common, num_classes=1, class_dropout=0.0)
    assert released_sampling(alone).cfg_scale == (1.0,)
    assert released_sampling(alone).temperature == (0.1,)
