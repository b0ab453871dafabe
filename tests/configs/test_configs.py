"""Every config file: it loads, says how to run it, is the one that was checked in, and builds the
model that it promises.

`golden/NAME.json` is a config with every default filled in, so that a change of a default shows up
as a change of the experiments that it touches. After a change on purpose, rewrite them with

    PYTHONPATH=. python tests/configs/test_configs.py
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from jaxllm.data.images import PrepareImage, open_images
from jaxllm.errors import InputError
from jaxllm.images.config import CodeModelRun, RQTransformerRun, TokenizerRun
from jaxllm.images.demo import DemoRun
from jaxllm.images.extract import ExtractRun
from jaxllm.images.runs import replace_in
from jaxllm.images.tokenizer import tokenizer_blueprint
from jaxllm.images.words import WordsRun
from jaxllm.kvcompress.recall import RecallRun
from jaxllm.models.code_model import code_model
from jaxllm.preference.config import PreferenceRun
from jaxllm.preference.reward_scorer import RewardRun
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.run_folder import (
    first_difference,
    from_plain,
    load_config,
    override,
    to_plain,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.py"))
GOLDEN = Path(__file__).parent / "golden"
XXL, XXXL = 1_436_140_032, 2_569_164_800  # d = 2, 1,000 classes and the null row
# From XXL at 16,384 codes to 4,096 codes and one class: the embedding, one head, 1,000 class rows.
TEXT_XXL = 1_410_972_672 - 2 * (16384 - 4096) * 1536 - 1000 * 1536
PARAMETERS = {
    "imagenet256_dnd_xxl": XXL,
    "imagenet256_dnd_xxxl": XXXL,
    "arxiv256_dnd": 1_587_144_192 - 1000 * 1536,
    "text_image384_dnd": TEXT_XXL,
    # 48 blocks (attention, SwiGLU, two norms), class, position and depth rows, two projections
    # of codebook vectors, the last norm, one head. No null row: the class is never dropped.
    "imagenet256_rq_transformer": 48 * (4 * 1536**2 + 3 * 1536 * 4096 + 2 * 1536)
    + (1000 + 64 + 4 + 2 * 256 + 1 + 16384) * 1536,
    # Encoder, decoder and the two 1x1 convolutions; the codebook follows an average.
    "imagenet256_tokenizer": 27_194_880 + 39_294_851 + 131_584,
    "arxiv256_tokenizer": 27_194_880 + 39_294_851 + 131_584,
    "text_image384_tokenizer": 27_194_880 + 39_294_851 + 131_584,
}
SCRIPTS = {
    TokenizerRun: "tokenizer.py",
    CodeModelRun: "code_model.py",
    RQTransformerRun: "code_model.py",
    ExtractRun: "extract_codes.py",
    DemoRun: "demo.py",
    WordsRun: "words.py",
    LanguageModelRun: "lm.py",
    PreferenceRun: "preference.py",
    RewardRun: "reward.py",
    RecallRun: "recall.py",
}


def without_workdir(words):
    place = words.index("--workdir") if "--workdir" in words else len(words)
    return words[:place] + words[place + 2 :]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_opens_with_its_command_and_survives_a_round_trip(path):
    config = load_config(path)
    header = path.read_text().split('"""')[1]
    joined = header.replace("\\\n", " ")
    command = re.search(r"^    python train/(\w+\.py) (configs/\S+\.py)(.*)$", joined, re.MULTILINE)
    assert command is not None
    override(config, without_workdir(shlex.split(command[3])))
    assert command[1] == SCRIPTS[type(config)]
    assert (ROOT / "train" / command[1]).is_file()
    assert ROOT / command[2] == path
    assert "Hardware" in header and ("Time" in header or "time" in header)
    assert from_plain(type(config), to_plain(config)) == config
    assert override(config, []) == config


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_models_have_the_parameters_of_the_paper(name):
    config = load_config(ROOT / "configs" / "images" / f"{name}.py")
    make = tokenizer_blueprint if isinstance(config, TokenizerRun) else code_model
    assert make(config.model).parameter_count == PARAMETERS[name]


