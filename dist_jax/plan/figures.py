"""From a compiled step to the figures of a plan."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable
from typing import Any

from dist_jax.plan import hlo
from dist_jax.plan.chips import Chip
from dist_jax.plan.compiling import Compiled
from dist_jax.plan.topology import Topology

# Arguments of the steps, by how their names begin in the program -> kind.
KINDS = (
    ('state.params', 'trainable'),
    ('variables', 'trainable'),
    ('state.opt_state', 'optimizer'),
    ('state.ema', 'average'),
    ('state', 'other state'),
    ('frozen', 'frozen'),
    ('batch', 'batch'),
    ('video', 'batch'),
)
TOP = 12  # operations that are listed


def kind_of(argument: str) -> str:
    """'state.params['layers']...' -> 'trainable'."""
    return next((kind for prefix, kind in KINDS if argument.startswith(prefix)), 'other')


def step_figures(compiled: Compiled, topology: Topology, clips: int) -> dict[str, Any]:
    """The figures of one step; see `dist_jax plan --help` for what is estimated how.

    Args:
      compiled: the compiler's answer.
      topology: what it was compiled for.
      clips: worked on by one call, over all chips.
    """
    chip = topology.chip
    limit = compiled.limit_bytes or chip.hbm_bytes
    figures: dict[str, Any] = {
        'clips_per_chip': clips / topology.num_chips,
        'hbm_limit_bytes': limit,
        'compile_seconds': round(compiled.seconds, 2),
    }
    if not compiled.text:
        return figures | {'fits': False, 'hbm_bytes_needed': compiled.needed_bytes}
    program = hlo.read_program(compiled.text)
    memory = hbm_bytes(compiled.memory, program)
    estimate = cycles(program, chip)
    seconds = estimate['estimated_cycles'] / chip.clock
    return (
        figures
        | {
            'fits': sum(memory.values()) <= limit,
            'hbm_bytes_per_chip': memory,
            'hbm_bytes_needed': sum(memory.values()),
            'temp_bytes': compiled.memory['temporaries'],
            'compiled_flops': program.flops,
            'hbm_bytes_accessed': program.hbm_bytes,
            'collective_bytes': collective_bytes(program),
            'collectives': collectives(program),
        }
        | estimate
        | {
            'estimated_seconds': seconds,
            'clips_per_second_per_chip': clips / topology.num_chips / seconds,
            'compiled_flops_utilisation': program.flops / seconds / chip.peak_flops,
            'groups': groups(program, chip),
            'top_operations': top_operations(program, chip),
            'loops_of_unknown_length': sorted(set(program.unknown_loops)),
        }
    )


def hbm_bytes(memory: dict[str, int], program: hlo.Program) -> dict[str, int]:
    """Bytes of a chip's HBM by kind; padding of the layouts is in them."""
    found = dict.fromkeys(('frozen', 'trainable', 'optimizer', 'batch', 'temporaries'), 0)
    for name, size in program.parameters:
        found[kind_of(name)] = found.get(kind_of(name), 0) + size
    rest = memory['arguments'] - sum(size for _, size in program.parameters)
    found['temporaries'] = memory['temporaries']
    found['outputs'] = memory['outputs'] - memory['aliased'] + max(rest, 0)
    found['program'] = memory['program']
    return found


def declared_seconds(declared: dict[str, int], chip: Chip) -> float:
    """Time of a kernel from the cost it declares: the slower of its products and its traffic."""
    return max(
        declared.get('flops', 0) / chip.peak_flops,
        declared.get('bytes_accessed', 0) / chip.hbm_bytes_per_second,
    )


def wire_seconds(op: hlo.Operation, chip: Chip) -> float:
    """Time of a collective on all links of a chip, as rings: a lower bound."""
    n = op.group_size
    passes = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1.0}.get(
        op.collective, (n - 1) / n
    )
    return passes * op.payload_bytes / chip.ici_bytes_per_second


def cycles_of(op: hlo.Operation, chip: Chip) -> float:
    """Cycles of one execution; 0 for what runs beside the core."""
    if op.asynchronous:
        return 0.0
    if op.collective:
        return wire_seconds(op, chip) * chip.clock
    if op.declared is not None and not op.cycles:
        return declared_seconds(op.declared, chip) * chip.clock
    return float(op.cycles)


