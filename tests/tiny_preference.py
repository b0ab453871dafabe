"""The smallest preference runs: a model of bytes, eight pairs, and the call that trains."""

import json

import jax
import numpy as np
import tiny_runs

from jaxllm.data.text_tokenizers import byte_tokenizer
from jaxllm.hub.hf_folder import save_decoder
from jaxllm.models.decoder import DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.preference.config import ModelConfig, OfflineData, PreferenceRun
from jaxllm.preference.job import preference_job
from jaxllm.preference.pairwise import DPO
from jaxllm.training.job import Job, LoopConfig
from jaxllm.training.loop import train
from jaxllm.training.optimizer import OptimizerConfig

MODEL = DecoderConfig(
    vocab_size=259,
    dim=16,
    layers=1,
    attention=AttentionConfig(2, 1, 8),
    mlp=MlpConfig(24),
    max_positions=64,
    init_std=0.2,
)
WORDS = ["sun", "rain", "a cloud", "snow", "wind and hail", "fog", "ice", "storm"]


def loop(steps):
    return LoopConfig(steps=steps, log_every=1, compile_cache=False)


def write_model(folder, config=MODEL):
    """A Hugging Face folder of a fresh model of bytes."""
    params = jax.jit(decoder(config).init)(jax.random.key(0))[0]
    tokenizer = byte_tokenizer()
    save_decoder(folder, config, params, tokenizer=tokenizer, eos=(tokenizer.eos,))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_folder(root):
    """A model and eight pairs."""
    write_model(root / "model")
    pairs = [
        {"prompt": f"{word}:", "chosen": " good", "rejected": f" bad {number}", "margin": 0.5}
        for number, word in enumerate(WORDS)
    ]
    write_rows(root / "pairs.jsonl", pairs)
    return root


def offline(folder, **changes):
    file = str(folder / "pairs.jsonl")
    return OfflineData(**{"file": file, "batch_size": 8, "row_length": 24, **changes})


def run_of(folder, algorithm=DPO(), steps=2, accumulate=1, data=(), **model):  # noqa: B008
    return PreferenceRun(
        ModelConfig(str(folder / "model"), **model),
        offline(folder, **dict(data)),
        algorithm=algorithm,
        optimizer=OptimizerConfig(learning_rate=1e-2, accumulate=accumulate),
        loop=loop(steps),
    )


def go(run, workdir, devices=1):
    """The result of training, and the rows of its metrics."""
    with tiny_runs.quick_compile():
        job = run if isinstance(run, Job) else preference_job(run, workdir)
        result = train(job, workdir, devices=jax.devices()[:devices])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return result, [
        {k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/")}
        for row in rows
        if "train/loss" in row
    ]


def policy(result):
    return jax.device_get(result.state.params["policy"])


def assert_equal_trees(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def low_letters(prompt, completion):
    """A rule for feedback: the share of letters that come before "a"."""
    return float(np.mean([letter < "a" for letter in completion] or [0.0]))
