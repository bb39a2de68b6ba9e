"""Plans for people: tables on the console and a picture."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dist_jax.drawing import cut, png
from input_pipeline.escape import Console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plan = Mapping[str, Any]

GIB = 2**30
MODULES = 14  # rows of the table and bars of the picture
PASSES = ('', 'forward', 'recompute', 'backward')
PASS_NAMES = {
    '': 'outside the gradient',
    'forward': 'forward',
    'recompute': 'recomputed',
    'backward': 'backward',
}
PASS_COLOURS = {'': '#8c959f', 'forward': '#0b6bcb', 'recompute': '#e3a978', 'backward': '#c2571a'}
KIND_COLOURS = {
    'frozen': '#8c959f',
    'trainable': '#0b6bcb',
    'optimizer': '#6cb6ff',
    'average': '#a5d3ff',
    'batch': '#2f9e5f',
    'batches_ahead': '#8fd3ae',
    'temporaries': '#c2571a',
    'held_for_training': '#cfd6dd',
}
REST_COLOUR = '#d8b9a6'


def _console() -> Console:
    # Into a file, wide enough for the names.
    return Console(width=None if sys.stdout.isatty() else 120)


def print_plan(plan: Plan) -> None:
    """Prints one plan: memory, estimates, modules, operations, and how far to trust them."""
    console = _console()
    steps = {'train step': plan}
    if plan.get('eval') and 'error' not in plan['eval']:
        steps['eval step'] = plan['eval']
    title = f'{plan["label"]} on {plan["topology"]}, {_chips(plan)}'
    console.print(_memory_table(title, steps))
    for step in steps.values():
        _print_allocations(console, step)
    console.print(_estimate_table(plan, steps))
    if plan['estimated_cycles']:
        console.print(_module_table(plan))
        for name, step in steps.items():
            if step.get('kernel_times'):
                console.print(_kernel_table(name, step))
            if step.get('collective_cycles'):
                console.print(_collective_table(name, step))
        console.print(_operation_table(plan))
    if plan.get('eval') and 'error' in plan['eval']:
        console.print(f'eval step: {plan["eval"]["error"]}', soft_wrap=True)
    if plan.get('search'):
        console.print(_search_line(plan['search']), soft_wrap=True)
    for line in _notes(plan):
        console.print(line, soft_wrap=True)


def print_comparison(plans: Sequence[Plan]) -> None:
    """Prints several plans side by side."""
    console = _console()
    columns = [plan['label'] for plan in plans]
    table = Table('', title=f'{plans[0]["topology"]}, train step, {plans[0]["chips"]} chips')
    for label in columns:
        table.add_column(label, justify='right', overflow='fold')
    for kind in _kinds(plans):
        values = [plan['hbm_bytes_per_chip'].get(kind) for plan in plans]
        table.add_row(f'{_words(kind)}, GiB', *(_gib(value) for value in values))
    table.add_row('needed, GiB', *(_gib(p['hbm_bytes_needed']) for p in plans), style='bold')
    table.add_row('fits', *(_fits(plan) for plan in plans), style='bold', end_section=True)
    for name, show in _ESTIMATES:
        table.add_row(name, *(show(plan) for plan in plans))
    if any(plan.get('search') for plan in plans):
        found = [(plan.get('search') or {}).get('largest_clips_per_chip') for plan in plans]
        table.add_row('largest batch a chip', *('-' if n is None else f'{n:g}' for n in found))
    console.print(table)
    for line in _notes(plans[0]):
        console.print(line, soft_wrap=True)


def _chips(plan: Plan) -> str:
    """'8 chips', or how they are arranged where weights are split."""
    split = [f'{name} {size}' for name, size in plan['mesh'].items() if size > 1]
    split = f' ({" x ".join(split)})' if split and split != [f'data {plan["chips"]}'] else ''
    return f'{plan["chips"]} chips{split}'


def _memory_table(title: str, steps: Mapping[str, Plan]) -> Table:
    table = Table('HBM of a chip, GiB', title=title)
    for name, step in steps.items():
        table.add_column(f'{name}, {step["clips_per_chip"]:g} clips a chip', justify='right')
    for kind in _kinds(list(steps.values())):
        values = [step['hbm_bytes_per_chip'].get(kind) for step in steps.values()]
        table.add_row(_words(kind), *(_gib(value) for value in values))
    table.add_row('needed', *(_gib(s['hbm_bytes_needed']) for s in steps.values()), style='bold')
    table.add_row('allowed', *(_gib(s['hbm_bytes_limit']) for s in steps.values()))
    table.add_row('fits', *(_fits(step) for step in steps.values()), style='bold')
    return table


def _print_allocations(console: Console, step: Plan) -> None:
    for one in step.get('largest_allocations', [])[:5]:
        console.print(
            f'  {_gib(one["bytes"])} GiB  {cut(one["shape"], 60)}  {one["op_name"]}',
            soft_wrap=True,
        )


def _seconds(seconds: float | None) -> str:
    return '-' if seconds is None else f'{1e3 * seconds:,.2f} ms'


def _big(value: float | None, unit: str = '') -> str:
    """Three digits or more, with a prefix: 13.7 T, 330.9 M."""
    if value is None:
        return '-'
    for factor, prefix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= factor:
            return f'{value / factor:,.1f} {prefix}{unit}'
    return f'{value:,.3g} {unit}'.strip()


def _percent(share: float | None) -> str:
    return '-' if share is None else f'{100 * share:.1f} %'


_ESTIMATES = (
    ('clips a chip', lambda p: f'{p["clips_per_chip"]:g}'),
    ('time of a step', lambda p: _seconds(p['estimated_seconds'])),
    ('clips/s/chip', lambda p: _rate(p['clips_per_second_per_chip'])),
    ('MFU', lambda p: _percent(p['estimated_mfu'])),
    ('model FLOPs a clip', lambda p: _big(p['model_flops_per_clip'])),
    ('model FLOPs a step', lambda p: _big(p['model_flops'])),
    ('compiled FLOPs', lambda p: _big(p['compiled_flops'])),
    ('cycles', lambda p: _big(p['estimated_cycles'])),
    ('  from the compiler', lambda p: _big(p.get('compiler_cycles'))),
    ('  of kernels', lambda p: _big(p.get('kernel_cycles') or None)),
    ('  waiting for links', lambda p: _big(p.get('collective_cycles') or None)),
    ('bytes on the links', lambda p: _collectives(p['collective_bytes'])),
    ('HBM traffic', lambda p: _big(p['hbm_bytes_accessed'], 'B')),
    ('  at full bandwidth', lambda p: _seconds(p.get('hbm_seconds'))),
)


def _rate(value: float | None) -> str:
    return '-' if value is None else f'{value:,.{1 if value < 1000 else 0}f}'


def _estimate_table(plan: Plan, steps: Mapping[str, Plan]) -> Table:
    table = Table('estimated, of a chip and a step', *steps, title='time')
    for column in table.columns[1:]:
        column.justify = 'right'
    for name, show in _ESTIMATES:
        table.add_row(name, *(show(step) for step in steps.values()))
    return table


def _collectives(found: Mapping[str, float] | None) -> str:
    if found is None:
        return '-'
    lines = [f'{kind} {_big(size, "B")}' for kind, size in found.items() if size >= 1e5]
    return '\n'.join(lines) or '0'


def _module_table(plan: Plan) -> Table:
    rows = _pivot(plan['groups'])
    total = sum(sum(row.values()) for row in rows.values())
    passes = [p for p in PASSES if any(row.get(p) for row in rows.values())]
    table = Table('train step, M cycles', title='modules')
    for name in (*(PASS_NAMES[p] for p in passes), 'share'):
        table.add_column(name, justify='right')
    for name, row in list(rows.items())[:MODULES]:
        cells = [f'{row[p] / 1e6:.2f}' if row.get(p) else '' for p in passes]
        table.add_row(name, *cells, f'{100 * sum(row.values()) / total:.1f} %')
    rest = list(rows.values())[MODULES:]
    if rest:
        cells = [f'{sum(row.get(p, 0) for row in rest) / 1e6:.2f}' for p in passes]
        share = sum(sum(row.values()) for row in rest) / total
        table.add_row(f'{len(rest)} others', *cells, f'{100 * share:.1f} %')
    return table


def _pivot(groups: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Module -> pass -> cycles, most cycles first."""
    table: dict[str, dict[str, float]] = {}
    for row in groups:
        name = row['name'] + (' (kernel)' if row['kernels'] else '')
        passes = table.setdefault(name, {})
        passes[row['pass']] = passes.get(row['pass'], 0) + row['cycles']
    return dict(sorted(table.items(), key=lambda item: -sum(item[1].values())))


