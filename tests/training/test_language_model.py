"""Training a language model on text: packed = padded, masks, evaluation, resuming, tokenizers."""

import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxllm.data.pipeline import stack_examples
from jaxllm.data.text import TextDataConfig, open_text
from jaxllm.data.text_tokenizers import (
    TextTokenizerConfig,
    byte_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from jaxllm.errors import InputError
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.parallel.mesh import MeshConfig
from jaxllm.training.checkpoint import read_newest
from jaxllm.training.job import LoopConfig
from jaxllm.training.language_model import (
    LanguageModelRun,
    TextScorer,
    language_model_job,
    language_model_loss,
    read_model,
    text_log_probs,
)
from jaxllm.training.loop import train
from jaxllm.training.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[2]
MODEL = DecoderConfig(
    vocab_size=259,
    dim=16,
    layers=2,
    attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8),
    mlp=MlpConfig(hidden=24),
)
RECORDS = [
    {"text": "to be or not"},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"text": "that is the question: whether it is nobler in the mind to suffer the slings"},
    {"prompt": "name:", "completion": " Hamlet, prince of Denmark"},
    {"text": "é"},
]


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    data = TextDataConfig(
        file=str(path),
        validation_file=str(path),
        row_length=32,
        batch_size=2,
        cache=str(tmp_path / "cache"),
    )
    loop = LoopConfig(steps=4, log_every=1, compile_cache=False)
    optimizer = OptimizerConfig(learning_rate=1e-2)
    return LanguageModelRun(model=MODEL, data=data, loop=loop, optimizer=optimizer)


def go(run, folder, *, devices=1, **options):
    job = language_model_job(run, folder, **options)
    with tiny_runs.quick_compile():
        return train(job, folder, devices=jax.devices()[:devices])


def without_validation(run, steps):
    data = replace(run.data, validation_file=None, validation_fraction=0.0)
    return replace(run, data=data, loop=replace(run.loop, steps=steps))


def batch_of(run, packing, tokenizer=None):
    data = replace(run.data, packing=packing)
    rows = open_text(data, tokenizer or byte_tokenizer(), "train")
    return rows, stack_examples(rows)


@pytest.fixture(scope="module")
def model():
    blueprint = decoder(MODEL)
    return blueprint, jax.jit(blueprint.init)(jax.random.key(0))[0]


def test_packed_and_padded_rows_have_the_same_loss_and_gradients(run, model):
    blueprint, params = model
    found = {}
    for packing in ("best_fit", "none"):
        rows, batch = batch_of(run, packing)
        loss_fn = language_model_loss(packed=packing != "none")

        def loss(params, loss_fn=loss_fn, batch=batch):
            return loss_fn(blueprint.build(params, {}), batch, jax.random.key(0))

        found[packing] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert len(rows) == {"best_fit": 5, "none": 7}[packing]
    (expected, metrics), gradients = found["none"]
    assert metrics["tokens"] == sum(len(r["text"].encode()) + 1 for r in RECORDS if "text" in r) + (
        sum(len(r["completion"]) + 1 for r in RECORDS if "prompt" in r)
    )
    (loss, other), grads = found["best_fit"]
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_tokens_that_count(run, model):
    """Against full logits, document by document."""
    blueprint, params = model
    logits_of = jax.jit(lambda p, x: (m := blueprint.build(p, {})).logits(m.hidden(x)))
    total, count, right = 0.0, 0, 0
    rows, batch = batch_of(run, "none")
    for i in range(len(rows.cache)):
        ids, weights = rows.cache.tokens(i), rows.cache.weights(i)
        for start in range(0, len(ids) - 1, 32):
            part = ids[start : start + 33]
            padded = np.pad(part[:-1], (0, 33 - len(part)))[None]
            logits = np.asarray(logits_of(params, padded))[0, : len(part) - 1]
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            counted = weights[start + 1 : start + 33] > 0
            picked = log_probs[np.arange(len(part) - 1), part[1:]]
            total -= picked[counted].sum()
            right += (logits.argmax(-1) == part[1:])[counted].sum()
            count += counted.sum()
    loss_fn = language_model_loss(packed=False)
    loss, metrics = jax.jit(lambda p: loss_fn(blueprint.build(p, {}), batch, None))(params)
    np.testing.assert_allclose(loss, total / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], right / count, rtol=1e-6)
    np.testing.assert_allclose(metrics["perplexity"], math.exp(total / count), rtol=1e-5)
    summary = TextScorer(blueprint.build, 4, packed=False).summary(params, {}, rows)
    bytes_ = sum(len(r.get("text", r.get("completion")).encode()) for r in RECORDS)
    expected = {
        "nll": total / count,
        "accuracy": right / count,
        "perplexity": math.exp(total / count),
        "bits_per_byte": total / math.log(2) / bytes_,
        "tokens": count,
    }
    assert summary.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(summary[name], value, rtol=1e-5)
    assert rows.cache.text_bytes == bytes_


