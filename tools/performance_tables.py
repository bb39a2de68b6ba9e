"""Renews the figures of training steps in docs/performance.md and README.md.

    nice -n 10 python -m tools.performance_tables                    # those that are not known
    nice -n 10 python -m tools.performance_tables --only dist-b16    # on every chip, anew
    python -m tools.performance_tables --only dist-b16@v5e evl-b16@v4
    python -m tools.performance_tables --table                       # no compiling

Compiles each step as `dist_jax plan` does and keeps its figures, with the versions that made them,
in docs/performance.json; draws those of v4 beside what they were and should be (docs/steps.png).
A program takes minutes on two cores, and is kept where `dist_jax plan` keeps its programs: what has
not changed is not compiled again.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dist_jax.json_file import write_json
from dist_jax.plan import topology
from dist_jax.plan.cache import default_folder
from tools import generated, which_tpu

TOOL = 'tools.performance_tables'
ROOT = Path(__file__).parents[1]
# name: (title, row of configs/, clips of a chip)
STEPS = {
    'dist-b16': ('DiST B/16 8+16', 'dist:b16_8+16f_k400', 32),
    'evl-b16': ('EVL B/16 8', 'evl:b16_8f_k400', 32),
    'side4video-b16': ('Side4Video B/16 8', 'side4video:b16_8f_k400', 32),
    'dist-l14': ('DiST L/14 32+64', 'dist:l14_32+64f_k400', 8),
}
# M cycles and GiB of temporaries on v4: before the trained parts were kernels, and the goals.
# The goals of L/14: four fifths of the cycles, no more memory.
BEFORE = {
    'dist-b16': (189, 3.16),
    'evl-b16': (142, 1.79),
    'side4video-b16': (229, 3.8),
    'dist-l14': (594, 11.8),
}
GOALS = {
    'dist-b16': (115, 2.4),
    'evl-b16': (105, None),
    'side4video-b16': (170, None),
    'dist-l14': (475, 11.8),
}
TOPOLOGIES = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v6e': 'v6e:2x2'}
KEPT = (
    'topology',
    'clips_per_chip',
    'fits',
    'hbm_bytes_needed',
    'hbm_bytes_limit',
    'temp_bytes',
    'estimated_cycles',
    'collective_cycles',
    'collective_cycles_on_links_of_one_dimension',
    'clips_per_second_per_chip',
    'estimated_mfu',
)
GIB = 2**30
NONE = '-'
Figures = dict[str, Any]
Plan = Callable[[ConfigDict], dict[str, Any]]


def names() -> list[str]:
    """'dist-b16@v4' of every figure, in the order of the tables."""
    return [f'{step}@{chip}' for chip in TOPOLOGIES for step in STEPS]


def chosen(only: Sequence[str]) -> list[str]:
    """Figures that `--only` names: 'dist-b16' on every chip, 'dist-b16@v5e', '@v5e'.

    Raises:
      ValueError: nothing is called so; lists what there is.
    """
    found = []
    for text in only:
        step, _, chip = text.partition('@')
        matching = [
            name
            for name in names()
            if step in ('', name.partition('@')[0]) and chip in ('', name.partition('@')[2])
        ]
        if not matching or not text:
            raise ValueError(f'--only {text}: there are {", ".join(names())}')
        found += matching
    return list(dict.fromkeys(found))


def request(name: str) -> ConfigDict:
    """The config of a figure: the row, with as many clips as its chips take."""
    step, _, chip = name.partition('@')
    _, row, clips = STEPS[step]
    config = copy.deepcopy(which_tpu.rows()[row])
    config.batch_size = clips * topology.parse_topology(TOPOLOGIES[chip]).num_chips
    return config


def kept(plan: dict[str, Any]) -> Figures:
    """What is kept of a plan."""
    kernels = plan.get('kernel_times', ())
    return {key: plan.get(key) for key in KEPT} | {
        'kernel_cycles_by_schedule': sum(one['schedule_cycles'] for one in kernels),
        'kernel_cycles_by_memory': sum(one['memory_cycles'] for one in kernels),
        'versions': {key: plan['versions'][key] for key in ('jax', 'libtpu')},
    }


def compute(wanted: Iterable[str], plan_for: Callable[[str], Plan], path: Path) -> None:
    """Fills the file of figures, one after the other."""
    known = which_tpu.read(path)
    for name in wanted:
        compiled = TOPOLOGIES[name.partition('@')[2]]
        print(f'{name}, on {compiled}', flush=True)
        known[name] = kept(plan_for(compiled)(request(name)))
        write_json(path, {each: known[each] for each in names() if each in known})


def versions(known: Iterable[Figures]) -> str:
    """'jax 0.10.2 and libtpu 0.0.42.1', of all figures."""
    found = {(one['versions']['jax'], one['versions']['libtpu']) for one in known}
    return '; '.join(f'jax {jax} and libtpu {libtpu}' for jax, libtpu in sorted(found))


def mega(cycles: float | None, digits: int = 0) -> str:
    return NONE if cycles is None else f'{cycles / 1e6:,.{digits}f} M'


def gib(size: float | None) -> str:
    return NONE if size is None else f'{size / GIB:.3g} GiB'


def _cycles(one: Figures) -> str:
    return mega(one['estimated_cycles']) if one['fits'] else 'does not fit'


def _kernels(one: Figures) -> str:
    by_schedule, by_memory = (
        mega(one[f'kernel_cycles_by_{kind}'], 1) for kind in ('schedule', 'memory')
    )
    return f'{by_schedule} ({by_memory})' if one['fits'] else NONE


def _waiting(one: Figures) -> str:
    all_links, some = (
        mega(one[f'collective_cycles{kind}'], 1) for kind in ('', '_on_links_of_one_dimension')
    )
    return f'{all_links} ({some})' if one['fits'] else NONE


def _share(one: Figures) -> str:
    mfu = one['estimated_mfu']
    return NONE if mfu is None else f'{100 * mfu:.1f} %'


def _rate(one: Figures) -> str:
    rate = one['clips_per_second_per_chip']
    if rate is None:
        return NONE
    return f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'


# What a row of the table is called -> its text for one figure.
LINES: dict[str, Callable[[Figures], str]] = {
    'clips a chip': lambda one: f'{one["clips_per_chip"]:g}',
    'temporaries': lambda one: gib(one['temp_bytes']),
    'needed, of what is allowed': lambda one: (
        f'{gib(one["hbm_bytes_needed"])} of {gib(one["hbm_bytes_limit"])}'
    ),
    'cycles of a step': _cycles,
    'of them kernels, by their schedule (by memory)': _kernels,
    'waiting for links: all of a chip (those of one dimension)': _waiting,
    'clips a second and chip': _rate,
    'MFU': _share,
}


def table_of(known: dict[str, Figures], chip: str) -> str:
    """The figures of one kind of chip; '' where none is known."""
    columns = [step for step in STEPS if f'{step}@{chip}' in known]
    if not columns:
        return ''
    header = [TOPOLOGIES[chip], *(STEPS[step][0] for step in columns)]
    lines = [
        [title, *(cell(known[f'{step}@{chip}']) for step in columns)]
        for title, cell in LINES.items()
    ]
    return generated.table(header, lines)


def of_page(known: dict[str, Figures]) -> str:
    """The part of docs/performance.md."""
    tables = [table_of(known, chip) for chip in TOPOLOGIES]
    said = f'Training steps in bfloat16, by {versions(known.values())}:'
    return '\n\n'.join([said, *(table for table in tables if table)])


def of_readme(known: dict[str, Figures]) -> str:
    """The part of README.md: a line for every step."""
    header = ['training step', 'clips a chip', 'v4', *(f'MFU {chip}' for chip in TOPOLOGIES)]
    lines = []
    for step, (title, _, clips) in STEPS.items():
        found = {chip: known.get(f'{step}@{chip}') for chip in TOPOLOGIES}
        if not any(found.values()):
            continue
        v4 = found['v4']
        size = f'{_cycles(v4)} cycles, {gib(v4["temp_bytes"])}' if v4 else NONE
        shares = (_share(one) if one else NONE for one in found.values())
        lines.append([title, str(clips), size, *shares])
    said = f'Estimates of the TPU compiler, not measurements, by {versions(known.values())}.'
    return f'{generated.table(header, lines)}\n\n{said}'


def draw(known: dict[str, Figures], path: Path) -> None:
    """Steps on v4 as bars: what they were, what they should be, what they are."""
    from matplotlib.figure import Figure

    steps = [step for step in STEPS if known.get(f'{step}@v4', {}).get('fits')]
    now = {
        step: (
            known[f'{step}@v4']['estimated_cycles'] / 1e6,
            known[f'{step}@v4']['temp_bytes'] / GIB,
        )
        for step in steps
    }
    figure = Figure(figsize=(10, 3.4), layout='constrained')
    titles = ('M cycles of a step', 'GiB of temporaries')
    for kind, (axes, title) in enumerate(zip(figure.subplots(1, 2), titles)):
        for shift, (label, colour, found) in enumerate(
            [('before', '#b0b0b0', BEFORE), ('goal', '#e3c16f', GOALS), ('now', '#3b6fb6', now)]
        ):
            values = [found[step][kind] for step in steps]
            places = [k + 0.27 * (shift - 1) for k, one in enumerate(values) if one is not None]
            bars = axes.bar(
                places, [one for one in values if one is not None], 0.25, color=colour, label=label
            )
            axes.bar_label(bars, fmt='%.3g', fontsize=8)
        axes.set_xticks(range(len(steps)), [STEPS[step][0] for step in steps], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def write_pages(known: dict[str, Figures], root: Path = ROOT) -> None:
    """Renews both pages, and the picture.

    Raises:
      ValueError: a page lacks the comments that its part stands between.
    """
    generated.write(root / 'docs' / 'performance.md', TOOL, {'steps': of_page(known)})
    generated.write(root / 'README.md', TOOL, {'steps': of_readme(known)})
    draw(known, root / 'docs' / 'steps.png')


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f'python -m {TOOL}',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help='these, anew')
    parser.add_argument('--table', action='store_true', help='write the tables of what is known')
    parser.add_argument('--cache', default=default_folder(), help='compiled programs (%(default)s)')
    arguments = parser.parse_args(argv)
    try:
        wanted = chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    logging.getLogger('dist_jax').setLevel(logging.INFO)
    path = ROOT / 'docs' / 'performance.json'
    known = which_tpu.read(path)
    if not arguments.table:
        topology.prepare_environment()
        missing = wanted or [name for name in names() if name not in known]
        compute(missing, which_tpu.planners(arguments.cache), path)
        known = which_tpu.read(path)
    try:
        write_pages(known)
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