def _operation_table(plan: Plan) -> Table:
    table = Table('M cycles', 'times', 'operation', 'line', title='operations with most cycles')
    table.columns[0].justify = table.columns[1].justify = 'right'
    table.columns[2].overflow = 'fold'
    for row in plan['top_operations']:
        mark = '' if row['estimated_by'] == 'compiler' else f' [{row["estimated_by"]}]'
        parts = row['op_name'].split('/')
        # What kind of loop it runs in says little.
        kept = [p for p in parts[1:] if p not in ('while', 'body', 'closed_call', 'checkpoint')]
        name = '/'.join(kept) or row['op_name'] or row['name']
        table.add_row(
            f'{row["cycles"] / 1e6:.2f}', str(row['count']), f'{name}{mark}', row['source']
        )
    return table


def _kernel_table(step: str, plan: Plan) -> Table:
    table = Table('M cycles', 'schedule', 'memory', 'counts', 'times', 'kernel', 'module')
    table.title = f'kernels, {step}'
    for row in plan['kernel_times']:
        slower = 'memory' if row['memory_cycles'] > row['schedule_cycles'] else 'schedule'
        numbers = (row[name] for name in ('cycles', 'schedule_cycles', 'memory_cycles'))
        cells = (f'{number / 1e6:.2f}' for number in numbers)
        table.add_row(*cells, slower, str(row['count']), row['name'], row['module'])
    return table


