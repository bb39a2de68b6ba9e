"""Texts of compiled programs, by hand."""

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
