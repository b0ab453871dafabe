"""What the policy is held against: moving references, and log-probs computed beforehand.

Computed log-probs are kept in a cache under a key of everything that decides them: the examples'
ids, the reference's parameters, the dtype of the computation, and which slots are scored. The chat
template and the tokenizer act through the ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.token_cache import cache_root
from jaxllm.decoding.language_model import load_language_model
from jaxllm.errors import InputError
from jaxllm.parallel.sharding import leaf_paths
from jaxllm.preference.config import MovingReference, PrecomputedReference, model_folder
from jaxllm.preference.log_probs import (
    PER_TOKEN,
    Batch,
    Need,
    SlotScores,
    SlotShape,
    row_hidden,
    slot_scores,
)
from jaxllm.preference.policy import Policy
from jaxllm.preference.rows import PreferenceRows
from jaxllm.preference.wrappers import TRDPO, moved_reference

Tree = Any


def moved(config: MovingReference, reference: Tree, policy: Tree, step: jax.Array) -> Tree:
    """Returns the reference after `step` updates of the policy; see `wrappers.moved_reference`."""
    options = TRDPO(alpha=config.alpha, every=config.every)
    return moved_reference(options, reference, policy, step)


def given_scores(batch: Batch) -> SlotScores:
    """The scores of a reference that a batch carries, see `reference_columns`."""
    return SlotScores(batch["ref_logps"], batch.get("ref_token_logps"))


def reference_columns(
    policy: Policy, rows: PreferenceRows, need: Need
) -> tuple[dict[str, np.ndarray], bool]:
    """Returns a frozen reference's log-probs of every slot, from the cache where it has them.

    Args:
      policy: Of a run with a `PrecomputedReference`.
      rows: All examples.
      need: What the algorithm reads.

    Returns:
      `ref_logps` float32 [n, S] and, if the algorithm reads tokens, `ref_token_logps` [n, S, L];
      and whether they were in the cache.
    """
    config = policy.reference
    if not isinstance(config, PrecomputedReference):
        raise InputError(f"reference {type(config).__name__} is not computed beforehand")
    folder = policy.folder if config.folder is None else Path(model_folder(config.folder))
    params = load_language_model(folder).params
    tokens = bool(PER_TOKEN & set(need))
    blueprint = policy.other or policy.blueprint
    dtype = str(blueprint.build(params, {}).dtype)
    key = _key(rows, params, {"dtype": dtype, "tokens": tokens, "model": policy.identity})
    root = cache_root() / "reference_logps" if config.cache is None else Path(config.cache)
    path = root / f"{key}.npz"
    found = _read(path, rows, tokens)
    if found is not None:
        return found, True
    columns = _compute(policy, rows, params, tokens)
    _write(path, columns)
    return columns, False


def _compute(
    policy: Policy, rows: PreferenceRows, params: Tree, tokens: bool
) -> dict[str, np.ndarray]:
    """Scores every example once, compiled once."""
    blueprint, shape = policy.other or policy.blueprint, SlotShape.of(rows)
    need = ("token_logps",) if tokens else ()

    @jax.jit
    def score(params: Tree, batch: Batch) -> SlotScores:
        model = blueprint.build(params, {})
        return slot_scores(model, row_hidden(model, batch, shape), batch, shape, need)

    sums = np.zeros((len(rows), shape.slots), np.float32)
    columns = {"ref_logps": sums}
    if tokens:
        columns["ref_token_logps"] = np.zeros((*sums.shape, shape.completion_length), np.float32)
    for batch in rows.in_order():
        scores, valid = score(params, batch), batch["valid"]
        places = batch["example"][valid]
        columns["ref_logps"][places] = np.asarray(scores.logps)[valid]
        if tokens:
            columns["ref_token_logps"][places] = np.asarray(scores.token_logps)[valid]
    return columns


def with_columns(rows: PreferenceRows, columns: Mapping[str, np.ndarray]) -> PreferenceRows:
    """The same rows with further arrays per example."""
    return PreferenceRows(
        rows.examples,
        rows.config,
        mismatched=rows.mismatched,
        supervised=rows.supervised,
        columns={**rows.columns, **columns},
    )


# -- cache ---------------------------------------------------------------------------------------


def _key(rows: PreferenceRows, params: Tree, facts: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the log-probs."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(f"{rows.slots} {rows.mismatched} {rows.completion_length}".encode())
    for example in rows.examples:
        beliefs = () if example.belief is None else example.belief.ids
        ids = (example.prompt_ids, example.completion_ids, beliefs)
        digest.update(json.dumps(ids).encode())
        if rows.supervised:
            digest.update(json.dumps(example.target_ids).encode())
    for path, leaf in leaf_paths(params):
        digest.update(path.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _read(path: Path, rows: PreferenceRows, tokens: bool) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    names = ["ref_logps", *(["ref_token_logps"] if tokens else [])]
    try:
        with np.load(path, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it to compute it anew") from None
    if any(len(c) != len(rows) or not np.isfinite(c).all() for c in columns.values()):
        raise InputError(f"{path}: not the log-probs of {len(rows)} examples; delete it")
    return columns


def _write(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if jax.process_index() != 0:  # Every process computes; one writes.
        return
    temporary = path.with_suffix(".tmp.npz")
    with temporary.open("wb") as file:
        np.savez(file, **dict(columns))  # type: ignore[arg-type]
    temporary.replace(path)


# -- the check before the first step -------------------------------------------------------------

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
"""Largest difference of a completion's log-prob per token, in nats."""


def start_error(
    policy: SlotScores, reference: SlotScores, lengths: jax.Array, dtype: Any
) -> str | None:
    """Returns what is wrong if policy and reference differ by more than the tolerance.

    Policy and reference are the same model before the first step, and go through the same code; a
    difference means that they were loaded or computed differently.
    """
    tolerance = TOLERANCE[str(jnp.dtype(dtype))]
    per_token = jnp.abs(policy.logps - reference.logps) / jnp.maximum(lengths, 1)
    largest = float(jnp.max(per_token))
    if largest <= tolerance:
        return None
    return (
        f"policy and reference differ by {largest:.2g} nats per token before the first step, "
        f"expected at most {tolerance:g}; model.check_start False starts anyway"
    )
