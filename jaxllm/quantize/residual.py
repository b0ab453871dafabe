"""Residual vector quantization; plain VQ is depth 1.

Eq. 2 of arXiv:2410.01912 (DnD-Transformer), Sec. 3.1 of arXiv:2203.01941 (RQ-VAE):

    r_0 = z;  k_i = argmin_k |r_{i-1} - e_i(k)|^2;  r_i = r_{i-1} - e_i(k_i);  q_i = e_1 + .. + e_i
    commitment = (1/C) sum_i mean((z - sg(q_i))^2)

Every prefix commits, and the gradient estimator is applied once, to the sum `q_C`.

Shapes: B examples, C code depth, K codebook size, E code dim; `...` any leading axes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.quantize.codebook import (
    Book,
    assignment_statistics,
    code_entropy,
    draw_rows,
    nearest_code,
    normalise,
    update_book,
)
from jaxllm.quantize.estimators import rotation, straight_through
from jaxllm.quantize.interface import (
    Params,
    QuantizeOutput,
    State,
    check_codes,
    check_input,
    masked_mean_square,
)

_stop = jax.lax.stop_gradient


class _Chain(NamedTuple):
    """What one pass over the levels leaves behind; lists run over levels, N vectors each."""

    residuals: list[jax.Array]  # r_0 .. r_C, each [N, E], with the gradient of the input
    codes: list[jax.Array]  # [N]
    chosen: list[jax.Array]  # [N, E], with the gradient of the codebook; zero where dropped
    tables: list[jax.Array]  # [K, E], as searched


@dataclasses.dataclass(frozen=True)
class ResidualVQ:
    """Configuration and pure functions of a residual vector quantizer.

    With `update='ema'` the state holds `codebook [C', K, E]`, `counts [C', K]` and
    `sums [C', K, E]`, where C' is 1 if shared, and there are no parameters. With
    `update='gradient'` the parameters hold `codebook [C', K, E]` and the state is empty. The
    padding row of the RQ-VAE code (index K, always zero) is not stored: code -1 marks a dropped
    level and decodes to zero.

    Attributes:
      codebook_size: K.
      code_dim: E.
      depth: C, the number of residual levels.
      shared: one codebook for all levels (the papers' choice; at small K separate ones are better).
      update: `'ema'`, or `'gradient'` through the codebook loss.
      ema_mode: for a shared codebook, `'pooled'` makes one step with the statistics of all levels;
        `'sequential'` makes one step per level, so that level i+1 already searches the codebook
        that level i updated and the decay per call is `decay ** depth` (the released RQ-VAE code).
        They are the same at depth 1 and for separate codebooks.
      decay: EMA decay.
      epsilon: Laplace smoothing of the EMA counts.
      restart_below: EMA codes with a smaller average number of vectors per EMA step (all levels of
        a batch when pooled) are replaced by random residuals of the batch; 0 turns it off. Lower it
        when a batch has few vectors per code. A gradient codebook has no restart.
      estimator: `'straight_through'` or `'rotation'`.
      dropout: probability that an example keeps only its first n levels, n uniform in 1..C;
        the example is the first axis of z.
      cosine: l2-normalise vectors and codes; depth 1 only, since residuals are not unit vectors.
      temperature: above 0, stochastic codes in training.
      entropy_weight: above 0, adds the `entropy` loss of `code_entropy`, averaged over levels.
      entropy_temperature: of its soft choice.
      beta: weight of the commitment loss in `total_loss`; the codebook loss has weight 1.
      legacy_beta: swaps the two weights, as several released implementations do.
      chunk_size: vectors searched at once over all devices together: the peak temporary is
        `[chunk_size, K]` float32.
    """

    codebook_size: int
    code_dim: int
    depth: int = 1
    shared: bool = True
    update: Literal["ema", "gradient"] = "ema"
    ema_mode: Literal["pooled", "sequential"] = "pooled"
    decay: float = 0.99
    epsilon: float = 1e-5
    restart_below: float = 1.0
    estimator: Literal["straight_through", "rotation"] = "straight_through"
    dropout: float = 0.0
    cosine: bool = False
    temperature: float = 0.0
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    beta: float = 0.25
    legacy_beta: bool = False
    chunk_size: int = 8192

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        for name in ("codebook_size", "code_dim", "depth", "chunk_size"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"ResidualVQ: {name} is {getattr(self, name)}, expected at least 1"
                )
        choices = {
            "update": ("ema", "gradient"),
            "ema_mode": ("pooled", "sequential"),
            "estimator": ("straight_through", "rotation"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"ResidualVQ: {name} is {getattr(self, name)!r}, not in {allowed}")
        for name in ("decay", "dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"ResidualVQ: {name} is {getattr(self, name)}, expected 0 to 1")
        if self.cosine and self.depth > 1:
            raise InputError(f"ResidualVQ: cosine needs depth 1, got depth {self.depth}")
        if self.legacy_beta and self.update == "ema":
            raise InputError("ResidualVQ: legacy_beta swaps two losses; update 'ema' has only one")
        if self.estimator == "rotation" and self.code_dim == 1:
            raise InputError("ResidualVQ: estimator 'rotation' needs code_dim of at least 2, got 1")

    @property
    def size(self) -> int:
        """K, the number of values that one code can take."""
        return self.codebook_size

    def init(self, key: jax.Array) -> tuple[Params, State]:
        """Returns a N(0, 1) codebook.

        With restart the EMA counts start at 0 as in RQ-VAE, so that the first training step puts
        data in nearly every entry; without restart they start at 1, since an entry with count 0
        would be divided by the smoothing constant. `residual_kmeans_start` is the other start.
        """
        books = 1 if self.shared else self.depth
        codebook = jax.random.normal(key, (books, self.codebook_size, self.code_dim))
        if self.update == "gradient":
            return {"codebook": codebook}, {}
        counts = jnp.full(codebook.shape[:2], 0.0 if self.restart_below > 0 else 1.0)
        return {}, {"codebook": codebook, "counts": counts, "sums": codebook}

    def codebook(self, params: Params, state: State) -> jax.Array:
        """Returns the vectors of every level, float32 `[C, K, E]`, normalised if cosine."""
        tables = self._tables(params, state)
        return jnp.stack([tables[self._book(level)] for level in range(self.depth)])

    def quantize(
        self,
        params: Params,
        state: State,
        z: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> QuantizeOutput:
        """Quantizes vectors and, in training, updates the codebook.

        Losses: `commitment`; if update is 'gradient', `codebook`, the mean over levels of
        `mean((sg(r_{i-1}) - e_i(k_i))^2)`; `entropy` if its weight is above 0. Means run over the
        valid vectors and the levels that dropout kept.

        Args:
          params: see the class.
          state: see the class.
          z: `[..., E]`, any float dtype; the arithmetic is float32.
          train: updates the EMA codebook and turns on dropout and stochastic codes.
          key: random key, needed in training by restart, dropout and stochastic codes.
          mask: bool `[...]`, False at padding, which is left out of losses, counts and EMA.

        Returns:
          `QuantizeOutput`; `quantized` uses the codebook from before the update.

        Raises:
          InputError: wrong shapes, or no key where one is needed.
        """
        check_input("ResidualVQ", self.code_dim, z, mask)
        if key is None:
            if train and self._needs_key:
                raise InputError("ResidualVQ: training with these options is random, pass key=")
            key = jax.random.key(0)  # never reaches a random choice
        dropout_key, chain_key = jax.random.split(key)
        vectors = z.reshape(-1, self.code_dim).astype(jnp.float32)
        if self.cosine:
            vectors = normalise(vectors)
        active = self._active_levels(z.shape[:-1], dropout_key if train else None)
        counted = active if mask is None else active & mask.reshape(-1, 1)

        chain, state = self._chain(params, state, vectors, active, counted, chain_key, train)
        estimate = rotation if self.estimator == "rotation" else straight_through
        total = sum(chain.chosen, jnp.zeros(()))
        quantized = estimate(vectors, total).reshape(z.shape).astype(z.dtype)
        codes = jnp.where(active, jnp.stack(chain.codes, 1), -1)
        codes = codes.reshape(*z.shape[:-1], self.depth)
        return QuantizeOutput(quantized, codes, self._losses(chain, counted), state)

    def embed_levels(self, params: Params, state: State, codes: jax.Array) -> jax.Array:
        """Returns the vector of every code, float32 `[..., C, E]`; zero at -1.

        A code that is not below K gives NaN rather than another code's vector.

        Raises:
          InputError: codes without C levels.
        """
        check_codes("ResidualVQ", self.depth, codes, None)
        tables = self._tables(params, state)
        return jnp.stack(
            [self._lookup(tables[self._book(i)], codes[..., i]) for i in range(codes.shape[-1])], -2
        )

    def decode(
        self, params: Params, state: State, codes: jax.Array, depth: int | None = None
    ) -> jax.Array:
        """Sums the vectors of the first `depth` levels; -1 adds nothing.

        Args:
          params: see the class.
          state: see the class.
          codes: int `[..., C]`.
          depth: number of levels, all by default.

        Returns:
          float32 `[..., E]`.

        Raises:
          InputError: codes without C levels, or depth outside 1..C.
        """
        depth = check_codes("ResidualVQ", self.depth, codes, depth)
        tables = self._tables(params, state)
        total = jnp.zeros((*codes.shape[:-1], self.code_dim))
        for level in range(depth):
            total = total + self._lookup(tables[self._book(level)], codes[..., level])
        return total

    def total_loss(self, losses: dict[str, jax.Array]) -> jax.Array:
        """Returns `beta * commitment + codebook + entropy_weight * entropy` (see `legacy_beta`)."""
        weights = (1.0, self.beta) if self.legacy_beta else (self.beta, 1.0)
        total = weights[0] * losses["commitment"] + weights[1] * losses.get("codebook", 0.0)
        return total + self.entropy_weight * losses.get("entropy", 0.0)

    @property
    def _needs_key(self) -> bool:
        restarts = self.update == "ema" and self.restart_below > 0
        return restarts or self.dropout > 0 or self.temperature > 0

    def _book(self, level: int) -> int:
        return 0 if self.shared else level

    def _tables(self, params: Params, state: State) -> jax.Array:
        """Codebooks as they are searched and decoded, `[C', K, E]`."""
        tables = (params if self.update == "gradient" else state)["codebook"].astype(jnp.float32)
        return normalise(tables) if self.cosine else tables

    def _lookup(self, table: jax.Array, codes: jax.Array) -> jax.Array:
        vectors = table.at[codes].get(mode="fill", fill_value=jnp.nan)
        return jnp.where(codes[..., None] < 0, 0.0, vectors)

    def _active_levels(self, shape: tuple[int, ...], key: jax.Array | None) -> jax.Array:
        """Which levels quantizer dropout keeps, bool `[N, C]`; all of them without a key."""
        if key is None or self.dropout == 0:
            return jnp.ones((math.prod(shape), self.depth), bool)
        examples = shape[:1]
        short_key, count_key = jax.random.split(key)
        short = jax.random.bernoulli(short_key, self.dropout, examples)
        count = jax.random.randint(count_key, examples, 1, self.depth + 1)
        count = jnp.where(short, count, self.depth)
        count = count.reshape(*examples, *(1,) * (len(shape) - len(examples)))
        return (jnp.arange(self.depth) < jnp.broadcast_to(count, shape)[..., None]).reshape(
            -1, self.depth
        )

    def _chain(
        self,
        params: Params,
        state: State,
        vectors: jax.Array,
        active: jax.Array,
        counted: jax.Array,
        key: jax.Array,
        train: bool,
    ) -> tuple[_Chain, State]:
        """Quantizes level by level; in training with EMA also returns the next state."""
        code_key, restart_key = jax.random.split(key)
        update = train and self.update == "ema"
        level_by_level = not self.shared or self.ema_mode == "sequential"
        chain = _Chain([vectors], [], [], [])
        for level in range(self.depth):
            table = self._tables(params, state)[self._book(level)]
            codes = nearest_code(
                _stop(chain.residuals[-1]),
                _stop(table),
                chunk_size=self.chunk_size,
                temperature=self.temperature if train else 0.0,
                key=jax.random.fold_in(code_key, level),
            )
            chosen = jnp.where(active[:, level, None], table[codes], 0.0)
            chain.residuals.append(chain.residuals[-1] - _stop(chosen))
            chain.codes.append(codes)
            chain.chosen.append(chosen)
            chain.tables.append(table)
            if update and level_by_level:
                step_key = jax.random.fold_in(restart_key, level)
                state = self._step(step_key, state, chain, counted, slice(level, level + 1))
        if update and not level_by_level:
            state = self._step(restart_key, state, chain, counted, slice(0, self.depth))
        return chain, state

    def _losses(self, chain: _Chain, counted: jax.Array) -> dict[str, jax.Array]:
        """The unweighted losses, means over the counted vectors and levels."""
        columns = list(counted.T)
        losses = {"commitment": masked_mean_square(chain.residuals[1:], columns)}
        if self.update == "gradient":
            targets = [_stop(residual) for residual in chain.residuals[:-1]]
            gaps = [target - code for target, code in zip(targets, chain.chosen, strict=True)]
            losses["codebook"] = masked_mean_square(gaps, columns)
        if self.entropy_weight > 0:
            entropies = [
                code_entropy(
                    residual,
                    table,
                    weights.astype(jnp.float32),
                    temperature=self.entropy_temperature,
                    chunk_size=self.chunk_size,
                )
                for residual, table, weights in zip(
                    chain.residuals[:-1], chain.tables, columns, strict=True
                )
            ]
            losses["entropy"] = jnp.stack(entropies).mean()
        return losses

    def _step(
        self, key: jax.Array, state: State, chain: _Chain, counted: jax.Array, levels: slice
    ) -> State:
        """One EMA step, with the statistics of the given levels, of the codebook they share."""
        residuals = [_stop(residual) for residual in chain.residuals[:-1][levels]]
        weights = counted.T[levels]
        statistics = [
            assignment_statistics(residual, codes, weight.astype(jnp.float32), self.codebook_size)
            for residual, codes, weight in zip(residuals, chain.codes[levels], weights, strict=True)
        ]
        counts, sums = jax.tree.map(lambda *parts: sum(parts), *statistics)
        candidates = None
        if self.restart_below > 0:
            candidates = draw_rows(key, jnp.stack(residuals), weights, self.codebook_size)
        index = self._book(levels.start)
        book = update_book(
            Book(**{name: state[name][index] for name in Book._fields}),
            counts,
            sums,
            candidates,
            decay=self.decay,
            epsilon=self.epsilon,
            restart_below=self.restart_below,
        )
        return {name: state[name].at[index].set(value) for name, value in book._asdict().items()}
