"""Losses and logged metrics beside those of TRL's trainers, stored and, where installed, live.

TRL's numbers are of `trl_losses.py`. Ours come from the stored log-probs of every token, and for
pairs also from the token ids through our own model. Where the two differ on purpose, OURS names the
option that makes them equal, or the test states by how much they differ.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
import trl_losses
from safetensors.numpy import save_file
from tiny_preference import write_rows

from jaxllm.decoding.language_model import load_language_model
from jaxllm.preference import (
    PairStats,
    PointStats,
    RewardPairs,
    RolloutStats,
    Sequences,
    algorithm,
    preference_loss,
)
from jaxllm.preference.config import FrozenReference, ModelConfig, OfflineData, PreferenceRun
from jaxllm.preference.log_probs import SlotShape
from jaxllm.preference.mixture import Part, WeightedSum
from jaxllm.preference.offline import open_files, open_rows
from jaxllm.preference.policy import open_policy
from jaxllm.preference.ppo import batch_advantages
from jaxllm.preference.program import KINDS
from jaxllm.preference.statistics import mean_over_rows
from jaxllm.preference.step import PreferenceLoss

RTOL, ATOL = 1e-5, 2e-6
"""Both sides are float32; numbers near 0, such as a margin, are differences of larger ones."""


def of(name, **options):
    return algorithm(name).config(**options)


TOKEN_MEAN = of("sft", average="token")
"""TRL averages the NLL over all tokens of a batch, ours by default over each sequence."""
OURS = {
    "sigmoid": of("dpo"),
    "hinge": of("hinge", beta=0.1),
    "ipo": of("ipo", tau=0.1, average="mean"),
    "exo_pair": of("exo", label_smoothing=1e-3),
    "nca_pair": of("nca", beta=0.1),
    "robust": of("robust_dpo", label_smoothing=0.1),
    "bco_pair": of("bco_pair", shift="zero"),  # Ours subtracts the batch's mean by default.
    "sppo_hard": of("sppo", beta=0.01),
    "aot": of("aot", beta=0.1, label_smoothing=0.1),
    "aot_unpaired": of("aot_unpaired", beta=0.1, label_smoothing=0.1),
    "apo_zero": of("apo_zero"),
    "apo_down": of("apo_down"),
    "discopop": of("discopop", beta=0.05, temperature=0.05),
    "sft": TOKEN_MEAN,
    "sigmoid_norm": of("dpo_norm", beta=2.0),
    "forward_kl": of("f_dpo", divergence="forward_kl"),
    "js_divergence": of("f_dpo", divergence="js"),
    "alpha_divergence": of("f_dpo", divergence="alpha", alpha=0.5),
    "ld_alpha": of("ld_dpo", alpha=0.5),
    "use_weighting": of("wpo", largest_weight=None),  # TRL does not bound the weights.
    "mpo": WeightedSum(
        (Part(of("dpo"), 0.8), Part(of("bco_pair", shift="zero"), 0.2), Part(TOKEN_MEAN, 1.0))
    ),
    "cpo": WeightedSum((Part(of("cpo", nll_weight=0.0)), Part(TOKEN_MEAN))),
    "simpo": of("simpo", beta=2.0, gamma=1.0),
    "alphapo": of("alphapo", beta=2.5, gamma=0.1, alpha=0.25),
    "orpo": of("orpo", nll_over="prompt_and_completion"),
    "kto": of("kto", undesirable_weight=1.5),
    "bradley_terry": of("bradley_terry"),
    "centred": of("bradley_terry", centre=0.01),
    "grpo": of("grpo", group_size=4, loss_type="grpo", kl_coef=0.04),
    "dapo": of("grpo", group_size=4, epsilon_high=0.28),
    "bnpo": of("grpo", group_size=4),  # In one process a batch's tokens are all tokens.
    "dr_grpo": of("grpo", group_size=4, loss_type="dr_grpo", max_length=8, scale_rewards="none"),
    "gspo": of("grpo", group_size=4, loss_type="grpo", importance="sequence"),
    "batch": of("grpo", group_size=4, loss_type="grpo", scale_rewards="batch"),
    "rloo": of("rloo", group_size=4, kl_coef=0.05),
}


@pytest.fixture(scope="module", params=["stored", "live"])
def trl(request):
    """Arrays and results of TRL."""
    if request.param == "live":
        pytest.importorskip("trl")
        return trl_losses.measure()
    with np.load(trl_losses.GOLDEN, allow_pickle=False) as stored:
        found = dict(stored)
    assert json.loads(str(found["pairs"])) == trl_losses.pairs()
    return {**found, "results": json.loads(str(found["results"]))}


def sequences(trl, side):
    """Statistics of completions from the stored log-probs of their tokens."""

    def array(model, key):
        return jnp.asarray(trl[f"{model}/{side}/{key}"])

    logps = array("policy", "logps")
    ids = answers(side)
    return Sequences.from_tokens(
        logps,
        np.arange(logps.shape[1]) < np.array([len(a) for _, a in ids], np.int32)[:, None],
        array("reference", "logps"),
        collision=array("policy", "collision"),
        prompt_logps=array("policy", "prompt"),
        prompt_lengths=np.array([len(p) - 1 for p, _ in ids], np.int32),
    )


def answers(side):
    if side == "rollouts":
        return [(r["prompt_ids"], r["completion_ids"]) for r in trl_losses.rollouts()]
    if side == "mismatched":
        return [(r["prompt_ids"], r["KL_completion_ids"]) for r in trl_losses.labelled()]
    return [(p["prompt_ids"], p[f"{side}_ids"]) for p in trl_losses.pairs()]


@pytest.fixture(scope="module")
def stored_pairs(trl):
    return PairStats(sequences(trl, "chosen"), sequences(trl, "rejected"))


@pytest.fixture(scope="module")
def modelled_pairs(trl, tmp_path_factory):
    """The statistics that a run on the same ids and weights trains on."""
    root = tmp_path_factory.mktemp("trl")
    for name in ("policy", "reference"):
        start = f"weights/{name}/"
        tensors = {
            key.removeprefix(start): np.asarray(value, np.float32)
            for key, value in trl.items()
            if key.startswith(start)
        }
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        config = {**trl_losses.CONFIG, "model_type": "llama", "hidden_act": "silu"}
        (root / name / "config.json").write_text(json.dumps(config))
    every = WeightedSum(tuple(Part(OURS[name]) for name in ("orpo", "use_weighting", "ld_alpha")))
    run = PreferenceRun(
        ModelConfig(str(root / "policy"), reference=FrozenReference(str(root / "reference"))),
        OfflineData(
            write_rows(root / "pairs.jsonl", trl_losses.pairs()), batch_size=6, row_length=16
        ),
        algorithm=every,
        precision="float32",
    )
    policy = open_policy(run)
    examples, _ = open_files(run, run.data, policy)
    rows = open_rows(run, policy, run.data.row_config(), examples)
    loss = PreferenceLoss(every, policy, SlotShape.of(rows), KINDS["pairs"])
    with tiny_runs.quick_compile():
        params = {"policy": load_language_model(root / "policy").params}
        extra = {"reference": load_language_model(root / "reference").params}
        return jax.jit(loss.stats)(params, extra, rows.batch(range(6)))


def close(ours, theirs, what=""):
    np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=ATOL, err_msg=what)


def our_loss(name, stats):
    per_row, metrics = preference_loss(stats, OURS[name])
    return float(mean_over_rows(per_row, stats)), {k: float(v) for k, v in metrics.items()}


LOGGED = [
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *(f"logps/{side}" for side in trl_losses.SIDES),
]


def compare_metrics(ours, theirs, left_out=()):
    """Everything that both log, under the names of both."""
    names = [name for name in LOGGED if name in theirs and name not in left_out]
    assert len(names) >= 4
    for name in names:
        close(ours[name], theirs[name], name)


# -- pairs ---------------------------------------------------------------------------------------


def test_our_model_gives_the_log_probs_of_transformers(modelled_pairs, stored_pairs):
    for ours, theirs in zip(modelled_pairs.sequences(), stored_pairs.sequences(), strict=True):
        longest = ours.token_logps.shape[1]
        for name in ("token_logps", "ref_token_logps"):
            found, expected = getattr(ours, name), getattr(theirs, name)[:, :longest]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        for name in ("lengths", "logps", "collision"):
            close(getattr(ours, name), getattr(theirs, name), name)
    ours, theirs = modelled_pairs.chosen, stored_pairs.chosen
    close(ours.prompt_logps, theirs.prompt_logps)
    assert (ours.prompt_lengths == theirs.prompt_lengths).all()
    # The models differ enough for the losses to leave the middle of their sigmoids.
    assert np.ptp(stored_pairs.margin) > 3


@pytest.fixture(params=["log-probs", "tokens"])
def given_pairs(request):
    kind = {"log-probs": "stored_pairs", "tokens": "modelled_pairs"}[request.param]
    return request.getfixturevalue(kind)


def test_pair_losses_are_those_of_dpo_trainer(trl, given_pairs):
    for name in trl_losses.DPO:
        theirs = trl["results"]["dpo"][name]
        loss, metrics = our_loss(name, given_pairs)
        close(loss, theirs["loss"], name)
        if name == "sft":  # It has no rewards; TRL logs those of DPO besides.
            assert not any(key.startswith("rewards") for key in metrics)
            continue
        # With ld_alpha TRL's log-probs are of the weakened tails, ours of the completions.
        weakened = ("logps/chosen", "logps/rejected") if name == "ld_alpha" else ()
        compare_metrics(metrics, theirs, left_out=weakened)


def test_reference_free_losses_are_those_of_cpo_trainer(trl, given_pairs):
    for name in trl_losses.CPO:
        theirs = trl["results"]["cpo"][name]
        loss, metrics = our_loss(name, given_pairs)
        close(loss, theirs["loss"], name)
        if name == "cpo":
            compare_metrics(metrics, theirs)
            continue
        # Under "simpo" TRL logs means per token as log-probs, ours are sums always.
        compare_metrics(metrics, theirs, left_out=("logps/chosen", "logps/rejected"))
        close(jnp.mean(given_pairs.chosen.mean_logps), theirs["logps/chosen"])


def test_orpo_differs_in_how_the_nll_is_averaged_only(trl, given_pairs):
    """TRL's is one mean over the tokens of all prompts and completions, ours one per pair."""
    theirs = trl["results"]["orpo"]["orpo"]
    loss, metrics = our_loss("orpo", given_pairs)
    chosen = given_pairs.chosen
    total = jnp.sum(chosen.logps + chosen.prompt_logps)
    over_tokens = -total / jnp.sum(chosen.lengths + chosen.prompt_lengths)
    close(over_tokens, theirs["nll_loss"])
    assert abs(metrics["nll"] - theirs["nll_loss"]) > 1e-3
    close(loss - metrics["nll"] + over_tokens, theirs["loss"])
    close(-metrics["odds_ratio/loss"], theirs["log_odds_ratio"])
    close(metrics["odds_ratio/log"], theirs["log_odds_chosen"])
    compare_metrics(metrics, theirs, left_out=("logps/chosen", "logps/rejected"))


