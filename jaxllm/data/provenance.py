"""What data ships with the package, where it is from, and whether the files are intact."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jaxllm.data.images import bundled
from jaxllm.errors import InputError


def names() -> list[str]:
    """Returns the names of the bundled data sets."""
    return sorted(path.name for path in bundled().iterdir() if path.is_dir())


def describe(name: str) -> dict[str, Any]:
    """Returns files, bytes, licence files and source of one data set."""
    folder = _folder(name)
    listed = provenance(folder)
    return {
        "name": name,
        "files": len(listed),
        "bytes": sum(row["bytes"] for row in listed.values()),
        "licences": sorted(path.name for path in folder.glob("LICENSE*")),
        "source": sorted({row["source"].split(":")[0] for row in listed.values()}),
    }


def verify(name: str) -> int:
    """Checks every listed file against its size and SHA-256; returns how many there are."""
    folder = _folder(name)
    listed = provenance(folder)
    for file, row in listed.items():
        path = folder / file
        if not path.is_file():
            raise InputError(f"{path}: missing, PROVENANCE.txt lists it")
        content = path.read_bytes()
        if len(content) != row["bytes"] or hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise InputError(f"{path}: differs from the size or SHA-256 in PROVENANCE.txt")
    return len(listed)


def provenance(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of a PROVENANCE.txt by file name."""
    lines = (folder / "PROVENANCE.txt").read_text().splitlines()[1:]
    rows = (line.split("\t") for line in lines if line.strip())
    return {
        file: {"bytes": int(size), "sha256": digest, "source": source}
        for file, size, digest, source in rows
    }


def _folder(name: str) -> Path:
    if name not in names():
        raise InputError(f"data set {name!r} is not one of {', '.join(names())}")
    return bundled(name)
