"""Builds a data set: from the original annotation files and videos to shards that train reads.

examples:
  dist_jax dataset build kinetics400 --annotations k400/annotations --videos /data/k400 \\
      --out built/k400 --short_side 256 --workers 16
  dist_jax dataset build something_v1 --annotations v1/ --videos v1/frames --out built/v1
  dist_jax dataset build hmdb51 --annotations splits/ --videos hmdb.tar --out built/hmdb51 \\
      --splits train1 test1
  dist_jax dataset build custom --list train=train.csv validation=val.csv --videos clips/ \\
      --out built/mine --short_side 320 --codec jpeg --crf 4
  dist_jax dataset build kinetics400 --annotations ... --videos ... --out ... --beam \\
      -- --runner=FlinkRunner --flink_master=HOST:8081

Then: dist_jax train --config.data.train_list=built/k400 --config.data.val_list=built/k400 ...

A build that was cut off continues when the same command runs again; other arguments are refused.
Videos that are missing or broken are left out and listed in OUT/report.txt. docs/guides/data.md has
a command for every data set. The exit code is 0 when the set is complete, 2 when something is
wrong, 130 when interrupted.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from etils import epath
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dist_jax.dataset.building import finish, plan, pool, shards
from dist_jax.dataset.building.plan import Options
from dist_jax.dataset.building.shards import BuildFolder
from dist_jax.dataset.building.videos import VideoFiles
from input_pipeline.datasets import DATASETS
from input_pipeline.encode import CODECS, USUAL_CRF
from input_pipeline.escape import Console
from input_pipeline.list_formats import FORMATS
from input_pipeline.machine import num_cpus
from input_pipeline.records import INDEX


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dist_jax dataset build',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [name for name, info in DATASETS.items() if info.splits or name == 'custom']
    add('name', choices=names, help='data set; custom takes any list', metavar='NAME')
    add('--out', required=True, metavar='DIR', help='folder of the data set; may be in a bucket')
    add(
        '--videos',
        nargs='+',
        required=True,
        metavar='PATH',
        help='folders (also in a bucket), tar files',
    )
    add('--annotations', default='', metavar='DIR', help='folder of the original files')
    add('--splits', nargs='+', default=[], help='default: all whose files are there')
    add('--list', nargs='+', default=[], metavar='SPLIT=FILE', help='lists by another name')
    add('--format', default='', choices=('', *FORMATS), metavar='FORMAT', help='of all lists')
    add('--label_map', nargs='+', default=[], metavar='FILE', help='class names, one a head')
    default = Options()
    more = parser.add_argument_group('what is stored (without --short_side: the files as they are)')
    add = more.add_argument
    add('--short_side', type=int, default=0, metavar='PIXELS', help='encode anew, at this size')
    add('--keyframe_interval', type=int, default=default.keyframe_interval, metavar='FRAMES')
    usual = ', '.join(f'{codec} {crf}' for codec, crf in USUAL_CRF.items())
    add('--crf', type=int, help=f'quality: h264 0 to 51, others 2 to 31 (default: {usual})')
    about = 'mpeg4: cheaper to decode; jpeg: every frame a key frame, cheapest and largest'
    add('--codec', choices=CODECS, default=default.codec, help=about)
    add('--records_per_shard', type=int, default=default.records_per_shard, metavar='N')
    add('--full_check', action='store_true', help='decode every frame of files kept as they are')
    add('--frame_rate', type=float, default=0.0, help="of frame folders (default: the set's own)")
    run = parser.add_argument_group('how it runs (may differ when a build is continued)')
    add = run.add_argument
    add('--workers', type=int, default=num_cpus(), help='processes (default: all cores)')
    add('--timeout', type=float, default=600, help='seconds for a video (default %(default)s)')
    add('--beam', action='store_true', help="with Apache Beam; its flags follow after '--'")
    return parser


def _arguments_of_result(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """What the bytes of the result depend on; kept in the manifest."""
    paths = {name: os.path.abspath(path) for name, path in _lists(arguments.list).items()}
    return {
        'name': arguments.name,
        'videos': [_absolute(path) for path in arguments.videos],
        'annotations': os.path.abspath(arguments.annotations) if arguments.annotations else '',
        'splits': arguments.splits,
        'list': paths,
        'format': arguments.format,
        'label_map': [os.path.abspath(path) for path in arguments.label_map],
        **asdict(options),
    }


def _absolute(path: str) -> str:
    return path if '://' in path else os.path.abspath(path)


def _lists(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        split, _, path = pair.partition('=')
        if not split or not path:
            raise ValueError(f'--list {pair}: expected SPLIT=FILE')
        found[split] = path
    return found


def _prepare(arguments: argparse.Namespace, console: Console) -> BuildFolder:
    """Starts a build or continues one.

    Raises:
      ValueError: if an argument or a list is wrong.
    """
    info = DATASETS[arguments.name]
    options = Options(
        arguments.records_per_shard,
        arguments.short_side,
        arguments.keyframe_interval,
        USUAL_CRF[arguments.codec] if arguments.crf is None else arguments.crf,
        arguments.codec,
        arguments.full_check,
        arguments.frame_rate or info.frame_rate,
    )
    lists = plan.find_lists(
        arguments.name, arguments.annotations, arguments.splits, _lists(arguments.list)
    )
    label_maps = plan.find_label_maps(arguments.name, arguments.annotations, arguments.label_map)
    result_of = _arguments_of_result(arguments, options)
    result_of['sha256'] = plan.digest([path for path, _ in lists.values()] + label_maps)
    out = epath.Path(arguments.out)
    folder = shards.continue_folder(out, result_of)
    if folder is not None:
        return folder
    console.print('looking for the videos')
    planned = plan.make_plan(
        arguments.name, lists, label_maps, VideoFiles(arguments.videos), options, arguments.format
    )
    return shards.start_folder(out, result_of, planned)


def _build(folder: BuildFolder, arguments: argparse.Namespace, beam_flags, console) -> None:
    tasks = folder.tasks()
    results = dict(zip(tasks, folder.results(tasks)))
    left = [task for task in tasks if results[task] is None]
    if len(left) < len(tasks):
        console.print(f'{len(tasks) - len(left)} of {len(tasks)} shards are built already')
    if arguments.beam:
        try:
            from dist_jax.dataset.building.beam import build_with_beam
        except ImportError as error:
            raise ValueError(f"{error}: --beam needs pip install -e '.[beam]'") from error
        build_with_beam(folder.path, left, beam_flags)
        return
    sizes = folder.manifest['splits']
    listed = sum(split['num_listed'] for split in sizes.values())
    done = [result for result in results.values() if result is not None]
    dropped = sum(len(result['problems']) for result in done)
    videos = sum(len(result['rows']) for result in done) + dropped
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        line = bar.add_task(f'{dropped} dropped', total=listed, completed=videos)

        def progress(more: int, more_dropped: int) -> None:
            nonlocal dropped
            dropped += more_dropped
            bar.update(line, advance=more, description=f'{dropped} dropped')

        pool.build_shards(folder.path, left, arguments.workers, arguments.timeout, progress)


def _check_complete(folder: BuildFolder) -> None:
    """Raises ValueError if a complete data set lost a shard."""
    for split in folder.manifest['splits'].values():
        for shard in split['shards']:
            path = folder.path / shard['file']
            if not path.exists() or path.stat().length != shard['bytes']:
                raise ValueError(
                    f'{path}: missing or of another size than the manifest says; delete the '
                    'folder and build it again'
                )


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    split = argv.index('--') if '--' in argv else len(argv)
    arguments, beam_flags = parser().parse_args(argv[:split]), list(argv[split + 1 :])
    console = Console()
    try:
        if beam_flags and not arguments.beam:
            raise ValueError(f"{beam_flags[0]} after '--' is for --beam")
        folder = _prepare(arguments, console)
        if (folder.path / INDEX).exists():
            _check_complete(folder)
            console.print(f'{folder.path} is complete already', soft_wrap=True)
            return 0
        with folder.lock():
            _build(folder, arguments, beam_flags, console)
            summaries = finish.finish(folder)
    except KeyboardInterrupt:
        console.print('interrupted; the same command continues')
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f'error: {error}', style='red', soft_wrap=True)
        return 2
    table = Table('split', 'listed', 'stored', 'GB', 'left out')
    for name, summary in summaries.items():
        reasons = ', '.join(f'{count} {kind}' for kind, count in summary.dropped.items())
        size = f'{summary.num_bytes / 1e9:.3f}'
        table.add_row(name, str(summary.listed), str(summary.stored), size, reasons)
    console.print(table)
    console.print(f'see {folder.path}: report.txt, labels.png', soft_wrap=True)
    return 0
