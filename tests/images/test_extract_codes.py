"""Extraction holds the pixels of one batch, however large the shard."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxllm.images.codes as codes_module
from jaxllm.data.images import ImageDataConfig, normalise, open_images
from jaxllm.images.codes import crops_of, extract_codes
from jaxllm.images.tokenizer import tokenizer_blueprint
from jaxllm.models.image_tokenizer import ImageTokenizerConfig
from jaxllm.quantize import ResidualVQ

DATA = ImageDataConfig(source="fashion", image_size=(32, 32))
MODEL = ImageTokenizerConfig(
    image_size=(32, 32), channels=1, width=8, patch=16, multipliers=(1,), groups=4, res_blocks=1,
    latent_dim=8, quantizer=ResidualVQ(codebook_size=1024, code_dim=4, depth=2),
)  # fmt: skip


def fingerprint(tokenizer, params, extra, images):
    """Stands in for the encoder: codes that tell apart images, cells and levels."""
    mean = np.rint((images + 1) * 127.5).reshape(len(images), -1).mean(axis=1)
    offsets = np.arange(8).reshape(1, 4, 2)
    return np.rint(mean).astype(np.int32)[:, None, None] + 256 * (offsets % 3) + offsets


@pytest.mark.parametrize(("shard", "batch_size"), [(100, 7), (64, 64), (10_000, 50)])
def test_codes_do_not_depend_on_shards_and_batches(shard, batch_size, tmp_path, monkeypatch):
    held, most = [], []

    def counted_crops(image, *arguments):
        held.append(1)
        return crops_of(image, *arguments)

    def counted_encoder(tokenizer, params, extra, images):
        most.append(len(held))
        held.clear()
        assert len(images) == batch_size
        return fingerprint(tokenizer, params, extra, images)

    monkeypatch.setattr(codes_module, "crops_of", counted_crops)
    monkeypatch.setattr(codes_module, "encode_images", counted_encoder)
    monkeypatch.setattr(codes_module, "SHARD", shard)
    blueprint = tokenizer_blueprint(MODEL)
    abstract = blueprint.abstract_params, blueprint.abstract_extra
    params, extra = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    # The training split, since only there classes could be repeated.
    how = {"crops": "ten", "batch_size": batch_size}
    found = extract_codes(blueprint, params, extra, DATA, "train", tmp_path, **how)
    source = open_images(dataclasses.replace(DATA, balance=0.0), "train")
    assert max(most) <= batch_size
    assert (len(found), found.meta["shards"]) == (len(source), -(-len(source) // shard))
    for row in range(len(source)):
        example = source[row]
        views = normalise(crops_of(example["image"], DATA, "ten"))
        np.testing.assert_array_equal(found[row]["codes"], fingerprint(None, None, None, views))
        assert found[row]["label"] == example["label"]
