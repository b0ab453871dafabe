"""Builds the program of any config for a topology; runs in a process of its own.

python -m jaxllm.cli.plan_worker < REQUEST.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.errors import InputError
from jaxllm.images.classifier import classifier_program
from jaxllm.images.code_models import CHUNK, code_model_program
from jaxllm.images.config import ClassifierRun, CodeModelRun, RQTransformerRun, TokenizerRun
from jaxllm.images.tokenizer import tokenizer_program
from jaxllm.kvcompress.decode import plan_caches
from jaxllm.kvcompress.spec import parse_plan
from jaxllm.parallel.mesh import make_mesh
from jaxllm.planning.checks import Expected
from jaxllm.planning.flops import TRAINING, code_model_flops, decoder_flops
from jaxllm.planning.measure import measure
from jaxllm.planning.programs import Planned, decode_step, training_step
from jaxllm.planning.topologies import find_topology
from jaxllm.planning.worker import serve
from jaxllm.preference.config import AdaptersOff, PreferenceRun
from jaxllm.preference.program import planned_program
from jaxllm.training.job import Program
from jaxllm.training.language_model import LanguageModelRun, language_model_program
from jaxllm.training.run_folder import load_config, override


def training_program(config: Any, mesh: Mesh) -> Planned:
    """Returns the training step of a config; call it with `mesh` in context.

    Raises:
      InputError: A config whose stage trains nothing.
    """
    if isinstance(config, LanguageModelRun):
        tokens = config.data.batch_size * config.data.row_length
        flops = decoder_flops(config.model, tokens, config.data.row_length)
        program = language_model_program(config)
        return _causal_step(
            config, program, mesh, TRAINING * flops, tokens, config.model.vocab_size
        )
    if isinstance(config, CodeModelRun):
        images = config.data.batch_size
        flops = code_model_flops(config.model, images)
        program, tokens = code_model_program(config), images * config.model.cells
        return _causal_step(
            config, program, mesh, TRAINING * flops, tokens, config.model.codebook_size, chunk=CHUNK
        )
    if isinstance(config, RQTransformerRun):
        return training_step(code_model_program(config), mesh)
    if isinstance(config, TokenizerRun):
        return training_step(tokenizer_program(config), mesh)
    if isinstance(config, ClassifierRun):
        return training_step(classifier_program(config), mesh)
    if isinstance(config, PreferenceRun):
        return _preference_step(config, mesh)
    raise InputError(f"a {type(config).__name__} has no training step to plan")


def _preference_step(config: PreferenceRun, mesh: Mesh) -> Planned:
    """The step on records of a file; the formula has one forward pass more for a reference."""
    program, policy = planned_program(config)
    rows, length = program.batch["tokens"].shape
    # Frozen kernels under adapters have no gradient: one product a weight backward.
    passes = TRAINING if policy.lora is None else TRAINING - 1
    flops = passes * decoder_flops(policy.config, rows * length, length)
    if policy.keeps_reference or isinstance(policy.reference, AdaptersOff):
        flops += decoder_flops(policy.reference_config, rows * length, length)
    vocabulary, width = policy.config.vocab_size, policy.config.dim
    return _causal_step(config, program, mesh, flops, rows * length, vocabulary, width)


def _causal_step(
    config: Any,
    program: Program,
    mesh: Mesh,
    flops: float,
    tokens: int,
    vocabulary: int,
    width: int | None = None,
    chunk: int = Expected.chunk,
) -> Planned:
    """The step of a causal model over a vocabulary, and what it is checked against.

    Args:
      config: The run's.
      program: What it compiles.
      mesh: In context.
      flops: Of a step by formula, over all chips.
      tokens: Of a step, over all chips.
      vocabulary: Ids, V.
      width: D, None for that of the config's model.
      chunk: Tokens that the loss takes at a time.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.optimizer.accumulate
    expected = Expected(
        vocabulary,
        config.model.dim if width is None else width,
        tokens // ways,
        chunk,
        mesh.shape["tensor"],
        kernel=True,
    )
    return training_step(program, mesh, model_flops=flops, tokens=tokens, expected=expected)


def decode_program(config: Any, mesh: Mesh, options: dict[str, Any]) -> Planned:
    """Returns the decode step of a language model's config."""
    if not isinstance(config, LanguageModelRun):
        raise InputError(f"--decode needs a language model's config, not {type(config).__name__}")
    return decode_step(
        config.model,
        mesh,
        plan_caches(parse_plan(options["kv"]), config.model, jnp.bfloat16),
        rows=options["rows"],
        context=options["context"],
    )


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of the requested program."""
    topology = find_topology(request["topology"])
    config = override(load_config(Path(request["config"])), request["overrides"])
    if not hasattr(config, "mesh"):
        raise InputError(f"a {type(config).__name__} is not one program that can be planned")
    mesh = make_mesh(config.mesh, topology.devices())
    with jax.set_mesh(mesh):
        options = request["decode"]
        planned = (
            training_program(config, mesh)
            if options is None
            else decode_program(config, mesh, options)
        )
        return measure(planned, topology, mesh)


if __name__ == "__main__":
    serve(answer)
