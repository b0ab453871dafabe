"""Head scores of a model and plans side by side, against loops and against the full cache."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny_runs
from flax import struct

from jaxllm.data.text_tokenizers import byte_tokenizer
from jaxllm.decoding.language_model import LanguageModel
from jaxllm.errors import InputError
from jaxllm.kvcompress.evaluate import Case, Question, evaluate_plans
from jaxllm.kvcompress.examples import Example
from jaxllm.kvcompress.measure import measure_heads
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig, attend
from jaxllm.nn.mlp import MlpConfig

TOKENIZER = byte_tokenizer()
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    dim=16,
    layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=4),
    mlp=MlpConfig(hidden=16),
    windows=(None, 9),
    init_std=0.4,
)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny_runs.quick_compile():
        yield


@pytest.fixture(scope="module")
def model():
    blueprint = decoder(CONFIG)
    params, _ = blueprint.init(jax.random.key(1))
    return LanguageModel("tiny", CONFIG, blueprint, params, TOKENIZER, (TOKENIZER.eos,))


@pytest.fixture(scope="module")
def shallow():
    """One layer: every rung of every layer is compiled."""
    config = dataclasses.replace(CONFIG, layers=1, windows=(None,))
    blueprint = decoder(config)
    params, _ = blueprint.init(jax.random.key(2))
    return LanguageModel("tiny", config, blueprint, params, TOKENIZER, (TOKENIZER.eos,))


def example(length, span, answer, seed=0):
    rng = np.random.default_rng(seed)
    prompt = rng.integers(97, 110, length).tolist()
    prompt[span[0] : span[1]] = answer
    fields = dict(distractor=None, answer="", question="", depth=0.0, length=length)
    return Example(
        prompt_ids=tuple(prompt), answer_ids=tuple(answer), span=span, question_start=length - 3,
        **fields,
    )  # fmt: skip


EXAMPLES = [example(14, (5, 8), [100, 101, 102]), example(25, (20, 22), [98, 103], seed=1)]


@struct.dataclass
class Capture:
    """A cache that keeps queries and keys."""

    q: jax.Array
    k: jax.Array
    window: int | None = struct.field(pytree_node=False, default=None)

    def extend(self, q, k, v, positions):
        out = attend(q, k, v, causal=True, window=self.window)
        return out, Capture(q, k, self.window)


def loops(model, item, estimator):
    """Scores of one example by NumPy loops over heads, steps and columns."""
    ids = [*item.prompt_ids, *item.answer_ids]
    network = model.blueprint.build(model.params, {})
    caches = [Capture(None, None, window) for window in CONFIG.layer_windows]
    _, caches = network.step(network.unstack(), caches, np.array([ids]), np.arange(len(ids))[None])
    start, stop = item.span
    size = stop - start
    scores = np.zeros((2, 4))
    for layer, cache in enumerate(caches):
        q, k = np.asarray(cache.q)[0], np.asarray(cache.k)[0]
        for head in range(4):
            for step, token in enumerate(item.answer_ids):
                row = len(item.prompt_ids) - 1 + step
                first = 0 if cache.window is None else max(0, row - cache.window + 1)
                logits = np.full(len(ids), -np.inf)
                for column in range(first, row + 1):
                    logits[column] = q[row, head] @ k[column, head // 2] / 2.0
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                if estimator == "r":
                    best = int(weights.argmax())
                    scores[layer, head] += (start <= best < stop and ids[best] == token) / size
                else:
                    top = np.argsort(-weights, kind="stable")[:size]
                    scores[layer, head] += sum(weights[c] for c in top if start <= c < stop) / size
    return scores


@pytest.mark.parametrize("estimator", ["r", "er"])
def test_head_scores_equal_loops(model, estimator):
    found = measure_heads(model, EXAMPLES, estimator, gate="none", batch=2)
    assert found.passed.tolist() == [True, True] and found.runs.shape == (2, 2, 4)
    for run, item in zip(found.runs, EXAMPLES, strict=True):
        np.testing.assert_allclose(run, loops(model, item, estimator), rtol=0, atol=1e-5)
    assert found.runs.max() > 0


def test_the_gate_keeps_what_the_model_answers(model):
    network = model.blueprint.build(model.params, {})
    prompt = EXAMPLES[0].prompt_ids
    logits = network.logits(network.hidden(np.array([prompt]))[:, -1])
    first = int(np.argmax(logits))
    # One token is the model's own, the other cannot be: 1 of 1 passes, 1 of 2 does not.
    right = dataclasses.replace(EXAMPLES[0], answer_ids=(first,))
    half = dataclasses.replace(EXAMPLES[0], answer_ids=((first + 1) % 256, (first + 2) % 256))
    found = measure_heads(model, [half, right], "er", batch=1)
    assert found.passed.tolist() == [False, True] and len(found.runs) == 1
    with pytest.raises(InputError, match="answers none of 1 examples"):
        measure_heads(model, [half], "er", batch=1)
    with pytest.raises(InputError, match="estimator 'r3'"):
        measure_heads(model, [half], "r3")


def cases(answers=None):
    rng = np.random.default_rng(3)
    made = []
    for number, length in enumerate((30, 21, 40)):
        context = tuple(rng.integers(97, 120, length).tolist())
        questions = []
        for turn in range(2):
            ids = tuple(rng.integers(97, 120, 4 + turn).tolist())
            wanted = None if answers is None else answers[number][turn]
            seen: list[str] = []
            questions.append((ids, wanted, seen))
        made.append((context, questions))
    return made


def as_cases(made):
    def judge(wanted, seen):
        def score(text):
            seen.append(text)
            return float(text == wanted)

        return score

    return [
        Case(context, tuple(Question(ids, judge(w, seen), 6) for ids, w, seen in questions))
        for context, questions in made
    ]


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_a_plan_that_keeps_all_answers_as_the_full_cache_does(shallow, protocol):
    model = shallow
    first = cases()
    (row,) = evaluate_plans(model, as_cases(first), ["full"], protocol, batch=2)
    assert row["questions"] == 6 and row["score"] == 0.0
    answers = [[seen[0] for _, _, seen in questions] for _, questions in first]
    again = as_cases(cases(answers))
    plans = ["uniform:budget=64,window=4", "full"]
    rows = evaluate_plans(model, again, plans, protocol, batch=2)
    assert [row["score"] for row in rows] == [1.0, 1.0]
    (tight,) = evaluate_plans(model, again, ["uniform:budget=6,window=4"], protocol, batch=2)
    assert tight["cache bytes per context"] < rows[0]["cache bytes per context"]
    assert tight["score"] < 1.0


def test_protocols_agree_on_the_first_turn_of_a_full_cache(model):
    asked, told, told_on = cases(), cases(), cases()
    for made, protocol in ((asked, "aware"), (told, "agnostic"), (told_on, "multi_turn")):
        evaluate_plans(model, as_cases(made), ["full"], protocol, batch=3)
    for a, b, c in zip(asked, told, told_on, strict=True):
        assert a[1][0][2] == b[1][0][2] == c[1][0][2]
        assert a[1][1][2] == b[1][1][2]  # The second question starts from the context again,
        assert a[1][1][2] != c[1][1][2]  # but in a conversation it sees the first.


def test_refusals(model):
    with pytest.raises(InputError, match="protocol 'blind'"):
        evaluate_plans(model, as_cases(cases()), ["full"], "blind")
    with pytest.raises(InputError, match="nothing is asked"):
        evaluate_plans(model, [], ["full"])
    with pytest.raises(InputError, match="plan 'tiny'"):
        evaluate_plans(model, as_cases(cases()), ["tiny"])
