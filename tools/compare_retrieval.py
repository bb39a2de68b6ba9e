"""Trains the demo of retrieval, and what says what its figures are worth.

    python -m tools.compare_retrieval
    python -m tools.compare_retrieval --out=/tmp/retrieval --seeds=3 config.num_epochs=5

Runs of `dist_jax train --config=configs/side4video_retrieval.py:demo`, one after the other: `wti`
and `meanP`; `one frame`, which sees how things look and not how they move; and `untrained`, the
step-0 network, in which frames have the backbone's own embedding. All read the same clips. What
remains is a table, and `comparison.json` in the folder. Stopped at any moment, the same command
goes on. Overrides are for all runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from input_pipeline.escape import Console

CONFIG = '--config=configs/side4video_retrieval.py:demo'
# Fields of each, over those of the demo.
KINDS: dict[str, Sequence[str]] = {
    'wti': (),
    'meanP': ('config.task.interaction=meanP',),
    'one frame': ('config.data.num_frames=1',),
    'untrained': (
        'config.num_steps=1',
        'config.optimizer.peak_lr=0',
        'config.optimizer.warmup_start_lr=0',
    ),
}
# Of a summary.
SHARES = ('t2v_r1', 't2v_r5', 't2v_r10', 'v2t_r1')
RANK = 't2v_median_rank'
Summaries = Mapping[str, Sequence[Mapping[str, float]]]


def main(argv: list[str] | None = None) -> int:
    """Trains what is missing and shows all; the exit status of a run that did not end well."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.compare_retrieval',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--out', default='runs/compare_retrieval', help='folder of all (default %(default)s)'
    )
    parser.add_argument('--kinds', default=','.join(KINDS), help='default %(default)s')
    parser.add_argument('--seeds', type=int, default=1, help='runs of each (default 1)')
    parser.add_argument('overrides', nargs='*', help='config fields, as config.num_epochs=5')
    arguments = parser.parse_args(argv)
    kinds = arguments.kinds.split(',')
    if unknown := sorted(set(kinds) - KINDS.keys()):
        parser.error(f'--kinds: no {", ".join(unknown)}; there are: {", ".join(KINDS)}')
    if arguments.seeds < 1:
        parser.error(f'--seeds={arguments.seeds} must be at least 1')
    out = Path(arguments.out)
    found: dict[str, list[Mapping[str, float]]] = {kind: [] for kind in kinds}
    for seed in range(arguments.seeds):
        for kind in kinds:
            workdir = out / f'{kind.replace(" ", "_")}_{seed}'
            command = train(out, workdir, seed, (*KINDS[kind], *arguments.overrides))
            if code := subprocess.run(command, check=False).returncode:
                return code
            found[kind].append(json.loads((workdir / 'summary.json').read_text()))
    Console().print(table(found))
    kept = {
        kind: [{name: run[f'val_{name}'] for name in (*SHARES, RANK)} for run in runs]
        for kind, runs in found.items()
    }
    (out / 'comparison.json').write_text(json.dumps(kept) + '\n')
    return 0


def train(out: Path, workdir: Path, seed: int, fields: Sequence[str]) -> list[str]:
    """The command of a run."""
    shared = (f'config.seed={seed}', f'config.data.root={out / "clips"}')
    given = (f'--{field}' for field in (*shared, *fields))
    return [sys.executable, '-m', 'dist_jax', 'train', CONFIG, f'--workdir={workdir}', *given]


def table(found: Summaries) -> Table:
    """The last figures of all kinds: a mean, and how far seeds lie apart."""
    columns = [name.replace('_r', ' R@') for name in SHARES]
    shown = Table('', *columns, 't2v median rank', title='held-out clips')
    for kind, runs in found.items():
        cells = []
        for name, factor, unit in (*((name, 100, ' %') for name in SHARES), (RANK, 1, '')):
            values = [factor * run[f'val_{name}'] for run in runs]
            spread = f' ({min(values):.1f} to {max(values):.1f})' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.1f}{unit}{spread}')
        shown.add_row(kind, *cells)
    return shown


if __name__ == '__main__':
    sys.exit(main())