def residual_block(inputs, outputs):
    """Two norms with scale and bias, two 3x3 convolutions, and a 1x1 one where widths differ."""
    shortcut = (inputs + 1) * outputs if inputs != outputs else 0
    return (
        2 * inputs
        + (9 * inputs + 1) * outputs
        + 2 * outputs
        + (9 * outputs + 1) * outputs
        + shortcut
    )


def attention(width):
    return 2 * width + 4 * (width + 1) * width


def autoencoder(multipliers, attended=()):
    """The RQ-VAE by hand: width 128, two blocks a level, three in the decoder."""
    widths = [128 * m for m in multipliers]
    total = 2 * (256 + 1) * 256  # to and from the code dimension
    for blocks, first in ((2, [128, *widths[:-1]]), (3, [*widths[1:], widths[-1]])):
        last = widths[-1]
        total += 2 * residual_block(last, last) + attention(last)
        for level, (inputs, width) in enumerate(zip(first, widths, strict=True)):
            total += residual_block(inputs, width) + (blocks - 1) * residual_block(width, width)
            total += blocks * attention(width) if level in attended else 0
    resampled = sum((9 * w + 1) * w for w in widths[:-1]) + sum((9 * w + 1) * w for w in widths[1:])
    ends = (9 * 3 + 1) * 128 + 2 * widths[-1] + (9 * widths[-1] + 1) * 256
    ends += (9 * 256 + 1) * widths[-1] + 2 * widths[0] + (9 * widths[0] + 1) * 3
    return total + resampled + ends


def test_the_tokenizer_of_the_rq_transformer_has_the_parameters_of_its_definition():
    assert autoencoder((1, 1, 2, 2, 4)) == PARAMETERS["imagenet256_tokenizer"]
    config = load_config(ROOT / "configs" / "images" / "imagenet256_rq_tokenizer.py")
    assert config.model.grid == (8, 8) and config.model.quantizer.depth == 4
    expected = autoencoder((1, 1, 2, 2, 4, 4), attended=(5,))
    assert tokenizer_blueprint(config.model).parameter_count == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_is_the_one_that_was_checked_in(path):
    golden = json.loads((GOLDEN / f"{path.stem}.json").read_text())
    found = json.loads(json.dumps(to_plain(load_config(path))))
    assert first_difference(golden, found, path.stem) is None, "see this file's first lines"


def test_every_golden_file_has_its_config():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {path.stem for path in FILES}


def test_stages_fit_each_other():
    """What one stage writes is what the next one's config reads."""
    chains = {
        "imagenet256_dnd_xxl": ("imagenet256_tokenizer", "imagenet256_codes"),
        "imagenet256_dnd_xxxl": ("imagenet256_tokenizer", "imagenet256_codes"),
        "imagenet256_rq_transformer": ("imagenet256_rq_tokenizer", "imagenet256_codes"),
        "arxiv256_dnd": ("arxiv256_tokenizer", "arxiv256_codes"),
        "text_image384_dnd": ("text_image384_tokenizer", "text_image384_codes"),
        "folder64_dnd": ("folder64", "folder64_codes"),
    }
    for model, chain in chains.items():
        stages = [load_config(ROOT / "configs" / "images" / f"{n}.py") for n in (model, *chain)]
        code_run, tokenizer_run, extract = stages
        quantizer, wanted = tokenizer_run.model.quantizer, code_run.model
        assert (wanted.grid, wanted.depth) == (tokenizer_run.model.grid, quantizer.depth), model
        assert wanted.codebook_size == quantizer.codebook_size, model
        assert extract.data.image_size == tokenizer_run.data.image_size, model
        assert (wanted.num_classes == 1) == tokenizer_run.data.unconditional, model
        code_run.sampling.per_depth(wanted.depth)  # refuses lists of another length