COLLECTIVES = 8  # rows of the table


def _collective_table(step: str, plan: Plan) -> Table:
    """What takes how long on the links, and what the core does meanwhile.

    "On some": what it waits if a collective has the links of one dimension of the torus only.
    """
    table = Table('kind', 'axes', 'MB', 'times', 'on the links', 'beside it', 'waits')
    table.add_column('on some')
    table.add_column('for')
    table.title = f'collectives, {step}, M cycles'
    for column in table.columns[2:-1]:
        column.justify = 'right'
    for row in plan['collectives'][:COLLECTIVES]:
        if row['bytes'] < 1e5:
            continue
        beside = f'{row["between_cycles"] / 1e6:.2f}' if row['asynchronous'] else 'nothing'
        table.add_row(
            row['kind'],
            row['axes'] or f'{row["chips"]} chips',
            f'{row["bytes"] / 1e6:,.1f}',
            str(row['count']),
            f'{row["transfer_cycles"] / 1e6:.2f}',
            beside,
            f'{row["wait_cycles"] / 1e6:.2f}',
            f'{row["wait_cycles_on_links_of_one_dimension"] / 1e6:.2f}',
            row['source'] or row['op_name'],
        )
    return table


def _search_line(search: Mapping[str, Any]) -> str:
    best, worse = search['largest_clips_per_chip'], search['smallest_that_does_not_fit']
    tried = ', '.join(
        f'{t["clips_per_chip"]:g}: {_gib(t["hbm_bytes_needed"])}{"" if t["fits"] else " no"}'
        for t in search['trials']
    )
    found = 'no batch fits' if best is None else f'largest batch that fits: {best:g} clips a chip'
    return (
        f'{found}' + (f' ({worse:g} do not)' if worse else '') + f'. GiB by clips a chip: {tried}'
    )


