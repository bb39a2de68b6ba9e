"""Kills a training run again and again and shows that it ends as if nothing had happened.

    python -m tools.kill_and_resume
    python -m tools.kill_and_resume --workdir=/tmp/kills --kills=10
    python -m tools.kill_and_resume --config=configs/sts.py:demo_images
    python -m tools.kill_and_resume --config=configs/side4video_retrieval.py:demo

One run trains without interruption. A second one, with the same config, is killed with SIGKILL at
different moments, each time started again with the same command: while it starts, between steps,
inside a save (while orbax's temporary folder is there), during an evaluation, which is between a
save and its score. Both must end with the same parameters and batch statistics, bit for bit, and
validation figures.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from dist_jax.checkpoint import FOLDER
from dist_jax.metric_writer import METRICS_FILE, read_metrics
from input_pipeline.escape import Console

POLL_SECONDS = 0.002
TIMEOUT_SECONDS = 600


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment; 0 if parameters and validation are equal, 1 if not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--workdir',
        default='runs/kill_and_resume',
        help='folder for both runs; must not exist (default %(default)s)',
    )
    parser.add_argument('--kills', type=int, default=5, help='SIGKILLs, at least 3 (default 5)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--config', default='configs/dist.py:demo', help='FILE:VARIANT')
    parser.add_argument('--json', help='write the outcome to this file')
    parser.add_argument('overrides', nargs='*', help='config fields, as config.num_steps=40')
    arguments = parser.parse_args(argv)
    folder = Path(arguments.workdir)
    if folder.exists():
        parser.error(f'{folder} exists; name a folder that does not: --workdir=FOLDER')
    overrides = [f'--{text}' for text in arguments.overrides or DEFAULT_OVERRIDES]
    command = [sys.executable, '-m', 'dist_jax.main', 'train', f'--config={arguments.config}']
    console = Console()

    console.print('a run without interruption')
    straight = folder / 'straight'
    subprocess.run([*command, *overrides, f'--workdir={straight}'], check=True)
    # The second run reads the same clips and backbone, and nothing else of the first.
    made = {'backbone.checkpoint': straight / 'backbone', 'data.root': straight / 'data'}
    shared = [f'--config.{field}={path}' for field, path in made.items() if path.exists()]
    workdir = folder / 'killed'
    rng = random.Random(arguments.seed)
    kills = [
        kill_once([*command, *overrides, *shared, f'--workdir={workdir}'], workdir, moment, rng)
        for moment in moments(arguments.kills)
    ]
    console.print('and to the end')
    subprocess.run([*command, *overrides, *shared, f'--workdir={workdir}'], check=True)

    hashes = {
        name: json.loads((folder / name / 'summary.json').read_text())['params_sha256']
        for name in ('straight', 'killed')
    }
    validated = [_validated(folder / name) for name in ('straight', 'killed')]
    equal = hashes['straight'] == hashes['killed'] and validated[0] == validated[1]
    table = Table('kill', 'moment', 'steps logged before', 'newest checkpoint', 'unfinished save')
    for number, kill in enumerate(kills, 1):
        table.add_row(str(number), *(str(value) for value in kill.values()))
    console.print(table)
    console.print(f'{hashes}\n{"bit-equal" if equal else "DIFFERENT"} after {len(kills)} kills')
    if arguments.json:
        outcome = {'kills': kills, 'params_sha256': hashes, 'equal': equal}
        Path(arguments.json).write_text(json.dumps(outcome, indent=1) + '\n')
    return 0 if equal else 1


DEFAULT_OVERRIDES = (
    'config.num_steps=60',
    'config.checkpoint.every_steps=7',
    'config.log.every_steps=1',
    'config.eval.every_epochs=0.3',
)


def moments(count: int) -> list[str]:
    """The moments of `count` kills: every kind at least once, then mostly between steps."""
    kinds = ['start', 'step', 'save', 'evaluation', 'step']
    return [kinds[i] if i < len(kinds) else ('save', 'step')[i % 2] for i in range(count)]


def kill_once(command: list[str], workdir: Path, moment: str, rng: random.Random) -> dict[str, str]:
    """Starts the run and kills it at the moment.

    Raises:
      RuntimeError: the run ended, or nothing happened for too long, before the moment came.
    """
    before = _logged(workdir)
    saved = _steps(workdir)
    wanted = {
        'start': _after(rng.uniform(0.5, 4)),
        'step': lambda: _logged(workdir) >= before + 2 and rng.random() < 0.01,
        'save': lambda: _unfinished(workdir) and _steps(workdir) >= saved,
        'evaluation': lambda: _evaluating(log),
    }[moment]
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir / f'{moment}.log'
    deadline = time.monotonic() + TIMEOUT_SECONDS
    with log.open('w') as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while not wanted():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f'the run did not come to a {moment}; see {log}')
            time.sleep(POLL_SECONDS)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return {
        'moment': moment,
        'logged': str(_logged(workdir)),
        'checkpoint': str(_steps(workdir)),
        'unfinished': ', '.join(_unfinished(workdir)),
    }


def _after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def _logged(workdir: Path) -> int:
    path = workdir / METRICS_FILE
    rows = read_metrics(path) if path.exists() else []
    return max((row['step'] for row in rows), default=0)


def _validated(workdir: Path) -> list[tuple[int, dict[str, float]]]:
    rows = read_metrics(workdir / METRICS_FILE)
    figures = [{k: row[k] for k in row if k.startswith('val_')} for row in rows]
    return [(row['step'], found) for row, found in zip(rows, figures) if found]


def _steps(workdir: Path) -> int:
    folder = workdir / FOLDER
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def _unfinished(workdir: Path) -> list[str]:
    return sorted(p.name for p in (workdir / FOLDER).glob('*.orbax-checkpoint-tmp'))


def _evaluating(log: Path) -> bool:
    return 'evaluate 0/' in log.read_text()


if __name__ == '__main__':
    sys.exit(main())
