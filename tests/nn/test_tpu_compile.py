"""Training steps and prompts compiled for four TPU chips that need not be there."""

from __future__ import annotations

import pytest
from tpu_programs import FOUR_CHIPS, kernel_calls

PROGRAM = """
from jaxllm.images.code_models import code_loss
from jaxllm.models.code_model import CODE_MODEL_RULES, code_model
from jaxllm.models.dnd import DnDConfig

config = DnDConfig(
    codebook_size=64, grid=(8, 16), layers=2, heads=2, dim=128, mlp_hidden=128, num_classes=3
)
blueprint = code_model(config, jnp.bfloat16)


def step(params, batch):
    def loss(params):
        return code_loss(blueprint.build(params, {}), batch, jax.random.key(0))[0]

    loss, grads = jax.value_and_grad(loss)(params)
    return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


rows = jax.ShapeDtypeStruct((4, 128, 2), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
with jax.set_mesh(mesh):
    params = params_of(blueprint, CODE_MODEL_RULES)
    codes, label = placed(rows, (batch_sharding(mesh),) * 2)
    batch = {"codes": codes, "label": label}
    print(jax.jit(step).lower(params, batch).compile().as_text())
"""

# Packed rows, alternating windows, capped scores: what a language model asks of the kernel.
DECODER = """
from jaxllm.models.decoder import DECODER_RULES, DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig

attention = AttentionConfig(4, 2, 64, soft_cap=30.0)
config = DecoderConfig(64, 128, 4, attention, MlpConfig(128), windows=(64, None), remat="full")
blueprint = decoder(config, jnp.bfloat16)


def loss(params, tokens, segments):
    model = blueprint.build(params, {})
    hidden = model.hidden(tokens, None, segments)
    return -jnp.mean(model.token_logprobs(hidden, jnp.roll(tokens, -1, axis=1)))


params = params_of(blueprint, DECODER_RULES)
rows = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh))
with jax.set_mesh(mesh):
    print(jax.jit(jax.grad(loss)).lower(params, rows, rows).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", FOUR_CHIPS)
def test_a_tpu_trains_with_the_splash_kernel(topology):
    """Each chip runs the kernel on its own two examples and one head, forward and backward."""
    calls = kernel_calls(PROGRAM, topology)
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert any(kernel in line for line in calls), kernel
    assert all("[2,1,128,64]" in line for line in calls if "splash_mha_fwd" in line)


@pytest.mark.slow
@pytest.mark.parametrize("topology", FOUR_CHIPS)
def test_a_tpu_trains_packed_language_models_with_the_splash_kernel(topology):
    """Each chip runs the kernel on its own two rows and two of four heads, in both layers."""
    calls = kernel_calls(DECODER, topology)
    for kernel in ("splash_mha_dq_segmented", "splash_mha_dkv_segmented"):
        assert sum(kernel in line for line in calls) == 2, kernel
    forward = [line for line in calls if "splash_mha_fwd_segmented" in line]
    # Once for the loss and once more because the layer is rematerialised.
    assert len(forward) == 4 and all("[2,2,256,64]" in line for line in forward)


PREFILL = """
from jaxllm.decoding.language_model import LanguageModel
from jaxllm.kvcompress.decode import plan_caches
from jaxllm.kvcompress.spec import parse_plan
from jaxllm.models.decoder import DECODER_RULES, DecoderConfig, decoder
from jaxllm.nn.attention import AttentionConfig
from jaxllm.nn.mlp import MlpConfig

config = DecoderConfig(64, 128, 3, AttentionConfig(4, 2, 64), MlpConfig(128))
blueprint = decoder(config, jnp.bfloat16)
model = LanguageModel("test", config, blueprint, None, None, ())
params = params_of(blueprint, DECODER_RULES)
rows = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh))
keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
plan = parse_plan("uniform:budget=64,window=8")
with jax.set_mesh(mesh):
    for caches in (None, plan_caches(plan, config, jnp.bfloat16)):
        run = model.sampler(caches)._prefill
        lowered = run.lower(params, {}, None, rows, rows, keys, slots=288, keep=False)
        print(lowered.compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", FOUR_CHIPS)
def test_a_tpu_runs_prompts_with_the_splash_kernel(topology):
    """Into dense and compressed caches; the last layer has too few queries for the kernel."""
    calls = [line for line in kernel_calls(PREFILL, topology) if "splash_mha_fwd" in line]
    assert len(calls) == 2 * 2 and all("[2,2,256,64]" in line for line in calls)