def _notes(plan: Plan) -> list[str]:
    calibration, versions = plan['calibration'], plan['versions']
    lines = [
        f'compiled by jax {versions["jax"]}, libtpu {versions["libtpu"]}',
        f'calibration: a plain {calibration["size"]}^3 bfloat16 product is '
        f'{calibration["cycles"] / 1e6:.2f} M cycles, {1e3 * calibration["seconds"]:.2f} ms, '
        f'{100 * calibration["share_of_peak"]:.0f} % of the peak of {plan["chip"]["name"]}',
        'These are estimates of the compiler, not measurements: a real step waits for data, hosts '
        'and memory as well.',
    ]
    if plan['num_slices'] > 1:
        lines.append('What slices send each other through their hosts takes no time here.')
    if plan.get('loops_of_unknown_length'):
        loops = ', '.join(plan['loops_of_unknown_length'][:3])
        lines.append(f'loops whose length depends on data count once: {loops}')
    if plan.get('hbm_seconds', 0) and plan['hbm_seconds'] > (plan['estimated_seconds'] or 0):
        lines.append('HBM traffic alone would take longer than these cycles: bound by memory')
    return lines


def _kinds(plans: Sequence[Plan]) -> list[str]:
    """Kinds of memory that any plan has, small ones last."""
    found = dict.fromkeys(kind for plan in plans for kind in plan['hbm_bytes_per_chip'])
    return [
        kind
        for kind in found
        if any((plan['hbm_bytes_per_chip'].get(kind) or 0) >= GIB / 2000 for plan in plans)
    ]


def _words(kind: str) -> str:
    return kind.replace('_', ' ')


def _gib(size: float | None) -> str:
    return f'{size / GIB:,.3f}' if size else '-'


def _fits(plan: Plan) -> str:
    return 'yes' if plan['fits'] else 'NO'


# The picture.


def draw(plans: Sequence[Plan], path: str | Path) -> None:
    """Writes a PNG: memory by kind and time by module of one plan, or both of several."""
    picture = png(lambda: _single(plans[0]) if len(plans) == 1 else _several(plans))
    Path(path).write_bytes(picture)


def _single(plan: Plan) -> Figure:
    from matplotlib.figure import Figure

    rows = list(_pivot(plan.get('groups', [])).items())[:MODULES]
    steps = [('train step', plan)]
    if plan.get('eval') and 'error' not in plan['eval']:
        steps.append(('eval step', plan['eval']))
    upper = 1.15 + 0.42 * len(steps)
    lower = 0.9 + 0.27 * len(rows) if rows else 0
    figure = Figure(figsize=(8.6, upper + lower), layout='constrained')
    ratios = [upper, lower] if rows else [upper]
    axes = figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
    figure.suptitle(
        f'{plan["label"]} on {plan["topology"]}: {_headline(plan)}', x=0.01, ha='left', fontsize=11
    )
    _draw_memory(axes[0], [name for name, _ in steps], [step for _, step in steps])
    if rows:
        _draw_modules(axes[1], rows, plan)
    return figure


def _headline(plan: Plan) -> str:
    if plan['estimated_seconds'] is None:
        return f'{plan["clips_per_chip"]:g} clips a chip do not fit'
    return (
        f'{plan["clips_per_chip"]:g} clips a chip, {_seconds(plan["estimated_seconds"])}, '
        f'{plan["clips_per_second_per_chip"]:.1f} clips/s/chip, '
        f'MFU {100 * plan["estimated_mfu"]:.1f} % (estimates)'
    )


def _several(plans: Sequence[Plan]) -> Figure:
    from matplotlib.figure import Figure

    height = 1.2 + 0.42 * len(plans)
    figure = Figure(figsize=(8.6, 2 * height), layout='constrained')
    above, below = figure.subplots(2, 1)
    labels = [plan['label'] for plan in plans]
    figure.suptitle(
        f'{plans[0]["topology"]}, train step (estimates)', x=0.01, ha='left', fontsize=11
    )
    _draw_memory(above, labels, plans)
    _draw_times(below, labels, plans)
    return figure


