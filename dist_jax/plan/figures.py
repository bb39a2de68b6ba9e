"""From a compiled step to the figures of a plan."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dist_jax.plan import gradients, hlo
from dist_jax.plan.chips import Chip
from dist_jax.plan.compiling import Compiled, Step
from dist_jax.plan.topology import Topology

# Arguments of the steps, by how their names begin in the program -> kind.
KINDS = (
    ('state.params', 'trainable'),
    ('variables', 'trainable'),
    ('state.opt_state', 'optimizer'),
    ('state.ema', 'average'),
    ('state', 'other_state'),
    ('frozen', 'frozen'),
    ('batch', 'batch'),
)
FIRST = ('frozen', 'trainable', 'optimizer', 'batch', 'temporaries')
TOP = 15  # operations and collectives that are listed


def kind_of(argument: str) -> str:
    """ "state.params['layers']..." -> 'trainable'."""
    return next((kind for prefix, kind in KINDS if argument.startswith(prefix)), 'other')


def step_figures(one: Step, compiled: Compiled, topology: Topology) -> dict[str, Any]:
    """The figures of one step; `dist_jax plan --help` says what is estimated how.

    Args:
      one: the step.
      compiled: the compiler's answer.
      topology: what it was compiled for.

    Returns:
      What goes into JSON: bytes, seconds, cycles and FLOPs of one chip and one step, if nothing
      else is said. Without a program, because it does not fit, there are no times.
    """
    chip = topology.chip
    per_chip = one.clips / topology.num_chips
    limit = compiled.limit_bytes or chip.hbm_bytes
    figures: dict[str, Any] = {
        'clips_per_chip': per_chip,
        'fits': compiled.fits,
        'hbm_bytes_limit': limit,
        'model_flops': one.flops_per_clip * per_chip,
        'model_flops_per_clip': one.flops_per_clip,
        'compile_seconds': round(compiled.seconds, 2),
    }
    if not compiled.text:
        memory = argument_bytes(one)
        known = sum(memory.values())
        needed = compiled.needed_bytes
        memory['batches_ahead'] = ahead = batches_ahead(memory, one)
        if needed is not None:
            memory['temporaries'] = max(needed - known, 0)
            needed += ahead
        unknown = (
            'compiled_flops',
            'hbm_bytes_accessed',
            'estimated_cycles',
            'estimated_seconds',
            'clips_per_second_per_chip',
            'estimated_mfu',
            'collective_bytes',
        )
        return (
            figures
            | {
                'hbm_bytes_per_chip': memory,
                'hbm_bytes_needed': needed,
                'temp_bytes': memory.get('temporaries'),
                'largest_allocations': [
                    {'bytes': size, 'op_name': name, 'shape': shape}
                    for size, name, shape in compiled.largest
                ],
            }
            | dict.fromkeys(unknown)
        )
    program = hlo.read_program(compiled.text)
    memory = hbm_bytes(compiled.memory, program)
    memory['batches_ahead'] = batches_ahead(memory, one)
    needed = sum(memory.values())
    estimate = cycles(program, chip)
    seconds = estimate['estimated_cycles'] / chip.clock
    return (
        figures
        | {
            'hbm_bytes_per_chip': memory,
            'hbm_bytes_needed': needed,
            'fits': compiled.fits and needed <= limit,
            'temp_bytes': compiled.memory['temporaries'],
            'compiled_flops': program.flops,
            'hbm_bytes_accessed': program.hbm_bytes,
            'collective_bytes': collective_bytes(program),
            'collectives': collectives(program, chip, mesh_sizes(one)),
            'kernel_times': kernel_times(program, chip),
        }
        | estimate
        | {
            'estimated_seconds': seconds,
            'clips_per_second_per_chip': per_chip / seconds,
            'estimated_mfu': figures['model_flops'] / seconds / chip.peak_flops,
            'groups': groups(program, chip),
            'top_operations': top_operations(program, chip),
            'loops_of_unknown_length': sorted(set(program.unknown_loops)),
        }
    )


def hbm_bytes(memory: dict[str, int], program: hlo.Program) -> dict[str, float]:
    """Bytes of a chip's HBM by kind, as the compiler lays them out (padding included)."""
    found: dict[str, float] = dict.fromkeys(FIRST, 0)
    for name, size in program.parameters:
        found[kind_of(name)] = found.get(kind_of(name), 0) + size
    rest = memory['arguments'] - sum(size for _, size in program.parameters)
    found['temporaries'] = memory['temporaries']
    found['outputs'] = max(memory['outputs'] - memory['aliased'] + rest, 0)
    found['program'] = memory['program']
    return found


