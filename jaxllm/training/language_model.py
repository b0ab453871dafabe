"""The job that trains a decoder language model on text, and the model of a finished run.

The loss is the mean negative log-likelihood of the tokens that count: all of a text, a completion
but not its prompt, the assistant's turns of a conversation. Rows may hold several documents, which
do not see each other. Bits per byte, the measure that does not depend on the tokenizer, is the
whole negative log-likelihood, end marks included, over the UTF-8 bytes of the text predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.data.pipeline import Batches, stack_examples
from jaxllm.data.text import TextDataConfig, TextRows, open_text, record_texts
from jaxllm.data.text_tokenizers import (
    TextTokenizerConfig,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from jaxllm.errors import InputError
from jaxllm.hub.hf_folder import is_hf_folder, load_decoder
from jaxllm.models.decoder import (
    DECODER_KERNELS,
    DECODER_RULES,
    Decoder,
    DecoderConfig,
    decoder,
)
from jaxllm.nn.lora import LoraConfig, merge
from jaxllm.nn.module import Blueprint
from jaxllm.nn.precision import compute_dtype
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.parallel.processes import first_process, wait_for_all
from jaxllm.training.checkpoint import finished_steps, read_newest
from jaxllm.training.job import Job, LoopConfig, Program
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.run_folder import first_difference, from_plain, read_json, to_plain
from jaxllm.training.state import TrainState, new_state
from jaxllm.training.step import Batch, LossFn, Metrics, make_step

JOB = "language_model"
Tree = Any
Generate = Callable[[TrainState, Tokenizer], str]
# What a model that is trained on may have otherwise than the one it starts from.
_FREE = ("dropout", "remat", "init_std")


@dataclass(frozen=True)
class LanguageModelRun:
    """Trains a decoder language model, from scratch or from another model."""

    model: DecoderConfig
    tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    data: TextDataConfig = field(default_factory=TextDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    init_from: str | None = None
    """A run folder or a Hugging Face folder whose parameters training starts from."""


def language_model_job(
    run: LanguageModelRun, workdir: Path, *, sample: Generate | None = None
) -> Job:
    """Returns the job that trains `run.model`.

    Args:
      run: The config.
      workdir: The run folder, where the tokenizer is kept.
      sample: (state, tokenizer) -> generated text, shown and written when the loop samples.

    Raises:
      InputError: Bad text or tokenizer, another tokenizer than the run folder's, a vocabulary that
        is too small, or an `init_from` of another model.
    """
    tokenizer = run_tokenizer(run, workdir)
    if run.model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size {run.model.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size}"
        )
    train_rows = open_text(run.data, tokenizer, "train")
    load = starting_point(run, tokenizer)
    program = language_model_program(run)
    build = decoder(run.model, compute_dtype(run.precision)).build
    score = TextScorer(build, run.data.batch_size, packed=run.data.packing != "none")

    evaluate = None
    if run.data.holds_out:
        validation = open_text(run.data, tokenizer, "validation")

        def evaluate(state: TrainState) -> dict[str, float]:
            return score.summary(state.best_params, state.extra, validation)

    _keep_tokenizer(tokenizer, workdir)  # Only now: a refused run leaves no folder.
    return Job(
        name=JOB,
        config=run,
        loop=run.loop,
        mesh=run.mesh,
        init=program.init,
        load=load,
        step=program.step,
        batches=Batches(
            train_rows,
            run.data.batch_size,
            run.loop.seed,
        ),
        rules=program.rules,
        unit="rows",
        evaluate=evaluate,
        sample=None if sample is None else partial(_write_sample, sample, tokenizer),
        identity=model_identity(run.model, tokenizer),
    )


def language_model_program(run: LanguageModelRun) -> Program:
    """Returns what `language_model_job` compiles."""
    blueprint = decoder(run.model, compute_dtype(run.precision))
    optimizer = make_optimizer(run.optimizer, run.loop.steps)

    def init(key: jax.Array) -> TrainState:
        params, extra = blueprint.init(key)
        return new_state(params, optimizer, ema=run.optimizer.ema_decay is not None, extra=extra)

    loss_fn = language_model_loss(
        packed=run.data.packing != "none", accumulate=run.optimizer.accumulate
    )
    shape = (run.data.batch_size, run.data.row_length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name in ("tokens", "targets", "positions", "segment_ids")
    }
    return Program(
        init=init,
        step=make_step(loss_fn, blueprint.build, optimizer, run.optimizer),
        rules=DECODER_RULES,
        batch={**batch, "weights": jax.ShapeDtypeStruct(shape, jnp.float32)},
    )


def model_identity(config: DecoderConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns what a checkpoint must agree with: the architecture and the tokenizer."""
    identity = None if tokenizer is None else tokenizer.identity
    return {**to_plain(config), "tokenizer": identity}


