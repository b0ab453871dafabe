"""The compiled decode loop writes each new entry in place: no cache is copied per token."""

import re

import jax
import numpy as np
import pytest

from jaxllm.decoding.language_model import LanguageModel
from jaxllm.decoding.text import TextSampling, row_keys
from jaxllm.models.bench_shapes import llama_shape
from jaxllm.models.decoder import decoder

LAYERS = 1
CONFIG = llama_shape(16, LAYERS, 2, 24, 40)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program of the CPU backend")
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="reads the program of one compiler")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_token_writes_two_entries_per_layer_and_copies_nothing(batch):
    blueprint = decoder(CONFIG)
    params, _ = blueprint.init(jax.random.key(0))
    sampler = LanguageModel("tiny", CONFIG, blueprint, params, None, ()).sampler()
    prompts = np.random.default_rng(0).integers(0, 40, (batch, 16)).tolist()
    keys, layers = row_keys(0, range(batch)), sampler.layers(params, {})
    state = sampler.prefill(params, {}, prompts, keys, max_new_tokens=32, layers=layers)
    compiled, texts = sampler._chunk, []

    def lower(*args, **options):
        texts.append(compiled.lower(*args, **options).compile().as_text())
        return state, None

    sampler._chunk = lower
    sampler.decode(params, {}, state, TextSampling(32, temperature=0.0), layers)
    shape = r"f32\[1,2,48,8\]|f32\[2,48,8\]" if batch == 1 else rf"f32\[{batch},2,48,8\]"
    made = re.findall(rf" = (?:{shape})\S* ([\w-]+)\(", texts[0])
    assert made.count("dynamic-update-slice") == 2 * LAYERS
    assert not {"copy", "transpose", "select", "concatenate"} & set(made)
