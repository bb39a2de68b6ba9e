"""Reads damaged and hostile checkpoints, lists and shards, and counts what becomes of them.

  python -m tools.fuzz_files
  python -m tools.fuzz_files --inputs 5000 --seed 1 --kinds checkpoint shard --json fuzz.json
  python -m tools.fuzz_files --kinds list --keep found/

Recorded and built files are changed byte by byte and field by field; others ask for more than there
is. Each is read by a child process with a bound on time and memory (videos are damaged by
`tools.fuzz_decode`). It may load, or be refused by a ValueError or OSError that names the file. The
exit code is 1 if any did neither: an error that names no file, another exception, a crash, a hang,
or more memory than the bound. Those inputs are listed, and kept with --keep. Linux only; the
recorded checkpoints are those of the tests, so it runs in a clone of the repository.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.progress import Progress
from rich.table import Table

from input_pipeline.escape import Console
from tools.fuzzing import checkpoints, lists, shards
from tools.fuzzing.child import BUGS, LOADED, REFUSED, Child, Input, Outcome, Reader
from tools.fuzzing.damage import Rng

GOLDEN = Path(__file__).parent.parent / 'tests' / 'golden'


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
      prepare: writes good ones into a folder.
      write: (good ones, path to write, rng, number) -> a bad one.
      read: the reader under test.
    """

    prepare: Callable[[Path], list[Input]]
    write: Callable[[list[Input], Path, Rng, int], Input]
    read: Reader


KINDS: dict[str, Kind] = {
    'checkpoint': Kind(
        lambda folder: checkpoints.prepare(folder, GOLDEN), checkpoints.write, checkpoints.read
    ),
    'list': Kind(lists.prepare, lists.write, lists.read),
    'label_map': Kind(lists.prepare_label_maps, lists.write_label_map, lists.read_label_map),
    'shard': Kind(shards.prepare, shards.write, shards.read),
}


def fuzz(
    name: str,
    count: int,
    seed: int,
    folder: Path,
    *,
    timeout: float,
    mebibytes: int,
    tick: Callable[[Input, Outcome], None],
) -> list[tuple[Input, Outcome]]:
    """Reads bad files of a kind.

    Args:
      name: a key of `KINDS`.
      count: files.
      seed: of the damage.
      folder: to write in; only one bad file lies there at a time.
      timeout: seconds a file.
      mebibytes: of memory a file.
      tick: called after each, while its file is there.

    Returns:
      How each ended.
    """
    kind, results = KINDS[name], []
    good = kind.prepare(folder / 'good')
    with Child(kind.read, good, timeout, mebibytes) as child:
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            item = kind.write(good, folder / f'{name}_{number:05d}', rng, number)
            outcome = child.read(item)
            tick(item, outcome)
            results.append((item, outcome))
            if item.path.is_dir():
                shutil.rmtree(item.path)
            else:
                item.path.unlink()
    return results


def figures(results: list[tuple[Input, Outcome]]) -> dict[str, dict]:
    """Counts, seconds and memory of every origin, and of all."""
    groups = collections.defaultdict(list)
    for item, outcome in results:
        groups[item.origin].append(outcome)
        groups['all'].append(outcome)
    groups['all'] = groups.pop('all')  # last
    return {
        origin: {
            'inputs': len(group),
            'outcomes': dict(collections.Counter(outcome.kind for outcome in group)),
            'seconds': _middle_and_most([outcome.seconds for outcome in group]),
            'mebibytes': _middle_and_most([outcome.mebibytes for outcome in group]),
        }
        for origin, group in groups.items()
    }


def _middle_and_most(values: list[float]) -> dict[str, float]:
    return {'median': round(statistics.median(values), 4), 'max': round(max(values), 4)}


def _print_table(console: Console, name: str, rows: dict[str, dict]) -> None:
    table = Table('made by', title=f'{name}: median / most a file')
    for column in ('inputs', LOADED, REFUSED, 'bugs', 'ms', 'MiB'):
        table.add_column(column, justify='right')
    for origin, row in rows.items():
        if origin == 'all':
            table.add_section()
        seconds, memory = row['seconds'], row['mebibytes']
        table.add_row(
            origin,
            str(row['inputs']),
            *(str(row['outcomes'].get(kind, 0)) for kind in (LOADED, REFUSED)),
            str(sum(row['outcomes'].get(kind, 0) for kind in BUGS)),
            f'{1000 * seconds["median"]:.0f} / {1000 * seconds["max"]:.0f}',
            f'{memory["median"]:.0f} / {memory["max"]:.0f}',
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.fuzz_files',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--inputs', type=int, default=2000, help='of all kinds (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the damage (%(default)s)')
    parser.add_argument(
        '--kinds', nargs='+', choices=KINDS, default=list(KINDS), help='what to read (all)'
    )
    parser.add_argument('--timeout', type=float, default=20, help='seconds a file (%(default)s)')
    parser.add_argument(
        '--memory', type=int, default=512, metavar='MIB', help='memory a file (%(default)s)'
    )
    parser.add_argument('--keep', metavar='DIR', help='keep what was neither read nor refused')
    parser.add_argument('--json', metavar='FILE', help='also write the figures there')
    arguments = parser.parse_args(argv)
    console = Console()
    found, report = [], {}

    def finish(item: Input, outcome: Outcome) -> None:
        progress.advance(task)
        if outcome.kind not in BUGS:
            return
        found.append((item, outcome))
        if arguments.keep:
            _keep(item.path, Path(arguments.keep) / item.path.name)

    with Progress(console=console) as progress:
        for position, name in enumerate(arguments.kinds):
            # Together exactly what was asked for.
            count = arguments.inputs * (position + 1) // len(arguments.kinds)
            count -= arguments.inputs * position // len(arguments.kinds)
            task = progress.add_task(name, total=count)
            with tempfile.TemporaryDirectory() as folder:
                start = time.monotonic()
                results = fuzz(
                    name,
                    count,
                    arguments.seed,
                    Path(folder),
                    timeout=arguments.timeout,
                    mebibytes=arguments.memory,
                    tick=finish,
                )
            report[name] = {
                'wall_seconds': round(time.monotonic() - start, 1),
                'made_by': figures(results),
            }
    for name, part in report.items():
        _print_table(console, name, part['made_by'])
    for item, outcome in found:
        console.print(
            f'{item.path.name} ({item.origin}): {outcome.kind}: {outcome.message}', soft_wrap=True
        )
    seconds = sum(part['wall_seconds'] for part in report.values())
    counts = collections.Counter(outcome.kind for _, outcome in found)
    bugs = ', '.join(f'{counts[kind]} {kind}' for kind in BUGS)
    console.print(
        f'{arguments.inputs} inputs in {seconds:.0f} s, bounds {arguments.timeout:g} s and '
        f'{arguments.memory} MiB a file; neither read nor refused: {bugs}',
        soft_wrap=True,
    )
    if arguments.json:
        text = json.dumps({**report, 'found': len(found)}, indent=1)
        Path(arguments.json).write_text(text + '\n', encoding='utf-8')
    return int(bool(found))


def _keep(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, symlinks=True, copy_function=_copy, dirs_exist_ok=True)
    else:
        _copy(path, target)


def _copy(source: str | Path, target: str | Path) -> None:
    if Path(source).is_fifo():  # it would be waited for
        Path(target).with_name(f'{Path(target).name}.fifo').touch()
    else:
        shutil.copy(source, target, follow_symlinks=False)


if __name__ == '__main__':
    sys.exit(main())
