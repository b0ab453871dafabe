"""What holds for all algorithms: finite at extremes, bf16, padding rows, sharding, refusals."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import InputError
from jaxllm.preference import (
    ALGORITHMS,
    ListStats,
    PairStats,
    PointStats,
    RolloutStats,
    Sequences,
    algorithm,
    algorithm_of,
    mean_over_rows,
    needs,
    preference_loss,
    preset,
)
from jaxllm.preference.mixture import PRESETS
from jaxllm.training.run_folder import from_plain, override, to_plain


def is_grouped(config):
    return hasattr(config, "group_size")


def options_of(name):
    config = algorithm(name).config()
    return dataclasses.replace(config, group_size=4) if is_grouped(config) else config


VARIANTS = {
    **{name: options_of(name) for name in ALGORITHMS},
    **{
        f"preset {name}": dataclasses.replace(made, group_size=4) if is_grouped(made) else made
        for name, made in PRESETS.items()
    },
    "f_dpo forward": algorithm("f_dpo").config(divergence="forward_kl"),
    "f_dpo js": algorithm("f_dpo").config(divergence="js"),
    "f_dpo alpha": algorithm("f_dpo").config(divergence="alpha"),
    "gpo exponential": algorithm("gpo").config(function="exponential"),
    "bco running": algorithm("bco").config(shift="running", density_weights=True),
    "wpo free": algorithm("wpo").config(largest_weight=None),
    "orpo prompt": algorithm("orpo").config(nll_over="prompt_and_completion"),
    "slic target": algorithm("slic_hf").config(regulariser="target"),
    "gspo tokens": algorithm("grpo").config(group_size=4, importance="sequence_token"),
    "grpo kl": algorithm("grpo").config(group_size=4, kl_coef=0.1),
    "reinforce kl": algorithm("reinforce").config(kl_coef=0.1),
    "gdpo renormalised": algorithm("gdpo").config(renormalise=True),
}


def kind_of(config):
    first = algorithm_of(config).stats[0]
    inner = getattr(config, "preference", None)
    return algorithm_of(inner).stats[0] if inner is not None else first


@functools.partial(jax.jit, static_argnums=1)
def value_and_gradient(stats, config):
    def total(given):
        per_row, metrics = preference_loss(given, config)
        return mean_over_rows(per_row, given), (per_row, metrics)

    return jax.value_and_grad(total, has_aux=True, allow_int=True)(stats)


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]


def close(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(floats(a), floats(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def swapped(stats):
    """The same pairs with the names exchanged: margins far below 0 as well as far above."""
    if isinstance(stats, PairStats):
        return dataclasses.replace(stats, chosen=stats.rejected, rejected=stats.chosen)
    return stats


def equal(stats):
    if isinstance(stats, PairStats):
        return dataclasses.replace(stats, rejected=stats.chosen)
    return stats


def far(stats):
    """Log-probs of -1e4 against references of about -1, the other way round in every other row."""

    def one(s):
        if not isinstance(s, Sequences):
            return s
        odd = (jnp.arange(s.logps.shape[0]) % 2 == 1).reshape(-1, *(1,) * (s.logps.ndim - 1))
        policy = jnp.where(odd, -1e4, s.logps)
        ref = jnp.where(odd, s.ref_logps, -1e4)
        tokens = jnp.where(odd[..., None], -1e4 / 6, s.token_logps)
        return dataclasses.replace(s, logps=policy, ref_logps=ref, token_logps=tokens)

    if isinstance(stats, RolloutStats):
        odd = (jnp.arange(len(stats.mask)) % 2 == 1)[:, None]
        return dataclasses.replace(
            stats,
            logps=jnp.where(odd, -1e4, stats.logps),
            ref_logps=jnp.where(odd, stats.ref_logps, -1e4),
        )
    return jax.tree.map(one, stats, is_leaf=lambda x: isinstance(x, Sequences))


@pytest.mark.parametrize("name", VARIANTS)
def test_extremes_are_finite_with_finite_gradients(name, stats_of):
    config = VARIANTS[name]
    kind = kind_of(config)
    ordinary = stats_of(kind)
    cases = [
        ordinary,
        swapped(far(ordinary)),
        far(ordinary),
        equal(ordinary),
        stats_of(kind, scale=1e4, length=1),
        stats_of(kind, scale=0.0, length=1),
        stats_of(kind, length=0),
    ]
    for case in cases:
        (_, (per_row, metrics)), grads = value_and_gradient(case, config)
        for x in floats((per_row, metrics, grads)):
            assert np.isfinite(np.asarray(x)).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_that_do_not_count_change_nothing(name, stats_of):
    """Four padding rows and an empty one, all of them NaN, beside eight real rows."""
    config = VARIANTS[name]
    stats = stats_of(kind_of(config))
    real, real_grads = value_and_gradient(stats, config)

    def padded(x):
        if not x.ndim:
            return x
        fill = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0
        return jnp.concatenate([x, jnp.full((4, *x.shape[1:]), fill, x.dtype)])

    wide = jax.tree.map(padded, stats)
    valid = jnp.arange(12) < 9  # Row 8 is called valid, but has no token (a reward of NaN).
    if not hasattr(wide, "sequences") or (not wide.sequences() and not hasattr(wide, "mask")):
        valid = jnp.arange(12) < 8
    found, grads = value_and_gradient(dataclasses.replace(wide, valid=valid), config)
    np.testing.assert_allclose(found[0], real[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1][0][:8], real[1][0], rtol=1e-5, atol=1e-6)
    assert not np.asarray(found[1][0][8:]).any()
    assert found[1][1]["rows/empty"] == valid.sum() - 8
    for x, y in zip(floats(grads), floats(real_grads), strict=True):
        if x.ndim:
            np.testing.assert_allclose(x[:8], y, rtol=1e-5, atol=1e-6)
            assert not np.asarray(x[8:]).any()


COUPLED = [
    "kto",
    "bco",
    "bco_pair",
    "aot",
    "aot_unpaired",
    "grpo",
    "rloo",
    "ppo",
    "reinforce",
    "raft",
    "group_distributional_po",
    "weighted_sum",
    "pro",
]


@pytest.mark.parametrize("name", COUPLED)
def test_eight_devices_equal_one(name, stats_of):
    config = VARIANTS[name]
    stats = stats_of(kind_of(config), rows=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        spec = PartitionSpec("data") if x.ndim else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    step = jax.jit(lambda given: value_and_gradient(given, config)[0])
    close(step(stats), step(jax.tree.map(place, stats)))


def test_bfloat16_tokens_are_summed_in_float32():
    """512 tokens of -0.5 are -256; a sum held in bfloat16 stops growing long before."""
    tokens = jnp.full((2, 512), -0.5, jnp.bfloat16)
    tokens = tokens.at[1].set(-0.5078125)  # The next number in bfloat16: the sum is -260.
    s = Sequences.from_tokens(tokens, jnp.ones((2, 512), bool), tokens)
    assert s.logps.dtype == jnp.float32
    np.testing.assert_array_equal(s.logps, [-256.0, -260.0])


@pytest.mark.parametrize("name", ["dpo", "kto", "infonca", "grpo", "bradley_terry"])
def test_bfloat16_statistics_give_float32_losses(name, stats_of):
    config = VARIANTS[name]
    stats = stats_of(kind_of(config))
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, stats
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, half)
    loss, metrics = preference_loss(half, config)
    assert loss.dtype == jnp.float32
    close((loss, metrics), preference_loss(wide, config), rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_configs_survive_json_and_are_hashable(name):
    config = VARIANTS[name]
    assert from_plain(type(config), json.loads(json.dumps(to_plain(config)))) == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("name", [n for n, a in ALGORITHMS.items() if hasattr(a.config(), "beta")])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_a_beta_that_is_not_above_0_is_refused(name, beta):
    with pytest.raises(InputError, match=r"beta is (0.0|-0.1|nan), expected above 0"):
        algorithm(name).config(beta=beta)


def test_options_outside_their_bounds_and_unknown_ones_are_refused():
    with pytest.raises(InputError, match="ConservativeDPO.label_smoothing is 0.5, expected"):
        algorithm("cdpo").config(label_smoothing=0.5)
    with pytest.raises(InputError, match="sum to 1"):
        algorithm("modpo").config(weights=(0.5, 0.2))
    with pytest.raises(InputError, match="max_length"):
        algorithm("grpo").config(loss_type="dr_grpo")
    with pytest.raises(InputError, match="unknown key --label-smoothing"):
        override(algorithm("dpo").config(), ["--label-smoothing", "0.1"])
    assert override(algorithm("dpo").config(), ["--beta", "0.5"]).beta == 0.5
    moved = override(preset("gdpo_paper"), ["--preference.beta", "0.2"])
    assert moved.preference == algorithm("dpo").config(beta=0.2)


def test_names_aliases_and_needs():
    trl = {
        "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exo", "nca_pair": "nca",
        "robust": "robust_dpo", "bco_pair": "bco_pair", "sppo_hard": "sppo", "aot": "aot",
        "aot_unpaired": "aot_unpaired", "apo_zero": "apo_zero", "apo_down": "apo_down",
        "discopop": "discopop", "sft": "sft", "sigmoid_norm": "dpo_norm",
        "gdpo": "group_distributional_po",
    }  # fmt: skip
    assert {name: algorithm(name).name for name in trl} == trl
    with pytest.raises(InputError, match="algorithm 'dop' is not known; near it: dpo"):
        algorithm("dop")
    assert needs(algorithm("simpo").config()) == ()
    assert needs(preset("mpo")) == ("ref_logps",)
    assert "ref_logps" not in needs(algorithm("grpo").config())
    assert "ref_logps" in needs(algorithm("grpo").config(kl_coef=0.1))


def test_missing_or_foreign_statistics_are_refused(stats_of):
    stats = stats_of(PairStats)
    bare = dataclasses.replace(stats, chosen=dataclasses.replace(stats.chosen, ref_logps=None))
    with pytest.raises(InputError, match="dpo needs ref_logps, which the statistics lack"):
        preference_loss(bare, algorithm("dpo").config())
    with pytest.raises(InputError, match="kto got PairStats, expected PointStats"):
        preference_loss(stats, algorithm("kto").config())
    with pytest.raises(InputError, match="6 rows are no multiple of group_size 4"):
        preference_loss(stats_of(RolloutStats, rows=6), options_of("grpo"))
    with pytest.raises(InputError, match="2 weights for None objectives|2 weights"):
        preference_loss(
            stats_of(algorithm("bradley_terry").stats[0]),
            algorithm("bradley_terry").config(weights=(0.5, 0.5)),
        )


def test_beliefs_are_measured_under_any_algorithm(stats_of):
    stats = stats_of(PairStats)
    _, metrics = preference_loss(stats, algorithm("dpo").config())
    q = np.exp(np.asarray(stats.beliefs.log_probs))
    np.testing.assert_allclose(metrics["belief/mass"], q.sum(1).mean(), rtol=1e-5)


def test_kinds_are_covered():
    kinds = {kind for entry in ALGORITHMS.values() for kind in entry.stats}
    assert {PairStats, PointStats, ListStats, RolloutStats} <= kinds
