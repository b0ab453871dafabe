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
import re
import types
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tyro

from jaxllm.errors import InputError
from jaxllm.parallel.processes import first_process
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
    config = module.get_config()
    if not dataclasses.is_dataclass(config):
        raise InputError(
            f"config {path}: get_config() returns {type(config).__name__}, not a dataclass"
        )
    return config


def sibling_config(file: str, name: str) -> Any:
    """Returns the config of another file in the folder of `file`, for configs that vary it."""
    return load_config(Path(file).with_name(name))


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Returns `config` with dotted overrides applied: ["--model.layers", "4"].

    Where a field may hold one of several dataclasses, `--model.part.kind NAME` puts another one
    with its defaults there, before all other overrides.

    Raises:
      InputError: For an unknown key (with the nearest known ones) or a value of another type.
    """
    config, arguments = _choose_kinds(config, list(arguments))
    parse = partial(
        tyro.cli,
        type(config),
        default=config,
        args=list(arguments),
        prog="CONFIG",
        # A union of dataclasses keeps the member that the config file chose, and a bool takes a
        # value like every other key.
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    if "--help" in arguments or "-h" in arguments:
        parse()
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(captured):
            return parse()
    except SystemExit:
        raise InputError(_explain(config, arguments, captured.getvalue())) from None


def _choose_kinds(config: Config, arguments: list[str]) -> tuple[Config, list[str]]:
    """Applies the overrides `--key.kind NAME` and returns the others."""
    rest: list[str] = []
    while arguments:
        argument = arguments.pop(0)
        key, equals, name = argument.partition("=")
        path = key.removeprefix("--").replace("-", "_").split(".")
        if not key.startswith("--") or path[-1] != "kind" or not _kinds_at(config, path[:-1]):
            rest.append(argument)
            continue
        if not equals:
            if not arguments:
                raise InputError(f"{key} needs a name")
            name = arguments.pop(0)
        config = _with_kind(config, path[:-1], name)
    return config, rest


def _kinds_at(config: Any, path: list[str]) -> dict[str, Any]:
    """The dataclasses that the field at `path` may hold; none if it has a `kind` of its own."""
    for name in path[:-1]:
        config = getattr(config, name, None)
    if not path or not dataclasses.is_dataclass(config) or not hasattr(config, path[-1]):
        return {}
    if hasattr(getattr(config, path[-1]), "kind"):
        return {}
    return _dataclasses_of(typing.get_type_hints(type(config))[path[-1]])


def _with_kind(config: Any, path: list[str], name: str) -> Any:
    if len(path) > 1:
        changed = _with_kind(getattr(config, path[0]), path[1:], name)
        return dataclasses.replace(config, **{path[0]: changed})
    known = _kinds_at(config, path)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        hint = f"; near it: {', '.join(near)}" if near else f", expected {', '.join(known)}"
        raise InputError(f"{path[0]}.kind {name!r} is not known{hint}")
    try:
        made = known[name]()
    except TypeError:
        raise InputError(f"{path[0]}.kind {name} has no defaults; choose it in the file") from None
    return dataclasses.replace(config, **{path[0]: made})


def dotted_keys(config: Any, prefix: str = "") -> list[str]:
    """Returns every leaf key of a config tree: ["loop.steps", ...]."""
    keys = []
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        name = prefix + field.name
        keys += dotted_keys(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return keys


def _explain(config: Any, arguments: Sequence[str], printed: str) -> str:
    known = dotted_keys(config)
    for argument in arguments:
        key = argument[2:].split("=")[0].replace("-", "_")
        if argument.startswith("--") and key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join('--' + name for name in near)}?" if near else ""
            return f"unknown key {argument.split('=')[0]}{hint}"
    # tyro draws a box: a title, a rule, the reason, a rule, help.
    title, *parts = re.split(r"\n[^\w\n]*[-─]{9,}[^\w\n]*\n", printed)
    reason = " ".join((parts or [title])[0].replace("│", " ").split())
    return f"bad override {' '.join(arguments)}: {reason}"


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []


# -- config.json ---------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """Returns a dataclass tree as JSON values.

    Where a field may hold one of several dataclasses, its object says which in `kind`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        plain = {name: to_plain(getattr(value, name)) for name in fields}
        hints = typing.get_type_hints(type(value))
        for name in fields:
            if len(_dataclasses_of(hints[name])) > 1 and plain[name] is not None:
                plain[name] = {"kind": type(getattr(value, name)).__name__, **plain[name]}
        return plain
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def _dataclasses_of(hint: Any) -> dict[str, Any]:
    options = typing.get_args(hint) if _is_union(hint) else ()
    return {o.__name__: o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def from_plain(kind: Any, value: Any, where: str = "config") -> Any:
    """Builds a value of type `kind` (dataclass, tuple, optional, ...) from JSON values.

    Raises:
      InputError: For an unknown or missing key, or a value of another type, naming where it is.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass_from_plain(kind, value, where)
    if _is_union(kind):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        named = _dataclasses_of(kind)
        if len(named) > 1:
            name = value.get("kind") if isinstance(value, dict) else None
            if name not in named:
                raise InputError(f"{where}: kind {name!r} is not one of {', '.join(named)}")
            rest = {key: item for key, item in value.items() if key != "kind"}
            return from_plain(named[name], rest, where)
        for option in options[:-1]:
            with contextlib.suppress(InputError):
                return from_plain(option, value, where)
        return from_plain(options[-1], value, where)
    if origin is tuple:
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        if not isinstance(value, list) or not (many or len(value) == len(arguments)):
            raise InputError(f"{where}: expected a list for {kind}, found {value!r}")
        kinds = arguments[:1] * len(value) if many else arguments
        return tuple(from_plain(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin is typing.Literal and value not in arguments:
        raise InputError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if kind is float and type(value) is int:
        return float(value)
    if kind in (bool, int, float, str) and type(value) is not kind:
        raise InputError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


def _dataclass_from_plain(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {value!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}")
    parts = {key: from_plain(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    try:
        return kind(**parts)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name, then renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a temporary name, then renames it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON, or raises InputError naming the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None


def open_run_folder(workdir: Path, job: Job) -> None:
    """Makes the folder and writes config.json: the job's name, its whole config and its identity.

    Raises:
      InputError: If the folder holds a run of another job, or a checkpoint of another model.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir}: a file is where the run folder should be")
    plain = {"job": job.name, "config": to_plain(job.config), "identity": to_plain(job.identity)}
    path = workdir / "config.json"
    if path.exists():
        saved = read_json(path)
        if not isinstance(saved, dict) or saved.get("job") != job.name:
            found = saved.get("job") if isinstance(saved, dict) else saved
            raise InputError(f"{workdir} holds a {found!r} run, not {job.name!r}")
        difference = first_difference(saved.get("identity"), plain["identity"])
        if difference and any(workdir.glob("checkpoints/[0-9]*")):
            key, old, new = difference
            raise InputError(
                f"{workdir} holds a checkpoint of another model: {key} is {old!r} there and "
                f"{new!r} here; choose another --workdir"
            )
    if first_process():
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, plain)


def first_difference(old: Any, new: Any, key: str = "model") -> tuple[str, Any, Any] | None:
    """Returns (key, old, new) of the first place where two JSON trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}")
            if found:
                return found
        return None
    return None if old == new else (key, old, new)


def versions(*more: str) -> dict[str, str]:
    """Returns the versions that a result depends on, and those of `more` packages if installed."""
    from importlib.metadata import version

    names = ("jaxllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {}
    for name in (*names, *more):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = version(name)
    return {"python": platform.python_version(), **found}
