"""From a trained code model and its tokenizer to pictures: sampling, completion, best of n."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.images import ImageDataConfig
from jaxllm.data.pipeline import padded_batches
from jaxllm.decoding.code_stacks import CodeSampler, SamplingConfig
from jaxllm.decoding.sampling import check_range
from jaxllm.errors import InputError
from jaxllm.images.config import CodeModelRun, RQTransformerRun, TokenizerRun
from jaxllm.images.runs import load_params, run_kind
from jaxllm.images.tokenizer import tokenizer_blueprint
from jaxllm.models.code_model import code_model
from jaxllm.models.image_tokenizer import ImageTokenizer
from jaxllm.nn.module import Blueprint
from jaxllm.nn.precision import compute_dtype
from jaxllm.training.run_folder import read_json


def tokenizer_run_of(run_dir: Path, run: Any) -> Path:
    """Returns the tokenizer run that made the codes a code model was trained on."""
    meta = Path(run.data.cache) / "train" / "meta.json"
    named = read_json(meta).get("tokenizer") if meta.exists() else None
    if named is None:
        raise InputError(f"{run_dir}: its code cache does not name a tokenizer; give --tokenizer")
    return (meta.parent / named).resolve()


CODE_RUNS: dict[str, Any] = {"dnd": CodeModelRun, "rq_transformer": RQTransformerRun}


@dataclass(frozen=True)
class Decoder:
    """A trained tokenizer as a function from codes to images."""

    blueprint: Blueprint[ImageTokenizer]
    params: Any
    extra: Any
    data: ImageDataConfig
    """The images it was trained on."""

    @classmethod
    def load(cls, run_dir: Path) -> Decoder:
        """Reads the tokenizer of a run folder."""
        run, params, extra = load_params(run_dir, TokenizerRun)
        blueprint = tokenizer_blueprint(run.model, compute_dtype(run.precision))
        return cls(blueprint, params["tokenizer"], extra["tokenizer"], run.data)

    def __call__(
        self, codes: np.ndarray, *, depth: int | None = None, batch: int = 64
    ) -> np.ndarray:
        """Decodes codes [n, cells, C], or their first `depth` levels, to images in [-1, 1]."""
        images = [
            np.asarray(_decode(self.blueprint, depth, self.params, self.extra, part["codes"]))[
                :real
            ]
            for part, real in padded_batches({"codes": np.asarray(codes)}, batch)
        ]
        return np.concatenate(images)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(
    blueprint: Blueprint[ImageTokenizer],
    depth: int | None,
    params: Any,
    extra: Any,
    codes: jax.Array,
) -> jax.Array:
    return jnp.clip(blueprint.build(params, extra).from_codes(codes, depth), -1, 1)


@dataclass(frozen=True)
class Generator:
    """A trained code model, ready to sample."""

    run: Any
    params: Any
    extra: Any
    class_names: list[str]
    sampler: CodeSampler

    @classmethod
    def load(cls, run_dir: Path) -> Generator:
        """Reads a code-model run (`dnd` or `rq_transformer`)."""
        kind = run_kind(run_dir)
        if kind not in CODE_RUNS:
            raise InputError(f"{run_dir}: a {kind!r} run; expected one of {', '.join(CODE_RUNS)}")
        run, params, extra = load_params(run_dir, CODE_RUNS[kind])
        meta = Path(run.data.cache) / "train" / "meta.json"
        names = read_json(meta)["class_names"] if meta.exists() else []
        names = names or [str(i) for i in range(run.model.num_classes)]
        blueprint = code_model(run.model, compute_dtype(run.precision))
        return cls(run, params, extra, names, CodeSampler(blueprint.build))

    def sample(
        self,
        class_ids: np.ndarray,
        *,
        seed: int = 0,
        config: SamplingConfig | None = None,
        batch: int = 64,
        first_image: int = 0,
        given: np.ndarray | None = None,
        given_rows: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws one grid of codes per class id.

        Args:
          class_ids: int [n].
          seed: With an image's number, the only source of randomness.
          config: How to draw; the run's own setting when None.
          batch: Images drawn at once. It changes nothing but memory and speed.
          first_image: Number of the first image; a later call can go on where one stopped.
          given: int [n, cells, C] codes whose first `given_rows` grid rows are kept (completion).
          given_rows: Rows of the grid that are not drawn.

        Returns:
          Codes int32 [n, cells, C] and their log-probabilities float32 [n, cells, C].
        """
        model = self.run.model
        ids = np.asarray(class_ids)
        check_range("class id", ids, model.num_classes)
        rows = {"ids": ids, "numbers": first_image + np.arange(len(ids))}
        if given is not None:
            rows["given"] = np.asarray(given)
        key, parts = jax.random.key(seed), []
        for part, real in padded_batches(rows, min(batch, len(ids))):
            out = self.sampler(
                self.params,
                self.extra,
                part["ids"],
                key,
                config or self.run.sampling,
                image_ids=part["numbers"],
                given=part.get("given"),
                given_cells=given_rows * model.grid[1],
            )
            parts.append([np.asarray(x)[:real] for x in out])
        codes, log_probs = zip(*parts, strict=True)
        return np.concatenate(codes), np.concatenate(log_probs)

    def best_of(
        self, class_ids: np.ndarray, n: int, *, seed: int = 0, config: SamplingConfig | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws `n` candidates per class id and keeps the one with the highest log-probability.

        Returns:
          Codes int32 [len(class_ids), cells, C] and their summed log-probabilities.
        """
        if n < 1:
            raise InputError(f"best-of-n needs n of at least 1, got {n}")
        ids = np.repeat(np.asarray(class_ids), n)
        codes, log_probs = self.sample(ids, seed=seed, config=config)
        totals = log_probs.sum(axis=(1, 2)).reshape(-1, n)
        best = np.argmax(totals, axis=1)
        picked = np.arange(len(best)) * n + best
        return codes[picked], totals[np.arange(len(best)), best]
