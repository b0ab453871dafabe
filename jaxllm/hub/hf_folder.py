"""Decoder language models from and to Hugging Face folders: config.json and safetensors.

A model is read one leaf after the other, and of a leaf only what this host's devices hold, so the
host never keeps more than one leaf; a folder is written one file after the other.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxllm.data.text_tokenizers import Tokenizer, save_tokenizer
from jaxllm.errors import InputError
from jaxllm.hub.hf_config import config_to_hf, read_config
from jaxllm.hub.hf_tensors import Table, tensor_table
from jaxllm.hub.layouts import Shape, Slot, check_tensors, model_slots, read_block
from jaxllm.models.decoder import DECODER_RULES, Decoder, DecoderConfig, decoder
from jaxllm.nn.module import Blueprint
from jaxllm.nn.precision import compute_dtype
from jaxllm.parallel.sharding import param_shardings

Tree = Any

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What lies beside the weights and is carried over unread.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_CARRIED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_hf_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder whose config.json names a Hugging Face `model_type`."""
    try:
        found = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("model_type"), str)


def load_decoder(
    folder: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: Any = None
) -> tuple[DecoderConfig, Blueprint[Decoder], Tree]:
    """Reads a decoder language model from a Hugging Face folder.

    Args:
      folder: Holds config.json and model.safetensors, or several files and their index.
      mesh: Where to place the parameters, by `DECODER_RULES`; None for the default device.
      dtype: Of the parameters and of the computation; None for float32 parameters and the
        backend's compute dtype.

    Returns:
      The config, the blueprint, and the parameters `blueprint.build(params, {})` takes.

    Raises:
      InputError: As `read_config`; a missing or unreadable file; an unknown, missing or misshapen
        tensor, of another dtype than float32, float16 and bfloat16, or with a value that is not
        finite.
    """
    folder = Path(folder)
    model_type, config = read_config(folder)
    blueprint = decoder(config, compute_dtype("auto") if dtype is None else dtype)
    files = TensorFiles(folder)
    table = tensor_table(model_type, config)
    slots = _file_slots(table, config, blueprint, files)
    by_leaf: dict[tuple[str | int, ...], list[Slot]] = defaultdict(list)
    for slot in slots:
        by_leaf[slot.path[1:]].append(slot)
    abstract = blueprint.abstract_params  # type: ignore[attr-defined]
    shardings: dict[Any, Any] = {}
    if mesh is not None:
        shardings = flatten_dict(param_shardings(abstract, DECODER_RULES, mesh))
    wanted = np.dtype(jnp.float32 if dtype is None else dtype)
    leaves = {
        path: _load_leaf(by_leaf[path], leaf.shape, shardings.get(path), wanted, files)
        for path, leaf in flatten_dict(abstract).items()
    }
    return config, blueprint, unflatten_dict(leaves)


def save_decoder(
    folder: str | os.PathLike[str],
    config: DecoderConfig,
    params: Tree,
    *,
    dtype: Any = None,
    source: str | os.PathLike[str] | None = None,
    tokenizer: Tokenizer | None = None,
    eos: Sequence[int] = (),
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that transformers loads; the inverse of `load_decoder`.

    On several hosts all processes call it and the first one writes.

    Args:
      folder: New or empty; it appears whole or not at all.
      config: The model.
      params: Its parameters, on any mesh.
      dtype: Of the tensors written; None for that of the parameters.
      source: The folder that the model came from: its model type is kept where it can be, and its
        tokenizer, generation settings and special token ids are copied.
      tokenizer: Of a model without a `source`: its files and special token ids are written.
      eos: Ids that end a text, of such a model; by default the tokenizer's.
      max_file_bytes: More go into several files with an index.

    Raises:
      InputError: No Hugging Face family has this model, `folder` holds something, or `source` is
        no such folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists, expected a new or an empty folder")
    if source is not None and not is_hf_folder(source):
        raise InputError(f"{source}: no config.json with a model_type, expected the source folder")
    origin = {} if source is None else json.loads((Path(source) / "config.json").read_text())
    model_type, written = config_to_hf(config, origin.get("model_type"))
    if source is None and tokenizer is not None:
        ends = tokenizer.eos if not eos else eos[0] if len(eos) == 1 else list(eos)
        ids = (tokenizer.bos, ends, tokenizer.pad)
        origin = dict(zip(_CARRIED_KEYS, ids, strict=True))
    written |= {name: origin[name] for name in _CARRIED_KEYS if name in origin}
    slots = model_slots(tensor_table(model_type, config).rules, decoder(config))
    leaves = {
        tuple(map(str, path)): leaf for path, leaf in flatten_dict({"params": params}).items()
    }
    wanted = np.dtype(leaves["params", "embed"].dtype if dtype is None else dtype)
    written["torch_dtype"] = wanted.name
    writes = jax.process_index() == 0
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    if writes:
        partial.mkdir(parents=True)
    try:
        _write_tensors(partial if writes else None, slots, leaves, wanted, max_file_bytes)
        if writes:
            (partial / "config.json").write_text(json.dumps(written, indent=2) + "\n")
            for name in _COMPANIONS if source is not None else ():
                if (Path(source) / name).is_file():  # type: ignore[arg-type]
                    shutil.copyfile(Path(source) / name, partial / name)  # type: ignore[arg-type]
            if source is None and tokenizer is not None:
                save_tokenizer(tokenizer, partial)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class TensorFiles:
    """The tensors of a folder's safetensors files, read in ranges."""

    def __init__(self, folder: Path):
        """Opens the files and reads their headers.

        Raises:
          InputError: A file is missing, unreadable or disagrees with the index, or a tensor has
            another dtype than float32, float16 and bfloat16.
        """
        self.folder = folder
        index = _read_index(folder)
        self.shapes: dict[str, Shape] = {}
        self._where: dict[str, tuple[Path, Any]] = {}
        for file in sorted(set(index.values())) if index is not None else [_SINGLE]:
            path = folder / file
            try:
                opened = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"{path}: not a readable safetensors file ({reason})") from error
            for name in opened.keys():
                if index is not None and index.get(name) != file:
                    raise InputError(f"{path}: holds {name}, which {_INDEX} has elsewhere")
                part = opened.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise InputError(
                        f"{path}: {name} is {part.get_dtype()}, expected {', '.join(_DTYPES)}"
                    )
                self.shapes[name] = tuple(part.get_shape())
                self._where[name] = path, opened
        if missing := [name for name in index or () if name not in self.shapes]:
            raise InputError(f"{folder / index[missing[0]]}: lacks {missing[0]}")  # type: ignore[index]

    def path(self, name: str) -> Path:
        """Returns the file that holds a tensor."""
        return self._where[name][0]

    def read(self, name: str, ranges: tuple[slice, ...]) -> np.ndarray:
        """Returns a range of a tensor, in its own dtype."""
        return self._where[name][1].get_slice(name)[ranges]