def batches_ahead(memory: dict[str, float], one: Step) -> float:
    """Bytes of the batches that are on the chip beside the program's own."""
    return (one.batches - 1) * memory['batch']


def argument_bytes(one: Step) -> dict[str, float]:
    """Bytes of a step's arguments on a chip by kind, from their shapes alone (no padding)."""
    found: dict[str, float] = dict.fromkeys(FIRST[:-1], 0)
    for name, tree in one.arguments.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            kind = kind_of(name + jax.tree_util.keystr(path))
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            found[kind] = found.get(kind, 0) + size
    return found


def mesh_sizes(one: Step) -> dict[str, int]:
    """Axis of the mesh that a step is compiled for -> chips along it."""
    leaves = jax.tree.leaves(one.arguments)
    return dict(leaves[0].sharding.mesh.shape) if leaves else {}


def schedule_cycles(op: hlo.Operation, chip: Chip) -> float:
    """Cycles of a kernel by its schedule, without waiting for memory.

    The FLOPs that a kernel declares are its schedule on v4, as if products filled it. On another
    chip it is taken to have the same share of the peak: as many cycles on v5p, twice as many on
    v5e, half as many on v6e, where vector operations that bind a kernel would not be that quick.
    """
    return op.declared.get('flops', 0) / chip.peak_flops * chip.clock


def memory_cycles(op: hlo.Operation, chip: Chip) -> float:
    """Cycles in which the bytes that a kernel declares pass at the bandwidth of the HBM."""
    return op.declared.get('bytes_accessed', 0) / chip.hbm_bytes_per_second * chip.clock


def wire_seconds(op: hlo.Operation, chip: Chip) -> float:
    """Time of a collective as rings on all links of a chip: a lower bound.

    What is sent between slices takes no time here: nothing is published to reckon with.
    """
    n = len(op.group)
    passes = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1.0, 'send': 0.0}.get(
        op.collective, (n - 1) / n
    )
    return passes * op.payload_bytes / chip.ici_bytes_per_second


def cycles_of(op: hlo.Operation, chip: Chip) -> float:
    """Cycles of one execution; 0 for what runs beside the core."""
    if op.asynchronous:
        return 0.0
    if op.collective:
        return wire_seconds(op, chip) * chip.clock
    if _declares(op):
        return max(schedule_cycles(op, chip), memory_cycles(op, chip))
    return float(op.cycles)


@dataclasses.dataclass(frozen=True)
class Wait:
    """A collective that runs beside the core, all executions of a step.

    Attributes:
      start: its first half.
      done: its second half, which waits.
      between: cycles of what the core does between the halves.
      cycles: that the core then waits for the links.
    """

    start: hlo.Operation
    done: hlo.Operation
    between: float
    cycles: float


def waits(program: hlo.Program, chip: Chip, links: float = 1.0) -> list[Wait]:
    """What the core waits for collectives that run beside it.

    Transfers share the links, which serve first what is waited for first.

    Args:
      program: what runs, in its order.
      chip: where.
      links: share of the chip's links that collectives use.
    """
    running, halves = {}, {}
    for number, op in enumerate(program.operations):
        if op.collective and op.asynchronous:
            running[op.name] = number
        elif op.completes in running:
            halves[running.pop(op.completes)] = number
    found, now = [], 0.0
    left: dict[int, float] = {}  # second half -> cycles that the links still need for it
    since: dict[int, tuple[hlo.Operation, float]] = {}
    for number, op in enumerate(program.operations):
        if number in halves:
            transfer = wire_seconds(op, chip) * chip.clock * op.count / links
            left[halves[number]], since[halves[number]] = transfer, (op, now)
        elif number in since:
            start, began = since[number]
            wait = left.pop(number)
            found.append(Wait(start, op, now - began, wait))
            now += wait
        else:
            passing = cycles_of(op, chip) * op.count
            now += passing
            for done in sorted(left):
                served = min(passing, left[done])
                left[done] -= served
                passing -= served
    return found


def spent(program: hlo.Program, chip: Chip) -> list[tuple[hlo.Operation, float]]:
    """Operations with the cycles of all their executions, waiting included."""
    waiting = {id(wait.done): wait.cycles for wait in waits(program, chip)}
    return [(op, waiting.get(id(op), cycles_of(op, chip) * op.count)) for op in program.operations]


