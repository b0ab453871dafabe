"""Language models from the command line, with the bundled model of 260 thousand parameters."""

import functools
import json
import shutil

import numpy as np
import pytest
import tiny_runs

from jaxllm.cli import long_context_commands, text_commands
from jaxllm.cli.main import main
from jaxllm.data.images import bundled
from jaxllm.data.records import read_jsonl
from jaxllm.decoding.language_model import load_language_model
from jaxllm.decoding.score import CompletionScorer

MODEL = bundled("stories260K")
GREEDY = ("--temperature", "0", "--max-new-tokens", "20")


@pytest.fixture(scope="module", autouse=True)
def quick():
    patch = pytest.MonkeyPatch()
    once = functools.cache(load_language_model)
    for module in (text_commands, long_context_commands):
        patch.setattr(module, "load_language_model", once)
    with tiny_runs.quick_compile():
        yield
    patch.undo()


def run(*arguments):
    return main([str(a) for a in arguments])


def output_of(capsys, *arguments):
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


STORY = ", there was a little girl named Lily. She loved to play"


def test_generate_prints_streams_and_writes_the_same_text(tmp_path, capsys):
    prompt = "Once upon a time"
    found = output_of(capsys, "generate", "--model", MODEL, "--prompt", prompt, *GREEDY)
    (row,) = found["results"]
    assert row["completion"].startswith(STORY[:40]) and row["finish_reason"] == "length"
    assert len(row["completion_ids"]) == len(row["logprobs"]) == 20 and max(row["logprobs"]) <= 0
    assert run("generate", "--model", MODEL, "--prompt", prompt, *GREEDY, "--stream") == 0
    assert capsys.readouterr().out.startswith(row["completion"] + "\n")
    rows = [{"id": 7, "prompt": prompt}, {"id": 8, "prompt_ids": [1, 403]}]
    prompts, out = write(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    options = ["--prompts", prompts, "--output", out, *GREEDY]
    assert run("generate", "--model", MODEL, *options) == 0
    first, second = read_jsonl(out)
    assert first == {**rows[0], **{k: first[k] for k in row if k != "prompt"}}
    assert first["completion"] == row["completion"] and second["id"] == 8
    np.testing.assert_allclose(first["logprobs"], row["logprobs"], rtol=0, atol=1e-5)


def test_samples_stops_and_plans(capsys, tmp_path):
    options = ["generate", "--model", MODEL, "--prompt", "Once upon a time"]
    found = output_of(capsys, *options, "--samples", 2, "--max-new-tokens", 8, "--seed", 3)
    assert [row["sample"] for row in found["results"]] == [0, 1]
    assert found["results"][0]["completion_ids"] != found["results"][1]["completion_ids"]
    (row,) = output_of(capsys, *options, *GREEDY, "--stop", "girl")["results"]
    assert row["completion"] == ", there was a little " and row["finish_reason"] == "stop"
    plain = output_of(capsys, *options, *GREEDY)["results"][0]
    roomy = output_of(capsys, *options, *GREEDY, "--kv", "uniform:budget=64")["results"][0]
    assert roomy["completion_ids"] == plain["completion_ids"]


def test_logprobs_of_given_completions(tmp_path, capsys):
    rows = [
        {"prompt": "Once upon a time", "completion": STORY},
        {"prompt_ids": [1, 403], "completion_ids": [407, 261]},
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = output_of(capsys, "logprobs", "--model", MODEL, "--input", source, "--output", out)
    first, second = read_jsonl(out)
    assert result["completion tokens"] == len(first["logprobs"]) + 2
    assert second["sum"] == pytest.approx(sum(second["logprobs"]), abs=1e-5)
    model = load_language_model(MODEL)
    score = CompletionScorer(model.blueprint.build)
    (expected,) = score(model.params, {}, [([1, 403], [407, 261])])
    np.testing.assert_allclose(second["logprobs"], expected, rtol=0, atol=1e-5)
    assert np.exp(first["sum"]) > 1e-6  # The model's own story.


def test_heads_are_measured_and_used(tmp_path, capsys):
    scores = tmp_path / "scores.json"
    common = ["--model", MODEL, "--lengths", 220, "--depths", 50, "--needles", 1, "--margin", 120]
    found = output_of(capsys, "heads", *common, "--gate", "none", "--output", scores)
    assert (found["examples"], found["passed"]) == (1, 1)
    saved = json.loads(scores.read_text())
    assert len(saved) == 40 and list(saved)[:2] == ["0-0", "0-1"] and len(saved["4-7"]) == 1
    plans = ["full", f"headkv:scores={scores},budget=24,beta=1.2,ratio=16"]
    found = output_of(
        capsys, "eval", "haystack", *common, "--kv", *plans, "--batch", 1, "--metric", "exact"
    )
    full, tight = found["plans"]
    assert tight["cache bytes per context"] < full["cache bytes per context"]
    assert full["questions"] == 1 and tight["score"] in (0, 1)


def test_benchmark_files_are_read(tmp_path, capsys):
    rows = [{"input": "Mary went to the kitchen.", "question": "Where is Mary?",
             "target": "kitchen"}]  # fmt: skip
    babi = write(tmp_path / "qa1.jsonl", rows)
    options = ["eval", "babilong", "--model", MODEL, "--input", babi, "--batch", 1]
    found = output_of(capsys, *options)
    assert found["records"] == 1 and found["plans"][0]["score"] in (0.0, 1.0)
    rows = [{"input": "Who?", "context": "Tom ran. " * 60, "answers": ["Tom"],
             "dataset": "hotpotqa", "all_classes": None, "_id": "a"}]  # fmt: skip
    bench = write(tmp_path / "hotpotqa.jsonl", rows)
    options = ["eval", "longbench", "--model", MODEL, "--input", bench, "--batch", 1]
    found = output_of(capsys, *options, "--max-prompt", 60, "--max-new-tokens", 8)
    assert found["contexts"] == 1 and 0 <= found["plans"][0]["score"] <= 1


def test_a_model_becomes_a_run_and_is_exported_again(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert output_of(capsys, "convert", "--from", "hf", MODEL, "--to", run)["parameters"] == 260032
    assert output_of(capsys, "convert", run, "--to", "hf", out)["parameters"] == 260032
    models = [load_language_model(folder) for folder in (MODEL, run, out)]
    tokens = np.array([[1, 403, 407, 261]])
    expected = None
    for model in models:
        assert model.config == models[0].config and model.eos == models[0].eos
        assert model.tokenizer.identity == models[0].tokenizer.identity
        built = model.blueprint.build(model.params, {})
        logits = np.asarray(built.logits(built.hidden(tokens)))
        expected = logits if expected is None else expected
        np.testing.assert_array_equal(logits, expected)
    written = json.loads((out / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 1)


def test_conversion_refuses_what_does_not_apply(tmp_path, capsys):
    for arguments, culprit in (
        ([MODEL, "--to", tmp_path / "a"], "--from says what the source is"),
        ([MODEL, "--to", "onnx", tmp_path / "a"], "expected --to DIR or --to hf DIR"),
        (["--from", "dnd", MODEL, "--to", "hf", tmp_path / "a"], "--to hf writes language models"),
        (["--from", "hf", MODEL, "--to", tmp_path / "a", "--dtype", "float16"], "--dtype is an"),
        ([MODEL, "--to", "hf", tmp_path / "a", "--ema"], "--ema is an option of --from dnd"),
        (["--from", "hf", tmp_path, "--to", tmp_path / "a"], "no config.json with a model_type"),
        ([MODEL, "--to", "hf", tmp_path], "exists"),
    ):
        (tmp_path / "there").touch()
        assert main(["convert", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert culprit in error and error.count("\n") == 1
        assert not (tmp_path / "a").exists()


def test_bad_input_is_one_line(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    write(tmp_path / "two.jsonl", [{"prompt": "a", "prompt_ids": [1]}])
    write(tmp_path / "id.jsonl", [{"prompt_ids": [512]}])
    write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    write(tmp_path / "none.jsonl", [{"prompt": "a"}])
    write(tmp_path / "long.jsonl", [{"prompt_ids": [5] * 513}])
    write(tmp_path / "long_pair.jsonl", [{"prompt_ids": [5] * 512, "completion_ids": [5, 5]}])
    write(tmp_path / "qa1.jsonl", [{"input": "a", "question": "b", "target": "moon"}])
    scores = tmp_path / "scores.json"
    scores.write_text('{"0-0": [1.0], "0-1": [0.5]}')
    cut, bent, other = (shutil.copytree(MODEL, tmp_path / name) for name in "abc")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((MODEL / "config.json").read_text())
    (bent / "config.json").write_text(json.dumps(config | {"intermediate_size": 176}))
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    generate = ["generate", "--model", MODEL]
    score = ["logprobs", "--model", MODEL, "--output", tmp_path / "o", "--input"]
    for arguments, culprit in (
        (["generate", "--model", tmp_path / "gone", "--prompt", "a"], "gone: no such folder"),
        (["generate", "--model", empty, "--prompt", "a"], "empty/config.json: no such file"),
        ([*generate, "--prompt", ""], "--prompt: the prompt is empty"),
        (
            [*generate, "--prompt", "a", "--kv", f"headkv:scores={scores},budget=64"],
            "8 query heads",
        ),
        (
            [*generate, "--prompt", "a", "--kv", "uniform:budget=2,window=8"],
            "budget 2.0 is smaller",
        ),
        (["convert", "--from", "hf", cut, "--to", tmp_path / "o"], "not a readable safetensors"),
        (
            ["convert", "--from", "hf", bent, "--to", tmp_path / "o"],
            "has shape (64, 172), expected",
        ),
        (["convert", "--from", "hf", other, "--to", tmp_path / "o"], "model_type 'mamba' is not"),
        ([*generate, "--prompts", tmp_path / "two.jsonl"], "has prompt and prompt_ids"),
        ([*generate, "--prompts", tmp_path / "id.jsonl"], "record 1: prompt_ids: 512 at 0"),
        ([*generate, "--prompts", tmp_path / "chat.jsonl"], "has no chat template"),
        ([*generate, "--prompts", tmp_path / "long.jsonl"], "record 1: 513 tokens, the model has"),
        ([*score, tmp_path / "long_pair.jsonl"], "record 1: 513 tokens, the model has 512"),
        ([*generate, "--prompt", "a", "--top-p", 0], "top_p 0.0"),
        ([*generate, "--prompt", "a", "--max-new-tokens", 0], "max_new_tokens 0"),
        ([*generate, "--prompt", "a", "--kv", "headkv:budget=8"], "scores=... is missing"),
        ([*generate, "--prompt", "a", "--kv", "tiny"], "plan 'tiny' is not one of"),
        ([*generate, "--prompt", "a", "--stream", "--samples", 2], "--stream shows one sample"),
        ([*generate, "--prompt", "a", "--prefill-chunk", 6], "prefill_chunk 6"),
        ([*score, tmp_path / "none.jsonl"], "needs one of completion, completion_ids; has none"),
        (["eval", "babilong", "--model", MODEL, "--input", tmp_path / "qa1.jsonl"], "'moon'"),
        (["eval", "haystack", "--model", MODEL, "--protocol", "blind"], "protocol 'blind'"),
        (["heads", "--model", MODEL, "--lengths", 100, "--output", tmp_path / "o"], "length 100"),
    ):
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert culprit in error and error.count("\n") == 1, (arguments, error)
    assert not (tmp_path / "o").exists()
