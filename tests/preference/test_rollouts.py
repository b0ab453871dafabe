"""On-policy data: what is sampled becomes, one compiled program, resuming, learning."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_preference import assert_equal_trees, go, run_of, write_folder, write_rows

from jaxllm.decoding.generate import Completion
from jaxllm.errors import InputError
from jaxllm.nn.lora import LoraConfig
from jaxllm.preference.config import OnPolicyData, RuleFeedback, VerifierFeedback
from jaxllm.preference.examples import open_feedback
from jaxllm.preference.job import preference_job
from jaxllm.preference.log_probs import SlotShape
from jaxllm.preference.pairwise import DPO
from jaxllm.preference.pointwise import KTO, RAFT
from jaxllm.preference.policy import open_policy
from jaxllm.preference.policy_gradient import GRPO, ReMax
from jaxllm.preference.ppo import PPO
from jaxllm.preference.records import Example
from jaxllm.preference.rollout_step import RolloutLoss, part_of, rollout_step, rollout_updates
from jaxllm.preference.rollouts import Sampled, sampled_examples
from jaxllm.preference.rows import PreferenceRows, RowConfig
from jaxllm.preference.step import init_of
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.step import apply_gradients

DATA = OnPolicyData(
    samples=4, max_prompt=8, max_new_tokens=6, batch_size=4, validation_prompts=2, threshold=0.5
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("rollouts"))
    write_rows(root / "prompts.jsonl", [{"prompt": f"{n}?"} for n in range(10)])
    return root


def online(folder, algorithm, steps=2, data=DATA, **model):
    run = run_of(folder, algorithm, steps=steps, **model)
    data = replace(data, prompts=str(folder / "prompts.jsonl"))
    return replace(run, data=data, feedback=RuleFeedback("tiny_preference:low_letters"))


SAMPLED = Sampled(
    [(7,), (8,)],
    [[Completion(ids=[p, k]) for k in range(3)] for p in (1, 2)],
    np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]]),
)


def made(target, **changes):
    return [
        (e.prompt_ids[0], *(ids[-1] for ids in e.completion_ids))
        for e in sampled_examples(SAMPLED, replace(DATA, samples=3, **changes), target, 0)
    ]


def test_what_becomes_of_samples():
    """(prompt, last token of each completion); all scores of the second prompt are equal."""
    assert made("pairs", select="best_of_n") == [(7, 1, 0)]
    (plain,) = made("pairs")
    assert plain in [(7, 1, 0), (7, 1, 2), (7, 2, 0)]
    assert made("pairs", select="rejection", rejection_beta=1e-3) == [(7, 1, 2)]
    assert made("completions", select="best_of_n") == [(7, 1), (8, 0)]
    assert made("completions", select="rejection", rejection_beta=1e-3, accepted=1)[0] == (7, 1)
    assert made("completions") == made("rewards") == [(p, k) for p in (7, 8) for k in range(3)]
    assert made("lists") == [(7, 0, 1, 2), (8, 0, 1, 2)]
    labels = sampled_examples(SAMPLED, replace(DATA, threshold=1.5), "labels", 0)
    assert [e.desirable for e in labels] == [False, True, False, False, False, False]


def test_grpo_raises_the_reward_in_one_compiled_program(folder, tmp_path):
    run = online(folder, GRPO(group_size=4, kl_coef=0.01), steps=14)
    run = replace(run, optimizer=OptimizerConfig(learning_rate=4e-2))
    job = preference_job(run, tmp_path)
    traces = []

    def step(*arguments):
        traces.append(1)
        return job.step(*arguments)

    result, rows = go(replace(job, step=step), tmp_path)
    assert len(traces) == 1
    # The steps of four samples a prompt, and no more: evaluation and samples are of the same shape.
    assert job.prepare._parts.rollouts.sampler.traces == 1
    assert rows[0]["kl_to_reference"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["kl_to_reference"] > 0.01
    first, last = (np.mean([r["reward"] for r in part]) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1
    assert result.summary["metrics"]["eval/score"] > first
    written = (tmp_path / "samples" / "step0000014.jsonl").read_text().splitlines()
    assert len(json.loads(written[0])["scores"]) == 4


def test_a_resumed_run_samples_the_same(folder, tmp_path):
    """Online DPO of adapters, which are merged for sampling; draws depend on state and step."""
    data = replace(DATA, layout="shared_prompt", select="best_of_n")
    run = online(folder, DPO(), 2, data, lora=LoraConfig(2))
    first, second = (preference_job(run, tmp_path) for _ in range(2))
    with tiny_runs.quick_compile():
        state = first.init(jax.random.key(0))
        later = replace(state, step=state.step + 1)
        before, after, again = (
            job.prepare(given, first.batches.batch(1))
            for job, given in ((first, state), (first, later), (second, later))
        )
    assert (after["tokens"] != before["tokens"]).any()
    for name in after:
        np.testing.assert_array_equal(after[name], again[name])


def stepped(job, run):
    """The state before a step, its batch, and what `run` makes of the step."""
    with tiny_runs.quick_compile():
        state = job.init(jax.random.key(0))
        batch = job.prepare(state, job.batches.batch(0))
        return state, batch, *run(job.step)(state, batch, jax.random.key(0))


def test_ppo_trains_policy_and_critic_in_minibatches_of_several_passes(folder, tmp_path):
    """From the second part on the ratio is to the policy that sampled."""
    data = replace(DATA, epochs=2, minibatches=2, validation_prompts=0)
    run = online(folder, PPO(), data=data)
    job, traces = preference_job(run, tmp_path), []
    parts, shape = job.prepare._parts, job.prepare._shape
    loss = RolloutLoss(run.algorithm, parts.policy, shape, data)
    updates = rollout_updates(loss, make_optimizer(run.optimizer, 4), run.optimizer)

    def step(*arguments):
        traces.append(1)
        return updates(*arguments)

    run_step = jax.jit(step)
    state, batch, new, several = stepped(job, lambda _: run_step)
    with tiny_runs.quick_compile():
        other = run_step(state, batch, jax.random.key(1))[1]
        once, metrics = jax.eval_shape(job.step, state, batch, jax.random.key(0))
    assert len(traces) == 1 and int(new.step) == 4 and (several["value_loss"] > 0).all()
    change = np.array(several["ratio_change"])
    assert change.shape == (4,) and change[0] < 1e-6 and (change[1:] > 1e-3).all()
    assert several["clip_fraction"][0] == 0 and several["clip_fraction"].max() > 0
    # Each pass sees every completion once, in an order of its own.
    lengths = np.array(several["length"]).reshape(2, 2).sum(1)
    assert lengths[0] == pytest.approx(lengths[1])
    assert several["value_loss"][0] != other["value_loss"][0]
    assert np.abs(new.params["critic"]["head"]["kernel"]).max() > 0
    old, moved = (tree.params["policy"]["embed"] for tree in (state, new))
    assert np.abs(moved - old).max() > 3 * 1e-2  # More than three updates of Adam at 1e-2.
    assert_equal_trees(new.extra["reference"], state.extra["reference"])
    # The job's step is these updates with their means.
    assert metrics["ratio_change"].shape == () and once.step.shape == ()


@pytest.mark.parametrize("layout", ["padded", "shared_prompt"])
def test_minibatches_keep_the_advantages_of_the_whole_batch(folder, layout):
    """Losses that weigh completions alike: their mean over the parts is that of the whole batch."""
    algorithm = GRPO(group_size=4, loss_type="grpo", kl_coef=0.1)
    run = online(folder, algorithm)
    policy, rng = open_policy(run), np.random.default_rng(0)
    examples = [
        Example(
            (7, *[8] * (n // 4)), ((*rng.integers(0, 255, 1 + n % 3),),), scores=(rng.random(),)
        )
        for n in range(8)
    ]
    rows = PreferenceRows(examples, RowConfig(layout, 8, 12))
    shape, batch = SlotShape.of(rows), rows.batch(range(8))
    optimizer = make_optimizer(run.optimizer, 2)
    whole, parts = (
        RolloutLoss(algorithm, policy, shape, replace(DATA, minibatches=n)) for n in (1, 4)
    )
    one_pass = rollout_step(whole, optimizer, run.optimizer)

    def losses(state, batch):
        fixed = parts.fixed(state.params, state.extra, batch)
        order = jax.random.permutation(jax.random.key(3), 8).reshape(4, 2)
        some = jax.lax.map(
            lambda rows: parts(
                state.params,
                state.extra,
                part_of(batch, rows),
                {name: value[rows] for name, value in fixed.items()},
            )[0],
            order,
        )
        gradient = jax.value_and_grad(whole, has_aux=True)
        before = whole.fixed(state.params, state.extra, batch)
        (loss, metrics), grads = gradient(state.params, state.extra, batch, before)
        by_hand, _ = apply_gradients(
            state, grads, {"loss": loss, **metrics}, batch, optimizer, None
        )
        return some, loss, by_hand, one_pass(state, batch, jax.random.key(0))[0]

    with tiny_runs.quick_compile():
        state = init_of(policy, optimizer, run.optimizer)(jax.random.key(0))
        moved = replace(state, params=jax.tree.map(lambda x: 1.1 * x, state.params))
        some, loss, by_hand, after = jax.jit(losses)(moved, batch)
    assert np.std(some) > 1e-3  # The parts differ, and
    assert np.mean(some) == pytest.approx(float(loss), abs=1e-6)
    # one pass in one part is the plain update.
    assert int(after.step) == 1
    assert_equal_trees(after.params, by_hand.params, rtol=0, atol=1e-7)


@pytest.mark.parametrize("algorithm", [RAFT(group_size=4), ReMax(), KTO()])
def test_batches_of_other_algorithms_fit_their_step(folder, tmp_path, algorithm):
    job = preference_job(online(folder, algorithm), tmp_path)
    state, batch, new, metrics = stepped(job, lambda f: lambda *a: jax.eval_shape(f, *a))
    assert {len(x) for x in batch.values()} <= {*job.batches.sizes.values()}
    assert metrics["loss"].shape == () and jax.tree.structure(new) == jax.tree.structure(state)


def test_samples_of_a_run_that_samples_once_are_kept(folder, tmp_path, capsys):
    data = replace(DATA, refresh="once", select="best_of_n", validation_prompts=0)
    run = online(folder, DPO(), 1, data)
    first = preference_job(run, tmp_path)
    assert "sampling 4 completions of 10 prompts" in capsys.readouterr().out
    second = preference_job(run, tmp_path)
    assert "sampling" not in capsys.readouterr().out
    a, b = first.batches.batch(0), second.batches.batch(0)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert (a["margin"][a["valid"]] > 0).all()
    with pytest.raises(InputError, match="data.temperature 1.0, this config has 0.5"):
        preference_job(replace(run, data=replace(run.data, temperature=0.5)), tmp_path)


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        (RuleFeedback(""), "expected package.module:name"),
        (RuleFeedback("no_such_module_here:f"), "no_such_module_here"),
        (VerifierFeedback("json:nothing"), "json has no function 'nothing'"),
    ],
)
def test_functions_that_are_not_there_are_named(feedback, message):
    with pytest.raises(InputError, match=message):
        open_feedback(feedback)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 60}, "68 tokens, the model has 64"),
        ({"validation_prompts": 10}, "leaves none of 10"),
        ({"batch_size": 9}, "8 prompts are fewer than data.batch_size 9"),
        ({"prompts": "missing.jsonl"}, "missing.jsonl: no such file"),
    ],
)
def test_bad_sampling_is_refused(folder, tmp_path, changes, message):
    run = online(folder, GRPO(group_size=4))
    with pytest.raises(InputError, match=message):
        preference_job(replace(run, data=replace(run.data, **changes)), tmp_path)
    assert not list(tmp_path.iterdir())
