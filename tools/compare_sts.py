"""Fine-tunes STS's demo with and without pre-training on pictures, with and without STS.

    python -m tools.compare_sts
    python -m tools.compare_sts --out=/tmp/sts --seeds=3 config.num_epochs=5

Runs of `dist_jax train`, one after the other: `configs/sts.py:demo_images` once, then
`configs/sts.py:demo` in all four ways, each with every seed. All read the same clips and differ in
nothing else. What remains is a table, and `comparison.png` and `comparison.json` in the folder.
Stopped at any moment, the same command goes on. Overrides are for the runs on clips.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dist_jax import drawing
from dist_jax.metric_writer import METRICS_FILE, read_metrics
from input_pipeline.escape import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCURACY = 'val_top1'
STARTS = ('pictures', 'scratch')
STS = ('official', 'off')
Curve = Sequence[tuple[int, float]]
Curves = Mapping[tuple[str, str], Sequence[Curve]]


def main(argv: list[str] | None = None) -> int:
    """Trains what is missing and shows all; the exit status of a run that did not end well."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.compare_sts',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--out', default='runs/compare_sts', help='folder of all (default %(default)s)'
    )
    parser.add_argument('--seeds', type=int, default=1, help='runs of each kind (default 1)')
    parser.add_argument('overrides', nargs='*', help='config fields, as config.num_epochs=5')
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f'--seeds={arguments.seeds} must be at least 1')
    out = Path(arguments.out)
    runs = commands(out, arguments.seeds, arguments.overrides)
    for workdir, command in runs.items():
        code = subprocess.run([*command, f'--workdir={workdir}'], check=False).returncode
        if code:
            return code

    found = {
        (start, sts): [curve(out / f'{start}_{sts}_{seed}') for seed in range(arguments.seeds)]
        for start in STARTS
        for sts in STS
    }
    pictures = curve(out / 'images')[-1][1]
    Console().print(table(found, pictures))
    (out / 'comparison.png').write_bytes(drawing.png(lambda: draw(found)))
    results = {f'{start}_{sts}': curves for (start, sts), curves in found.items()}
    (out / 'comparison.json').write_text(json.dumps({'images': pictures, **results}) + '\n')
    return 0


def commands(out: Path, seeds: int, overrides: Sequence[str]) -> dict[Path, list[str]]:
    """Workdir -> the command that trains there, but for the workdir, in order."""
    train = [sys.executable, '-m', 'dist_jax', 'train']
    found = {out / 'images': [*train, '--config=configs/sts.py:demo_images']}
    for seed in range(seeds):
        for start in STARTS:
            for sts in STS:
                fields = [
                    f'config.model.sts={sts}',
                    f'config.seed={seed}',
                    f'config.data.root={out / "clips"}',
                    *([f'config.init_from={out / "images"}'] if start == 'pictures' else []),
                    *overrides,
                ]
                found[out / f'{start}_{sts}_{seed}'] = [
                    *train,
                    '--config=configs/sts.py:demo',
                    *(f'--{field}' for field in fields),
                ]
    return found


def curve(workdir: Path) -> list[tuple[int, float]]:
    """(step, validation accuracy) of a run's evaluations."""
    rows = read_metrics(workdir / METRICS_FILE)
    return [(row['step'], row[ACCURACY]) for row in rows if ACCURACY in row]


def table(found: Curves, pictures: float) -> Table:
    """The last accuracy of all kinds of runs: a mean, and how far seeds lie apart."""
    shown = Table(
        'fine-tuned', *(f'STS {sts}' for sts in STS), title=f'pictures: {100 * pictures:.1f} %'
    )
    for start in STARTS:
        cells = []
        for sts in STS:
            last = [100 * curve[-1][1] for curve in found[start, sts]]
            spread = f' ({min(last):.1f} to {max(last):.1f})' if len(last) > 1 else ''
            cells.append(f'{statistics.mean(last):.1f} %{spread}')
        shown.add_row(f'from {start}', *cells)
    return shown


def draw(found: Curves) -> Figure:
    """Accuracy over steps: a colour for STS on or off, dashed from scratch, a line a seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.8), layout='constrained')
    axis = figure.subplots()
    for (start, sts), curves in found.items():
        for number, points in enumerate(curves):
            steps, values = zip(*points)
            axis.plot(
                steps,
                [100 * value for value in values],
                color=f'C{STS.index(sts)}',
                linestyle=('-', '--')[STARTS.index(start)],
                marker='o',
                markersize=3.5,
                alpha=1 if len(curves) == 1 else 0.7,
                label=None if number else f'from {start}, STS {sts}',
            )
    axis.set_title('accuracy on validation clips, %')
    axis.set_xlabel('step')
    axis.set_xlim(left=0)
    axis.set_ylim(0, 103)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.grid(True)
    axis.legend(loc='lower right')
    return figure


if __name__ == '__main__':
    sys.exit(main())