def cycles(program: hlo.Program, chip: Chip) -> dict[str, Any]:
    """Where the cycles of a step come from, and what runs beside them."""
    kernels = [op for op in program.operations if _declares(op)]
    kernel = sum(cycles_of(op, chip) * op.count for op in kernels)
    synchronous = [op for op in program.operations if op.collective and not op.asynchronous]
    beside = [op for op in program.operations if op.collective and op.asynchronous]
    wire = sum(cycles_of(op, chip) * op.count for op in synchronous)
    waiting = sum(wait.cycles for wait in waits(program, chip))
    hidden = sum(wire_seconds(op, chip) * op.count for op in beside)
    copied = sum(
        op.hbm_bytes * op.count
        for op in program.operations
        if op.asynchronous and not op.collective
    )
    return {
        'estimated_cycles': program.compiler_cycles + kernel + wire + waiting,
        'compiler_cycles': program.compiler_cycles,
        'kernel_cycles': kernel,
        'kernels': sum(op.count for op in kernels),
        'collective_cycles': wire + waiting,
        'collective_cycles_on_links_of_one_dimension': wire * chip.dimensions
        + sum(wait.cycles for wait in waits(program, chip, 1 / chip.dimensions)),
        'asynchronous_collective_seconds': hidden,
        'asynchronous_copy_seconds': copied / chip.hbm_bytes_per_second,
        'hbm_seconds': program.hbm_bytes / chip.hbm_bytes_per_second,
    }