def _write_sample(sample: Generate, tokenizer: Tokenizer, state: TrainState, path: Path) -> None:
    text = sample(state, tokenizer)
    Path(f"{path}.txt").write_text(text + "\n", encoding="utf-8")
    print(text)


# -- loss and evaluation -------------------------------------------------------------------------


def text_log_probs(model: Decoder, batch: Batch, *, packed: bool) -> tuple[jax.Array, jax.Array]:
    """Returns log p of each target of a batch of rows, and whether it was the most likely token.

    Args:
      model: The model.
      batch: `tokens`, `targets` and `segment_ids`, int [B, T].
      packed: Whether rows hold several documents; padding on the right needs no segments.

    Returns:
      float32 [B, T] in nats and bool [B, T]; meaningless at padding.
    """
    segments = batch["segment_ids"] if packed else None
    hidden = model.hidden(batch["tokens"], segment_ids=segments)
    log_probs, correct = model.token_logprobs(hidden, batch["targets"], with_accuracy=True)
    return log_probs, correct


def language_model_loss(*, packed: bool, accumulate: int = 1) -> LossFn:
    """Returns the loss: mean NLL in nats over the tokens that count.

    Its metrics are accuracy, perplexity, and `tokens`, how many count in a step. With accumulation,
    each micro-batch has the same say, whatever number of its tokens count.
    """

    def loss_fn(model: Decoder, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        segments = batch["segment_ids"] if packed else None
        hidden = model.hidden(batch["tokens"], segment_ids=segments, key=key)
        weights = batch["weights"]
        total = jnp.sum(weights)
        share = weights / jnp.where(total > 0, total, 1.0)
        loss, correct = model.weighted_nll(hidden, batch["targets"], share)
        return loss, {
            "accuracy": jnp.sum(share * correct),
            "perplexity": jnp.exp(loss),
            "tokens": total * accumulate,
        }

    return loss_fn


class TextScorer:
    """A compiled evaluation of rows; compiles once."""

    def __init__(self, build: Callable[[Any, Any], Decoder], batch_size: int, *, packed: bool):
        self.batch_size = batch_size

        def sums(params: Tree, extra: Tree, batch: Batch) -> jax.Array:
            log_probs, correct = text_log_probs(build(params, extra), batch, packed=packed)
            weights = batch["weights"]
            return jnp.stack(
                [jnp.sum(weights * log_probs), jnp.sum(weights * correct), jnp.sum(weights)]
            )

        self._run = jax.jit(sums)

    def summary(self, params: Tree, extra: Tree, rows: TextRows) -> dict[str, float]:
        """Returns NLL in nats per token, accuracy, perplexity, bits per byte and tokens."""
        totals = np.zeros(3)
        for start in range(0, len(rows), self.batch_size):
            real = min(self.batch_size, len(rows) - start)
            index = [start + i if i < real else start for i in range(self.batch_size)]
            batch = stack_examples(rows, index)
            batch["weights"][real:] = 0
            totals += np.asarray(self._run(params, extra, batch), np.float64)
        log_prob, correct, tokens = totals.tolist()
        nll = -log_prob / tokens
        return {
            "nll": nll,
            "accuracy": correct / tokens,
            "perplexity": math.exp(min(nll, 700.0)),
            "bits_per_byte": -log_prob / math.log(2) / max(1, rows.cache.text_bytes),
            "tokens": tokens,
        }


# -- tokenizer and starting point ----------------------------------------------------------------


def run_tokenizer(run: LanguageModelRun, workdir: Path) -> Tokenizer:
    """Returns the tokenizer that the run folder keeps, or else the one to be kept there.

    Raises:
      InputError: Another tokenizer than the one in the folder, or none that can be read.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir}: a file is where the run folder should be")
    kept = find_tokenizer(workdir) if workdir.is_dir() else None
    wanted = run.tokenizer
    if kept is None:
        if wanted.train_bpe:
            return train_bpe(record_texts(run.data), wanted.train_bpe)
        return load_tokenizer(wanted.path)
    if wanted.train_bpe:
        if kept.trained_size != wanted.train_bpe:
            raise InputError(
                f"{workdir} holds a tokenizer made with train_bpe {kept.trained_size or 0}, this "
                f"config says {wanted.train_bpe}; choose another --workdir"
            )
    elif wanted.path == "bytes" or Path(wanted.path).exists():
        given = load_tokenizer(wanted.path).identity
        if given != kept.identity:
            raise InputError(
                f"{workdir} holds tokenizer {kept.identity[:24]}, {wanted.path} is {given[:24]}; "
                "choose another --workdir"
            )
    return kept


def _keep_tokenizer(tokenizer: Tokenizer, workdir: Path) -> None:
    if first_process():
        save_tokenizer(tokenizer, workdir)
    wait_for_all("tokenizer saved")  # A process that begins later must not find half of it.


def starting_point(run: LanguageModelRun, tokenizer: Tokenizer) -> Callable[[Mesh], Tree] | None:
    """Returns what reads the parameters of `run.init_from`, after checking that they fit."""
    if run.init_from is None:
        return None
    folder = Path(run.init_from)
    config, other = model_config(folder), find_tokenizer(folder)
    check_same_model(f"init_from {folder}", config, run.model)
    if other is not None and other.identity != tokenizer.identity:
        raise InputError(
            f"init_from {folder} has tokenizer {other.identity[:24]}, this run has "
            f"{tokenizer.identity[:24]}; set tokenizer.path to {folder}"
        )
    return lambda mesh: read_model(folder, mesh=mesh)[2]


def check_same_model(what: str, found: DecoderConfig, wanted: DecoderConfig) -> None:
    """Refuses a model of another architecture than the config's.

    Raises:
      InputError: Naming `what` and the first difference; dropout, rematerialisation and the scale
        of the initial parameters may differ.
    """
    theirs, ours = to_plain(found), to_plain(wanted)
    for name in _FREE:
        theirs.pop(name), ours.pop(name)
    if difference := first_difference(theirs, ours):
        key, old, new = difference
        raise InputError(f"{what} has {key} {old!r}, this config has {new!r}")


# -- finished models -----------------------------------------------------------------------------


def model_config(folder: Path) -> DecoderConfig:
    """Returns the config of the model of a run or Hugging Face folder."""
    if is_hf_folder(folder):
        from jaxllm.hub.hf_config import read_config

        return read_config(folder)[1]
    return _read_run(folder)[0]


def read_model(
    folder: Path, *, mesh: Mesh | None = None, dtype: Any = None
) -> tuple[DecoderConfig, Blueprint[Decoder], Tree]:
    """Reads config, blueprint and parameters of a run of ours or of a Hugging Face folder.

    A run is one that trained a language model, or one whose identity names a `decoder` whose
    parameters are `policy`, or adapters of `base`; these are added to it.

    Args:
      folder: A run folder (averaged and best parameters where the run keeps such) or a folder with
        config.json and safetensors.
      mesh: Where the parameters of a Hugging Face folder are placed; None for one device.
      dtype: Of the computation, and of the parameters when given; None for float32 parameters and
        the backend's compute dtype.

    Raises:
      InputError: If the folder is neither, is a run of another job, or has no checkpoint.
    """
    if is_hf_folder(folder):
        return load_decoder(folder, mesh=mesh, dtype=dtype)
    config, precision, lora = _read_run(folder)
    best = folder / "best"
    tree = read_newest(best if finished_steps(best) else folder / "checkpoints")
    params = tree.get("ema", tree["params"])
    params = params.get("policy", params)
    if lora is not None:
        params = merge(tree["extra"]["base"], params, lora, DECODER_KERNELS)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    blueprint = decoder(config, compute_dtype(precision) if dtype is None else dtype)
    return config, blueprint, params


def is_model_run(saved: Any) -> bool:
    """Whether the content of a config.json is of a run that `read_model` reads."""
    if not isinstance(saved, dict):
        return False
    identity = saved.get("identity")
    return saved.get("job") == JOB or (isinstance(identity, dict) and "decoder" in identity)


def _read_run(folder: Path) -> tuple[DecoderConfig, Any, LoraConfig | None]:
    """Architecture, precision and adapters of a run."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = folder / "config.json"
    saved = read_json(path)
    if not is_model_run(saved):
        found = saved.get("job") if isinstance(saved, dict) else None
        kind = f"a {found!r} run" if found else "neither a run's config nor a Hugging Face model's"
        raise InputError(f"{path}: {kind}, expected a {JOB!r} run or a Hugging Face folder")
    if saved["job"] == JOB:
        run = from_plain(LanguageModelRun, saved.get("config"), str(path))
        return run.model, run.precision, None
    identity = saved["identity"]
    config = from_plain(DecoderConfig, identity["decoder"], f"{path}: identity.decoder")
    lora = from_plain(LoraConfig | None, identity.get("lora"), f"{path}: identity.lora")
    return config, saved["config"].get("precision", "auto"), lora
