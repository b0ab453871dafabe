"""The job that trains a model over codes, and the exact log-probabilities of given codes.

The loss is the plain cross-entropy, averaged over batch, cells and depth with equal weight for
every depth (section 3.2 of arXiv:2410.01912). Logits exist for one chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.pipeline import Batches, padded_batches
from jaxllm.decoding.sampling import check_range
from jaxllm.errors import InputError
from jaxllm.images.codes import CodeSource, DrawCrop, open_codes
from jaxllm.images.config import CodeModelRun, RQTransformerRun
from jaxllm.models.code_model import CODE_MODEL_RULES, code_model
from jaxllm.models.rq_transformer import RQTransformerConfig
from jaxllm.nn.precision import compute_dtype
from jaxllm.nn.vocabulary import token_log_probs
from jaxllm.parallel.processes import fetch
from jaxllm.training.job import Job, Program
from jaxllm.training.optimizer import make_optimizer
from jaxllm.training.state import TrainState, new_state
from jaxllm.training.step import Batch, Metrics, make_step

EVAL_BATCH = 64
CHUNK = 4096
"""Cells of a chunk of the loss: a codebook has fewer entries than a vocabulary of text."""
AnyCodeRun = CodeModelRun | RQTransformerRun


def code_log_probs(
    model: Any,
    codes: jax.Array,
    class_ids: jax.Array,
    *,
    key: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Returns log p of every code given all before it, and whether it was the most likely.

    Args:
      model: A code model.
      codes: int [B, cells, C].
      class_ids: int [B].
      key: Turns dropout on.
      chunk: Cells whose logits exist at the same time.

    Returns:
      float32 [B, cells, C] in nats and bool [B, cells, C].
    """
    hidden = model.hidden(codes, class_ids, key=key)
    parts = [
        token_log_probs(h, model.head_kernel(i), codes[..., i], chunk=chunk, with_accuracy=True)
        for i, h in enumerate(hidden)
    ]
    log_probs, correct = zip(*parts, strict=True)
    return jnp.stack(log_probs, axis=-1), jnp.stack(correct, axis=-1)


