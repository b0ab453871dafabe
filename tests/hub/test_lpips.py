"""LPIPS from files of the official names, legacy torch and safetensors, as a training loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_writer import save

from jaxllm.errors import InputError
from jaxllm.hub.lpips import load_lpips
from jaxllm.images.config import PerceptualConfig
from jaxllm.images.tokenizer import perceptual_loss
from jaxllm.models.perceptual import import_lpips

CHANNELS = (3, 64, 64, 128, 128, *(256,) * 3, *(512,) * 6)
INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    vgg = {"classifier.0.bias": np.zeros(4, np.float32)}
    for index, inputs, outputs in zip(INDICES, CHANNELS[:-1], CHANNELS[1:], strict=True):
        w = rng.standard_normal((outputs, inputs, 3, 3), np.float32) * (2 / 9 / inputs) ** 0.5
        vgg[f"features.{index}.weight"] = w
        vgg[f"features.{index}.bias"] = np.zeros(outputs, np.float32)
    lin = {
        f"lin{i}.model.1.weight": rng.uniform(0, 1, (1, c, 1, 1)).astype(np.float32)
        for i, c in enumerate((64, 128, 256, 512, 512))
    }
    path = tmp_path_factory.mktemp("lpips")
    save(path / "vgg16.pth", vgg, legacy=True)
    save_file(lin, path / "lpips_vgg.safetensors")
    return path, vgg, lin


def test_mean_distance_of_grey_images(folder):
    path, vgg, lin = folder
    distance, params = perceptual_loss(PerceptualConfig(kind="lpips", path=str(path)))
    rng = np.random.default_rng(1)
    images, decoded = (jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 1)), jnp.float32) for _ in "ab")
    value = jax.jit(distance)(params, images, decoded)
    colour = (jnp.repeat(x, 3, axis=-1) for x in (images, decoded))
    expected = import_lpips(vgg, lin)(*colour)
    assert value.shape == () and expected.shape == (2,)
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-4)


def test_images_and_folders_that_do_not_fit(folder, tmp_path):
    path, _, lin = folder
    distance, params = load_lpips(path)
    for shape in ((1, 15, 16, 1), (1, 16, 16, 2)):
        with pytest.raises(InputError, match=r"expected equal \[B, >=16, >=16, 3\]"):
            distance(params, jnp.zeros(shape), jnp.zeros(shape))
    with pytest.raises(InputError, match="no vgg16.pth or vgg16.safetensors"):
        load_lpips(tmp_path)
    save_file(lin, tmp_path / "vgg16.safetensors")
    save_file(lin, tmp_path / "lpips_vgg.safetensors")
    with pytest.raises(InputError, match=r"missing \['features.0.bias'"):
        load_lpips(tmp_path)
