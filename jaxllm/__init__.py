"""Research systems for language and image generation in JAX and Flax.

The names below are the public surface; each is imported when first used, so `import jaxllm` is
cheap. Sub-packages (`jaxllm.models`, `jaxllm.quantize`, ...) are importable by their own names.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    "InputError": "jaxllm.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
