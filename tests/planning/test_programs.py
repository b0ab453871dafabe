"""What is planned is what runs; its memory and FLOPs are those of arithmetic."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxllm.cli.plan_command import summary
from jaxllm.cli.plan_worker import decode_program, training_program
from jaxllm.data.text import TextDataConfig
from jaxllm.errors import InputError
from jaxllm.images.classifier import classifier_job, classifier_program
from jaxllm.images.config import AdversarialConfig
from jaxllm.images.tokenizer import tokenizer_job, tokenizer_program
from jaxllm.models.decoder import DecoderConfig
from jaxllm.models.discriminator import DiscriminatorConfig
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig
from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.planning.flops import decode_flops, decoder_flops
from jaxllm.planning.measure import measure
from jaxllm.planning.memory import refused
from jaxllm.planning.programs import Planned
from jaxllm.planning.roofline import roofline
from jaxllm.planning.topologies import find_topology
from jaxllm.training.language_model import (
    LanguageModelRun,
    language_model_job,
    language_model_program,
)

TOPOLOGY = find_topology("cpu:8")
MODEL = DecoderConfig(32, 64, 2, AttentionConfig(4, 2, 8), MlpConfig(128), remat="full")
RUN = LanguageModelRun(
    model=MODEL,
    data=TextDataConfig(row_length=128, batch_size=8),
    loop=tiny_runs.loop(2),
    mesh=MeshConfig(2, 2, 2),
)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), dict(tree))


def test_the_abstract_batch_is_that_of_the_job(tmp_path):
    run = LanguageModelRun(
        model=DecoderConfig(259, 16, 1, AttentionConfig(2, 2, 8), MlpConfig(8)),
        data=TextDataConfig(row_length=32, batch_size=4, cache=str(tmp_path / "cache")),
        loop=tiny_runs.loop(1),
    )
    job = language_model_job(run, tmp_path / "run")
    assert shapes(job.batches.batch(0)) == shapes(language_model_program(run).batch)
    job = classifier_job(tiny_runs.classifier(0))
    assert shapes(job.batches.batch(0)) == shapes(classifier_program(tiny_runs.classifier(0)).batch)
    adversary = AdversarialConfig(weight=0.5, model=DiscriminatorConfig(channels=1, width=8))
    images = tiny_runs.tokenizer(adversarial=adversary)
    job, program = tokenizer_job(images), tokenizer_program(images)
    assert shapes(job.batches.batch(0)) == shapes(program.batch)
    starts = [jax.eval_shape(one.init, jax.random.key(0)) for one in (job, program)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*starts)
    assert set(starts[0].params) == {"tokenizer", "discriminator"}


@pytest.fixture(scope="module")
def trained():
    mesh = make_mesh(RUN.mesh)
    with jax.set_mesh(mesh):
        return measure(training_program(RUN, mesh), TOPOLOGY, mesh)


def test_memory_by_arithmetic_is_the_compilers(trained):
    parts, held = trained["parts"], trained["memory"]
    # Adam keeps two averages; every parameter with a long axis is split.
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)
    assert parts["batch"] == 8 * 128 * 4 * 5 / 4  # data x fsdp
    assert held["fits"]
    # `segment_ids` counts from the batch, `positions` are not read by the step.
    unread = 8 * 128 * 4 / 4
    assert held["arguments"] == pytest.approx(sum(parts.values()) - unread, abs=64)
    assert held["peak"] >= held["arguments"] + held["temporaries"]


def test_flops_of_a_step_by_formula_and_compiled(trained):
    tokens = 8 * 128
    layer = 64 * 8 * (2 * 4 + 2 * 2) + 3 * 64 * 128
    by_hand = tokens * (2 * (2 * layer + 64 * 32) + 2 * 2 * 128 * 4 * 8)
    assert trained["model_flops"] == pytest.approx(3 * by_hand)
    # Every layer and the vocabulary once more, without the last product of a layer, whose result
    # nothing needs; plain XLA attention computes the hidden half of the square too.
    square = tokens * 2 * 2 * 128 * 4 * 8
    expected = (4 * by_hand + 4 * square - tokens * 2 * 2 * 64 * 128) / 8
    assert trained["flops"]["products"] == pytest.approx(expected, rel=0.12)
    assert trained["flops"]["compiler_says"] < trained["flops"]["products"]


def test_no_gather_is_larger_than_a_layer(trained):
    assert trained["largest_gather"]["nbytes"] <= trained["layer_bytes"]
    assert {one["axes"] for one in trained["collectives"]} <= {
        "data", "fsdp", "tensor", "data+fsdp", "fsdp+tensor", "data+tensor", "data+fsdp+tensor",
    }  # fmt: skip


def test_what_the_compiler_says_of_too_little_memory():
    gib = 1024**3
    used = "RESOURCE_EXHAUSTED: Ran out of memory. Used 22.45G of 15.75G hbm. Exceeded by 6.70G."
    assert refused(used) == pytest.approx((22.45 * gib, 15.75 * gib))
    other = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (62.17G) exceeds available HBM (512M). HLO module: jit_step."
    )
    assert refused(other) == pytest.approx((62.17 * gib, gib / 2))
    assert refused("INTERNAL: something else") is None


def test_text_that_cannot_be_read_leaves_the_memory():
    class Compiled:
        memory_analysis = staticmethod(lambda: SimpleNamespace(
            argument_size_in_bytes=5, output_size_in_bytes=4, alias_size_in_bytes=3,
            temp_size_in_bytes=2, generated_code_size_in_bytes=1,
        ))  # fmt: skip

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: 1 operand but sees 3\nmore")

    written = []

    def compiled(compiler_options):
        for text in written:
            folder = Path(compiler_options["xla_dump_to"])
            (folder / "module_0000.jit_step.after_codegen.txt").write_text(text)
        return Compiled()

    lowered = SimpleNamespace(compile=compiled)
    function = SimpleNamespace(lower=lambda *arguments: lowered)
    mesh = make_mesh(RUN.mesh)
    planned = Planned("step", function, (), {}, 1.0, None, 1.0)
    found = measure(planned, find_topology("v5p:2x2x2"), mesh)
    assert found["unread"] == "INTERNAL: 1 operand but sees 3" and found["memory"]["peak"] == 9
    assert roofline(found, find_topology("v5p:2x2x2")) is None
    said = summary("c.py", find_topology("v5p:2x2x2"), {**found, "roofline": None})
    assert said["only memory"] == found["unread"] and "collectives" not in said
    # What the compiler itself wrote is read in its place.
    written.append("""HloModule m

ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  ROOT %c = f32[8,2]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}
""")
    found = measure(planned, find_topology("v5p:2x2x2"), mesh)
    assert "unread" not in found and found["flops"]["products"] == 2 * 8 * 4 * 2
    assert found["flops"]["compiler_says"] is None


def test_windows_and_decoding_by_formula():
    plain = decoder_flops(MODEL, 100, 100)
    windowed = replace(MODEL, windows=(10, None))
    seen = sum(min(t + 1, 10) for t in range(100)) / 100
    fewer = 100 * 4 * 4 * 8 * (50 - seen)
    assert decoder_flops(windowed, 100, 100) == pytest.approx(plain - fewer, rel=0.01)
    assert decode_flops(MODEL, 3, 40) - decode_flops(MODEL, 3, 0) == 3 * 4 * 4 * 8 * 2 * 40


def test_a_smaller_cache_is_less_memory_to_hold_and_to_read():
    mesh = make_mesh(MeshConfig(4, 1, 2))
    found = {}
    with jax.set_mesh(mesh):
        for kv in ("full", "uniform:budget=16,window=4"):
            options = {"kv": kv, "rows": 8, "context": 256}
            with tiny_runs.quick_compile():
                planned = decode_program(RUN, mesh, options)
                found[kv] = measure(planned, TOPOLOGY, mesh)
    full, small = found.values()
    keys = 2 * 8 * 2 * 256 * 8 * jnp.dtype(jnp.bfloat16).itemsize * MODEL.layers / 8
    assert full["parts"]["cache"] == pytest.approx(keys, rel=0.3)
    assert small["parts"]["cache"] < full["parts"]["cache"] / 4
    assert small["model_flops"] < full["model_flops"]
    assert full["memory"]["arguments"] == pytest.approx(sum(full["parts"].values()), rel=0.02)


def test_rows_that_do_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(8, 1, 1))
    run = LanguageModelRun(model=MODEL, data=TextDataConfig(batch_size=6))
    with jax.set_mesh(mesh), pytest.raises(InputError, match="batch size 6 does not divide"):
        training_program(run, mesh)
    with jax.set_mesh(mesh), pytest.raises(InputError, match="6 rows do not divide"):
        decode_program(run, mesh, {"kv": "full", "rows": 6, "context": 16})
    assert np.prod(list(mesh.shape.values())) == 8
