"""Reading the text of compiled programs: loops, fusions, branches, kernels, collectives."""

import numpy as np
import pytest
from programs import NESTED, config

from dist_jax.plan import hlo


def test_bodies_count_as_often_as_nested_loops_turn():
    program = hlo.read_program(NESTED)
    counts = {op.name: op.count for op in program.operations if op.cycles}
    assert counts == {'y': 15, 'z': 5}
    assert program.compiler_cycles == 15 * 7 + 5 * 100
    assert program.unknown_loops == ()


def test_a_count_that_the_compiler_knows_is_taken():
    text = NESTED.replace(
        'body=%outer_body', 'body=%outer_body, backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert hlo.read_program(text).compiler_cycles == 9 * (3 * 7 + 100)


def test_a_loop_that_depends_on_data_counts_once_and_is_named():
    text = NESTED.replace('%zero = s32[] constant(0)', '%zero = s32[] custom-call(%x)')
    program = hlo.read_program(text)
    assert program.unknown_loops == ('loop',)
    assert program.compiler_cycles == 3 * 7 + 100


def test_operations_say_where_they_come_from():
    (op,) = (op for op in hlo.read_program(NESTED).operations if op.name == 'y')
    assert op.op_name == 'jit(f)/inner/mul'
    assert op.source == '/somewhere/dist_jax/models/clip.py:12'


def test_arguments_are_measured_as_they_lie_in_memory():
    assert hlo.read_program(NESTED).parameters == (("state.params['a']", 512),)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match='ENTRY'):
        hlo.read_program('HloModule x\n')


def entry(*lines, before=''):
    """A program with these instructions, the last one its result."""
    *rest, last = lines
    body = '\n'.join([f'  {line}' for line in rest] + [f'  ROOT {last}'])
    return f'HloModule m, is_scheduled=true\n{before}\nENTRY %main () -> f32[] {{\n{body}\n}}\n'


FUSED = """
%fused (a: bf16[64,128], b: bf16[128,32]) -> bf16[64,32] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(1)
  %inner = bf16[64,128]{1,0} negate(%a), backend_config={"window_config":{"estimated_cycles":"99"}}
  ROOT %c = bf16[64,32]{1,0} convolution(%inner, %b), dim_labels=bf_io->bf
}
"""
OPERANDS = (
    '%a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)',
    '%b = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(1)',
)


def test_a_fusion_counts_once_with_its_own_cycles_and_the_products_in_it():
    fusion = '%f = bf16[64,32]{1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%fused, '
    program = hlo.read_program(entry(*OPERANDS, fusion + config(50), before=FUSED))
    assert program.compiler_cycles == 50
    assert program.flops == 2 * 64 * 128 * 32
    # Columns are padded to tiles of 128.
    assert program.hbm_bytes == 2 * (64 * 128 + 128 * 128 + 64 * 128)


def test_arrays_outside_the_hbm_are_no_traffic():
    fusion = '%f = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kOutput, calls=%fused'
    program = hlo.read_program(entry(*OPERANDS, fusion, before=FUSED))
    assert program.hbm_bytes == 2 * (64 * 128 + 128 * 128)


@pytest.mark.parametrize(
    ('shapes', 'attributes', 'expected'),
    [
        # 3 x 3 with padding: the corners of the frame see 4 taps, the edges 6, the rest 9.
        (
            ('f32[2,4,4,5]', 'f32[3,3,5,7]', 'f32[2,4,4,7]'),
            'window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f',
            2 * 2 * 5 * 7 * (4 * 4 + 8 * 6 + 4 * 9),
        ),
        # A batch of 12 products, written as a dilated window over the batch.
        (
            ('f32[12,30,8]', 'f32[12,8,6]', 'f32[12,30,6]'),
            'window={size=12 stride=11 pad=0_0 lhs_dilate=12}, dim_labels=0bf_0io->0bf',
            2 * 12 * 30 * 8 * 6,
        ),
        (
            ('f32[2,9,4]', 'f32[3,2,4]', 'f32[2,9,4]'),
            'window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f, feature_group_count=2',
            2 * 2 * 2 * 4 * (7 * 3 + 2 * 2),
        ),
    ],
    ids=['padded', 'batched', 'grouped'],
)
def test_convolutions_count_what_they_multiply(shapes, attributes, expected):
    left, right, out = shapes
    text = entry(
        f'%a = {left} parameter(0)',
        f'%b = {right} parameter(1)',
        f'%c = {out} convolution(%a, %b), {attributes}',
    )
    assert hlo.read_program(text).flops == expected