def test_steps_are_the_epochs_of_the_paper():
    steps = {
        path.stem: load_config(path) for path in FILES if "256" in path.stem or "384" in path.stem
    }
    steps = {name: config.loop.steps for name, config in steps.items() if hasattr(config, "loop")}
    assert steps == {
        "imagenet256_tokenizer": 500_400,
        "imagenet256_rq_tokenizer": 50_040,
        "imagenet256_dnd_xxl": 1_501_200,
        "imagenet256_dnd_xxxl": 1_501_200,
        "imagenet256_rq_transformer": 62_500,
        "arxiv256_tokenizer": 781_200,
        "arxiv256_dnd": 2_343_600,
        "text_image384_tokenizer": 937_500,
        "text_image384_dnd": 2_812_500,
    }


def test_the_tokenizer_recipe_of_the_paper():
    run = load_config(ROOT / "configs" / "images" / "imagenet256_tokenizer.py")
    optimizer, adversarial = run.optimizer, run.adversarial
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule) == (
        "adam",
        4e-5,
        "constant",
    )
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (0.5, 0.9, None)
    assert (run.data.batch_size, optimizer.warmup_steps) == (256, 2502)
    assert (adversarial.weight, adversarial.loss, adversarial.start_step) == (0.75, "hinge", 0)
    assert adversarial.adaptive and adversarial.model.norm == "group"
    assert (run.perceptual.kind, run.perceptual.weight) == ("lpips", 1.0)
    assert (run.reconstruction, run.model.quantizer.beta, run.model.remat) == ("l2", 0.25, True)
    released = ["--model.quantizer.ema-mode", "sequential", "--adversarial.model.norm", "batch"]
    changed = override(run, released)
    assert changed.model.quantizer.ema_mode == "sequential"
    assert changed.adversarial.model.norm == "batch"


def test_pages_of_the_paper_scaled_down_are_an_override():
    config = load_config(ROOT / "configs" / "images" / "text_image384_tokenizer.py")
    data = override(config, ["--data.pages.size", "512", "--data.resize", "crop"]).data
    page = open_images(data, "validation")[0]
    assert page["image"].shape == (512, 512, 3)
    prepared = PrepareImage(data, train=False)(page, np.random.default_rng(0))["image"]
    assert prepared.shape == (384, 384, 3) and prepared.min() < -0.5 < 0.99 < prepared.max()


def test_the_recipe_of_the_paper():
    config = load_config(ROOT / "configs" / "images" / "imagenet256_dnd_xxl.py")
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.05)
    assert optimizer.learning_rate == 1e-4 * config.data.batch_size / 256
    assert config.loop.steps == 300 * (1_281_167 // 256)
    assert config.model.head_layers == (39, 47)


def test_structures_are_overrides_of_the_main_config():
    config = load_config(ROOT / "configs" / "images" / "imagenet256_dnd_xxl.py")
    for structure in ("parallel", "flat"):
        changed = override(config, ["--model.structure", structure, "--model.head-layers", "None"])
        assert changed.model.structure == structure and changed.model.head_layers is None
    assert override(config, ["--model.structure", "vertical"]).model.head_layers == (39, 47)


def test_tokenizer_depth_is_one_override():
    config = load_config(ROOT / "configs" / "images" / "imagenet256_tokenizer.py")
    assert override(config, ["--model.quantizer.depth", "8"]).model.quantizer.depth == 8


@pytest.mark.parametrize("layers", [(47, 39), (39, 40), (39,), (39, 48)])
def test_bad_head_layers_are_refused(layers):
    config = load_config(ROOT / "configs" / "images" / "imagenet256_dnd_xxl.py")
    with pytest.raises(InputError, match="head_layers"):
        replace_in(config, model__head_layers=layers)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.json"):
        old.unlink()
    for file in FILES:
        text = json.dumps(to_plain(load_config(file)), indent=1)
        (GOLDEN / f"{file.stem}.json").write_text(text + "\n")
