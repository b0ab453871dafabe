"""A trained code model and tokenizer read back: sampling, best of n, decoding by depth."""

import json
import shutil

import numpy as np
import pytest
import tiny_runs

from jaxllm.decoding.code_stacks import SamplingConfig
from jaxllm.errors import InputError
from jaxllm.images.code_models import CodeScorer
from jaxllm.images.config import ClassifierRun, TokenizerRun
from jaxllm.images.reconstruct import reconstruct
from jaxllm.images.runs import load_params, run_kind
from jaxllm.images.sample import Decoder, Generator, tokenizer_run_of


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny_runs.small_programs():
        yield


@pytest.fixture(scope="module")
def generator(tiny_demo):
    return Generator.load(tiny_demo[0] / "code_model")


PLAIN = SamplingConfig(cfg_scale=(1.0,))


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(generator):
    classes = np.array([0, 1, 2, 0, 1])
    codes, log_probs = generator.sample(classes, seed=4, config=PLAIN, batch=5)
    assert codes.shape == log_probs.shape == (5, 16, 2) and codes.dtype == np.int32
    small, _ = generator.sample(classes, seed=4, config=PLAIN, batch=2)
    np.testing.assert_array_equal(small, codes)
    later, _ = generator.sample(classes[3:], seed=4, config=PLAIN, batch=2, first_image=3)
    np.testing.assert_array_equal(later, codes[3:])
    other, _ = generator.sample(classes, seed=5, config=PLAIN, batch=2)
    assert (other != codes).mean() > 0.5
    scorer = CodeScorer(generator.sampler.build)
    scored, _ = scorer(generator.params, generator.extra, codes, classes)
    np.testing.assert_allclose(log_probs, scored, rtol=0, atol=1e-5)


def test_given_rows_are_kept(generator):
    given = np.random.default_rng(0).integers(0, 8, (2, 16, 2))
    codes, _ = generator.sample(np.array([0, 1]), config=PLAIN, given=given, given_rows=3)
    np.testing.assert_array_equal(codes[:, :12], given[:, :12])
    assert (codes[:, 12:] != given[:, 12:]).any()


def test_best_of_n_needs_one_candidate_and_a_known_class(generator):
    with pytest.raises(InputError, match="n of at least 1, got 0"):
        generator.best_of(np.array([0]), 0)
    with pytest.raises(InputError, match="class id 3 is outside 0 .. 2"):
        generator.best_of(np.array([0, 3]), 2)


def test_decoding_the_first_codes_is_the_reconstruction_by_depth(tiny_demo):
    decoder = Decoder.load(tiny_demo[0] / "tokenizer")
    assert decoder.data == tiny_runs.DATA
    images = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 1)).astype(np.float32)
    parts = decoder.blueprint, decoder.params, decoder.extra
    by_depth = reconstruct(*parts, images)
    codes = np.asarray(decoder.blueprint.build(*parts[1:]).to_codes(images))
    for depth in (1, 2):
        decoded = decoder(codes, depth=depth, batch=2)
        np.testing.assert_allclose(decoded, by_depth[depth - 1], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(decoder(codes, batch=2), decoder(codes, depth=2, batch=2))
    assert np.abs(by_depth[0] - by_depth[1]).max() > 1e-3


def test_the_tokenizer_is_found_through_the_cache(tiny_demo, generator, tmp_path):
    folder = tiny_demo[0]
    assert tokenizer_run_of(folder / "code_model", generator.run) == folder / "tokenizer"
    # A copied run and its caches find the copied tokenizer.
    copy = shutil.copytree(folder / "codes", tmp_path / "codes")
    saved = json.loads((copy / "train" / "meta.json").read_text())
    assert (copy / "train" / saved["tokenizer"]).resolve() == tmp_path / "tokenizer"


def test_a_run_of_another_kind_is_refused(tiny_demo):
    folder = tiny_demo[0]
    assert run_kind(folder / "code_model") == "dnd" and run_kind(folder / "scorer") == "classifier"
    with pytest.raises(InputError, match="scorer: a 'classifier' run; expected a 'tokenizer' run"):
        load_params(folder / "scorer", TokenizerRun)
    with pytest.raises(InputError, match="code_model: a 'dnd' run; expected a 'classifier' run"):
        load_params(folder / "code_model", ClassifierRun)
