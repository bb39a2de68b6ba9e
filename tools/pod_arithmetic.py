"""What a training on Kinetics-400 costs on pods: chip-hours, hours, CPUs to feed it; and links.

    nice -n 10 python -m tools.pod_arithmetic            # every row; goes on where it was stopped
    nice -n 10 python -m tools.pod_arithmetic --rows dist:b16_8+16f_k400 --targets v4-8 --anew
    nice -n 10 python -m tools.pod_arithmetic --input    # measures what a clip costs a CPU
    nice -n 10 python -m tools.pod_arithmetic --scaling  # collectives on 4, 32 and 128 chips
    python -m tools.pod_arithmetic --table               # no compiling, no measuring

The recipe's batch, in as many parts (`accumulation`) as fit, is compiled for each slice as
`dist_jax plan` does, whole, with its collectives. Rows that train the same program share figures.
All is kept in docs/pod_arithmetic.json, and written into docs/performance.md. A program takes
minutes on two cores. The CPUs' part reads generated videos of 10 s as `tools.benchmark_input` has
them, with the transforms of each row, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dist_jax.json_file import write_json
from dist_jax.plan import topology
from dist_jax.plan.cache import default_folder
from tools import generated, which_tpu

TOOL = 'tools.pod_arithmetic'
DATA = 'kinetics400'
# As Cloud TPU sells them: v4 counts cores, two a chip.
TARGETS = {
    'v4-8': 'v4:2x2x1',
    'v4-32': 'v4:2x2x4',
    'v4-128': 'v4:4x4x4',
    'v5e-8': 'v5e:2x4',
    'v5e-64': 'v5e:8x8',
}
# What the papers say of the row; for whole trainings on this set.
PUBLISHED = {
    'evl:b16_8f_k400': '60 V100-hours',
    'side4video:b16_8f_k400': '44 A100-hours',
}
SCALING = ('v4:2x2x1', 'v4:2x4x4', 'v4:4x4x8')  # 4, 32 and 128 chips
SCALING_ROW = 'dist:b16_8+16f_k400'
SCALING_CLIPS = 8  # of a chip
KEPT = (
    'chips',
    'clips_per_chip',
    'fits',
    'hbm_bytes_needed',
    'estimated_seconds',
    'estimated_mfu',
    'estimated_cycles',
    'collective_bytes',
    'collective_cycles',
    'collective_cycles_on_links_of_one_dimension',
    'asynchronous_collective_seconds',
)
VIDEOS, DRAWS = 3, 3  # that a row is measured on
SHORT_SIDE = 256  # of videos that are encoded anew
NONE = '-'
Figures = dict[str, Any]


def names() -> list[str]:
    """Rows of configs/ that are trained on Kinetics-400 alone, or go on there."""
    return [name for name, config in which_tpu.rows().items() if config.data.name == DATA]


def kept(plan: dict[str, Any], config: ConfigDict) -> Figures:
    """What is kept of a plan."""
    return {key: plan.get(key) for key in KEPT} | {
        'accumulation': config.accumulation,
        'versions': {key: plan['versions'][key] for key in ('jax', 'libtpu')},
    }


def planned(
    plan: Callable[[ConfigDict], dict[str, Any]], config: ConfigDict, chips: int, fsdp: int
) -> Figures:
    """The recipe's batch on so many chips, in the fewest parts that fit.

    Returns:
      Figures; `fits` is False, and nothing else is known, where there is less than a clip a chip.
    """
    parts = config.accumulation
    while config.batch_size % (chips * parts) == 0:
        asked = copy.deepcopy(config)
        asked.mesh.fsdp, asked.accumulation = fsdp, parts
        figures = plan(asked)
        if figures['fits']:
            return kept(figures, asked)
        parts *= 2
    return {'chips': chips, 'fits': False}


def plan_rows(
    wanted: Iterable[str], targets: Sequence[str], anew: bool, folder: str, path: Path
) -> None:
    """Fills the file with what is not known of these rows and slices, or with all of it."""
    known, rows, firsts = which_tpu.read(path), which_tpu.rows(), program_names()
    plan_for = which_tpu.planners(folder)
    for first in dict.fromkeys(firsts[name] for name in wanted):
        config = rows[first]
        place = known.setdefault('plans', {}).setdefault(first, {})
        for target in targets:
            if target in place and not anew:
                continue
            compiled = TARGETS[target]
            print(f'{first} for {target}', flush=True)
            whole = topology.parse_topology(compiled)
            split = which_tpu.split_over(config, whole.chip.name)
            fsdp = whole.num_chips if split else 1
            place[target] = planned(plan_for(compiled), config, whole.num_chips, fsdp)
            write_json(path, known)


def program_names() -> dict[str, str]:
    """Each row -> the first row of the same program and batch, under which it is kept."""
    firsts, found, rows = {}, {}, which_tpu.rows()
    for name in names():
        config = rows[name]
        key = (which_tpu.program_of(config), config.batch_size, config.accumulation)
        found[name] = firsts.setdefault(key, name)
    return found


def plan_scaling(anew: bool, folder: str, path: Path) -> None:
    """The same step with as many clips a chip on more and more chips, where it is not known."""
    known = which_tpu.read(path)
    plan_for = which_tpu.planners(folder)
    for compiled in SCALING:
        if compiled in known.get('scaling', {}) and not anew:
            continue
        print(f'{SCALING_ROW} on {compiled}', flush=True)
        config = copy.deepcopy(which_tpu.rows()[SCALING_ROW])
        config.batch_size = SCALING_CLIPS * topology.parse_topology(compiled).num_chips
        found = kept(plan_for(compiled)(config), config)
        known.setdefault('scaling', {})[compiled] = found
        write_json(path, known)


def measure_input(wanted: Iterable[str], path: Path) -> None:
    """Clips a second of one CPU for the readers of these rows, in a file of figures."""
    from dist_jax.models.layers import Pixels
    from dist_jax.recipe import train_reader
    from input_pipeline.encode import transcode
    from tools import benchmark_input

    known, rows = which_tpu.read(path), which_tpu.rows()
    with tempfile.TemporaryDirectory() as folder:
        originals = [Path(folder) / f'{k}.mp4' for k in range(VIDEOS)]
        for k, one in enumerate(originals):
            benchmark_input.write_video(one, k)
        encoding = benchmark_input.TRANSCODED[benchmark_input.DEFAULT]
        again = [one.with_suffix('.again.mp4') for one in originals]
        for one, other in zip(originals, again):
            other.write_bytes(transcode(str(one), SHORT_SIDE, *encoding))
        of_reader: dict[str, Figures] = {}
        for name in wanted:
            reader = train_reader(rows[name], Pixels())
            if repr(reader) not in of_reader:
                print(f'input of {name}', flush=True)
                pipelines = {
                    kind: lambda number, rng, files=files, reader=reader: benchmark_input.read_ours(
                        str(files[number]), rng, reader
                    )
                    for kind, files in (('as they are', originals), ('encoded anew', again))
                }
                rates = benchmark_input.measure_pipelines(pipelines, VIDEOS, DRAWS, lambda: None)
                of_reader[repr(reader)] = rates | {'load': os.getloadavg()[0]}
            known.setdefault('input', {})[name] = of_reader[repr(reader)]
            write_json(path, known)


# The tables.


def seconds_of(figures: Figures, config: ConfigDict) -> float | None:
    """Of the whole training; None where no step fits."""
    if not figures['fits']:
        return None
    return which_tpu.clips_of(config) / config.batch_size * figures['estimated_seconds']


def amount(value: float) -> str:
    return f'{value:,.0f}' if value >= 10 else f'{value:.2g}'


def cost(figures: Figures | None, config: ConfigDict) -> str:
    """'chip-hours · hours' of a target."""
    if figures is None:
        return ''
    seconds = seconds_of(figures, config)
    if seconds is None:
        return NONE
    parts = f' ({figures["accumulation"]} parts)' if figures['accumulation'] > 1 else ''
    hours = seconds / 3600
    return f'{amount(hours * figures["chips"])} · {amount(hours)} h{parts}'


def feeding(figures: Figures | None, config: ConfigDict, rates: Figures | None) -> str:
    """CPUs that keep the slice busy: 'as they are / encoded anew'."""
    if figures is None or rates is None:
        return ''
    if not figures['fits']:
        return NONE
    wanted = config.batch_size / figures['estimated_seconds']
    cpus = (math.ceil(wanted / rates[kind]) for kind in ('as they are', 'encoded anew'))
    return ' / '.join(map(str, cpus))


def versions(known: Figures) -> str:
    """Of all figures."""
    plans = [one for place in known.get('plans', {}).values() for one in place.values()]
    plans += known.get('scaling', {}).values()
    found = {(v['jax'], v['libtpu']) for one in plans if (v := one.get('versions'))}
    return '; '.join(f'jax {jax} and libtpu {libtpu}' for jax, libtpu in sorted(found))


def of_rows(known: Figures) -> str:
    """Chip-hours and hours, and CPUs, of every row that is known."""
    rows, firsts, plans = which_tpu.rows(), program_names(), known.get('plans', {})
    costs, cpus = [], []
    for name in names():
        place, config = plans.get(firsts[name]), rows[name]
        if not place:
            continue
        found = [place.get(target) for target in TARGETS]
        length = f'{which_tpu.clips_of(config) / which_tpu.EXAMPLES[DATA]:.3g}'
        costs.append(
            [
                f'`{name}`',
                length,
                *(cost(one, config) for one in found),
                PUBLISHED.get(name, ''),
            ]
        )
        if rates := known.get('input', {}).get(name):
            cpus.append([f'`{name}`', *(feeding(one, config, rates) for one in found)])
    said = (
        f'A training of each row, chip-hours · hours, with the batch of its recipe (256 clips, '
        f'others as configs/ say) and {which_tpu.EXAMPLES[DATA]:,} videos an epoch, of training '
        f'steps alone, by {versions(known)}. `parts`: the batch goes through the chips in as many '
        f'(`accumulation`). `{NONE}`: not one clip a chip fits, or the batch has fewer.'
    )
    header = ['row', 'epochs', *TARGETS, 'published']
    blocks = [said, generated.table(header, costs)]
    if cpus:
        blocks += [
            'CPUs of all hosts together that feed it, if they are like those that measured: files '
            'as they are / encoded anew with a key frame every 8.',
            generated.table(['row', *TARGETS], cpus),
        ]
    return '\n\n'.join(blocks)


def of_scaling(known: Figures) -> str:
    """Collectives of one step on more and more chips."""
    found = known.get('scaling', {})
    rows = []
    for compiled, one in found.items():
        sent = ', '.join(
            f'{kind} {size / 1e6:.3g}' for kind, size in sorted(one['collective_bytes'].items())
        )
        rows.append(
            [
                str(topology.parse_topology(compiled).num_chips),
                compiled,
                sent,
                f'{one["estimated_cycles"] / 1e6:.1f}',
                f'{one["collective_cycles"] / 1e6:.2f}',
                f'{one["collective_cycles_on_links_of_one_dimension"] / 1e6:.2f}',
            ]
        )
    header = [
        'chips',
        'slice',
        'MB that a chip puts in',
        'M cycles of a step',
        'of them waiting, all links of a chip',
        'links of one dimension',
    ]
    said = (
        f'The whole step of `{SCALING_ROW}` with {SCALING_CLIPS} clips a chip, by '
        f'{versions(known)}:'
    )
    return f'{said}\n\n{generated.table(header, rows)}'


def parts_of(known: Figures) -> dict[str, str]:
    """Parts of docs/performance.md that something is known of."""
    parts = {}
    if known.get('plans'):
        parts['rows'] = of_rows(known)
    if known.get('scaling'):
        parts['scaling'] = of_scaling(known)
    return parts


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f'python -m {TOOL}',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--rows', nargs='+', default=[], metavar='FILE:ROW', help='only these')
    parser.add_argument('--targets', nargs='+', default=[*TARGETS], choices=TARGETS)
    parser.add_argument('--anew', action='store_true', help='also what is known already')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--input', action='store_true', help='measure what clips cost a CPU')
    what.add_argument('--scaling', action='store_true', help='compile for 4, 32 and 128 chips')
    what.add_argument('--table', action='store_true', help='write the tables of what is known')
    parser.add_argument('--cache', default=default_folder(), help='compiled programs (%(default)s)')
    arguments = parser.parse_args(argv)
    unknown = set(arguments.rows) - set(names())
    if unknown:
        parser.error(f'no row {sorted(unknown)}; there are {", ".join(names())}')
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    logging.getLogger('dist_jax').setLevel(logging.INFO)
    path, wanted = which_tpu.DOCS / 'pod_arithmetic.json', arguments.rows or names()
    if arguments.input:
        measure_input(wanted, path)
    elif not arguments.table:
        topology.prepare_environment()
        if arguments.scaling:
            plan_scaling(arguments.anew, arguments.cache, path)
        else:
            plan_rows(wanted, arguments.targets, arguments.anew, arguments.cache, path)
    try:
        generated.write(which_tpu.DOCS / 'performance.md', TOOL, parts_of(which_tpu.read(path)))
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
