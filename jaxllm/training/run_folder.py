"""Config files in, run folders out: get_config(), dotted overrides, config.json, identity.

A config file is Python and is run as such: it is the user's own code. What a run folder holds is
JSON and is only ever read into dataclasses whose types are known beforehand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import types
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from jaxllm.errors import InputError
from jaxllm.training.job import Job

Config = TypeVar("Config")


def load_config(path: Path) -> Any:
    """Runs a config file and returns what its `get_config()` returns, a frozen dataclass."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, _siblings(path), n=3, cutoff=0.3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise InputError(f"config {path}: no such file{hint}")
    spec = importlib.util.spec_from_file_location(f"jaxllm_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"config {path}: defines no get_config()")
    return module.get_config()


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Returns `config` with dotted overrides applied: ["--model.layers", "4"].

    Raises:
      InputError: For an unknown key (with the nearest known ones) or a value of another type.
    """
    parse = partial(
        tyro.cli,
        type(config),
        default=config,
        args=list(arguments),
        prog="CONFIG",
        # A union of dataclasses keeps the member that the config file chose.
        config=(tyro.conf.AvoidSubcommands,),
    )
    if "--help" in arguments or "-h" in arguments:
        parse()
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(captured):
            return parse()
    except SystemExit:
        raise InputError(_explain(config, arguments, captured.getvalue())) from None


def dotted_keys(config: Any, prefix: str = "") -> list[str]:
    """Returns every leaf key of a config tree: ["loop.steps", ...]."""
    keys = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        keys += dotted_keys(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return keys


def _explain(config: Any, arguments: Sequence[str], printed: str) -> str:
    known = dotted_keys(config)
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        key = argument[2:].split("=")[0].replace("-", "_")
        bare = key.replace(".no_", ".")
        if key not in known and bare not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join('--' + name for name in near)}?" if near else ""
            return f"unknown key {argument.split('=')[0]}{hint}"
    text = " ".join(printed.replace("│", " ").split())
    cleaned = "".join(c for c in text if c not in "╭╮╰╯─").strip()
    return f"bad override {' '.join(arguments)}: {cleaned[:300]}"


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []


# -- config.json ---------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """Returns a dataclass tree as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(kind: Any, value: Any, where: str = "config") -> Any:
    """Builds a value of type `kind` (dataclass, tuple, optional, ...) from JSON values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected an object, found {value!r}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise InputError(f"{where}: unknown key {unknown[0]!r}")
        return kind(**{k: from_plain(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options[:-1]:
            with contextlib.suppress(InputError, TypeError):
                return from_plain(option, value, where)
        return from_plain(options[-1], value, where)
    if origin is tuple:
        inner = arguments[0]
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = [inner] * len(value) if many else list(arguments)
        return tuple(from_plain(k, v, where) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int):
        return float(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a temporary name, then renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Reads JSON, or raises InputError naming the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


def write_config(workdir: Path, job: Job) -> None:
    """Writes config.json: the job's name, its whole config and its identity."""
    if jax.process_index() == 0:
        plain = {"job": job.name, "config": to_plain(job.config), "identity": to_plain(job.identity)}
        write_json(workdir / "config.json", plain)


def check_identity(workdir: Path, job: Job) -> None:
    """Refuses to continue a run folder that belongs to another job or model."""
    path = workdir / "config.json"
    if not path.exists():
        return
    saved, wanted = read_json(path), to_plain(job.identity)
    if saved.get("job") != job.name:
        raise InputError(f"{workdir} holds a {saved.get('job')!r} run, not {job.name!r}")
    difference = first_difference(saved.get("identity"), wanted)
    if difference and (workdir / "checkpoints").exists():
        key, old, new = difference
        raise InputError(
            f"{workdir} holds a checkpoint of another model: {key} is {old!r} there and {new!r} "
            "here; choose another --workdir"
        )


def first_difference(old: Any, new: Any, key: str = "model") -> tuple[str, Any, Any] | None:
    """Returns (key, old, new) of the first place where two JSON trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}")
            if found:
                return found
        return None
    return None if old == new else (key, old, new)


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    from importlib.metadata import version

    names = ("jaxllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = version(name)
    return {"python": platform.python_version(), **found}
