"""The four parts of a run: what goes together, what is refused, and how parts are chosen."""

import pytest

from jaxllm.errors import InputError
from jaxllm.nn.lora import LoraConfig
from jaxllm.preference.config import (
    AdaptersOff,
    AutoReference,
    FrozenReference,
    GivenFeedback,
    LexiconFeedback,
    ModelConfig,
    MovingReference,
    NoReference,
    OfflineData,
    OnPolicyData,
    PrecomputedReference,
    PreferenceRun,
    check_run,
    name_algorithms,
    resolved_reference,
    target_of,
)
from jaxllm.preference.distributional import GroupDistributionalPO
from jaxllm.preference.listwise import PlackettLuceDPO
from jaxllm.preference.mixture import Part, WeightedSum
from jaxllm.preference.pairwise import DPO
from jaxllm.preference.pairwise_tokens import TDPO1
from jaxllm.preference.pointwise import KTO, RAFT, SFT
from jaxllm.preference.policy_gradient import GRPO, RLOO, ReMax
from jaxllm.preference.ppo import PPO
from jaxllm.preference.reference_free import SimPO
from jaxllm.preference.reward_model import BradleyTerry
from jaxllm.preference.wrappers import TRDPO
from jaxllm.training.run_folder import from_plain, override, to_plain


def run(algorithm=DPO(), data=OfflineData("x"), feedback=None, **model):  # noqa: B008
    if feedback is None:
        feedback = LexiconFeedback() if isinstance(data, OnPolicyData) else GivenFeedback()
    return PreferenceRun(ModelConfig("policy", **model), data, feedback, algorithm)


ONLINE, ONCE = OnPolicyData(), OnPolicyData(refresh="once")


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        (run(), FrozenReference()),
        (run(SimPO()), NoReference()),
        (run(lora=LoraConfig()), AdaptersOff()),
        (run(TRDPO(alpha=0.5, every=3)), MovingReference(0.5, 3)),
        (run(reference=PrecomputedReference()), PrecomputedReference()),
        (run(GRPO(), ONLINE), NoReference()),
        (run(GRPO(kl_coef=0.1), ONLINE), FrozenReference()),
    ],
)
def test_the_reference_is_what_the_algorithm_needs(given, reference):
    check_run(given)
    assert resolved_reference(given) == reference


@pytest.mark.parametrize(
    ("given", "target"),
    [
        (run(), "pairs"),
        (run(KTO()), "labels"),
        (run(SFT()), "completions"),
        (run(KTO(), OfflineData("x", unpair=True)), "labels"),
        (run(SFT(), OnPolicyData(select="best_of_n")), "completions"),
        (run(RAFT(), ONLINE), "rewards"),
        (run(PlackettLuceDPO()), "lists"),
        (run(RLOO(group_size=8), ONLINE), "rollouts"),
        (run(GroupDistributionalPO()), "pairs"),
        (run(GroupDistributionalPO(KTO())), "labels"),
        (run(WeightedSum()), "pairs"),
    ],
)
def test_algorithms_say_what_examples_they_want(given, target):
    check_run(given)
    assert target_of(given) == target


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (run(SimPO(), reference=FrozenReference()), "simpo reads no reference"),
        (run(reference=NoReference()), "dpo reads a reference"),
        (run(reference=AdaptersOff()), "needs model.lora"),
        (run(lora=LoraConfig(), reference=MovingReference()), "does not go with model.lora"),
        (run(TRDPO(), reference=FrozenReference()), "moves its own reference"),
        (run(TDPO1(), reference=PrecomputedReference()), "KL over the vocabulary"),
        (run(DPO(), ONLINE, reference=PrecomputedReference()), "sampled at every step"),
        (run(DPO(), ONLINE, GivenFeedback()), "have no labels"),
        (run(DPO(), OfflineData("x", unpair=True)), "unpair makes labels"),
        (run(RAFT()), "data must be on-policy"),
        (run(GRPO()), "data must be on-policy"),
        (run(GRPO(), ONCE), "data must be on-policy"),
        (run(GRPO(group_size=4), ONLINE), "group_size 4 differs from data.samples 8"),
        (run(GRPO(), OnPolicyData(select="best_of_n")), "expected plain"),
        (run(DPO(), OnPolicyData(epochs=2)), "data.epochs 2 and data.minibatches 1 are for policy"),
        (run(ReMax(), OnPolicyData(minibatches=2)), "remax has no clipped ratio"),
        (run(RLOO(8, epsilon=None), OnPolicyData(epochs=2)), "rloo has no clipped ratio"),
        (run(GRPO(), OnPolicyData(minibatches=3)), "3 does not divide the 64 completions"),
        (
            run(WeightedSum((Part(GRPO()), Part(PPO()))), OnPolicyData(minibatches=2)),
            "advantages of their own",
        ),
        (run(DPO(), OnPolicyData(samples=1)), "at least 2 for pairs"),
        (run(DPO(), OnPolicyData(select="rejection", accepted=9)), "accepted 9"),
        (run(GroupDistributionalPO(), ONLINE), "do not state"),
        (run(BradleyTerry()), "train/reward.py"),
        (run(WeightedSum((Part(DPO()), Part(KTO())))), "different kinds of examples"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        check_run(given)


def test_parts_are_chosen_by_name_and_survive_json():
    arguments = name_algorithms(["--algorithm.kind", "gdpo", "--model.lora.kind=LoraConfig"])
    found = override(run(), [*arguments, "--algorithm.preference.kind=KTO"])
    assert found.algorithm == GroupDistributionalPO(KTO()) and found.model.lora == LoraConfig()
    found = override(found, name_algorithms(["--algorithm.kind=kto", "--algorithm.beta", "0.3"]))
    assert found.algorithm == KTO(0.3)
    found = override(
        found, ["--model.reference.kind", "MovingReference", "--data.kind=OnPolicyData"]
    )
    assert found.model.reference == MovingReference() and found.data == OnPolicyData()
    assert isinstance(run().model.reference, AutoReference)
    assert from_plain(PreferenceRun, to_plain(found)) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm.kind", "ddpo"], "algorithm 'ddpo' is not known; near it: dpo"),
        (["--algorithm.gamma", "1"], "unknown key --algorithm.gamma"),
        (["--algorithm.beta", "0"], "DPO.beta is 0.0, expected above 0"),
        (["--algorithm.beta", "-1"], "DPO.beta is -1.0"),
        (["--model.reference.kind", "Frozen"], "near it: FrozenReference"),
        (["--feedback.kind"], "needs a name"),
    ],
)
def test_unknown_parts_and_foreign_options_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        override(run(), name_algorithms(arguments))
