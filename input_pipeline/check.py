"""Reads a whole list of videos before a run and reports those that cannot be read.

examples:
  dist_jax check --list k400/train.txt --root /data/k400
  dist_jax check --list videos/ --format folder --full
  dist_jax check --list trainlist01.txt --label_map classInd.txt --root UCF-101 --report bad.jsonl

The report has the lines that a training run writes to bad_videos.jsonl; if every video can be read,
it is empty where --report names it, and else there is none. The exit code is 0 if every video can
be read, 1 if not, 2 if the list itself is wrong.
"""

import argparse
import os
import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from input_pipeline.bad_videos import NUM_CHECK_FRAMES, check_source, open_report
from input_pipeline.escape import Console
from input_pipeline.list_formats import LIST_FORMATS
from input_pipeline.machine import num_cpus
from input_pipeline.sources import open_source

REPORT = 'bad_videos.jsonl'


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dist_jax check',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--list', required=True, metavar='PATH', help='list file or folder')
    parser.add_argument(
        '--root', default='', help='folder the paths start from (default: the folder of the list)'
    )
    parser.add_argument(
        '--format', default='auto', choices=LIST_FORMATS, help='format of the list (default auto)'
    )
    parser.add_argument(
        '--label_map', default=[], nargs='+', metavar='FILE', help='class names, one file per head'
    )
    parser.add_argument(
        '--subset', default='', help='train1 .. test3 of HMDB51 and UCF101, split of a CSV'
    )
    parser.add_argument(
        '--report', default='', metavar='FILE', help=f'default {REPORT}, if a video is bad'
    )
    parser.add_argument(
        '--full',
        action='store_true',
        help=f'decode every frame (default: the {NUM_CHECK_FRAMES} frames of a segment sample)',
    )
    parser.add_argument('--threads', type=int, default=num_cpus(), help='default: all cores')
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs `dist_jax check`.

    Args:
      argv: arguments after the command; None takes them from the process.

    Returns:
      The exit code: 0 all good, 1 some videos are bad, 2 the list is wrong.
    """
    arguments = parser().parse_args(argv)
    report = arguments.report or REPORT
    console = Console()
    try:
        source = open_source(
            arguments.list,
            arguments.format,
            arguments.root,
            arguments.label_map or '',
            subset=arguments.subset,
        )
        open_report(report)
    except (ValueError, OSError) as error:
        console.print(f'error: {error}', style='red', soft_wrap=True)
        return 2
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task('0 bad', total=len(source))
        result = check_source(
            source,
            report,
            full=arguments.full,
            num_threads=max(arguments.threads, 1),
            progress=lambda done, _, bad: bar.update(
                task, completed=done, description=f'{bad} bad'
            ),
        )
    if not result.bad:
        if not arguments.report:
            os.remove(report)
        console.print(f'all {result.total} videos can be read')
        return 0
    table = Table('kind', 'videos', 'first of them', title=None)
    for kind, count in result.counts.most_common():
        first = next(entry for entry in result.bad if entry['kind'] == kind)
        table.add_row(kind, str(count), f'{first["path"]}: {first["reason"]}')
    console.print(table)
    share = len(result.bad) / result.total
    console.print(
        f'{len(result.bad)} of {result.total} videos ({share:.2%}) cannot be read; see {report}',
        soft_wrap=True,
    )
    return 1


if __name__ == '__main__':
    sys.exit(main())
