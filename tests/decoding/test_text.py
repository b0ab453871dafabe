"""Text generation: cached equals uncached, and a row's tokens depend on that row only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs

from jaxllm.data.text_tokenizers import byte_tokenizer
from jaxllm.decoding.generate import TextGenerator
from jaxllm.decoding.language_model import text_sampler
from jaxllm.decoding.score import CompletionScorer
from jaxllm.decoding.text import (
    CHUNK,
    TextSampler,
    TextSampling,
    bucket,
    left_padded,
    row_keys,
)
from jaxllm.decoding.text_cache import dense_cache
from jaxllm.errors import InputError
from jaxllm.models.decoder import DECODER_RULES, DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.parallel.sharding import param_shardings
from jaxllm.training.language_model import LanguageModelRun
from jaxllm.training.state import new_state

VOCAB = byte_tokenizer().vocab_size
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    dim=16,
    layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=4),
    mlp=MlpConfig(hidden=24),
    init_std=0.4,  # Far from uniform, so that what a token sees matters.
)
MODEL = decoder(CONFIG)
PARAMS, _ = MODEL.init(jax.random.key(0))


def caches(batch, prompt_slots, slots):
    return [dense_cache(batch, 2, slots, 4) for _ in range(CONFIG.layers)]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny_runs.quick_compile():
        yield


@pytest.fixture(scope="module")
def sampler():
    return TextSampler(MODEL.build, caches)


@pytest.fixture(scope="module")
def generator(sampler):
    return TextGenerator(PARAMS, {}, sampler, byte_tokenizer())


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 200, n).tolist() for n in lengths]


@jax.jit
def uncached_logits(tokens):
    model = MODEL.build(PARAMS, {})
    return model.logits(model.hidden(tokens))


def test_greedy_tokens_are_the_uncached_ones(generator):
    rows = prompts(3, 17, 30)
    setting = TextSampling(max_new_tokens=CHUNK + 5, temperature=0.0)
    for prompt, (completion,) in zip(rows, generator(rows, setting), strict=True):
        assert len(completion.ids) == CHUNK + 5 and completion.finish_reason == "length"
        whole = np.zeros((1, 80), np.int32)
        whole[0, : len(prompt) + CHUNK + 5] = prompt + completion.ids
        logits = np.asarray(uncached_logits(whole))[0]
        ends = slice(len(prompt) - 1, len(prompt) + CHUNK + 4)
        assert logits[ends].argmax(-1).tolist() == completion.ids


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_kernels_with_their_outputs_first_draw_the_same_tokens(tied, monkeypatch):
    model = decoder(dataclasses.replace(CONFIG, tie_embeddings=tied))
    params, _ = model.init(jax.random.key(1))
    found = []
    for least in (CONFIG.dim + 1, CONFIG.dim):
        monkeypatch.setattr("jaxllm.models.decoder._OUTPUTS_FIRST_FROM", least)
        layers = model.build(params, {}).decoding_layers()
        assert (layers.head is not None) == (least == CONFIG.dim and not tied)
        generate = TextGenerator(params, {}, TextSampler(model.build, caches), byte_tokenizer())
        rows = generate(prompts(4, 9), TextSampling(max_new_tokens=12, temperature=0.0))
        found.append([(c.ids, c.log_probs) for (c,) in rows])
    for (plain, plain_scores), (turned, turned_scores) in zip(*found, strict=True):
        assert plain == turned
        np.testing.assert_allclose(plain_scores, turned_scores, rtol=0, atol=1e-5)


def test_log_probs_are_the_scorers(generator):
    rows = prompts(5, 11)
    setting = TextSampling(max_new_tokens=20, temperature=0.8, top_p=0.9)
    found = [row[0] for row in generator(rows, setting, seed=3)]
    pairs = [(prompt, c.ids) for prompt, c in zip(rows, found, strict=True)]
    scored = CompletionScorer(MODEL.build)(PARAMS, {}, pairs, batch=2)
    for completion, values in zip(found, scored, strict=True):
        np.testing.assert_allclose(completion.log_probs, values, rtol=0, atol=2e-5)


def test_a_row_does_not_depend_on_its_batch(generator):
    rows = prompts(2, 9, 16, 40, 12)
    setting = TextSampling(max_new_tokens=12)
    together = generator(rows, setting, seed=1, batch=5)
    for batch in (1, 2):
        apart = generator(rows, setting, seed=1, batch=batch)
        assert [r[0].ids for r in apart] == [r[0].ids for r in together]
    assert generator(rows, setting, seed=2)[0][0].ids != together[0][0].ids
    assert (
        generator([rows[0]] * 2, setting)[0][0].ids != generator([rows[0]] * 2, setting)[1][0].ids
    )


def test_samples_share_a_prefill_and_differ(generator, sampler):
    rows = prompts(6, 10)
    found = generator(rows, TextSampling(max_new_tokens=10), samples=3, seed=5)
    assert [len(r) for r in found] == [3, 3]
    assert len({tuple(c.ids) for r in found for c in r}) == 6
    greedy = generator(rows, TextSampling(max_new_tokens=10, temperature=0), samples=2)
    assert all(a.ids == b.ids for a, b in greedy)
    keys = row_keys(5, [0, 1], 3)
    assert len({tuple(k) for k in np.asarray(jax.random.key_data(keys)).tolist()}) == 6


def test_one_compilation_serves_all_settings_of_a_bucket():
    fresh = TextSampler(MODEL.build, caches)
    generate = TextGenerator(PARAMS, {}, fresh)
    for lengths, temperature in (((3, 4), 1.0), ((16, 2), 0.5), ((9, 9), 0.0)):
        generate(prompts(*lengths), TextSampling(max_new_tokens=40, temperature=temperature))
    assert fresh.traces == 1
    assert (bucket(1), bucket(16), bucket(17), bucket(64)) == (16, 16, 32, 64)


def test_stop_ids_end_a_row_and_not_the_others(generator):
    rows = prompts(4, 8, 6)
    free = [r[0].ids for r in generator(rows, TextSampling(max_new_tokens=50), seed=9)]
    stop = free[1][20]
    setting = TextSampling(max_new_tokens=50, stop_ids=(stop,))
    for ids, (completion,) in zip(free, generator(rows, setting, seed=9), strict=True):
        end = ids.index(stop) + 1 if stop in ids else 50
        assert completion.ids == ids[:end]
        assert completion.finish_reason == ("stop" if stop in ids else "length")


def test_penalty_and_min_p_by_an_uncached_loop(generator):
    (prompt,) = prompts(7)
    setting = TextSampling(max_new_tokens=15, temperature=0.0, repetition_penalty=1.7)
    ((completion,),) = generator([prompt], setting)
    row = list(prompt)
    for token in completion.ids:
        tokens = np.zeros((1, 80), np.int32)
        tokens[0, : len(row)] = row
        logits = np.asarray(uncached_logits(tokens))[0, len(row) - 1].copy()
        for seen in set(row):
            logits[seen] = logits[seen] / 1.7 if logits[seen] > 0 else logits[seen] * 1.7
        assert logits.argmax() == token
        row.append(token)
    # A min_p of 1 leaves only the most likely token.
    greedy = generator([prompt], TextSampling(max_new_tokens=9, temperature=0.0))
    assert generator([prompt], TextSampling(max_new_tokens=9, min_p=1.0))[0][0].ids == (
        greedy[0][0].ids
    )


@pytest.mark.parametrize("size", [4, 16])
def test_a_prompt_in_chunks_is_the_prompt_whole(generator, size):
    rows = prompts(3, 33, 60)
    setting = TextSampling(max_new_tokens=8, temperature=0.0)
    whole = generator(rows, setting)
    chunked = TextGenerator(PARAMS, {}, TextSampler(MODEL.build, caches, prefill_chunk=size))
    for (a,), (b,) in zip(whole, chunked(rows, setting), strict=True):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=0, atol=1e-5)


def test_a_context_is_asked_two_questions(sampler):
    context, first, second = prompts(20, 5, 9, seed=4)
    state = sampler.prefill(PARAMS, {}, [context], row_keys(0, [0]), max_new_tokens=64)
    for question in (first, second):
        asked = sampler.extend(PARAMS, {}, state, [question])
        assert asked.position.tolist() == [20 + len(question)]
        tokens = np.zeros((1, 80), np.int32)
        tokens[0, : 20 + len(question)] = context + question
        expected = np.asarray(uncached_logits(tokens))[0, 19 + len(question)]
        model = MODEL.build(PARAMS, {})
        np.testing.assert_allclose(model.logits(asked.hidden)[0], expected, rtol=0, atol=2e-5)


def test_only_ids_of_the_tokenizer_are_drawn():
    few = TextSampler(MODEL.build, caches, known_ids=40)
    rows = prompts(5, 9)
    found = TextGenerator(PARAMS, {}, few)(rows, TextSampling(max_new_tokens=30, temperature=3.0))
    assert max(token for (completion,) in found for token in completion.ids) < 40
    pairs = [(prompt, c.ids) for prompt, (c,) in zip(rows, found, strict=True)]
    scored = CompletionScorer(MODEL.build)(PARAMS, {}, pairs, batch=2)
    np.testing.assert_allclose(found[0][0].log_probs, scored[0], rtol=0, atol=2e-5)


def test_a_question_that_does_not_fit_is_refused(sampler):
    state = sampler.prefill(PARAMS, {}, prompts(10), row_keys(0, [0]), max_new_tokens=32)
    with pytest.raises(InputError, match="64 more slots do not fit the cache of layer 0"):
        sampler.extend(PARAMS, {}, state, prompts(40))
    assert sampler.cache_bytes(1, 10, 32) == sum(x.nbytes for x in jax.tree.leaves(state.caches))


def test_a_batch_over_devices_gives_the_same_tokens(generator):
    rows = prompts(4, 12, 7, 15)
    setting = TextSampling(max_new_tokens=10)
    expected = [r[0].ids for r in generator(rows, setting, seed=2, batch=4)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(PARAMS, param_shardings(PARAMS, DECODER_RULES, mesh))
        sharded = TextGenerator(placed, {}, TextSampler(MODEL.build, caches))
        assert [r[0].ids for r in sharded(rows, setting, seed=2, batch=4)] == expected


def test_streamed_pieces_are_the_text_and_stop_strings_are_cut(generator):
    rows = prompts(5, 3)
    setting = TextSampling(max_new_tokens=60)
    pieces = {0: "", 1: ""}

    def show(number, text):
        pieces[number] += text

    free = [r[0] for r in generator(rows, setting, seed=6, on_text=show)]
    for number, completion in enumerate(free):
        assert pieces[number] == completion.text
    stop = free[0].text[10:13]
    pieces.update({0: "", 1: ""})
    ended = generator(rows, setting, seed=6, stop=[stop, "never seen"], on_text=show)[0][0]
    assert ended.finish_reason == "stop" and stop not in ended.text
    assert free[0].text.startswith(ended.text + stop) and pieces[0] == ended.text
    assert ended.ids == free[0].ids[: len(ended.ids)]


def test_the_sample_of_a_run_is_what_its_model_says(generator):
    run = LanguageModelRun(model=CONFIG)
    sample = text_sampler(run, prompt="abc", max_new_tokens=12)
    state = new_state(PARAMS, optax.sgd(1.0), ema=False)
    tokenizer = byte_tokenizer()
    ids = [tokenizer.start, *b"abc"]
    setting = TextSampling(max_new_tokens=12, temperature=0.8, stop_ids=(tokenizer.eos,))
    assert sample(state, tokenizer) == "abc" + generator([ids], setting)[0][0].text


def test_left_padding_by_hand():
    tokens, positions = left_padded([[7, 8], [9]], 4)
    assert tokens.tolist() == [[0, 0, 7, 8], [0, 0, 0, 9]]
    assert positions.tolist() == [[-1, -1, 0, 1], [-1, -1, -1, 0]]


def test_refusals(generator, sampler):
    good = TextSampling(max_new_tokens=4)
    for call, message in (
        (lambda: generator([[]], good), "prompt 0 is empty"),
        (lambda: generator([[1], [VOCAB]], good), f"token id {VOCAB} is outside"),
        (lambda: generator([[1]], good, samples=0), "samples 0"),
        (lambda: generator([[1]], good, stop=[""]), "must not be empty"),
        (lambda: TextGenerator(PARAMS, {}, sampler)([[1]], good, stop=["x"]), "tokenizer"),
        (lambda: TextSampling(max_new_tokens=0), "max_new_tokens 0"),
        (lambda: TextSampling(min_p=1.5), "min_p 1.5"),
        (lambda: TextSampling(repetition_penalty=0.0), "repetition_penalty 0.0"),
        (lambda: TextSampling(top_p=0.0), "top_p 0.0"),
        (lambda: TextSampler(MODEL.build, caches, prefill_chunk=6), "power of two"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_finished_rows_are_masked(sampler):
    state = sampler.prefill(PARAMS, {}, prompts(3, 4), row_keys(0, [0, 1]), max_new_tokens=8)
    state = dataclasses.replace(state, done=jnp.array([True, False]))
    state, drawn = sampler.decode(PARAMS, {}, state, TextSampling(max_new_tokens=8))
    assert drawn.valid.sum(axis=1).tolist() == [0, 8] and bool(state.done.all())
