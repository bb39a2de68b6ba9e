"""Reads the text of a scheduled, compiled TPU program into rows of costs.

The compiler writes the cycles it expects (`estimated_cycles`) beside every operation that runs on
the core, once for the body of a loop; here a body counts as often as its loop turns. What carries
no cycles is kept apart and named: kernels of one's own (by the cost they declare), collectives (by
their bytes), asynchronous copies (by their bytes).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

import numpy as np

ITEM_BITS = {
    'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
    's32': 32, 'u32': 32, 's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64,
    'c64': 64, 'c128': 128, 'token': 0, 'opaque': 0,
}  # fmt: skip

COLLECTIVES = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'ragged-all-to-all',
    'collective-permute',
    'collective-broadcast',
    'send',  # between slices, through the hosts
)
# Operations that move or name values without work of their own.
FREE = frozenset(
    {
        'after-all',
        'bitcast',
        'constant',
        'get-tuple-element',
        'opt-barrier',
        'parameter',
        'partition-id',
        'recv',
        'replica-id',
        'tuple',
    }
)
# Operations that touch a part of their first operand.
_PARTIAL = ('dynamic-slice', 'slice', 'gather', 'dynamic-update-slice')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = ')
_OPCODE = re.compile(r'([a-z][\w-]*)\(')
_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^{}]*)\})?')
_NAME = re.compile(r'%([\w.-]+)')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a shape text: `bf16[8,128]{1,0:T(8,128)(2,1)S(3)}`.

    Attributes:
      dtype: as the program writes it.
      dims: sizes.
      minor_to_major: layout; empty if none is given.
      tiles: sizes of the first tiling.
      space: memory space; 0 is the HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes in memory: the minor dimensions are padded to whole tiles."""
        bits = ITEM_BITS.get(self.dtype, 8 if self.dtype.startswith('f8') else 32)
        dims = [self.dims[i] for i in self.minor_to_major] or list(reversed(self.dims))
        for i, tile in enumerate(reversed(self.tiles)):
            if i < len(dims):
                dims[i] = -(-dims[i] // tile) * tile
        return math.prod(dims) * bits // 8


@functools.lru_cache(maxsize=100_000)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape text, those of a tuple one after the other."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        order, _, rest = layout.partition(':')
        tiles = re.search(r'T\(([\d,]+)\)', rest)
        space = re.search(r'S\((\d+)\)', rest)
        found.append(
            Array(
                dtype,
                tuple(int(d.removeprefix('<=')) for d in dims.split(',') if d),
                tuple(int(d) for d in order.split(',') if d.strip().isdigit()),
                tuple(map(int, tiles[1].split(','))) if tiles else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where the operation comes from: jax's name stack and primitive; '' if unknown."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1].replace("\\'", "'") if found else ''

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for one execution, None where it gives none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.rest)
        return int(found[1]) if found else None

    @property
    def channel(self) -> str:
        """Number that the halves of a collective share; '' if it has none."""
        found = re.search(r'channel_id=(\d+)', self.rest)
        return found[1] if found else ''

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ''

    def called(self, key: str) -> tuple[str, ...]:
        """Computations that an attribute names: `calls`, `body`, `branch_computations`, ..."""
        found = re.search(rf'\b{key}=(\{{[^}}]*\}}|%?[\w.-]+)', self.rest)
        return tuple(_NAME.findall(found[1])) or (found[1],) if found else ()

    @property
    def declared_cost(self) -> dict[str, int] | None:
        """`cost_estimate` of a kernel: flops, transcendentals, bytes_accessed."""
        found = re.search(r'"cost_estimate":(\{[^{}]*\})', self.rest)
        return {k: int(v) for k, v in json.loads(found[1]).items()} if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, each in the order in which it runs."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    frames: dict[int, str]


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    Raises:
      ValueError: it is not one.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = '', None
    lines = text.splitlines()
    for line in lines:
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], line[found.end() :], bool(found[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError('not the text of a compiled program: it has no ENTRY computation')
    return Module(computations, entry, _frames(lines))


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
    shape, text = text[:end], text[end:].lstrip()
    opcode = _OPCODE.match(text)
    if opcode is None:
        raise ValueError(f'cannot read the instruction {name}: {text[:80]!r}')
    close = _closing(text, opcode.end() - 1)
    inside = text[opcode.end() : close]
    operands = tuple(_NAME.findall(inside))
    rest = text[close + 1 :]
    if opcode[1] in ('constant', 'parameter'):
        rest = f'({inside}){rest}'
    return Instruction(name, opcode[1], shape, operands, rest, is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f'unbalanced brackets in {text[:80]!r}')


def _frames(lines: list[str]) -> dict[int, str]:
    """Stack frame -> 'file.py:line', from the tables at the head of the program."""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] | None = None
    for line in lines:
        if line in ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'):
            table = tables.setdefault(line, {})
        elif table is not None and (found := re.match(r'(\d+) (.*)', line)):
            table[int(found[1])] = found[2]
        elif line:
            table = None
    files = {i: name.strip('"') for i, name in tables.get('FileNames', {}).items()}
    places = {}
    for i, text in tables.get('FileLocations', {}).items():
        numbers = dict(re.findall(r'(\w+)=(\d+)', text))
        path = files.get(int(numbers.get('file_name_id', 0)), '')
        places[i] = f'{path}:{numbers.get("line", "?")}'
    frames, parents = {}, {}
    for i, text in tables.get('StackFrames', {}).items():
        numbers = dict(re.findall(r'(\w+)=(\d+)', text))
        frames[i] = places.get(int(numbers.get('file_location_id', 0)), '')
        parents[i] = int(numbers.get('parent_frame_id', 1)) - 1  # 0: no parent
    # Flax's lifting says nothing; who called it does.
    for i in sorted(frames):
        if '/flax/' in frames[i] and parents[i] in frames:
            frames[i] = frames[parents[i]]
    return frames


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction that runs, with what one execution costs a chip.

    Attributes:
      name: of the instruction.
      opcode: its kind.
      op_name: jax's name stack and primitive.
      source: 'file.py:line' of the Python call, if known.
      count: executions in a step: the product of the turns of the loops around it.
      cycles: the compiler's estimate; 0 where it has none.
      flops: of dots and convolutions in it, or what a kernel declares.
      hbm_bytes: read from and written to the HBM.
      collective: kind of collective, or ''.
      payload_bytes: of the collective: what a chip puts in, or gets out where that is more.
      group: chips of the first group that the collective is among, by their number in the mesh.
      completes: name of the asynchronous collective that this one waits for, or ''.
      declared: cost that a kernel of one's own declares, or None.
      asynchronous: whether it runs beside the core (copies and collectives in two halves).
    """

    name: str
    opcode: str
    op_name: str
    source: str = ''
    count: int = 1
    cycles: int = 0
    flops: float = 0.0
    hbm_bytes: int = 0
    collective: str = ''
    payload_bytes: int = 0
    group: tuple[int, ...] = (0,)
    completes: str = ''
    declared: dict[str, int] | None = None
    asynchronous: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs in one step of one chip.

    Attributes:
      operations: every instruction that does something.
      unknown_loops: name stacks of loops whose turns depend on data; their bodies count once.
      parameters: (name, bytes in HBM) of the arguments.
    """

    operations: tuple[Operation, ...]
    unknown_loops: tuple[str, ...]
    parameters: tuple[tuple[str, int], ...]

    @property
    def compiler_cycles(self) -> int:
        """The compiler's cycles, loops multiplied."""
        return sum(op.cycles * op.count for op in self.operations)

    @property
    def flops(self) -> float:
        """Floating-point operations of dots and convolutions, loops multiplied."""
        return sum(op.flops * op.count for op in self.operations)

    @property
    def hbm_bytes(self) -> int:
        """Traffic with the HBM, loops multiplied."""
        return sum(op.hbm_bytes * op.count for op in self.operations)


def read_program(text: str) -> Program:
    """Reads a compiled program into what runs in one step.

    Raises:
      ValueError: the text is not a compiled program.
    """
    module = parse(text)
    unknown: list[str] = []
    operations = tuple(_run(module, module.entry, 1, unknown))
    parameters = tuple(
        (i.op_name or i.name, sum(a.bytes for a in arrays(i.shape)))
        for i in module.computations[module.entry].values()
        if i.opcode == 'parameter'
    )
    return Program(operations, tuple(unknown), parameters)


def _run(module: Module, name: str, count: int, unknown: list[str]) -> Iterator[Operation]:
    """Operations of a computation that runs `count` times, loops and calls followed."""
    computation = module.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in FREE:
            continue
        if opcode == 'while':
            turns = trip_count(module, computation, instruction)
            if turns is None:
                unknown.append(instruction.op_name or instruction.name)
            body, *_ = instruction.called('body')
            yield from _run(module, body, count * (1 if turns is None else turns), unknown)
        elif opcode == 'conditional':
            yield from _dearest_branch(module, instruction, count, unknown)
        elif opcode == 'call':
            for called in instruction.called('to_apply') or instruction.called('calls'):
                yield from _run(module, called, count, unknown)
        elif opcode.endswith(('-done', '-update')):
            # Its other half, the start, is counted; which collective it waits for is said.
            if opcode.removesuffix('-done') in (*COLLECTIVES, 'async'):
                yield _completion(instruction, _started(computation, instruction), count)
        elif opcode == 'async-start':
            for called in instruction.called('calls'):
                for op in _run(module, called, count, unknown):
                    yield dataclasses.replace(op, name=instruction.name, asynchronous=True)
        elif (inner := _fused_collective(module, instruction)) is not None:
            # The compiler's own halves of a collective that fusions between them carry forward.
            name = f'channel {inner.channel}'
            if instruction.name.startswith(_FUSED_START):
                body = module.computations[instruction.called('calls')[0]]
                started = _operation(module, body, inner, count)
                yield dataclasses.replace(started, name=name, cycles=0, asynchronous=True)
            elif instruction.name.startswith(_FUSED_DONE):
                yield _completion(inner, name, count)
            else:
                yield _operation(module, computation, instruction, count)
        else:
            yield _operation(module, computation, instruction, count)


_FUSED_START, _FUSED_DONE = 'async-collective-start', 'async-collective-done'


def _fused_collective(module: Module, instruction: Instruction) -> Instruction | None:
    """The collective inside a fusion."""
    if instruction.opcode != 'fusion':
        return None
    inner = module.computations[instruction.called('calls')[0]]
    return next((i for i in inner.values() if i.opcode in COLLECTIVES), None)


def _started(computation: dict[str, Instruction], done: Instruction) -> str:
    """The name of the first half of what an instruction completes."""
    start = computation[done.operands[0]]
    while start.opcode.endswith('-update'):
        start = computation[start.operands[0]]
    return start.name


def _completion(instruction: Instruction, completes: str, count: int) -> Operation:
    return Operation(
        name=instruction.name,
        opcode=instruction.opcode,
        op_name=instruction.op_name,
        count=count,
        completes=completes,
    )


def _dearest_branch(
    module: Module, instruction: Instruction, count: int, unknown: list[str]
) -> Iterator[Operation]:
    branches = instruction.called('branch_computations')
    if not branches:
        branches = instruction.called('true_computation') + instruction.called('false_computation')
    dearest: list[Operation] = []
    loops: list[str] = []
    for branch in branches:
        here: list[str] = []
        found = list(_run(module, branch, count, here))
        if not dearest or _cycles(found) > _cycles(dearest):
            dearest, loops = found, here
    unknown += loops
    yield from dearest


def _cycles(operations: list[Operation]) -> int:
    return sum(op.cycles * op.count for op in operations)


def _operation(
    module: Module, computation: dict[str, Instruction], instruction: Instruction, count: int
) -> Operation:
    opcode = instruction.opcode
    base = opcode.removesuffix('-start')
    collective = base if base in COLLECTIVES else ''
    payload = 0
    if opcode == 'send':
        payload = sum(a.bytes for a in arrays(computation[instruction.operands[0]].shape))
    elif collective:
        inputs = sum(
            a.bytes for o in instruction.operands if o in computation
            for a in arrays(computation[o].shape)
        )  # fmt: skip
        outputs = sum(a.bytes for a in arrays(instruction.shape))
        # The value of a start names its operands too.
        payload = max(inputs, outputs - inputs if opcode.endswith('-start') else outputs)
    declared = instruction.declared_cost if opcode == 'custom-call' else None
    flops = _flops(module, computation, instruction)
    frame = re.search(r'stack_frame_id=(\d+)', instruction.rest)
    asynchronous = opcode.endswith('-start') or opcode == 'send'
    return Operation(
        name=instruction.name,
        opcode=opcode,
        op_name=instruction.op_name,
        source=module.frames.get(int(frame[1]), '') if frame else '',
        count=count,
        cycles=0 if asynchronous else instruction.cycles or 0,
        flops=flops if declared is None else float(declared.get('flops', 0)),
        hbm_bytes=_hbm_bytes(module, computation, instruction),
        collective=collective,
        payload_bytes=payload,
        group=_group(instruction.rest) if collective else (0,),
        declared=declared,
        asynchronous=asynchronous,
    )


def _group(rest: str) -> tuple[int, ...]:
    """Chips of the first replica group, in any of the notations."""
    found = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}', rest)
    if found:
        return tuple(int(n) for n in found[1].split(',') if n)
    found = re.search(r'replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest)
    if found:
        return tuple(_chips(found[2], found[3]).ravel()[: int(found[1])].tolist())
    found = re.search(
        r'replica_groups=[@\w]*\[([^\]]*)\]'
        r'(?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}',
        rest,
    )
    if found:
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        among = re.findall(r"'([^']+)'", found[4])
        chips = _chips(found[2] or str(math.prod(sizes.values())), found[3])
        first = tuple(slice(None) if name in among else 0 for name in sizes)
        return tuple(chips.reshape(tuple(sizes.values()))[first].ravel().tolist())
    return (0,)


def _chips(sizes: str, order: str | None) -> np.ndarray:
    """'2,8' and '1,0' -> the numbers from 0 on in this shape, its axes in this order."""
    shape = [int(n) for n in sizes.split(',')]
    axes = [int(n) for n in order.split(',')] if order else None
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes)


def trip_count(
    module: Module, computation: dict[str, Instruction], loop: Instruction
) -> int | None:
    """How often a loop turns; None if that depends on data.

    From `known_trip_count`, or from a condition that compares a counter with a constant.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    (condition_name,), (body_name,) = loop.called('condition'), loop.called('body')
    condition, body = module.computations[condition_name], module.computations[body_name]
    root = next((i for i in condition.values() if i.is_root), None)
    start_tuple = computation.get(loop.operands[0]) if loop.operands else None
    if root is None or start_tuple is None:
        return None
    direction = re.search(r'direction=(\w+)', root.rest)
    operands = root.operands
    if root.opcode == 'fusion':
        # The comparison sits in a fusion of its own; its operands map to the fusion's.
        inner = module.computations[root.called('calls')[0]]
        compare = next((i for i in inner.values() if i.is_root), None)
        if compare is None or compare.opcode != 'compare':
            return None
        direction = re.search(r'direction=(\w+)', compare.rest)
        operands = tuple(_outside(inner, o, root.operands) or o for o in compare.operands)
        condition = {**inner, **condition}
    elif root.opcode != 'compare':
        return None
    if direction is None or len(operands) != 2:
        return None

    def start_of(index: int) -> int | None:
        if start_tuple.opcode != 'tuple' or index >= len(start_tuple.operands):
            return None
        return _constant(computation, start_tuple.operands[index])

    def value(name: str) -> tuple[str, int] | None:
        """('constant', n) or ('counter', place in the loop's tuple)."""
        number = _constant(condition, name)
        if number is not None:
            return 'constant', number
        place = _place(condition, name)
        if place is None:
            return None
        step = _step(body, place)
        if step == 0:  # carried along unchanged
            number = start_of(place)
            return None if number is None else ('constant', number)
        return 'counter', place

    left, right = (value(name) for name in operands)
    if left is None or right is None or {left[0], right[0]} != {'counter', 'constant'}:
        return None
    kind = direction[1]
    if left[0] == 'constant':
        left, right = right, left
        kind = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE'}.get(kind, kind)
    start, step = start_of(left[1]), _step(body, left[1])
    if start is None or not step:
        return None
    distance = (right[1] - start) * (1 if step > 0 else -1)
    if kind in ('LE', 'GE'):
        distance += 1
    elif kind not in ('LT', 'GT', 'NE'):
        return None
    return max(0, -(-distance // abs(step)))


def _outside(inner: dict[str, Instruction], name: str, operands: tuple[str, ...]) -> str | None:
    """The operand of a fusion that a name inside it stands for."""
    instruction = inner.get(name)
    while instruction is not None and instruction.opcode in ('bitcast', 'copy', 'convert'):
        instruction = inner.get(instruction.operands[0])
    if instruction is None or instruction.opcode != 'parameter':
        return None
    return operands[_number(instruction)]


def _number(instruction: Instruction) -> int:
    found = re.match(r'\((-?\d+)\)', instruction.rest)
    return int(found[1]) if found else 0


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    """The integer that a name stands for, through copies."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ('copy', 'bitcast', 'convert'):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != 'constant':
        return None
    found = re.match(r'\((-?\d+)\)', instruction.rest)
    return int(found[1]) if found else None


def _place(computation: dict[str, Instruction], name: str) -> int | None:
    """Which element of the loop's tuple a name stands for."""
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ('copy', 'bitcast'):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != 'get-tuple-element':
        return None
    source = computation.get(instruction.operands[0])
    if source is None or source.opcode != 'parameter':
        return None
    return int(re.search(r'index=(\d+)', instruction.rest)[1])


def _step(body: dict[str, Instruction], place: int) -> int | None:
    """What a turn adds to an element of the loop's tuple; None if it is no constant."""
    root = next((i for i in body.values() if i.is_root), None)
    if root is None or root.opcode != 'tuple' or place >= len(root.operands):
        return None
    if _place(body, root.operands[place]) == place:
        return 0
    last = body.get(root.operands[place])
    if last is None or last.opcode not in ('add', 'subtract') or len(last.operands) != 2:
        return None
    sign = 1 if last.opcode == 'add' else -1
    for counter, step in (last.operands, last.operands[::-1]):
        if _place(body, counter) == place and (number := _constant(body, step)) is not None:
            return sign * number
    return None


def _flops(module: Module, computation: dict[str, Instruction], instruction: Instruction) -> float:
    """Floating-point operations of the dots and convolutions of an instruction, fusions opened."""
    if instruction.opcode == 'convolution':
        return _convolution_flops(computation, instruction)
    if instruction.opcode == 'dot':
        left = arrays(computation[instruction.operands[0]].shape)[0]
        found = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)
        contracted = [int(d) for d in found[1].split(',') if d] if found else []
        out = arrays(instruction.shape)[0].size
        return 2.0 * out * math.prod(left.dims[d] for d in contracted)
    if instruction.opcode == 'fusion':
        inner = module.computations[instruction.called('calls')[0]]
        return sum(_flops(module, inner, i) for i in inner.values())
    return 0.0


def _convolution_flops(computation: dict[str, Instruction], instruction: Instruction) -> float:
    left, right = (arrays(computation[o].shape)[0] for o in instruction.operands[:2])
    out = arrays(instruction.shape)[0]
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
    if labels is None:
        return 0.0
    window = re.search(r'window=\{([^}]*)\}', instruction.rest)
    fields = dict(re.findall(r'(\w+)=(\S+)', window[1])) if window else {}
    batch = out.dims[labels[3].index('b')]
    features = right.dims[labels[2].index('o')] * right.dims[labels[2].index('i')]
    total = 2.0 * batch * features
    groups = re.search(r'batch_group_count=(\d+)', instruction.rest)
    if groups:
        total /= int(groups[1])
    spatial = sorted(c for c in labels[1] if c.isdigit())

    def numbers(key: str, default: int) -> list[int]:
        text = fields.get(key)
        return [int(n) for n in text.split('x')] if text else [default] * len(spatial)

    strides, left_dilation = numbers('stride', 1), numbers('lhs_dilate', 1)
    right_dilation = numbers('rhs_dilate', 1)
    padding = fields.get('pad', 'x'.join(['0_0'] * len(spatial))).split('x')
    for i, dim in enumerate(spatial):
        total *= _touches(
            out.dims[labels[3].index(dim)],
            right.dims[labels[2].index(dim)],
            left.dims[labels[1].index(dim)] * left_dilation[i],
            stride=strides[i],
            padding=int(padding[i].split('_')[0]),
            tap_dilation=right_dilation[i],
            input_dilation=left_dilation[i],
        )
    return total


def _touches(
    outputs: int,
    taps: int,
    limit: int,
    *,
    stride: int,
    padding: int,
    tap_dilation: int,
    input_dilation: int,
) -> int:
    """Pairs of an output and a tap of a window that meet an input.

    Places in the padding, and zeros between dilated inputs, are no work. Tap t of output o lies at
    `o stride + t tap_dilation - padding`, which has to be below `limit` and a multiple of
    `input_dilation`: for an output these are taps of an interval, those that are `first` modulo
    `step`.
    """
    start = np.arange(outputs, dtype=np.int64) * stride - padding
    common = math.gcd(tap_dilation, input_dilation)
    step = input_dilation // common
    first = -start // common * pow(tap_dilation // common, -1, step) % step
    least = np.maximum(0, -(start // tap_dilation))
    most = np.minimum(taps - 1, (limit - 1 - start) // tap_dilation)
    count = (most - first) // step - (least - 1 - first) // step
    return int(np.where((start % common == 0) & (most >= least), count, 0).sum())


def _hbm_bytes(
    module: Module, computation: dict[str, Instruction], instruction: Instruction
) -> int:
    """Bytes that an instruction reads from and writes to the HBM.

    A fusion that takes a slice of an operand reads the slice, one that updates a slice in place
    writes the slice; a kernel moves no more than it declares.
    """
    if instruction.opcode == 'send':
        return sum(a.bytes for a in arrays(computation[instruction.operands[0]].shape))
    if instruction.opcode == 'custom-call' and instruction.target != 'tpu_custom_call':
        return 0  # names a buffer, moves nothing
    sources = [arrays(computation[o].shape) for o in instruction.operands if o in computation]
    results = arrays(instruction.shape)
    if instruction.opcode.endswith('-start'):
        # (operands, results, context): the operands are read, the rest of the HBM arrays written.
        read = [a for group in sources for a in group]
        names = [(a.dtype, a.dims, a.space) for a in read]
        written = [a for a in results if a.space == 0 and (a.dtype, a.dims, 0) not in names]
        moved = [a for a in results if a.space != 0 and a.dims] or written
        amount = max((a.bytes for a in moved), default=0)
        return amount * (any(a.space == 0 for a in read) + bool(written))
    if instruction.opcode == 'fusion':
        return _fusion_bytes(module, instruction, sources, results)
    if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
        sources = [results]
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * sum(a.bytes for a in sources[1] if results[0].space == 0)
    moved = sum(a.bytes for group in (*sources, results) for a in group if a.space == 0)
    # A kernel may read and write parts of its arrays; it says how much in all.
    declared = (instruction.declared_cost or {}).get('bytes_accessed', moved)
    return min(moved, declared)


def _fusion_bytes(
    module: Module,
    instruction: Instruction,
    sources: list[tuple[Array, ...]],
    results: tuple[Array, ...],
) -> int:
    inner = module.computations[instruction.called('calls')[0]]
    users: dict[str, list[Instruction]] = {}
    for one in inner.values():
        for operand in one.operands:
            users.setdefault(operand, []).append(one)
    total = 0
    for one in inner.values():
        if one.opcode != 'parameter' or _number(one) >= len(sources):
            continue
        whole = sum(a.bytes for a in sources[_number(one)] if a.space == 0)
        read = 0
        for user, name in _users(users, one.name):
            if user.operands[0] != name or user.opcode not in _PARTIAL:
                read = whole
                break
            # An update in place reads nothing of what it updates.
            if user.opcode != 'dynamic-update-slice':
                read += sum(a.bytes for a in arrays(user.shape))
        total += min(whole, read)
    root = next((i for i in inner.values() if i.is_root), None)
    parts = [root] if root is not None else []
    if root is not None and root.opcode == 'tuple':
        parts = [inner[o] for o in root.operands if o in inner]
    for part, result in zip(parts, results):
        while part.opcode in ('bitcast', 'copy') and part.operands[0] in inner:
            part = inner[part.operands[0]]
        written = result.bytes
        if part.opcode == 'dynamic-update-slice' and part.operands[1] in inner:
            written = sum(a.bytes for a in arrays(inner[part.operands[1]].shape))
        total += written if result.space == 0 else 0
    return total


def _users(users: dict[str, list[Instruction]], name: str) -> Iterator[tuple[Instruction, str]]:
    """Instructions that use a value, and the name they use; bitcasts are looked through."""
    for user in users.get(name, ()):
        if user.opcode == 'bitcast' or (user.opcode == 'fusion' and 'bitcast' in user.name):
            yield from _users(users, user.name)
        else:
            yield user, name
