"""Reads a kernel's schedule as libtpu dumps it, and runs its scalar part to count cycles.

A bundle is one cycle of one core. The dump has no trip counts, but all the code: the counters of
loops, the predicates of what `pl.when` guards and of copies are scalar arithmetic that depends on
nothing but the core's number. So it is run: every loop, branch and copy counts as often as it
happens.

What is read is the schedule behind register allocation (`packed-bundles-post-ra`), in which the
bundles that wait for a unit are written out, empty. The later `final_bundles` leaves them out: a
product of 16 rows occupies its unit for 16 cycles there as well, and two of them stand two bundles
apart. Waiting for memory is in neither.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_jax.models.kernel_costs import CORES, MATRIX_UNITS

GRANULE_BYTES = 512  # of a copy

_BUNDLE = re.compile(
    r'^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:[ >]*\{((?:[^{}]|\{[^{}]*\})*)\}', re.MULTILINE
)
_COMMENT = re.compile(r'/\*.*?\*/', re.DOTALL)
_INSTRUCTION = re.compile(
    r'%(?P<name>\w+) = (?P<opcode>[\w.]+) *'
    r'(?P<address>\[(?:smem|thread):(?:[^\[\]]|\[[^\]]*\])*\])? *'
    r'(?:\((?P<guard>!?%\w+)(?:, (?P<otherwise>%\w+))?\),? *)?(?P<rest>.*)',
    re.DOTALL,
)
_BRANCH = re.compile(r'target bundleno = (\d+)')

Value = int | bool | None  # None: not known
State = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One scalar instruction, branch or copy.

    Attributes:
      name: `s31_s23`: number of the value, and the register that holds it.
      opcode: as the dump writes it.
      guard: predicate without which nothing happens, '!%p..' if negated; ''.
      otherwise: what the value is without it; ''.
      operands: registers, numbers; of loads and stores the address first.
      target: bundle that a branch goes to.
    """

    name: str
    opcode: str
    guard: str
    otherwise: str
    operands: tuple[str, ...]
    target: int = -1


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one core does in a call of a kernel.

    Attributes:
      cycles: bundles, loops multiplied.
      busy: unit -> share of its slots that are used.
      product_cycles: that the matrix units need for the products alone.
      bytes: copied from and to memory.
    """

    cycles: int
    busy: dict[str, float]
    product_cycles: float
    bytes: int


def read(folder: Path, kernel: str) -> Schedule:
    """The schedule of the one kernel of this name that was dumped into a folder.

    Raises:
      ValueError: there is none or several, or a branch of it depends on data.
    """
    code = _only(folder, f'*-{kernel}.*-packed-bundles-post-ra.txt', 'schedule-analysis')
    slots = _only(folder, f'*-{kernel}.*-pre-delay_hlo-static-per-bundle-utilization.txt')
    return schedule(code.read_text(), slots.read_text())


def _only(folder: Path, pattern: str, without: str = ' ') -> Path:
    found = [path for path in folder.glob(pattern) if without not in path.name]
    if len(found) != 1:
        raise ValueError(f'{folder}: {len(found)} files {pattern} instead of one')
    return found[0]


def schedule(code: str, slots: str) -> Schedule:
    """From the text of the bundles and of the slots that each uses."""
    bundles = parse(code)
    units, capacity, used = _slots(slots)
    if len(used) != len(bundles):
        raise ValueError(f'{len(bundles)} bundles, and slots of {len(used)}')
    # Frames are dealt out to both cores; the slower one decides.
    runs = (run(bundles, core) for core in range(CORES))
    times, copied = max(runs, key=lambda counted: sum(counted[0]))
    cycles = sum(times)
    total = [sum(t * row[i] for t, row in zip(times, used)) for i in range(len(units))]
    return Schedule(
        cycles,
        {unit: total[i] / capacity[i] / cycles for i, unit in enumerate(units)},
        total[units.index('MXU')] / MATRIX_UNITS,
        copied,
    )


def parse(code: str) -> list[list[Instruction]]:
    """The scalar instructions of every bundle that branches and copies depend on."""
    bundles = []
    for number, (address, body) in enumerate(_BUNDLE.findall(_COMMENT.sub(_granules, code))):
        if int(address, 16) != number:
            raise ValueError(f'bundle {number} of the schedule cannot be read')
        parts = (_instruction(part.strip()) for part in body.split(';;'))
        bundles.append([part for part in parts if part is not None])
    return _needed(bundles)


def _granules(comment: re.Match[str]) -> str:
    return 'granules ' if comment[0] == '/*size_in_granules=*/' else ''


def _instruction(text: str) -> Instruction | None:
    found = _INSTRUCTION.match(text)
    if found is None:
        return None
    opcode, rest = found['opcode'], found['rest']
    target = -1
    if opcode.startswith(('sbr', 'scall')):
        branch = _BRANCH.search(rest)
        if opcode != 'sbr.rel' or branch is None:
            raise ValueError(f'a branch of an unknown kind: {text}')
        target, operands = int(branch[1]), ()
    elif opcode.startswith('dma.') and 'granules' in rest:
        operands = (rest.partition('granules ')[2].partition(',')[0],)
    elif opcode[0] in 'sp':
        operands = tuple(part.strip() for part in rest.split(',') if part.strip())
        operands = (found['address'] or '', *operands) if opcode in ('sld', 'sst') else operands
    else:
        return None
    guard, otherwise = found['guard'] or '', found['otherwise'] or ''
    return Instruction(found['name'], opcode, guard, otherwise, operands, target)


def _needed(bundles: list[list[Instruction]]) -> list[list[Instruction]]:
    """Without arithmetic that no branch and no copy depends on."""
    every = [one for bundle in bundles for one in bundle]
    wanted: set[str] = set()
    kept: set[int] = set()
    grown = True
    while grown:
        before = len(kept)
        for one in every:
            root = one.opcode == 'sbr.rel' or one.opcode.startswith('dma.')
            stored = one.opcode == 'sst' and one.operands[0] in wanted
            if root or stored or _value(one.name) in wanted:
                kept.add(id(one))
                wanted |= {
                    _value(o.lstrip('!%')) for o in (one.guard, one.otherwise, *one.operands)
                }
        grown = len(kept) > before
    return [[one for one in bundle if id(one) in kept] for bundle in bundles]


def _value(name: str) -> str:
    """`s31_s23` -> `s31`; an address stays."""
    return name if name.startswith('[') else name.partition('_')[0]


def _slots(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    lines = text.splitlines()
    units = [name.strip() for name in lines[1].split(',')]
    capacity = [int(number) for number in lines[2].split()]
    return units, capacity, [[int(number) for number in line.split()] for line in lines[4:] if line]


def run(bundles: Sequence[Sequence[Instruction]], core: int) -> tuple[list[int], int]:
    """Runs the scalar part on one core.

    Returns:
      How often each bundle is executed, and the bytes that are copied.

    Raises:
      ValueError: a branch depends on what is not known here, such as data.
    """
    busy = [number for number, bundle in enumerate(bundles) if bundle] + [len(bundles)]
    upcoming, place = [], 0
    for number in range(len(bundles) + 1):
        place += busy[place] < number
        upcoming.append(busy[place])
    state: State = {'[smem:[#allocation0]]': core}
    held: dict[str, str] = {}  # register -> the value in it
    entered, left = [0] * (len(bundles) + 1), [0] * (len(bundles) + 1)
    copied, number, start, jump = 0, 0, 0, -1
    while number < len(bundles):
        landing, jump = jump, -1
        written: State = {}
        for one in bundles[number]:
            if one.opcode == 'sphi':
                # No instruction: its sources share its register, and name what is in it.
                value, register = one.name.split('_')
                state[value] = state.get(held.get(register, value))
                held[register] = value
        for one in bundles[number]:
            holds = not one.guard or _read(state, one.guard)
            if one.opcode == 'sphi' or (holds is False and not one.otherwise):
                continue
            if one.opcode == 'sbr.rel':
                if holds is None:
                    raise ValueError(f'the branch in bundle {number} depends on data')
                jump = one.target
            elif one.opcode.startswith('dma.'):
                size = _read(state, one.operands[0])
                if size is None or holds is None:
                    raise ValueError(f'the copy in bundle {number} depends on data')
                copied += size * GRANULE_BYTES
            elif one.opcode == 'sst':
                written[one.operands[0]] = _read(state, one.operands[1])
            else:
                value, register = one.name.split('_')
                result = _result(one, state)
                if one.otherwise:
                    result = _select(holds, result, _read(state, one.otherwise))
                written[value] = result
                held[register] = value
        state |= written
        if landing >= 0:  # the bundle behind a branch is executed before it takes effect
            entered[start] += 1
            left[number + 1] += 1
            number = start = landing
        else:
            number = number + 1 if jump >= 0 else upcoming[number + 1]
    entered[start] += 1
    left[len(bundles)] += 1
    times, now = [], 0
    for number in range(len(bundles)):
        now += entered[number] - left[number]
        times.append(now)
    return times, copied


def _result(one: Instruction, state: State) -> Value:
    if one.opcode == 'sld':
        return state.get(one.operands[0])
    operands = [_read(state, operand) for operand in one.operands]
    if one.opcode in _LOGIC:
        return _LOGIC[one.opcode](*operands)
    function = _ARITHMETIC.get(one.opcode)
    if function is None or None in operands:
        return None
    return function(*operands)


def _read(state: State, operand: str) -> Value:
    if operand.startswith('!'):
        found = _read(state, operand[1:])
        return None if found is None else not found
    if operand.startswith('%'):
        return state.get(_value(operand[1:]))
    number = operand.removeprefix('-')
    return int(operand) & _MASK if number.isdigit() else None


_MASK = 2**32 - 1


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


def _or(a: Value, b: Value) -> Value:
    if True in (a, b):
        return True
    return None if None in (a, b) else False


def _not(a: Value) -> Value:
    return None if a is None else not a


def _select(which: Value, a: Value, b: Value) -> Value:
    return None if which is None else (a if which else b)


_LOGIC: dict[str, Callable[..., Value]] = {
    'por': _or,
    'pand': lambda a, b: _not(_or(_not(a), _not(b))),
    'pnand': lambda a, b: _or(_not(a), _not(b)),
    'pneg': _not,
    'pmov': lambda a: a,
    'smov': lambda a: a,
    'scalar_select': _select,
}
_ARITHMETIC: dict[str, Callable[..., Value]] = {
    'sadd.s32': lambda a, b: (a + b) & _MASK,
    'ssub.s32': lambda a, b: (a - b) & _MASK,
    'smul.u32': lambda a, b: (a * b) & _MASK,
    'sand.u32': lambda a, b: a & b,
    'sor.u32': lambda a, b: a | b,
    'sxor.u32': lambda a, b: a ^ b,
    'sshll.u32': lambda a, b: (a << b) & _MASK,
    'sshrl.u32': lambda a, b: a >> b,
    'sshra.s32': lambda a, b: (_signed(a) >> b) & _MASK,
    'scmp.eq.s32.totalorder': lambda a, b: a == b,
    'scmp.ne.s32.totalorder': lambda a, b: a != b,
    'scmp.lt.s32.totalorder': lambda a, b: _signed(a) < _signed(b),
    'scmp.le.s32.totalorder': lambda a, b: _signed(a) <= _signed(b),
    'scmp.gt.s32.totalorder': lambda a, b: _signed(a) > _signed(b),
    'scmp.ge.s32.totalorder': lambda a, b: _signed(a) >= _signed(b),
}
