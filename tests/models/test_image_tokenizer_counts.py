"""Parameter counts of the paper's tokenizer, from the definitions of arXiv:2203.01941's network."""

import jax
import numpy as np
import pytest

from jaxllm.models.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from jaxllm.nn.module import Blueprint


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("levels", "encoder", "decoder"),
    [((), 27_194_880, 39_294_851), ((4,), 29_298_176, 42_449_795)],
)
def test_numbers_of_the_f16_tokenizer(levels, encoder, decoder):
    config = ImageTokenizerConfig(attention_levels=levels)
    assert config.grid == (16, 16)
    model = Blueprint(lambda rngs: ImageTokenizer(config, rngs=rngs))
    params = model.abstract_params
    assert count(params["encoder"]) == encoder
    assert count(params["decoder"]) == decoder
    assert count(params["quant_conv"]) + count(params["post_quant_conv"]) == 131_584
    # Torch's table has one row more, for padding: 4,194,560 numbers.
    codebook = model.abstract_extra["quantizer_state"]["codebook"]
    assert codebook.shape == (1, 16384, 256) and count(codebook) + 256 == 4_194_560
