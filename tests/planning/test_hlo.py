"""Compiled text, read back: loops, products, collectives and traffic against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.parallel.mesh import MeshConfig, make_mesh
from jaxllm.planning.collectives import axes_of, find_collectives, replica_groups, summed
from jaxllm.planning.flops import compiled_flops, kernel_flops
from jaxllm.planning.hlo import Instruction, parse, trip_count
from jaxllm.planning.topologies import find_topology
from jaxllm.planning.traffic import memory_bytes

# What TPU's compiler writes: layouts with memory spaces, a loop that counts up by 2 to 8, products
# as convolutions, one asynchronous gather in two parts of one channel, an attribute of two lines.
TPU = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %first = bf16[16,4]{1,0:S(1)} all-gather(%x), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0)
  %again = bf16[16,4]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0)
  %y = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%x, %first), dim_labels=bf_oi->bf
  %splash_mha_fwd.3 = (f32[2,128]{1,0}, bf16[2,3,64,32]{3,2,1,0:S(1)}) custom-call(%y), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
 "xprof_metadata":"{\\"block_q\\": 128}"
 }}, backend_config={}
  ROOT %out = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%next, %x)
}

%condition (q: (s32[], bf16[8,4])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %eight = s32[]{:T(128)} constant(8)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %eight), direction=LT
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %end = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_tpu_program_is_read_with_its_loops_kernels_and_channels():
    module = parse(TPU)
    loop = next(line for _, line, _ in module.instructions() if line.opcode == "while")
    assert trip_count(module, loop) == 4 and module.runs["body"] == 4
    assert compiled_flops(module) == 4 * 2 * 8 * 16 * 4
    # Scores and values over half of the square.
    assert kernel_flops(module) == {"splash_mha_fwd": 4 * 2 * 2 * 3 * 64 * 64 * 32}
    topology = find_topology("v5e:2x2")
    (gather,) = find_collectives(module, topology, (2, 1, 2))
    assert (gather.kind, gather.axes, gather.members) == ("all-gather", "data", 2)
    assert (gather.nbytes, gather.times) == (16 * 4 * 2, 4)
    assert gather.seconds == pytest.approx(4 * 128 / 2 / 50e9)
    # Read: the rows for each of the gathers, the product, the kernel; `first` is on chip.
    small, wide, product = 8 * 4 * 2, 16 * 4 * 2, 8 * 16 * 2
    by_hand = (small + 0) + (small + wide) + (small + 0 + product) + (product + 2 * 128 * 4)
    assert memory_bytes(module) == 4 * (by_hand + 3 * 4 + 9)  # and counting, and comparing


def test_replica_groups_in_every_notation():
    def groups(text):
        return replica_groups(Instruction("x", "all-reduce", (), (), text, ""))

    mesh = (2, 2, 2)
    cases = {
        "replica_groups={{0,1},{2,3},{4,5},{6,7}}": "tensor",
        "replica_groups=[2,4]<=[2,2,2]T(1,0,2)": "data+tensor",
        "replica_groups=[4,2]<=[8]": "tensor",
        "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}": "fsdp",
        "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}": "fsdp",
        "replica_groups=mesh['a'=8] {'a'}": "data+fsdp+tensor",
        "source_target_pairs={{0,4},{4,0},{1,5},{5,1}}": "data",
    }
    for text, axes in cases.items():
        assert axes_of(groups(text), mesh) == axes, text
    assert groups("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}")[0] == [0, 1, 4, 5]
    assert groups("source_target_pairs={{0,1},{1,2},{2,0},{3,4}}") == [[0, 1, 2], [3, 4]]


def test_what_crosses_between_slices_goes_over_the_network():
    """Two slices: each chip's quarter of the gradient, there and back."""
    module = parse("""HloModule m

ENTRY %main (a: bf16[1024,64]) -> bf16[1024,64] {
  %a = bf16[1024,64]{1,0} parameter(0)
  %after = token[] after-all()
  %go = (bf16[1024,64]{1,0}, u32[], token[]) send(%a, %after), channel_id=1, \\
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.7_0",\\
_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %sum = bf16[1024,64]{1,0} all-reduce(%a), replica_groups={{0,1,2,3}}
}
""")
    over, inside = find_collectives(module, find_topology("2xv5e:2x2"), (1, 4, 1))
    assert (over.kind, over.axes, over.members, over.name) == (
        "all-reduce",
        "slices",
        2,
        "all-reduce.7_0",
    )
    assert over.seconds == pytest.approx(2 * 0.5 * 1024 * 64 * 2 / 3.125e9)
    assert (inside.axes, inside.members) == ("fsdp", 4)


