"""HLO text written by hand, with known answers: nested loops, lines that break, kernels, collectives."""

import json

import pytest

from llava_jax.errors import UserError
from llava_jax.plan import costs
from llava_jax.plan.hlo import parse
from llava_jax.plan.replay import profile

CYCLES = 'backend_config={"estimated_cycles":"%d"}'
KERNEL = '''custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 64, \\"block_kv\\": 64}"
}}, metadata={op_name="jit(step)/transpose(jvp(decoder))/while/body/splash_mha_fwd"}, backend_config={"body":"A(
}B","cost_estimate":{"bytes_accessed":"90","flops":"7000"}}'''
KERNEL_SHAPE = "(bf16[2,128,64]{2,1,0:T(8,128)(2,1)}, /*index=1*/f32[2,128]{1,0})"


def op(name: str, cycles: int, scope: str = "", root: bool = False, call: str = "add(%x, %x)") -> str:
    metadata = f', metadata={{op_name="jit(step)/{scope}"}}' if scope else ""
    return f"  {'ROOT ' * root}%{name} = f32[8,128]{{1,0:T(8,128)}} {call}{metadata}, {CYCLES % cycles}"


MODULE = f"""HloModule jit_step, is_scheduled=true

%inner_condition (p: (s32[], f32[8,128])) -> pred[] {{
  %p.1 = (s32[]{{:T(128)}}, f32[8,128]{{1,0}}) parameter(0)
  %bound.1 = s32[]{{:T(128)}} constant(5)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  ROOT %less.1 = pred[] compare(%i.1, %bound.1), direction=LT
}}

%inner (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p.2 = (s32[]{{:T(128)}}, f32[8,128]{{1,0}}) parameter(0)
  %i.2 = s32[]{{:T(128)}} get-tuple-element(%p.2), index=0
  %x = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%p.2), index=1
  %one.2 = s32[]{{:T(128)}} constant(1)
  %next.2 = s32[]{{:T(128)}} add(%i.2, %one.2)
{op("work.2", 100, "jvp(decoder)/while/body/dot")}
{op("bare.2", 10)}
  %kernel.2 = {KERNEL_SHAPE} custom-call(%t, %q, %k, /*index=3*/%k), {KERNEL}
  %t = s8[1,2,2]{{2,1,0}} constant({{...}})
  %q = bf16[2,128,64]{{2,1,0:T(8,128)(2,1)S(1)}} constant({{...}})
  %k = bf16[2,128,64]{{2,1,0:T(8,128)(2,1)}} constant({{...}})
  ROOT %out.2 = (s32[]{{:T(128)}}, f32[8,128]{{1,0}}) tuple(%next.2, %work.2)
}}

%outer_condition (p: (s32[], f32[8,128])) -> pred[] {{
  %p.3 = (s32[], f32[8,128], s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %bound.3 = s32[] constant(3)
  ROOT %less.3 = pred[] fusion(%i.3, %bound.3), kind=kLoop, calls=%compare
}}

%compare (a: s32[], b: s32[]) -> pred[] {{
  %a.4 = s32[] parameter(0)
  %b.4 = s32[] parameter(1)
  ROOT %less.4 = pred[] compare(%a.4, %b.4), direction=LT
}}

%outer (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p.5 = (s32[], f32[8,128], s32[]) parameter(0)
  %i.5 = s32[] get-tuple-element(%p.5), index=0
  %x = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%p.5), index=1
  %one.5 = s32[] constant(1)
  %two.5 = s32[] get-tuple-element(%p.5), index=2
  %next.5 = s32[] add(%i.5, %one.5)
  %zero.5 = s32[] constant(0)
  %start.5 = (s32[], f32[8,128]) tuple(%zero.5, %x)
  %loop.5 = (s32[], f32[8,128]) while(%start.5), condition=%inner_condition, body=%inner
{op("backward.5", 7, "transpose(jvp(vision))/checkpoint/rematted_computation/dot")}
  ROOT %out.5 = (s32[], f32[8,128], s32[]) tuple(%next.5, %x, %two.5)
}}, execution_thread="main"

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %start = (s32[], f32[8,128], s32[]) tuple(%zero, %x, %two)
  %loop = (s32[], f32[8,128], s32[]) while(%start), condition=%outer_condition, body=%outer
{op("update", 1000, "optimizer/mul")}
{op("argument", 3, "state.trainable['decoder/lm_head']", call="copy(%x)").replace("jit(step)/", "")}
  %ready = f32[64,128]{{1,0:T(8,128)}} all-gather(%x), channel_id=1, replica_groups=[2,8]<=[16], dimensions={{0}}
  %sum = f32[8,128]{{1,0:T(8,128)}} all-reduce(%x), channel_id=2, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%compare
{op("last", 1, "transpose(jvp(loss))/add", root=True)}
}}
"""


def test_cycles_are_summed_over_nested_loops():
    found = profile(MODULE, [0] * 16)
    # 3 rounds of the outer loop, 5 of the inner one in each.
    assert found.cycles == 3 * (5 * (100 + 10) + 7) + 1000 + 3 + 1
    assert found.by_part() == {"decoder": 3 * 5 * 110, "vision": 21, "optimizer": 1000, "other": 3, "loss": 1}


def test_a_kernel_whose_text_spans_lines_has_no_cycles_and_states_its_flops():
    op, = profile(MODULE, [0] * 16).kernels
    assert op.times == 15 and op.cycles == 0 and (op.kernel.flops, op.kernel.bytes) == (7000, 90)
    assert not op.kernel.max_steps
    assert json.loads(op.kernel.job)["operands"] == [
        ["int8", [1, 2, 2]], ["bfloat16", [2, 128, 64]], *[["bfloat16", [2, 128, 64]]] * 2]


