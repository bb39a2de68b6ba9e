"""Lengths of kernels: compiles them for v4, without a TPU, and reads libtpu's schedule.

    python -m tools.kernel_schedule                                    # what is declared
    python -m tools.kernel_schedule --check                            # against the compiler
    python -m tools.kernel_schedule --check --only residual_mlp --only frame_attention:tokens=197
    python -m tools.kernel_schedule --write                            # measured anew
    python -m tools.kernel_schedule --page                             # docs/performance.md alone

The table holds bundles (cycles of one core) of a frame at the shapes that configs use; kernels
declare it as their cost, and `dist_jax plan` counts it. `--check` fails where the two differ by
more than 3 %. A new kernel adds an entry to `tools/scheduling/cases.py` and one to `WORK` in
`dist_jax/models/kernel_costs.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from rich.progress import track
from rich.table import Table

from dist_jax.json_file import write_json
from dist_jax.models import kernel_costs
from input_pipeline.escape import Console
from tools import generated
from tools.scheduling import cases
from tools.scheduling import compile as compiling
from tools.scheduling.cases import KERNELS

TOOL = 'tools.kernel_schedule'
PAGE = Path(__file__).parents[1] / 'docs' / 'performance.md'
TOLERANCE = 0.03  # between declared and compiled
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f'python -m {TOOL}',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--check', action='store_true', help='compile, compare, fail beyond 3 %%')
    what.add_argument('--write', action='store_true', help='compile, write table and page')
    what.add_argument('--page', action='store_true', help='write the table into the docs')
    parser.add_argument(
        '--only',
        action='append',
        default=[],
        metavar='KERNEL[:NAME=SIZE,...]',
        help='these only; may be repeated (default: all)',
    )
    arguments = parser.parse_args(argv)
    try:
        wanted = choose(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    if arguments.page:
        write_page()
        return 0
    if not (arguments.check or arguments.write):
        Console().print(_table(declared(wanted), 'declared'))
        return 0
    found = compiling.measure(wanted)
    rows = list(track(found, 'compiling', total=len(wanted)))
    if arguments.write:
        write(rows)
        write_page()
    Console().print(_table(rows, 'compiled'))
    worst = max(abs(one) for row in rows for one in deviations(row))
    print(f'declared and compiled differ by at most {100 * worst:.1f} %')
    return int(worst > TOLERANCE)


def choose(texts: Sequence[str]) -> list[tuple[str, dict[str, int]]]:
    """Kernels and shapes that `--only` names, all of them where it is not given.

    Raises:
      ValueError: nothing is of that name or size; lists what there is.
    """
    every = [(name, shape) for name, kernel in KERNELS.items() for shape in kernel.shapes]
    if not texts:
        return every
    chosen = []
    for text in texts:
        kernel, _, sizes = text.partition(':')
        limits = [part.split('=') for part in sizes.split(',') if part]
        found = [
            (name, shape)
            for name, shape in every
            if name == kernel and all(str(shape.get(limit[0])) == limit[-1] for limit in limits)
        ]
        if not found:
            there = '; '.join(f'{name}:{_words(shape)}' for name, shape in every)
            raise ValueError(f'--only={text}: there is no such kernel. There are {there}')
        chosen += [one for one in found if one not in chosen]
    return chosen


def deviations(row: Row) -> tuple[float, float]:
    """What the kernel declares over what was compiled, less one: of bundles, of bytes."""
    bundles, moved = cases.declared(row['kernel'], row['shape'])
    return bundles / row['bundles'] - 1, moved / row['bytes'] - 1


def declared(wanted: Iterable[tuple[str, dict[str, int]]]) -> list[Row]:
    """Rows of the table as it is."""
    kernels = kernel_costs.table()['kernels']
    return [
        {'kernel': name} | row
        for name, shape in wanted
        for row in kernels.get(name, {'rows': ()})['rows']
        if row['shape'] == shape
    ]


def write(rows: Sequence[Row]) -> None:
    """Writes the table; rows of other kernels and shapes stay if the compiler is the same."""
    versions = {name: rows[0]['versions'][name] for name in ('jax', 'libtpu')}
    before = kernel_costs.table()
    kept = before['kernels'] if before['versions'] == versions else {}
    table: dict[str, Any] = {'versions': versions, 'kernels': {}}
    for name, kernel in KERNELS.items():
        new = {_words(row['shape']): row for row in rows if row['kernel'] == name}
        old = {_words(row['shape']): row for row in kept.get(name, {'rows': ()})['rows']}
        here = [(old | new)[w] for w in map(_words, kernel.shapes) if w in old | new]
        if not here:
            continue
        here = [{k: v for k, v in row.items() if k not in ('kernel', 'versions')} for row in here]
        table['kernels'][name] = fit(name, here) | {'rows': here}
    write_json(Path(kernel_costs.__file__).with_name(kernel_costs.FILE), table)
    kernel_costs.table.cache_clear()


def write_page(page: Path = PAGE) -> None:
    """Renews the table of docs/performance.md, of what is declared."""
    versions, rows = kernel_costs.table()['versions'], declared(choose(()))
    header = ['kernel', 'shape', 'bundles', 'products', 'busiest unit', 'fills', 'kB']
    lines = []
    for row in rows:
        lines.append(
            [
                f'`{row["kernel"]}`',
                _words(row['shape']).replace(',', ', '),
                f'{row["bundles"]:,.0f}',
                f'{row["products"]:,.0f}',
                f'{row["unit"]} {100 * row["busy"]:.0f} %',
                f'{100 * row["spills"]:.0f} %',
                f'{row["bytes"] / 1e3:,.0f}',
            ]
        )
    said = f'Of a frame, by jax {versions["jax"]} and libtpu {versions["libtpu"]}:'
    text = f'{said}\n\n{generated.table(header, lines)}'
    generated.write(page, TOOL, {'kernels': text})


def fit(kernel: str, rows: Sequence[Row]) -> Row:
    """The formula: what a unit of work takes, none less than nothing, by relative least squares.

    Returns:
      `bundles_per_unit_of_work`, and `formula_error`, the worst of these rows.
    """
    works = [kernel_costs.WORK[kernel](**row['shape']) for row in rows]
    amounts = np.array([list(work.values()) for work in works], float)
    times = np.array([row['bundles'] for row in rows])
    found, _ = scipy.optimize.nnls(amounts / times[:, None], np.ones(len(rows)))
    per_unit = {name: round(float(c), 4) for name, c in zip(works[0], found)}
    errors = [kernel_costs.by_formula(per_unit, w) / t - 1 for w, t in zip(works, times)]
    return {
        'bundles_per_unit_of_work': per_unit,
        'formula_error': round(float(np.abs(errors).max()), 4),
    }


def _words(shape: dict[str, int]) -> str:
    return ','.join(f'{name}={size}' for name, size in shape.items())


def _table(rows: Sequence[Row], title: str) -> Table:
    kernels = kernel_costs.table()['kernels']
    table = Table(
        *('kernel', 'shape', 'bundles', 'products', 'busiest unit', 'fills', 'kB'),
        *('declared', 'bytes', 'formula'),
        title=f'{title}, of a frame on a v4 core',
    )
    for column in table.columns[2:]:
        column.justify = 'right'
    for row in rows:
        name, shape = row['kernel'], row['shape']
        formula = '-'
        if name in kernels:
            per_unit = kernels[name]['bundles_per_unit_of_work']
            bundles = kernel_costs.by_formula(per_unit, kernel_costs.WORK[name](**shape))
            formula = _percent(bundles / row['bundles'] - 1)
        table.add_row(
            name,
            _words(shape),
            f'{row["bundles"]:,.0f}',
            f'{row["products"]:,.0f}',
            f'{row["unit"]} {100 * row["busy"]:.0f} %',
            f'{100 * row["spills"]:.0f} %',
            f'{row["bytes"] / 1e3:,.0f}',
            *map(_percent, deviations(row)),
            formula,
        )
    return table


def _percent(part: float) -> str:
    return f'{100 * part:+.1f} %'


if __name__ == '__main__':
    sys.exit(main())