def test_a_compiled_loop_is_counted_with_its_trips():
    """A scan of 5 products on 8 devices: the compiler's own count has only one of them."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    layers, rows, dim = 5, 16, 32

    def step(stacked, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stacked)[0]

    def abstract(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    stacked = abstract(layers, dim, dim, spec=P(None, "fsdp", "tensor"))
    x = abstract(rows, dim, spec=P(("data", "fsdp")))
    compiled = jax.jit(step, out_shardings=x.sharding).lower(stacked, x).compile()
    module = parse(compiled.as_text())
    one = 2 * rows * dim * dim / 8
    assert compiled_flops(module) == layers * one
    assert compiled.cost_analysis()["flops"] < 2 * one + 10 * rows * dim
    found = {(one.kind, one.axes): one for one in summed(
        find_collectives(module, find_topology("cpu:8"), (2, 2, 2)))}  # fmt: skip
    gathers = [one for (kind, _), one in found.items() if kind == "all-gather"]
    assert gathers and all(one.axes in ("fsdp", "tensor") for one in gathers)
    assert sum(one.times for one in gathers) >= layers
    assert memory_bytes(module) > layers * dim * dim / 4 * 4


def test_a_buffer_that_passes_through_is_not_moved():
    module = parse("""HloModule m

%f (x: f32[8], y: f32[64]) -> (f32[8], f32[64]) {
  %x = f32[8]{0} parameter(0)
  %y = f32[64]{0} parameter(1)
  ROOT %both = (f32[8]{0}, f32[64]{0}) tuple(%x, %y)
}

ENTRY %main (a: f32[8], b: f32[64]) -> (f32[8], f32[64]) {
  %a = f32[8]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  ROOT %go = (f32[8]{0}, f32[64]{0}) fusion(%a, %b), kind=kCustom, \\
output_to_operand_aliasing={{1}: (1, {})}, calls=%f
}
""")
    assert memory_bytes(module) == 2 * 8 * 4


def test_the_window_of_a_product_is_in_the_order_of_the_labels_numbers():
    """Queries, keys and values of five heads as one product, as TPU writes it."""
    module = parse("""HloModule m

ENTRY %main (x: bf16[2,3,4,1,1], w: bf16[5,3,6,4,1]) -> bf16[2,3,5,3,6] {
  %x = bf16[2,3,4,1,1]{4,3,2,1,0} parameter(0)
  %w = bf16[5,3,6,4,1]{4,3,2,1,0} parameter(1)
  ROOT %y = bf16[2,3,5,3,6]{4,3,2,1,0} convolution(%x, %w), \\
window={size=3x1x5 pad=2_2x0_0x4_4 rhs_reversal=1x0x1}, dim_labels=1bf20_20oi1->1b20f
}
""")
    assert compiled_flops(module) == 2 * (2 * 3) * 4 * (5 * 3 * 6)


def test_what_a_sparse_core_gathers_counts_once():
    """Rows of a table: started without operands, handed over by the update, waited for."""
    module = parse("""HloModule m

%looked_up (t: bf16[100,4], i: s32[6]) -> bf16[6,4] {
  %t = bf16[100,4]{1,0} parameter(0)
  %i = s32[6]{0} parameter(1)
  ROOT %rows = bf16[6,4]{1,0} custom-call(%t, %i), custom_call_target="gather"
}, execution_thread="sparsecore"

ENTRY %main (table: bf16[100,4], indices: s32[6]) -> bf16[6,4] {
  %table = bf16[100,4]{1,0} parameter(0)
  %indices = s32[6]{0} parameter(1)
  %start = ((), (), (s32[32]{0}, s32[8]{0:S(8)})) async-start(), calls=%looked_up
  %go = ((bf16[100,4]{1,0}, s32[6]{0}), bf16[6,4]{1,0}, (s32[32]{0})) async-update(%start, \\
%table, %indices), output_to_operand_aliasing={{2,0}: (0, {2,0})}
  ROOT %rows.1 = bf16[6,4]{1,0} async-done(%go)
}
""")
    assert memory_bytes(module) == 2 * (6 * 4) * 2
