import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax.training.hlo import Collective, read_program

# As the compiler for TPUs writes: layouts with parentheses, estimates, loops without their rounds.
TPU = """\
HloModule jit_step, is_scheduled=true

%fused (p.0: bf16[8,128]) -> bf16[8,128] {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inner = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%p.0), kind=kLoop, calls=%none, \
backend_config={"window_config":{"estimated_cycles":"77777"}}
}

%body (s.0: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s.0 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.0 = s32[]{:T(128)} get-tuple-element(%s.0), index=0
  %x.0 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%s.0), index=1
  %f.0 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x.0), kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/while/dot_general" stack_frame_id=4}, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %r.0 = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%f.0), replica_groups={{0,1},{2,3}}, to_apply=%a
  ROOT %t.0 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%i.0, %r.0)
}

%condition (s.1: (s32[], bf16[8,128])) -> pred[] {
  %end = s32[]{:T(128)} constant(7)
  %s.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

%until (s.2: (s32[], bf16[8,128])) -> pred[] {
  %s.2 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  ROOT %ne = pred[]{:T(512)} compare(%i.2, %i.2), direction=NE
}

%short (x.3: bf16[8,128]) -> bf16[8,128] {
  %x.3 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %f.3 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x.3), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"10"}}
}

%long (x.4: bf16[8,128]) -> bf16[8,128] {
  %x.4 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %f.4 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x.4), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"500"}}
}

ENTRY %main (x.5: bf16[8,128], w: f32[4,128]) -> bf16[8,128] {
  %zero = s32[]{:T(128)} constant(2)
  %x.5 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[4,128]{1,0:T(4,128)} parameter(1)
  %g = (f32[4,128]{1,0:T(4,128)}, f32[16,128]{1,0:T(8,128)}) all-gather-start(%w), \
replica_groups=[1,4]<=[4], dimensions={0}
  %d = f32[16,128]{1,0:T(8,128)} all-gather-done(%g)
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%zero, %x.5)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) while(%start), \
condition=%condition, body=%body
  %loop.2 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) while(%loop), \
condition=%until, body=%body
  %which = s32[]{:T(128)} get-tuple-element(%loop.2), index=0
  %x.6 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop.2), index=1
  ROOT %c = bf16[8,128]{1,0:T(8,128)(2,1)} conditional(%which, %x.6, %x.6), \
branch_computations={%short, %long}
}
"""


def test_cycles_count_once_for_each_round_and_the_longest_branch():
    program = read_program(TPU)
    # From 2 to 7, and a loop whose end is not known; what is within a fusion is in its figure.
    assert program.cycles == 5 * 1000 + 1000 + 500
    assert program.num_unknown_loops == 1


KERNEL = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"kernel_cycles":"3000"
}}, metadata={op_name="jit(step)/pallas_call"}, backend_config={"custom_call_config":{"body":"TU"}}
  %other = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%k), custom_call_target="other"
  ROOT %copy = bf16[8,128]{0,1:T(8,128)(2,1)} copy(%other), frontend_attributes={kernel_metadata={
"kernel_cycles":"3000"
}}, metadata={op_name="jit(step)/pallas_call"}, \
backend_config={"window_config":{"estimated_cycles":"20"}}
}
"""


def test_a_kernel_brings_its_own_estimate_and_copies_of_its_result_repeat_it():
    program = read_program(KERNEL)
    assert (program.cycles, program.kernel_cycles) == (3020, 3000)
    assert read_program(TPU).kernel_cycles == 0


def test_collectives_are_found_with_their_bytes_groups_and_rounds():
    gather, reduce, unknown = read_program(TPU).collectives
    assert gather == Collective("all-gather", 16 * 128 * 4, 4, 1, "all-gather-start")
    assert reduce == Collective("all-reduce", 8 * 128 * 2, 2, 5, "all-reduce")
    assert unknown.times == 1
    # A ring: half of it there and half back for two; three quarters for four.
    assert reduce.sent_bytes == 2 * 2048 / 2 * 5
    assert gather.sent_bytes == 8192 * 3 / 4


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2},{1,3}}", 2),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8),
        # Half of an axis.
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp':(1)2}", 4),
    ],
)
def test_the_devices_of_a_group_are_counted_however_they_are_named(groups, size):
    text = f"""\
ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    (collective,) = read_program(text, num_devices=8).collectives
    assert collective.group_size == size


def test_the_text_of_a_program_compiled_here_is_read():
    mesh = Mesh(np.array(jax.devices()[:4]), "x")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec(None)
    )
    def summed(x):
        total = jnp.zeros((32,))
        return jax.lax.fori_loop(0, 6, lambda i, y: y + jax.lax.psum(x[0] * jnp.cos(y), "x"), total)

    place = NamedSharding(mesh, PartitionSpec("x"))
    compiled = jax.jit(summed).lower(jax.ShapeDtypeStruct((4, 32), jnp.float32, sharding=place))
    program = read_program(compiled.compile().as_text(), num_devices=4)
    assert program.cycles is None
    assert [
        (one.kind, one.num_bytes, one.group_size, one.times) for one in program.collectives
    ] == [("all-reduce", 128, 4, 6)]


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="which has an ENTRY, got 'what'"):
        read_program("what")
