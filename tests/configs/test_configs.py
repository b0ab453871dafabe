"""Every config file: it loads, says how to run it, and builds the model that it promises."""

import re
from pathlib import Path

import pytest

from jaxllm.errors import InputError
from jaxllm.images.config import CodeModelRun, RQTransformerRun, TokenizerRun
from jaxllm.images.demo import DemoRun
from jaxllm.images.extract import ExtractRun
from jaxllm.images.runs import replace_in
from jaxllm.images.tokenizer import tokenizer_blueprint
from jaxllm.images.words import WordsRun
from jaxllm.models.code_model import code_model
from jaxllm.training.run_folder import from_plain, load_config, override, to_plain

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.py"))
XXL, XXXL = 1_436_140_032, 2_569_164_800  # d = 2, 1,000 classes and the null row
# From XXL at 16,384 codes to 4,096 codes and one class: the embedding, one head, 1,000 class rows.
TEXT_XXL = 1_410_972_672 - 2 * (16384 - 4096) * 1536 - 1000 * 1536
PARAMETERS = {
    "imagenet256_dnd_xxl": XXL,
    "imagenet256_dnd_xxxl": XXXL,
    "arxiv256_dnd": 1_587_144_192 - 1000 * 1536,
    "text_image384_dnd": TEXT_XXL,
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
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_opens_with_its_command_and_survives_a_round_trip(path):
    config = load_config(path)
    header = path.read_text().split('"""')[1]
    command = re.search(r"python train/(\w+\.py) (configs/\S+\.py)", header)
    assert command is not None
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
