"""Samples grids of code stacks from any code model, in one jitted loop with a static cache.

A code model predicts the C codes of one cell per `step` (see `models/dnd.py`). The draw of code i
of cell t of an image uses a random number made of (seed, image number, t, i): a sample does not
depend on the batch it was drawn in or on the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decoding.cache import init_cache
from jaxllm.decoding.guidance import Schedule, guidance_scales, guide, pair
from jaxllm.decoding.sampling import check_filters, check_range, sample_token
from jaxllm.errors import InputError
from jaxllm.parallel.sharding import constrain

Tree = Any


class CodeModel(Protocol):
    """What a model must offer to be sampled; `config` has cells, depth, codebook_size, ..."""

    config: Any
    dtype: Any

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Layers, key/value heads, positions and head size of the decode cache."""
        ...

    def unstack(self) -> Any:
        """Returns the layers in the form `step` wants."""
        ...

    def step(
        self,
        layers: Any,
        caches: Any,
        previous: jax.Array,
        class_ids: jax.Array,
        position: jax.Array,
        choose: Callable[[int, jax.Array], jax.Array],
    ) -> Any:
        """Predicts the codes of one cell; see `DnDTransformer.step`."""
        ...


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn; each tuple has one value for all depths or one per depth."""

    cfg_scale: tuple[float, ...] = (2.0,)
    """Guidance scale; 1 for every depth turns guidance and its doubled batch off."""
    cfg_schedule: Schedule = "constant"
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Fractions of the sequence that schedule `interval` guides."""
    temperature: tuple[float, ...] = (1.0,)
    """0 takes the most likely code."""
    top_k: tuple[int, ...] = (0,)
    """0 is off."""
    top_p: tuple[float, ...] = (1.0,)
    """1 is off."""

    def per_depth(self, depth: int) -> SamplingConfig:
        """Returns the config with every tuple of length `depth`, checked."""
        filled = {}
        for name in ("cfg_scale", "temperature", "top_k", "top_p"):
            values = getattr(self, name)
            if len(values) not in (1, depth):
                raise InputError(f"{name} {values} needs 1 value or one per depth ({depth})")
            filled[name] = values * depth if len(values) == 1 else values
        for i in range(depth):
            check_filters(filled["temperature"][i], filled["top_k"][i], filled["top_p"][i])
            if not filled["cfg_scale"][i] >= 1:
                raise InputError(f"cfg_scale {filled['cfg_scale'][i]} must be 1 (off) or more")
        return SamplingConfig(
            cfg_schedule=self.cfg_schedule, cfg_interval=self.cfg_interval, **filled
        )