def test_smoothed_labels_are_what_they_were_in_trl(trl, stored_pairs):
    """Its `sigmoid` no longer reads label_smoothing: cDPO has no trainer to be compared with."""
    clean = float(jnp.mean(preference_loss(stored_pairs, of("dpo"))[0]))
    smooth = float(jnp.mean(preference_loss(stored_pairs, of("cdpo"))[0]))
    close(clean, trl["results"]["dpo"]["sigmoid"]["loss"])
    assert abs(smooth - clean) > 1e-2


# -- single completions and reward models --------------------------------------------------------


def test_kto_is_that_of_kto_trainer(trl, stored_pairs):
    """Rows alternate between chosen and rejected; mismatched completions are the same rows'."""
    both = jax.tree.map(
        lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]),
        stored_pairs.chosen,
        stored_pairs.rejected,
    )
    stats = PointStats(
        both,
        desirable=jnp.asarray([row["label"] for row in trl_losses.labelled()]),
        mismatched=sequences(trl, "mismatched"),
    )
    theirs = trl["results"]["kto"]["kto"]
    loss, metrics = our_loss("kto", stats)
    close(loss, theirs["loss"])
    close(metrics["kl"], theirs["kl"])
    assert theirs["kl"] > 1e-3
    compare_metrics(metrics, theirs)
    # Its unpaired APO-zero is a mean over completions, the paired one a sum over both of a pair.
    unpaired = trl["results"]["kto"]["apo_zero_unpaired"]["loss"]
    close(our_loss("apo_zero", stored_pairs)[0] / 2, unpaired)


