"""Reading the text of compiled programs: loops, fusions, branches, kernels, collectives."""

import pytest

from dist_jax.plan import hlo

ONE = '"window_config":{"estimated_cycles":"%d"}'


def config(cycles):
    return f'backend_config={{{ONE % cycles}}}'


# A loop of 5 turns that holds one of 3 turns, by a counter that starts at 1 and is compared in a
# fusion of its own.
NESTED = f"""\
HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/dist_jax/models/clip.py"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=12 end_line=12 column=2 end_column=66}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}

%less (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}}

%inner_condition (p: (s32[], f32[8])) -> pred[] {{
  %p = (s32[], f32[8]{{0:T(128)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %four = s32[] constant(4)
  ROOT %r = pred[] fusion(%i, %four), kind=kLoop, calls=%less
}}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0:T(128)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{{0:T(128)}} get-tuple-element(%p), index=1
  %y = f32[8]{{0:T(128)}} multiply(%x, %x), metadata={{op_name="jit(f)/inner/mul" \
stack_frame_id=1}}, {config(7)}
  ROOT %t = (s32[], f32[8]{{0:T(128)}}) tuple(%next, %y)
}}

%outer_condition (p: (s32[], f32[8])) -> pred[] {{
  %five = s32[] constant(5)
  %p = (s32[], f32[8]{{0:T(128)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %r = pred[] compare(%i, %five), direction=LT
}}

%outer_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0:T(128)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{{0:T(128)}} get-tuple-element(%p), index=1
  %start = s32[] copy(%one)
  %in = (s32[], f32[8]{{0:T(128)}}) tuple(%start, %x)
  %loop = (s32[], f32[8]{{0:T(128)}}) while(%in), condition=%inner_condition, body=%inner_body
  %y = f32[8]{{0:T(128)}} get-tuple-element(%loop), index=1
  %z = f32[8]{{0:T(128)}} add(%y, %y), {config(100)}
  ROOT %t = (s32[], f32[8]{{0:T(128)}}) tuple(%next, %z)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0:T(128)}} parameter(0), metadata={{op_name="state.params[\\'a\\']"}}
  %zero = s32[] constant(0)
  %in = (s32[], f32[8]{{0:T(128)}}) tuple(%zero, %x)
  %loop = (s32[], f32[8]{{0:T(128)}}) while(%in), condition=%outer_condition, body=%outer_body
  ROOT %y = f32[8]{{0:T(128)}} get-tuple-element(%loop), index=1
}}
"""


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