def _read_index(folder: Path) -> dict[str, str] | None:
    """Returns tensor name -> file name of a folder with several files, None of one with one."""
    path = folder / _INDEX
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text())["weight_map"]
        good = all(Path(file).name == file for file in names.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable index with a weight_map ({error})") from error
    if not good:
        raise InputError(f"{path}: names a file outside the folder")
    return names


def _file_slots(
    table: Table, config: DecoderConfig, blueprint: Blueprint[Decoder], files: TensorFiles
) -> list[Slot]:
    """Returns where each tensor goes, under the names that this folder has for them.

    Names are compared without the table's prefix if the folder has none. A repeat of tied
    embeddings is compared and dropped.
    """
    shapes = {n: shape for n, shape in files.shapes.items() if not table.ignored.fullmatch(n)}
    slots = model_slots(table.rules, blueprint)
    if not any(name.startswith(table.prefix) for name in shapes):
        slots = [slot._replace(name=slot.name.removeprefix(table.prefix)) for slot in slots]
    embed = next(slot.name for slot in slots if slot.path[1:] == ("embed",))
    if config.tie_embeddings and table.head in shapes and embed in shapes:
        del shapes[table.head]
        whole = (slice(None), slice(None))
        if not np.array_equal(files.read(table.head, whole), files.read(embed, whole)):
            raise InputError(
                f"{files.path(table.head)}: {table.head} differs from {embed}, but config.json "
                "ties them"
            )
    check_tensors(slots, shapes, str(files.folder))
    return slots


def _load_leaf(
    slots: Sequence[Slot], shape: Shape, sharding: Any, dtype: np.dtype, files: TensorFiles
) -> jax.Array:
    """Reads one leaf onto its devices: what each holds, once for those that hold the same."""

    def read(name: str, ranges: tuple[slice, ...]) -> np.ndarray:
        tensor = files.read(name, ranges)
        with np.errstate(over="ignore"):
            cast = tensor.astype(dtype)
        if not np.isfinite(cast).all():
            raise InputError(
                f"{files.path(name)}: {name} holds a value that is not finite in {dtype.name}"
            )
        return cast

    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        ranges = zip(index or (), shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in ranges)
        if bounds not in blocks:
            filled = np.empty([stop - start for start, stop in bounds], dtype)
            read_block(slots, filled, bounds, read)
            blocks[bounds] = filled
        return blocks[bounds]

    if sharding is None:
        return jnp.asarray(block((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, block, dtype=dtype)


def _write_tensors(
    folder: Path | None,
    slots: Sequence[Slot],
    leaves: dict[tuple[str, ...], Any],
    dtype: np.dtype,
    max_file_bytes: int,
) -> None:
    """Writes all tensors, in files of at most `max_file_bytes` where one tensor is not larger."""
    sizes = [int(np.prod(slot.torch_shape)) * dtype.itemsize for slot in slots]
    groups: list[list[Slot]] = [[]]
    held = 0
    for slot, size in zip(slots, sizes, strict=True):
        if groups[-1] and held + size > max_file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(slot)
        held += size
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        file = _SINGLE if len(groups) == 1 else file
        tensors = {}
        for slot in group:
            value = slot.view(leaves[tuple(map(str, slot.path))])
            if isinstance(value, jax.Array) and not value.is_fully_addressable:
                value = multihost_utils.process_allgather(value, tiled=True)
            if folder is not None:
                there = slot.layout.save(np.asarray(value))
                tensors[slot.name] = np.ascontiguousarray(there.astype(dtype))
            weight_map[slot.name] = file
        if folder is not None:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            # The writer makes files for the owner only; give them the folder's permissions.
            (folder / file).chmod(folder.stat().st_mode & 0o666)
    if folder is not None and len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
