"""What is checked in compiled programs, on programs of a few lines."""

from dataclasses import replace

import pytest

from jaxllm.planning.checks import Expected, most_scored, verdicts
from jaxllm.planning.collectives import Collective
from jaxllm.planning.hlo import parse

EXPECTED = Expected(vocabulary=1000, width=64, tokens=4096, tensor=2, kernel=True)
TEXT = """HloModule m

ENTRY %main (a: f32[64,500]) -> f32[64,500] {{
  %a = f32[64,500]{{1,0}} parameter(0)
  %gathered = f32[64,1000]{{1,0}} all-gather(%a), replica_groups={{{{0,1}}}}, dimensions={{1}}
  %hidden = bf16[4096,64]{{1,0}} copy(%a)
  %logits = f32[{shape}]{{1,0}} copy(%a)
  ROOT %out = f32[64,500]{{1,0}} copy(%a)
}}
"""


def gather(nbytes):
    return Collective("all-gather", "fsdp", 8, nbytes, 1.0, 0.0)


def judged(shape, expected=EXPECTED, gathers=(), kernels=("splash_mha_fwd",), chip=True):
    module = parse(TEXT.format(shape=shape))
    return verdicts(module, expected, gathers, 2.0**20, kernels, platform_has_kernel=chip)


@pytest.mark.parametrize(
    ("shape", "tokens"), [("1024,500", 1024), ("2,2048,1000", 4096), ("500,4096", 4096)]
)
def test_tokens_scored_at_once(shape, tokens):
    assert most_scored(parse(TEXT.format(shape=shape)), EXPECTED) == tokens
    whole = tokens == EXPECTED.tokens
    assert judged(shape)["logits"] == ("of all 4096 tokens of a chip" if whole else "holds")


def test_parameters_are_no_logits_and_one_chunk_is_whole():
    assert most_scored(parse(TEXT.format(shape="32,1000")), EXPECTED) == 0
    assert judged("512,1000", replace(EXPECTED, tokens=512))["logits"] == "holds"
    assert judged("4096,1000", replace(EXPECTED, chunk=4096))["logits"] == "holds"
    assert set(judged("8,8", Expected())) == {"gathers"}


def test_gathers_and_kernels():
    found = judged("8,8", gathers=[gather(2.0**20), gather(3 * 2.0**20)], kernels=())
    assert found == {
        "gathers": "3.0 MiB gathered, a layer has 1.0",
        "logits": "holds",
        "kernel": "plain XLA",
    }
    assert judged("8,8", gathers=[gather(2.0**20)])["gathers"] == "holds"
    assert "kernel" not in judged("8,8", kernels=(), chip=False)