class CodeSampler:
    """A compiled sampler; compiles once per batch shape, whatever the scales and temperatures.

    Under `jax.set_mesh` the batch and the caches are split over the mesh, with the same samples.
    """

    def __init__(self, build: Callable[[Tree, Tree], CodeModel]):
        self.build = build
        self.traces = 0
        """Times the loop was traced, that is, compiled for another batch shape or option."""
        self._run = jax.jit(self._decode, static_argnames=("top_k", "guided", "filtered"))

    def __call__(
        self,
        params: Tree,
        extra: Tree,
        class_ids: np.ndarray | jax.Array,
        key: jax.Array,
        config: SamplingConfig,
        *,
        image_ids: np.ndarray | None = None,
        given: np.ndarray | None = None,
        given_cells: int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Draws one grid of codes per class id.

        Args:
          params: Model parameters.
          extra: The model's buffers.
          class_ids: int [B].
          key: Typed key; with `image_ids` it determines every draw.
          config: Scales, temperature and filters.
          image_ids: int [B], the images' own numbers; 0 .. B-1 when None.
          given: int [B, cells, C] codes of which the first `given_cells` cells are kept.
          given_cells: Cells in raster order that are not sampled.

        Returns:
          Codes int32 [B, cells, C], and their float32 log-probabilities under the conditional
          model (before guidance, temperature and filters), which is what scoring gives.

        Raises:
          InputError: For a class id, a given code or a setting outside its range.
        """
        model = jax.eval_shape(self.build, params, extra).config
        config = config.per_depth(model.depth)
        ids = np.asarray(class_ids)
        check_range("class id", ids, model.num_classes)
        shape = (len(ids), model.cells, model.depth)
        if given is None:
            given = np.zeros(shape, np.int32)
        elif np.shape(given) != shape or not 0 <= given_cells <= model.cells:
            raise InputError(
                f"given codes {np.shape(given)} with {given_cells} cells kept; expected {shape}"
            )
        check_range("code", np.asarray(given), model.codebook_size)
        guided = max(config.cfg_scale) > 1
        if guided and model.null_class is None:
            raise InputError(
                f"cfg_scale {max(config.cfg_scale)} needs a model trained with class dropout"
            )
        scales = guidance_scales(
            np.asarray(config.cfg_scale), model.cells, config.cfg_schedule, config.cfg_interval
        )
        numbers = np.arange(len(ids)) if image_ids is None else np.asarray(image_ids)
        return self._run(
            params,
            extra,
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(numbers, jnp.int32),
            key,
            jnp.asarray(scales),
            jnp.asarray(config.temperature, jnp.float32),
            jnp.asarray(config.top_p, jnp.float32),
            jnp.asarray(given, jnp.int32),
            jnp.int32(given_cells),
            top_k=config.top_k,
            guided=guided,
            filtered=min(config.top_p) < 1,
        )

    def _decode(
        self,
        params: Tree,
        extra: Tree,
        class_ids: jax.Array,
        image_ids: jax.Array,
        key: jax.Array,
        scales: jax.Array,
        temperature: jax.Array,
        top_p: jax.Array,
        given: jax.Array,
        given_cells: jax.Array,
        *,
        top_k: tuple[int, ...],
        guided: bool,
        filtered: bool,
    ) -> tuple[jax.Array, jax.Array]:
        self.traces += 1  # Runs while tracing only.
        model = self.build(params, extra)
        class_ids, image_ids = constrain(class_ids, "batch"), constrain(image_ids, "batch")
        depth, cells = model.config.depth, model.config.cells
        layers = model.unstack()
        rows = pair(class_ids, model.config.null_class) if guided else class_ids
        uniforms = jax.vmap(
            lambda image: jax.random.uniform(jax.random.fold_in(key, image), (cells, depth))
        )(image_ids)
        copies = 2 if guided else 1

        def one_cell(carry: tuple[Any, jax.Array], position: jax.Array) -> tuple[Any, Any]:
            caches, previous = carry
            chosen: list[jax.Array] = []
            log_probs: list[jax.Array] = []

            def choose(i: int, logits: jax.Array) -> jax.Array:
                conditional = logits[0::copies]
                mixed = guide(logits, scales[position, i]) if guided else logits
                code = sample_token(
                    uniforms[:, position, i],
                    mixed,
                    temperature=temperature[i],
                    top_k=top_k[i],
                    top_p=top_p[i] if filtered else 1.0,
                )
                code = jnp.where(position < given_cells, given[:, position, i], code)
                picked = jnp.take_along_axis(conditional, code[:, None], axis=-1)[:, 0]
                chosen.append(code)
                log_probs.append(picked - jax.nn.logsumexp(conditional, axis=-1))
                return jnp.repeat(code, copies, axis=0)

            caches = model.step(layers, caches, previous, rows, position, choose)
            codes = jnp.stack(chosen, axis=-1)
            return (caches, jnp.repeat(codes, copies, axis=0)), (codes, jnp.stack(log_probs, -1))

        caches = init_cache(model.cache_shape, len(rows), model.dtype)
        start = (caches, jnp.zeros((len(rows), depth), jnp.int32))
        _, (codes, log_probs) = jax.lax.scan(one_cell, start, jnp.arange(cells))
        return codes.swapaxes(0, 1), log_probs.swapaxes(0, 1)