def cycles(program: hlo.Program, chip: Chip) -> dict[str, Any]:
    """Where the cycles of a step come from, and what runs beside them."""
    kernels = [op for op in program.operations if op.declared is not None and not op.cycles]
    waits = [op for op in program.operations if op.collective and not op.asynchronous]
    beside = [op for op in program.operations if op.collective and op.asynchronous]
    kernel = sum(declared_seconds(op.declared or {}, chip) * op.count for op in kernels)
    wire = sum(wire_seconds(op, chip) * op.count for op in waits)
    hidden = sum(wire_seconds(op, chip) * op.count for op in beside)
    return {
        'estimated_cycles': program.compiler_cycles + (kernel + wire) * chip.clock,
        'compiler_cycles': program.compiler_cycles,
        'kernel_cycles': kernel * chip.clock,
        'kernels': sum(op.count for op in kernels),
        'collective_cycles': wire * chip.clock,
        'asynchronous_collective_seconds': hidden,
        'hbm_seconds': program.hbm_bytes / chip.hbm_bytes_per_second,
    }


def collective_bytes(program: hlo.Program) -> dict[str, int]:
    """Bytes that a chip puts in, by kind of collective."""
    found: collections.Counter[str] = collections.Counter()
    for op in program.operations:
        if op.collective:
            found[op.collective] += op.payload_bytes * op.count
    return dict(found)


def collectives(program: hlo.Program) -> list[dict[str, Any]]:
    """Every collective, largest first."""
    rows = [
        {
            'kind': op.collective,
            'bytes': op.payload_bytes,
            'count': op.count,
            'chips': op.group_size,
            'asynchronous': op.asynchronous,
            'op_name': op.op_name,
            'source': short_source(op.source),
        }
        for op in program.operations
        if op.collective
    ]
    return sorted(rows, key=lambda row: -row['bytes'] * row['count'])


# Parts of a name stack that say how something runs, not what it is.
_PLUMBING = re.compile(
    r'^(while|body|cond|closed_call|checkpoint|rematted_computation|core_call|custom_jvp_call.*'
    r'|custom_vjp_call.*|branch_\d+_fun|shard_map|pjit|remat|jit\(.*\)|vmap\(.*\)|.*->.*)$'
)
_WRAPPED = re.compile(r'^(?:transpose|jvp|checkpoint|rematted_computation)\((.*)\)$')


def group_of(op_name: str, source: str = '') -> tuple[str, str]:
    """(module, pass) of an operation.

    The module is made of the first two names of jax's name stack (Flax modules, named scopes);
    where there are none, of the source file in brackets. The pass is 'forward', 'backward',
    'recompute' (forward again, for the backward pass), or '' outside the differentiated part.
    """
    parts = op_name.split('/')
    if 'rematted_computation' in op_name:
        direction = 'recompute'
    elif 'transpose(' in op_name:
        direction = 'backward'
    else:
        direction = 'forward' if 'jvp(' in op_name else ''
    names: list[str] = []
    for part in parts[:-1]:
        wrapped = False
        while found := _WRAPPED.match(part):
            part, wrapped = found[1], True
        # The outermost name of a differentiated part is the whole network.
        if part and not wrapped and not _PLUMBING.match(part):
            names.append(re.sub(r'_\d+$', '_*', part))
    if names:
        return '/'.join(names[:2]), direction
    return (f'({short_source(source).partition(":")[0]})' if source else '(other)'), direction


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
    for op in program.operations:
        spent = cycles_of(op, chip) * op.count
        total += spent
        row = table.setdefault(group_of(op.op_name, op.source), collections.defaultdict(float))
        row['cycles'] += spent
        row['flops'] += op.flops * op.count
        row['hbm_bytes'] += op.hbm_bytes * op.count
        if op.declared is not None:
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
    ranked: Iterable[hlo.Operation] = sorted(
        program.operations, key=lambda op: -cycles_of(op, chip) * op.count
    )[:most]
    return [
        {
            'name': op.name,
            'cycles': cycles_of(op, chip) * op.count,
            'count': op.count,
            'estimated_by': 'declared cost'
            if op.declared is not None and not op.cycles
            else 'bytes on the links'
            if op.collective
            else 'compiler',
            'flops': op.flops * op.count,
            'hbm_bytes': op.hbm_bytes * op.count,
            'op_name': op.op_name,
            'source': short_source(op.source),
        }
        for op in ranked
        if math.isfinite(op.cycles)
    ]