def _draw_memory(axis: Axes, labels: Sequence[str], steps: Sequence[Plan]) -> None:
    place = range(len(steps))
    starts = [0.0] * len(steps)
    named, rest = [], []
    for kind in _kinds(steps):
        (named if kind in KIND_COLOURS else rest).append(kind)
    for kinds, label, colour in (
        *(([kind], _words(kind), KIND_COLOURS[kind]) for kind in named),
        (rest, 'program, outputs', REST_COLOUR),
    ):
        sizes = [
            sum(step['hbm_bytes_per_chip'].get(kind) or 0 for kind in kinds) / GIB for step in steps
        ]
        if any(sizes):
            axis.barh(place, sizes, left=starts, height=0.55, color=colour, label=label)
            starts = [a + b for a, b in zip(starts, sizes)]
    limit = steps[0]['hbm_bytes_limit'] / GIB
    most = max(*starts, 1e-9)
    shown = most > limit / 20
    if shown:
        axis.axvline(limit, color='#1c2128', linewidth=1, linestyle=(0, (4, 3)))
        axis.annotate(
            f'{limit:.4g} allowed',
            (limit, 1),
            xycoords=('data', 'axes fraction'),
            xytext=(-3, 2),
            textcoords='offset points',
            ha='right',
            fontsize=8,
        )
    for at, (end, step) in enumerate(zip(starts, steps)):
        needed = step['hbm_bytes_needed']
        text = 'does not fit' if needed is None else f'{needed / GIB:.3g}'
        if needed is not None and not step['fits']:
            text += ', does not fit'
        axis.text(end, at, f' {text}', va='center', fontsize=8)
    axis.set_xlim(0, max(most * 1.22, limit * 1.02 if shown else 0))
    _label_bars(axis, labels)
    axis.set_title('HBM of a chip, GiB')
    _legend_below(axis, len(steps))


def _draw_passes(axis: Axes, widths: Mapping[str, Sequence[float]], height: float) -> list[float]:
    """One bar a row, its passes after each other; returns where the bars end."""
    ends = [0.0] * len(next(iter(widths.values())))
    for direction, row in widths.items():
        if any(row):
            axis.barh(
                range(len(row)),
                row,
                left=ends,
                height=height,
                color=PASS_COLOURS[direction],
                label=PASS_NAMES[direction],
            )
            ends = [a + b for a, b in zip(ends, row)]
    return ends


def _draw_modules(axis: Axes, rows: Sequence[tuple[str, Mapping[str, float]]], plan: Plan) -> None:
    clock = plan['chip']['clock']
    ends = _draw_passes(
        axis,
        {p: [1e3 * row.get(p, 0) / clock for _, row in rows] for p in PASSES},
        height=0.66,
    )
    total = 1e3 * plan['estimated_seconds']
    for at, end in enumerate(ends):
        axis.text(end, at, f' {100 * end / total:.1f} %', va='center', fontsize=8)
    axis.set_xlim(0, max(ends) * 1.1)
    _label_bars(axis, [name for name, _ in rows])
    axis.set_title(f'train step by module, ms of {total:.1f}')
    axis.legend(loc='lower right')


def _draw_times(axis: Axes, labels: Sequence[str], plans: Sequence[Plan]) -> None:
    widths = {
        direction: [
            1e3
            * sum(row['cycles'] for row in plan.get('groups', []) if row['pass'] == direction)
            / plan['chip']['clock']
            / plan['clips_per_chip']
            for plan in plans
        ]
        for direction in PASSES
    }
    ends = _draw_passes(axis, widths, height=0.55)
    for at, (end, plan) in enumerate(zip(ends, plans)):
        text = 'does not fit'
        if plan['estimated_seconds'] is not None:
            text = (
                f'{end:.3g} ms, {_rate(plan["clips_per_second_per_chip"])} clips/s, '
                f'MFU {100 * plan["estimated_mfu"]:.1f} %'
            )
        axis.text(end, at, f' {text}', va='center', fontsize=8)
    axis.set_xlim(0, max(*ends, 1e-9) * 1.55)
    _label_bars(axis, labels)
    axis.set_title('time of a clip on a chip, ms')
    _legend_below(axis, len(plans))


def _legend_below(axis: Axes, bars: int) -> None:
    if not axis.get_legend_handles_labels()[0]:
        return
    axis.legend(
        loc='upper left',
        bbox_to_anchor=(0, -0.1 - 0.2 / bars),
        ncols=7,
        fontsize=8,
        handlelength=1,
        handletextpad=0.4,
        columnspacing=1.2,
        borderaxespad=0,
    )


def _label_bars(axis: Axes, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), [_wrapped(label) for label in labels])
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis='y', length=0)
    axis.grid(True, axis='x')


def _wrapped(label: str) -> str:
    return '\n'.join(textwrap.wrap(label, 34, break_long_words=False, break_on_hyphens=False)[:3])