def test_the_dearest_branch_counts():
    branches = ''.join(
        f"""
%branch{i} (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %x{i} = f32[8] negate(%p), {config(cycles)}
}}
"""
        for i, cycles in enumerate((5, 40, 6))
    )
    text = entry(
        '%x = f32[8] parameter(0)',
        '%i = s32[] parameter(1)',
        '%c = f32[8] conditional(%i, %x, %x, %x), '
        'branch_computations={%branch0, %branch1, %branch2}',
        before=branches,
    )
    assert hlo.read_program(text).compiler_cycles == 40


def test_calls_are_followed():
    called = f"""
%callee (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  ROOT %x = f32[8] negate(%p), {config(5)}
}}
"""
    text = entry(
        '%x = f32[8] parameter(0)', '%c = f32[8] call(%x), to_apply=%callee', before=called
    )
    assert hlo.read_program(text).compiler_cycles == 5


def test_kernels_are_known_by_the_cost_they_declare():
    text = entry(
        '%x = f32[8] parameter(0)',
        '%k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"body":"abc","cost_estimate":{"flops":"300",'
        '"transcendentals":"7","bytes_accessed":"64","remote_bytes_transferred":"0"}}}',
        '%b = f32[8] custom-call(%k), custom_call_target="ConcatBitcast"',
    )
    kernel, named = hlo.read_program(text).operations
    assert kernel.declared == {
        'flops': 300,
        'transcendentals': 7,
        'bytes_accessed': 64,
        'remote_bytes_transferred': 0,
    }
    assert kernel.flops == 300
    assert kernel.cycles == 0 and named.declared is None and named.hbm_bytes == 0
    assert kernel.hbm_bytes == 64
    larger = text.replace('f32[8] custom-call(%x)', 'f32[8000] custom-call(%x)')
    assert hlo.read_program(larger).operations[0].hbm_bytes == 64  # writes a part of it in place


@pytest.mark.parametrize(
    ('groups', 'chips'),
    [
        ('{{0,1,2,3},{4,5,6,7}}', 4),
        ('[2,8]<=[16]', 8),
        ("mesh['data'=4,'model'=2] {'data'}", 4),
        ("mesh['data'=4,'model'=2] {'data','model'}", 8),
    ],
)
def test_collectives_say_their_bytes_and_their_chips(groups, chips):
    text = entry(
        '%x = f32[1024]{0:T(1024)} parameter(0)',
        f'%r = f32[1024]{{0:T(1024)}} all-reduce(%x), replica_groups={groups}, to_apply=%add',
    )
    (op,) = hlo.read_program(text).operations
    assert (op.collective, op.payload_bytes, len(op.group)) == ('all-reduce', 4096, chips)
    assert not op.asynchronous


@pytest.mark.parametrize(
    ('groups', 'first'),
    [
        ('{{0,2},{1,3}}', (0, 2)),
        ('[2,2]<=[2,2]T(1,0)', (0, 2)),
        ("mesh['data'=2,'fsdp'=2] {'data'}", (0, 2)),
        ('[2,2]<=[4]', (0, 1)),
        ("mesh['data'=2,'fsdp'=2] {'fsdp'}", (0, 1)),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
    ],
)
def test_collectives_say_which_chips_are_together(groups, first):
    text = entry(
        '%x = f32[1024]{0:T(1024)} parameter(0)',
        f'%r = f32[1024]{{0:T(1024)}} all-reduce(%x), replica_groups={groups}, to_apply=%add',
    )
    (op,) = hlo.read_program(text).operations
    assert op.group == first