def code_loss(model: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy with class dropout; metrics per depth, NLL in nats per image."""
    drop_key, dropout_key = jax.random.split(rng)
    classes = batch["label"]
    if model.config.null_class is not None:
        dropped = jax.random.bernoulli(drop_key, model.config.class_dropout, classes.shape)
        classes = jnp.where(dropped, model.config.null_class, classes)
    log_probs, correct = code_log_probs(model, batch["codes"], classes, key=dropout_key)
    return -jnp.mean(log_probs), depth_metrics(log_probs, correct)


def depth_metrics(log_probs: jax.Array, correct: jax.Array) -> Metrics:
    """Summarises [B, cells, C]: NLL in nats per image, total and by depth, accuracy by depth."""
    nll = -jnp.mean(jnp.sum(log_probs, axis=1), axis=0)
    accuracy = jnp.mean(correct, axis=(0, 1))
    by_depth = {f"nll_depth{i + 1}": value for i, value in enumerate(nll)}
    return {
        "nll": jnp.sum(nll),
        **by_depth,
        **{f"accuracy_depth{i + 1}": value for i, value in enumerate(accuracy)},
    }


def code_model_job(run: AnyCodeRun) -> Job:
    """Returns the job that trains `run.model` on the code cache of `run.data`."""
    folder = Path(run.data.cache)
    train_codes = open_codes(folder / "train")
    validation = open_codes(folder / "validation").first_crops()
    check_codes(run, train_codes)
    program = code_model_program(run, train_codes.codebook)
    score = CodeScorer(code_model(run.model, compute_dtype(run.precision)).build)

    def evaluate(state: TrainState) -> dict[str, float]:
        return score.summary(state.best_params, state.extra, validation)

    return Job(
        name="rq_transformer" if isinstance(run, RQTransformerRun) else "dnd",
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=program.init,
        step=program.step,
        batches=Batches(
            train_codes.balanced(run.data.balance),
            run.data.batch_size,
            run.loop.seed,
            DrawCrop(run.data.random_crop),
        ),
        rules=program.rules,
        evaluate=evaluate,
        identity=run.model,
    )


def code_model_program(run: AnyCodeRun, codebook: np.ndarray | None = None) -> Program:
    """Returns what `code_model_job` compiles.

    Args:
      run: The config.
      codebook: The tokenizer's vectors [C, V, E], which an RQ-Transformer embeds codes with; None
        for zeros, where only shapes matter.
    """
    model = run.model
    blueprint = code_model(model, compute_dtype(run.precision))
    optimizer = make_optimizer(run.optimizer, run.loop.steps)

    def init(key: jax.Array) -> TrainState:
        params, extra = blueprint.init(key)
        if isinstance(model, RQTransformerConfig):
            shape = (model.depth, model.codebook_size, model.code_dim)
            vectors = jnp.zeros(shape) if codebook is None else jnp.asarray(codebook)
            extra = {**extra, "codebook": vectors}
        return new_state(params, optimizer, ema=run.optimizer.ema_decay is not None, extra=extra)

    rows = run.data.batch_size
    return Program(
        init=init,
        step=make_step(code_loss, blueprint.build, optimizer, run.optimizer),
        rules=CODE_MODEL_RULES,
        batch={
            "codes": jax.ShapeDtypeStruct((rows, model.cells, model.depth), jnp.int32),
            "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        },
    )


def check_codes(run: AnyCodeRun, source: CodeSource) -> None:
    """Raises InputError where the model does not fit the codes it is to be trained on."""
    model, meta = run.model, source.meta
    wanted = {
        "codebook_size": model.codebook_size,
        "depth": model.depth,
        "grid": list(model.grid),
        "classes": model.num_classes,
    }
    found = {**{k: meta[k] for k in ("codebook_size", "depth", "grid")}}
    found["classes"] = len(meta["class_names"])
    for name, value in wanted.items():
        if found[name] != value:
            raise InputError(
                f"{run.data.cache}: the codes have {name} {found[name]}, the model has {value}"
            )
    if isinstance(model, RQTransformerConfig):
        shape = None if source.codebook is None else source.codebook.shape
        expected = (model.depth, model.codebook_size, model.code_dim)
        if shape != expected:
            raise InputError(f"{run.data.cache}: codebook.npy is {shape}, expected {expected}")


class CodeScorer:
    """A compiled scorer of given codes; compiles once per batch shape."""

    def __init__(self, build: Callable[[Any, Any], Any]):
        self.build = build
        self._run = jax.jit(lambda p, e, codes, ids: code_log_probs(build(p, e), codes, ids))

    def __call__(
        self, params: Any, extra: Any, codes: np.ndarray, class_ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns log-probabilities float32 [n, cells, C] and correctness bool [n, cells, C].

        Raises:
          InputError: For codes of another shape, a code outside the codebook or a class id outside
            its range.
        """
        config = jax.eval_shape(self.build, params, extra).config
        codes, class_ids = np.asarray(codes), np.asarray(class_ids)
        if codes.shape[1:] != (config.cells, config.depth):
            raise InputError(
                f"codes have shape {codes.shape[1:]}, expected ({config.cells}, {config.depth})"
            )
        check_range("code", codes, config.codebook_size)
        limit = config.num_classes + (config.null_class is not None)
        check_range("class id", class_ids, limit)
        rows = {"codes": codes.astype(np.int32), "label": class_ids.astype(np.int32)}
        parts = []
        for batch, real in padded_batches(rows, EVAL_BATCH):
            out = self._run(params, extra, batch["codes"], batch["label"])
            parts.append([fetch(x)[:real] for x in out])
        log_probs, correct = zip(*parts, strict=True)
        return np.concatenate(log_probs), np.concatenate(correct)

    def summary(self, params: Any, extra: Any, examples: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns NLL in nats per image by depth, bits per code and accuracy by depth."""
        log_probs, correct = self(params, extra, examples["codes"], examples["label"])
        metrics = {
            k: float(v)
            for k, v in depth_metrics(jnp.asarray(log_probs), jnp.asarray(correct)).items()
        }
        return {**metrics, "bits_per_code": float(-np.mean(log_probs) / np.log(2))}