def test_packed_log_probs_are_those_of_the_model_and_padding_has_no_loss(run, model):
    blueprint, params = model
    _, batch = batch_of(run, "best_fit")

    @jax.jit
    def compute(params):
        built = blueprint.build(params, {})
        hidden = built.hidden(batch["tokens"], segment_ids=batch["segment_ids"])
        empty = {**batch, "weights": np.zeros_like(batch["weights"])}
        loss, _ = language_model_loss(packed=True)(built, empty, None)
        return text_log_probs(built, batch, packed=True), built.logits(hidden), loss

    (log_probs, correct), logits, loss = compute(params)
    expected = np.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)
    np.testing.assert_allclose(log_probs, expected[..., 0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(correct, np.argmax(logits, -1) == batch["targets"])
    assert loss == 0


def test_a_run_learns_and_its_model_can_be_read_back(run, tmp_path, capsys):
    run = replace(
        run,
        optimizer=replace(run.optimizer, ema_decay=0.5, accumulate=2),
        loop=replace(run.loop, steps=12, eval_every=6, sample_every=12),
    )
    folder = tmp_path / "run"
    result = go(run, folder, sample=lambda state, tokenizer: f"é {int(state.step)}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval/bits_per_byte" in row]
    assert [row["step"] for row in evaluated] == [6, 12]
    assert evaluated[1]["eval/nll"] < evaluated[0]["eval/nll"] < math.log(259) - 0.1
    assert {"train/loss", "train/accuracy", "train/perplexity", "train/tokens"} <= rows[0].keys()
    assert (folder / "samples/step0000012.txt").read_text() == "é 12\n"
    assert "é 12" in capsys.readouterr().out
    config, _, params = read_model(folder)
    assert config == MODEL and load_tokenizer(folder).identity == byte_tokenizer().identity
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(result.state.ema), strict=True):
        np.testing.assert_array_equal(a, b)
    _, blueprint, half = read_model(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert blueprint.build(half, {}).dtype == jnp.bfloat16


def test_a_stopped_run_goes_on_to_the_same_numbers(run, tmp_path):
    whole = go(without_validation(run, 3), tmp_path / "a")
    go(without_validation(run, 2), tmp_path / "b")
    resumed = go(without_validation(run, 3), tmp_path / "b")
    for a, b in zip(
        jax.tree.leaves(whole.state.params), jax.tree.leaves(resumed.state.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    losses = [result.summary["metrics"]["train/loss"] for result in (whole, resumed)]
    assert losses[0] == losses[1]


def test_fine_tuning_starts_from_a_run_on_any_mesh(run, tmp_path):
    go(without_validation(run, 1), tmp_path / "a")
    start = read_newest(tmp_path / "a/checkpoints")["params"]
    tuned = replace(
        run,
        loop=replace(run.loop, steps=1),
        model=replace(MODEL, dropout=0.1),
        init_from=str(tmp_path / "a"),
        optimizer=replace(run.optimizer, name="sgd", learning_rate=1e-30, ema_decay=0.5),
        mesh=MeshConfig(data=1, fsdp=2),
    )
    result = go(tuned, tmp_path / "b", devices=2)
    rows = open_text(run.data, byte_tokenizer(), "validation")
    score = TextScorer(decoder(MODEL).build, 2, packed=True).summary(start, {}, rows)
    np.testing.assert_allclose(result.summary["metrics"]["eval/nll"], score["nll"], rtol=1e-5)
    for tree in (result.state.params, result.state.ema):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(start), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for changes, message in (
        ({"model": replace(MODEL, layers=1)}, "has model.layers 2, this config has 1"),
        ({"init_from": str(tmp_path / "gone")}, "gone: no such folder"),
        ({"init_from": str(tmp_path)}, "config.json: no such file"),
    ):
        with pytest.raises(InputError, match=message):
            language_model_job(replace(tuned, **changes), tmp_path / "c")
    bpe = TextTokenizerConfig(train_bpe=259)
    with pytest.raises(InputError, match="has tokenizer bytes:.*, this run has json:.* set tokeni"):
        language_model_job(replace(tuned, tokenizer=bpe), tmp_path / "d")


def test_fine_tuning_starts_from_a_hugging_face_folder(run, model, tmp_path):
    from jaxllm.hub.hf_folder import save_decoder

    params = jax.tree.map(lambda leaf: leaf + 1, model[1])
    save_decoder(tmp_path / "hf", MODEL, params)
    save_tokenizer(byte_tokenizer(), tmp_path / "hf")
    tuned = replace(without_validation(run, 0), init_from=str(tmp_path / "hf"))
    result = go(tuned, tmp_path / "run")
    for a, b in zip(jax.tree.leaves(result.state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_trained_tokenizer_is_kept_in_the_run_folder(run, tmp_path):
    run = replace(run, tokenizer=TextTokenizerConfig(train_bpe=259))
    folder = tmp_path / "run"
    job = language_model_job(run, folder)
    kept = load_tokenizer(folder)
    assert (folder / "tokenizer.json").is_file() and kept.vocab_size == kept.trained_size == 259
    assert job.identity["tokenizer"] == kept.identity
    Path(run.data.file).write_text('{"text": "quite another text, text, text"}\n')
    assert language_model_job(run, folder).identity["tokenizer"] == kept.identity
    for tokenizer, message in (
        (TextTokenizerConfig(train_bpe=258), "made with train_bpe 259, this config says 258"),
        (TextTokenizerConfig(), "holds tokenizer json:.* bytes is bytes:.* choose another"),
    ):
        with pytest.raises(InputError, match=message):
            language_model_job(replace(run, tokenizer=tokenizer), folder)
    with pytest.raises(InputError, match="train_bpe 200 has no room for 256 bytes"):
        TextTokenizerConfig(train_bpe=200)


def test_a_copied_tokenizer_outlives_its_source_and_a_changed_one_is_refused(run, tmp_path):
    source, folder = tmp_path / "tokenizer", tmp_path / "run"
    save_tokenizer(train_bpe(["aa bb"] * 2, 258), source)
    run = replace(without_validation(run, 1), tokenizer=TextTokenizerConfig(path=str(source)))
    go(run, folder)
    shutil.rmtree(source)
    go(run, folder)
    # Another file put in its place is noticed by the identity in the checkpoint.
    save_tokenizer(train_bpe(["cc dd"] * 2, 258), folder)
    with pytest.raises(InputError, match="checkpoint of another model: model.tokenizer is 'json:"):
        go(run, folder)


def test_refusals(run, tmp_path):
    missing = replace(run, data=replace(run.data, file="gone.txt"))
    with pytest.raises(InputError, match="gone.txt: no such file"):
        language_model_job(missing, tmp_path / "run")
    small = replace(run, model=replace(MODEL, vocab_size=258))
    with pytest.raises(InputError, match="model.vocab_size 258 is less than the tokenizer's 259"):
        language_model_job(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: a file is where the run folder should be"):
        language_model_job(run, tmp_path / "file")
    (tmp_path / "config.json").write_text('{"job": "dnd", "config": {}}')
    with pytest.raises(InputError, match="config.json: a 'dnd' run, expected a 'language_model'"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="neither a run's config nor a Hugging Face model's"):
        read_model(tmp_path)


def test_the_script_takes_overrides_and_refuses_in_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "configs/lm/shakespeare.py", "lm.py")
    data = ["--data.file", run.data.file, "--data.cache", "cache", "--mesh.data", "-1"]
    small = ["--tokenizer.train-bpe", "300", "--model.layers", "1", "--loop.steps", "0"]

    def script(*arguments):
        monkeypatch.setattr(sys, "argv", ["lm.py", "lm.py", *data, *small, *arguments])
        with pytest.raises(SystemExit) as stop, tiny_runs.quick_compile():
            runpy.run_path(str(ROOT / "train/lm.py"), run_name="__main__")
        return stop.value.code, capsys.readouterr().err

    for arguments, message in (
        (["--data.file", "gone.txt"], "gone.txt: no such file"),
        (["--model.layer", "2"], "unknown key --model.layer; did you mean --model.layers"),
        (["--data.packing", "tight"], "bad override"),
        (["--tokenizer.train-bpe", "3"], "train_bpe 3 has no room"),
        (["--model.vocab-size", "200"], "model.vocab_size 200 is less than the tokenizer's"),
    ):
        code, err = script(*arguments)
        assert code == 2 and err.count("\n") == 1 and message in err, err
        assert not Path("runs").exists()
    assert script("--data.validation-fraction", "0", "--loop.compile-cache", "False")[0] == 0
    assert load_tokenizer("runs/lm").trained_size == 300
    saved = json.loads(Path("runs/lm/config.json").read_text())
    assert saved["config"]["tokenizer"] == {"path": "bytes", "train_bpe": 300}
