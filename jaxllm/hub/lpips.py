"""LPIPS-VGG16 from its two official files, as a distance and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.errors import InputError
from jaxllm.hub.torch_files import load_state_dict
from jaxllm.models.perceptual import LPIPS, import_lpips
from jaxllm.nn.module import Blueprint

Tree = Any


Distance = Callable[[Tree, jax.Array, jax.Array], jax.Array]


def load_lpips(folder: Path) -> tuple[Distance, Tree]:
    """Reads LPIPS-VGG16 from its two official files.

    Args:
      folder: Holds `vgg16` (torchvision) and `lpips_vgg` (version 0.1), each as `.pth`, `.pt` or
        `.safetensors`.

    Returns:
      The distance of `lpips_distance` and its parameters.

    Raises:
      InputError: A file is missing or is no such file.
    """
    model = import_lpips(*(_read_weights(folder, name) for name in ("vgg16", "lpips_vgg")))
    return lpips_distance()[0], nnx.to_pure_dict(nnx.state(model))


def lpips_distance() -> tuple[Distance, Blueprint[LPIPS]]:
    """Returns the distance and the blueprint of its parameters.

    The distance is `distance(params, images, decoded)`, the mean over images [B, h, w, 1 or 3] in
    [-1, 1] with h and w at least 16. One channel is repeated to three.
    """
    blueprint = Blueprint(lambda rngs: LPIPS(rngs=rngs))

    def distance(params: Tree, images: jax.Array, decoded: jax.Array) -> jax.Array:
        if images.shape[-1] == 1:
            images, decoded = (jnp.repeat(x, 3, axis=-1) for x in (images, decoded))
        return jnp.mean(blueprint.build(params, {})(images, decoded))

    return distance, blueprint


def _read_weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    endings = (".pth", ".pt", ".safetensors")
    found = [path for ending in endings if (path := folder / f"{name}{ending}").is_file()]
    if not found:
        raise InputError(f"{folder}: no {name}.pth or {name}.safetensors, which LPIPS needs")
    return load_state_dict(found[0])