CARRIED = """
%started (a: f32[1024]) -> (f32[1024], f32[4096]) {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %g = f32[4096]{0:T(1024)} all-gather(%a), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %s = (f32[1024]{0}, f32[4096]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%carried (b: f32[1024], c: f32[8]) -> f32[8] {
  %b = f32[1024]{0:T(1024)} parameter(0)
  %c = f32[8]{0:T(128)} parameter(1)
  %g = f32[4096]{0:T(1024)} all-gather(%b), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %y = f32[8]{0:T(128)} multiply(%c, %c)
}
%finished (d: f32[1024]) -> f32[4096] {
  %d = f32[1024]{0:T(1024)} parameter(0)
  %g = f32[4096]{0:T(1024)} all-gather(%d), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %e = f32[4096]{0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}
"""


def test_a_collective_carried_by_fusions_counts_once():
    text = entry(
        '%x = f32[1024]{0:T(1024)} parameter(0)',
        '%n = f32[8]{0:T(128)} parameter(1)',
        '%async-collective-start.2 = (f32[1024]{0}, f32[4096]{0}) fusion(%x), calls=%started',
        f'%y = f32[8]{{0:T(128)}} fusion(%x, %n), calls=%carried, {config(7)}',
        '%async-collective-done.3 = f32[4096]{0} fusion(%x), calls=%finished',
        before=CARRIED,
    )
    start, between, done = hlo.read_program(text).operations
    assert (start.collective, start.payload_bytes, start.asynchronous) == (
        'all-gather',
        4 * 4096,
        True,
    )
    assert (between.collective, between.cycles) == ('', 7)
    assert done.completes == start.name


def test_what_runs_beside_the_core_is_counted_once_and_marked():
    text = entry(
        '%x = f32[1024]{0:T(1024)} parameter(0)',
        '%s = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) all-gather-start(%x), '
        'replica_groups={{0,1,2,3}}, dimensions={0}',
        '%c = (f32[1024]{0:T(1024)S(3)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%x)',
        '%d = f32[1024]{0:T(1024)S(3)} copy-done(%c)',
        '%g = f32[4096]{0:T(1024)} all-gather-done(%s)',
    )
    gather, copy, done = hlo.read_program(text).operations
    assert gather.asynchronous and copy.asynchronous
    assert done.completes == gather.name and not done.collective
    assert gather.payload_bytes == 4 * 4096
    assert copy.hbm_bytes == 4096 and copy.collective == ''


def test_slices_and_updates_in_place_move_the_slice_only():
    fused = """
%fused (whole: f32[100,1024], i: s32[], new: f32[1,1024]) -> f32[100,1024] {
  %whole = f32[100,1024]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %new = f32[1,1024]{1,0:T(1,128)} parameter(2)
  ROOT %u = f32[100,1024]{1,0:T(8,128)} dynamic-update-slice(%whole, %new, %i, %zero)
}
"""
    text = entry(
        '%whole = f32[100,1024]{1,0:T(8,128)} parameter(0)',
        '%i = s32[] parameter(1)',
        '%new = f32[1,1024]{1,0:T(1,128)} parameter(2)',
        '%f = f32[100,1024]{1,0:T(8,128)} fusion(%whole, %i, %new), kind=kLoop, calls=%fused',
        before=fused,
    )
    (op,) = hlo.read_program(text).operations
    assert op.hbm_bytes == 2 * 4096 + 4  # the index too


def test_touches_of_windows_are_counted_without_writing_them_out():
    """Against all pairs of an output and a tap; the last window has 10^11 of them."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        outputs, taps, stride, tap_dilation, input_dilation = rng.integers(1, 12, 5).tolist()
        padding, limit = int(rng.integers(-4, 16)), int(rng.integers(1, 12)) * input_dilation
        place = np.arange(outputs)[:, None] * stride + np.arange(taps) * tap_dilation - padding
        there = (place >= 0) & (place < limit) & (place % input_dilation == 0)
        found = hlo._touches(
            outputs,
            taps,
            limit,
            stride=stride,
            padding=padding,
            tap_dilation=tap_dilation,
            input_dilation=input_dilation,
        )
        assert found == there.sum()
    one = {'stride': 1, 'padding': 0, 'tap_dilation': 1, 'input_dilation': 1}
    assert hlo._touches(10**5, 10**6, 10**6, **one) == 10**11 - 10**5 * (10**5 - 1) // 2
