"""`config.json` of a Hugging Face folder as a `DecoderConfig`, and back.

A key that a family does not list may only be one that does not change the model, or be switched off
(null or false); everything else is refused by name. Writing is checked by reading: what a family
cannot express does not come back equal.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError
from jaxllm.hub.hf_families import FAMILIES, REQUIRED, Json, Key
from jaxllm.models.decoder import DecoderConfig

# Keys that say nothing about what a forward pass computes: ids of special tokens, how the model is
# trained (dropout, initialisation), generated from or stored.
_HARMLESS = re.compile(
    r"model_type|architectures|(torch_)?dtype|transformers_version|_name_or_path|tokenizer_class"
    r"|\w+_token_id|\w*(dropout|pdrop)|initializer_range|use_cache|cache_implementation"
    r"|gradient_checkpointing|pretraining_tp|_?attn_implementation\w*|summary_\w+|id2label|label2id"
    r"|num_labels|problem_type|task_specific_params|return_dict\w*|output_\w+|max_length"
    r"|min_length|do_sample|early_stopping|num_beams|num_beam_groups|num_return_sequences"
    r"|temperature|top_k|top_p|typical_p|length_penalty|repetition_penalty|diversity_penalty"
    r"|chunk_size_feed_forward|use_bfloat16|n_ctx|_flash_attn_2_enabled|prefix"
)


def read_config(folder: Path) -> tuple[str, DecoderConfig]:
    """Returns (model type, config) of a folder's `config.json`.

    Raises:
      InputError: No such file, no JSON object, a model type or feature that this library lacks, or
        a value of the wrong kind.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}, expected a JSON file") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, expected an object")
    try:
        return config_from_hf(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def config_from_hf(found: Mapping[str, Any]) -> tuple[str, DecoderConfig]:
    """Returns (model type, config) of a parsed `config.json`; errors as `read_config`."""
    model_type = found.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    keys = FAMILIES[model_type].keys
    for name, value in found.items():
        off = value is None or value is False
        if name not in keys and not off and not _HARMLESS.fullmatch(name):
            raise InputError(
                f"{name} {_short(value)} is not known of {model_type} models; remove the key if it "
                "changes nothing"
            )
    values = {name: _value(name, key, found) for name, key in keys.items()}
    return model_type, FAMILIES[model_type].read(values)


def config_to_hf(config: DecoderConfig, prefer: str | None = None) -> tuple[str, Json]:
    """Returns (model type, `config.json`) of the first family that has such a model.

    Dropout, remat and init_std are settings of a run, not of the model, and left out.

    Args:
      config: The model.
      prefer: The family to try first.

    Raises:
      InputError: No family has it; says what the nearest one cannot express.
    """
    wanted = _model_only(config)
    nearest: tuple[int, str] = (1000, "")
    for model_type in sorted(FAMILIES, key=lambda name: name != prefer):
        family = FAMILIES[model_type]
        written = {"model_type": model_type, "architectures": [family.architecture]}
        written |= family.write(config)
        try:
            _, back = config_from_hf(written)
        except InputError as error:
            nearest = min(nearest, (500, f"{model_type}: {error}"))
            continue
        lost = _differences(wanted, _model_only(back))
        if not lost:
            return model_type, written
        nearest = min(nearest, (len(lost), f"{model_type} has no {', '.join(lost)}"))
    raise InputError(f"no Hugging Face family has this model; {nearest[1]}")


def _model_only(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(
        config, dropout=0.0, remat="none", init_std=0.02, windows=config.layer_windows
    )


def _differences(a: Any, b: Any) -> list[str]:
    if not dataclasses.is_dataclass(a) or type(a) is not type(b):
        return [] if a == b else [f"= {a!r}"]
    names = [field.name for field in dataclasses.fields(a)]
    return [
        f"{name}{'.' if difference[0] != '=' else ' '}{difference}"
        for name in names
        for difference in _differences(getattr(a, name), getattr(b, name))
    ]


def _value(name: str, key: Key, found: Mapping[str, Any]) -> Any:
    value = found.get(name)
    if value is None:
        if key.default is REQUIRED:
            raise InputError(f"{name} is missing")
        return None if key.nullable and name in found else key.default
    kinds = key.kind if isinstance(key.kind, tuple) else (key.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{name} is {value!r}, expected {names}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."