def test_what_collectives_send_within_a_slice_and_between():
    found = profile(MODULE, [0] * 8 + [1] * 8)
    gather, reduce = [each for op in found.ops for each in op.collectives]
    size = 8 * 128 * 4
    assert (gather.group, gather.slices) == (8, 1) and gather.ici_bytes == 7 * size and gather.dcn_bytes == 0
    assert (reduce.group, reduce.slices) == (2, 2) and reduce.ici_bytes == 0 and reduce.dcn_bytes == 2 * size / 2
    assert [op.asynchronous for op in found.ops if op.collectives] == [False, False]


def test_pieces_of_a_collective_spread_over_a_loop_count_once():
    gather = "all-gather(%p), channel_id=9, replica_groups={{0,1}}, dimensions={0}"
    text = f"""HloModule m
%piece (p: bf16[8]) -> bf16[16] {{
  %p = bf16[8]{{0}} parameter(0)
  ROOT %g = bf16[16]{{0}} {gather}
}}
%condition (p: (s32[])) -> pred[] {{
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(23)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}
%body (p: (s32[])) -> (s32[]) {{
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8]{{0}} constant({{...}})
  %step = bf16[16]{{0}} fusion(%x), kind=kCustom, calls=%piece, {CYCLES % 50}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[]) tuple(%next)
}}
ENTRY %main (x: bf16[8]) -> bf16[16] {{
  %x = bf16[8]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %async-collective-start = bf16[16]{{0}} fusion(%x), kind=kCustom, calls=%piece
  %start = (s32[]) tuple(%zero)
  %loop = (s32[]) while(%start), condition=%condition, body=%body
  ROOT %async-collective-done = bf16[16]{{0}} fusion(%x), kind=kCustom, calls=%piece
}}
"""
    found = profile(text, [0, 0])
    assert found.ici_bytes == 16 * 2 / 2
    assert [op.instruction.name for op in found.ops if op.collectives] == ["async-collective-start"]
    assert [op.instruction.name for op in found.ops if op.awaits] == ["async-collective-done"]
    assert found.cycles == 23 * 50


def test_the_end_of_a_transfer_belongs_to_its_start():
    """A collective on a SparseCore, whose operands come with an update, and a transfer to other slices."""
    text = """HloModule m
%called (p: bf16[8]) -> bf16[16] {
  %p = bf16[8]{0} parameter(0)
  ROOT %g = bf16[16]{0} all-gather(%p), channel_id=3, replica_groups={{0,1}}, dimensions={0}
}
%wrapped (p: bf16[8]) -> bf16[16] {
  %p = bf16[8]{0} parameter(0)
  ROOT %c = bf16[16]{0} custom-call(%p), custom_call_target="x", called_computations={%called}
}
ENTRY %main (x: bf16[8]) -> bf16[16] {
  %x = bf16[8]{0} parameter(0)
  %start = ((), ()) async-start(), async_execution_thread="sparsecore", calls=%wrapped
  %update = ((bf16[8]{0}), bf16[16]{0}) async-update(%start, %x)
  %send = (bf16[8]{0}, u32[], token[]) send(%x, %t), channel_id=7, frontend_attributes={TYPE="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=7
  ROOT %done = bf16[16]{0} async-done(%update)
}
""".replace("TYPE", costs.TRANSFER)
    ops = {op.instruction.name: op for op in profile(text, [0, 1]).ops}
    assert ops["start"].asynchronous and ops["send"].asynchronous
    for start, end in (("start", "done"), ("send", "send-done")):
        assert [each.key for each in ops[start].collectives] == list(ops[end].awaits) != []
    assert ops["start"].collectives[0].bytes == 32


@pytest.mark.parametrize("text,expected", [
    ("replica_groups={{0,1},{2,3}}", [0, 1]), ("replica_groups=[2,2]<=[4]", [0, 1]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [0, 2]), ("replica_groups={}", [0, 1, 2, 3]),
    ("source_target_pairs={{2,3},{3,2}}", [2, 3]), ("replica_groups=mesh['axis_0'=4] {'axis_0'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [0, 2]), ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [0, 1]),
    ("replica_groups=mesh['axis_0'=4] {'axis_0':(1)2}", [0, 2]),
    ("replica_groups=mesh['axis_0'=4] {'axis_0':(2)2}", [0, 1]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, device_ids=(3,2,1,0)", [3, 1]),
])
def test_the_first_replica_group_in_all_notations(text, expected):
    module = parse(f"ENTRY %e (p: f32[]) -> f32[] {{\n  ROOT %r = f32[] all-reduce(%p), {text}, to_apply=%a\n}}\n")
    assert costs.first_group(module.entry.root, 4) == expected


@pytest.mark.parametrize("change,runs", [
    (("constant(3)", "constant(7)"), 7 * 5), (("constant(3)", "constant(0)"), 0),
    (("constant(3)", "reduce(%x)"), 2 * 5),
    (("(%a.4, %b.4), direction=LT", "(%a.4, %b.4), direction=NE"), 2 * 5), (("constant(5)", "reduce(%x)"), 3 * 2),
    (("%zero = s32[] constant(0)", "%zero = s32[] constant(1)"), 2 * 5),  # the first round is peeled off
    (("tuple(%zero.5, %x)", "tuple(%two.5, %x)"), 3 * 3),  # a constant that the outer loop carries
])
def test_rounds_of_loops(change, runs):
    """Those of the work in two loops, of 3 and 5 rounds. Two rounds stand for an outer one of unknown length."""
    found = profile(MODULE.replace(*change), [0] * 16, 2)
    assert sum(op.times for op in found.ops if op.instruction.name == "work.2") == runs


def test_a_text_without_entry_is_an_error():
    with pytest.raises(UserError, match="no HLO module"):
        parse("HloModule m\n")
