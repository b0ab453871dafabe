"""Official checkpoints of image models as run folders, which everything here then reads.

A file is recognised by its tensor names: a code model (DnD-Transformer or LlamaGen), or an RQ-VAE
tokenizer, whose training checkpoints hold its discriminator too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxllm.data.images import ImageDataConfig
from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.errors import InputError
from jaxllm.hub.official import (
    DEFAULTS,
    Imported,
    ImportOptions,
    Tensors,
    import_discriminator,
    import_dnd,
    import_tokenizer,
)
from jaxllm.hub.torch_files import load_checkpoint, named_tensors
from jaxllm.images.config import AdversarialConfig, CodeModelRun, TokenizerRun
from jaxllm.models.dnd import DnDConfig
from jaxllm.training.finished_run import check_new_folder, write_finished_run
from jaxllm.training.state import Tree

Kind = Literal["dnd", "llamagen"]

# Top-level keys of official training checkpoints.
RAW_KEYS, EMA_KEYS = ("state_dict", "model", "module"), ("ema", "state_dict_ema")
SUFFIXES = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Converted:
    """What a run folder is made of."""

    job: str
    run: CodeModelRun | TokenizerRun
    identity: Any
    params: Tree
    extra: Tree
    parts: dict[str, Imported]


def convert(
    kind: Kind, source: Path, to: Path, *, options: ImportOptions = DEFAULTS
) -> dict[str, Any]:
    """Writes the run folder of an official checkpoint.

    Args:
      kind: `dnd` for a DnD-Transformer or its tokenizer, `llamagen` for a LlamaGen code model.
      source: A `.pt`, `.pth` or `.safetensors` file, or a folder that holds one.
      to: The run folder to make; it appears when it is complete.
      options: What the tensors do not tell.

    Returns:
      `kind`, `source`, `step`, and by part ("code_model", or "tokenizer" and "discriminator")
      `tensors`, the number consumed, and `parameters`, the number that gradients train.

    Raises:
      InputError: The source cannot be read or is no such model, or `to` is not an empty folder.
    """
    check_new_folder(to)
    path = find_weights(source)
    tensors, rest = load_checkpoint(path, EMA_KEYS if options.ema else RAW_KEYS)
    if options.ema and not rest:
        raise InputError(f"{path}: holds one set of weights, expected averaged ones beside them")
    try:
        found = _recognise(kind, tensors, rest, options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    step = _step(rest)
    write_finished_run(
        to,
        job=found.job,
        config=found.run,
        identity=found.identity,
        params=found.params,
        extra=found.extra,
        step=step,
    )
    return {
        "kind": kind,
        "source": str(path),
        "step": step,
        "tensors": {name: part.tensors for name, part in found.parts.items()},
        "parameters": {
            name: sum(leaf.size for leaf in jax.tree.leaves(part.params))
            for name, part in found.parts.items()
        },
    }


def find_weights(source: Path) -> Path:
    """Returns the file itself, or the only file of weights in a folder."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder")
    files = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES)
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise InputError(f"{source}: expected one {'/'.join(SUFFIXES)} file, found {names}")
    return files[0]


def _recognise(
    kind: Kind, tensors: Tensors, rest: dict[str, Any], options: ImportOptions
) -> Converted:
    if "tok_embeddings.weight" in tensors:
        actual = "llamagen" if "norm.weight" in tensors else "dnd"
        if kind != actual:
            raise InputError(f"a {actual} code model, not {kind}")
        return _code_model(import_dnd(tensors, options))
    if not any(name.startswith("quantizer.codebooks.") for name in tensors):
        raise InputError(
            "neither a code model (tok_embeddings.weight) nor an RQ-VAE tokenizer "
            f"(quantizer.codebooks.0.weight); it holds {next(iter(tensors), 'nothing')}"
        )
    if kind != "dnd":
        raise InputError(f"a dnd tokenizer, not {kind}")
    discriminator = None
    if rest.get("discriminator"):
        named = named_tensors(rest["discriminator"], "discriminator")
        discriminator = import_discriminator(named)
    return _tokenizer(import_tokenizer(tensors, options), discriminator)


def _code_model(part: Imported) -> Converted:
    run = CodeModelRun(model=part.config, sampling=released_sampling(part.config))
    return Converted("dnd", run, run.model, part.params, part.extra, {"code_model": part})


def _tokenizer(part: Imported, discriminator: Imported | None) -> Converted:
    parts = {"tokenizer": part}
    adversarial = AdversarialConfig()
    if discriminator is not None:
        parts["discriminator"] = discriminator
        adversarial = AdversarialConfig(weight=0.75, model=discriminator.config)
    size, channels = part.config.image_size, part.config.channels
    run = TokenizerRun(
        model=part.config,
        data=ImageDataConfig(source="tfds", image_size=size, channels=channels, resize="crop"),
        adversarial=adversarial,
    )
    identity = {
        "model": run.model,
        "adversarial": None if discriminator is None else discriminator.config,
    }
    params = {name: p.params for name, p in parts.items()}
    extra = {"perceptual": {}, **{name: p.extra for name, p in parts.items()}}
    return Converted("tokenizer", run, identity, params, extra, parts)


def released_sampling(config: DnDConfig) -> SamplingConfig:
    """How the release's scripts draw: guidance 2.0 (XXXL 1.7), or none at temperature 0.1."""
    if config.null_class is None:
        return SamplingConfig(cfg_scale=(1.0,), temperature=(0.1,))
    return SamplingConfig(cfg_scale=(1.7 if config.dim == 2048 else 2.0,))


def _step(rest: dict[str, Any]) -> int:
    step = rest.get("steps", rest.get("epoch", 0))
    if not isinstance(step, int | np.integer) or not 0 <= step < 2**31:
        return 0
    return int(step)