def test_reward_models_train_as_under_reward_trainer(trl):
    stats = RewardPairs(
        jnp.asarray(trl["reward/chosen"]),
        jnp.asarray(trl["reward/rejected"]),
        jnp.asarray(trl_losses.MARGINS),
    )
    for name in trl_losses.REWARD:
        theirs = trl["results"]["reward"][name]
        loss, metrics = our_loss(name, stats)
        close(loss, theirs["loss"], name)
        close(metrics["rewards/accuracies"], theirs["accuracy"])
        close(metrics["rewards/margins"], theirs["margin"])


# -- rollouts ------------------------------------------------------------------------------------


def rollouts(trl, **others):
    seen = sequences(trl, "rollouts")
    width = trl["old"].shape[1]
    arrays = {"logps": seen.token_logps, "mask": seen.mask, "ref_logps": seen.ref_token_logps}
    return RolloutStats(
        **{name: x[:, :width] for name, x in arrays.items()},
        rewards=jnp.asarray(trl_losses.REWARDS),
        **others,
    )


def test_policy_gradients_are_those_of_their_trainers(trl):
    """Advantages of the samples, then the loss against another policy's log-probs."""
    for kind in ("grpo", "rloo"):
        for name, theirs in trl["results"][kind].items():
            fresh = rollouts(trl)
            advantages = batch_advantages(fresh, OURS[name])["advantages"]
            close(advantages, theirs["advantages"], name)
            stats = rollouts(
                trl,
                old_logps=jnp.asarray(trl["old"]),
                advantages=jnp.asarray(theirs["advantages"]),
            )
            loss, metrics = our_loss(name, stats)
            close(loss, theirs["loss"], name)
            close(metrics["reward"], np.mean(trl_losses.REWARDS))
            if name == "gspo":  # TRL counts clipped sequences, ours their tokens.
                continue
            close(metrics["clip_fraction"], theirs["clip_ratio/region_mean"], name)
            assert 0 < metrics["clip_fraction"] < 1
            if "kl" in theirs and kind == "grpo":
                close(metrics["kl"], theirs["kl"], name)