def kernel_times(program: hlo.Program, chip: Chip) -> list[dict[str, Any]]:
    """Cycles of kernels by schedule and by memory; the larger of both counts."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for op in program.operations:
        if not _declares(op):
            continue
        name = re.sub(r'[.\d]+$', '', op.name)
        module, _ = group_of(op.op_name, op.source, op.opcode)
        row = table.setdefault(
            (name, module), {'name': name, 'module': module} | dict.fromkeys(_KERNEL_SUMS, 0)
        )
        times = schedule_cycles(op, chip), memory_cycles(op, chip), cycles_of(op, chip)
        for key, value in zip(_KERNEL_SUMS, (1, *times)):
            row[key] += value * op.count
    return sorted(table.values(), key=lambda row: -row['cycles'])


_KERNEL_SUMS = ('count', 'schedule_cycles', 'memory_cycles', 'cycles')


def collective_bytes(program: hlo.Program) -> dict[str, int]:
    """Bytes that a chip puts in, by kind of collective."""
    found: collections.Counter[str] = collections.Counter()
    for op in program.operations:
        if op.collective:
            found[op.collective] += op.payload_bytes * op.count
    return dict(found)


def collectives(program: hlo.Program, chip: Chip, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
    """The largest collectives; those of the same origin together.

    Returns:
      Rows of all executions: `bytes`, `transfer_cycles` on all links of a chip, `between_cycles`
      of what the core does meanwhile, `wait_cycles` that it does nothing, the same where a
      collective has the links of one dimension of the torus only, and `axes` of the mesh.
    """
    waiting, narrow = (
        {id(wait.start): wait for wait in waits(program, chip, links)}
        for links in (1.0, 1 / chip.dimensions)
    )
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for op in program.operations:
        if not op.collective:
            continue
        key = (op.collective, op.op_name, op.source, op.asynchronous, op.group)
        row = table.setdefault(
            key,
            {
                'kind': op.collective,
                'axes': axes_of(op.group, mesh),
                'chips': len(op.group),
                'asynchronous': op.asynchronous,
                'op_name': op.op_name,
                'source': short_source(op.source),
            }
            | dict.fromkeys(_COLLECTIVE_SUMS, 0),
        )
        transfer, wait = wire_seconds(op, chip) * chip.clock * op.count, waiting.get(id(op))
        alone = 0 if op.asynchronous else 1
        for name, value in zip(
            _COLLECTIVE_SUMS,
            (
                op.payload_bytes * op.count,
                op.count,
                transfer,
                wait.between if wait else 0,
                wait.cycles if wait else alone * transfer,
                narrow[id(op)].cycles if wait else alone * transfer * chip.dimensions,
            ),
        ):
            row[name] += value
    return sorted(table.values(), key=lambda row: -row['bytes'])[:TOP]


_COLLECTIVE_SUMS = (
    'bytes',
    'count',
    'transfer_cycles',
    'between_cycles',
    'wait_cycles',
    'wait_cycles_on_links_of_one_dimension',
)


def axes_of(group: tuple[int, ...], mesh: Mapping[str, int]) -> str:
    """Axes of the mesh that chips of a group differ along: 'fsdp', 'data x fsdp'."""
    if max(group) >= math.prod(mesh.values()):
        return ''
    places = np.unravel_index(group, tuple(mesh.values()))
    return ' x '.join(name for name, at in zip(mesh, places) if len(set(at.tolist())) > 1)


# Parts of a name stack that say how something runs, not what it is.
_PLUMBING = re.compile(
    r'^(while|body|cond|closed_call|checkpoint|rematted_computation|core_call|custom_jvp_call.*'
    r'|custom_vjp_call.*|branch_\d+_fun|shard_map|pjit|remat|jit\(.*\)|vmap\(.*\)|.*->.*)$'
)
_WRAPPED = re.compile(r'^(?:transpose|jvp|checkpoint|rematted_computation)\((.*)\)$')


def group_of(op_name: str, source: str = '', opcode: str = 'unknown') -> tuple[str, str]:
    """(module, pass) of an operation.

    The module is made of the first two names of jax's name stack (Flax modules, named scopes).
    Where there are none, brackets hold the source file, or the kind of an operation that the
    compiler added by itself. The pass is 'forward', 'backward',
    'recompute' (forward again, for the backward pass), or '' outside the differentiated part.
    """
    parts = op_name.split('/')
    if 'rematted_computation' in op_name:
        direction = 'recompute'
    elif 'transpose(' in op_name:
        direction = 'backward'
    else:
        direction = 'forward' if 'jvp(' in op_name else ''
    names: list[str] = []  # 'module.method', which Flax adds to the module's name, is left out
    for part in parts[:-1]:
        wrapped = False
        while found := _WRAPPED.match(part):
            part, wrapped = found[1], True
        # The outermost name of a differentiated part is the whole network.
        if part and not wrapped and not _PLUMBING.match(part) and '.' not in part:
            names.append(re.sub(r'_\d+$', '_*', part))
    if len(names) > 1 and names[0] == gradients.NET:
        del names[0]
    if names:
        return '/'.join(names[:2]), direction
    if source:
        return f'({short_source(source).partition(":")[0]})', direction
    return f'({opcode})', direction


def short_source(source: str) -> str:
    """'.../dist_jax/models/clip.py:152' -> 'models/clip.py:152'; other packages by their name."""
    for marker in ('/dist_jax/dist_jax/', '/dist_jax/', '/site-packages/'):
        _, found, rest = source.rpartition(marker)
        if found:
            return rest
    return '/'.join(source.split('/')[-2:])


def groups(program: hlo.Program, chip: Chip) -> list[dict[str, Any]]:
    """Cycles and FLOPs by module and pass, most cycles first."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    total = 0.0
    for op, time in spent(program, chip):
        total += time
        row = table.setdefault(
            group_of(op.op_name, op.source, op.opcode), collections.defaultdict(float)
        )
        row['cycles'] += time
        row['flops'] += op.flops * op.count
        row['hbm_bytes'] += op.hbm_bytes * op.count
        if _declares(op):
            row['kernels'] += op.count
    rows = [
        {
            'name': name,
            'pass': direction,
            'cycles': row['cycles'],
            'share': row['cycles'] / max(total, 1.0),
            'flops': row['flops'],
            'hbm_bytes': row['hbm_bytes'],
            'kernels': int(row['kernels']),
        }
        for (name, direction), row in table.items()
        if row['cycles']
    ]
    return sorted(rows, key=lambda row: -row['cycles'])


def top_operations(program: hlo.Program, chip: Chip, most: int = TOP) -> list[dict[str, Any]]:
    """The operations with the most cycles."""
    rows = []
    for op, time in sorted(spent(program, chip), key=lambda one: -one[1])[:most]:
        by = 'bytes on the links' if op.collective or op.completes else 'compiler'
        rows.append(
            {
                'name': op.name,
                'cycles': time,
                'count': op.count,
                'estimated_by': 'declared cost' if _declares(op) else by,
                'flops': op.flops * op.count,
                'hbm_bytes': op.hbm_bytes * op.count,
                'op_name': op.op_name,
                'source': short_source(op.source),
            }
        )
    return rows


def _declares(op: hlo.Operation) -> bool:
    """Whether an operation counts by the cost that it declares: a kernel of one's own."""
    return op.declared is not None and not op.cycles
