"""Looks at a built data set: figures, pictures of every class, and a check of every record.

examples:
  dist_jax dataset inspect built/k400
  dist_jax dataset inspect built/k400 --splits validation --full --threads 16
  dist_jax dataset inspect built/k400 --no_check --videos 6 --out look/

Written into OUT (FOLDER/inspection unless given): statistics.json, statistics.png (durations,
sizes, frame rates, bytes), SPLIT/CLASS.png (frames of a few videos of each class, with a text in
sets of captions) and check.jsonl, one line for every record that is not what it should be. The
check compares each record with the checksum, id and label of the index, and decodes 8 frames of it,
or with --full all. The exit code is 0 if every record is right, 1 if not, 2 if FOLDER is not a data
set.
"""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dist_jax import contact_sheet
from dist_jax.drawing import cut, theme
from input_pipeline.bad_videos import check_frames
from input_pipeline.decode import DecodeError
from input_pipeline.escape import Console, json_text
from input_pipeline.jpeg import open_file
from input_pipeline.label_sets import LabelSets
from input_pipeline.machine import num_cpus
from input_pipeline.pipeline import open_video
from input_pipeline.records import BuiltSplit, Identity, is_built, read_example, read_index

MOST_SHEETS = 20  # of a set of captions, which has no classes
LETTER = 0.09  # inches: width of one of a title
FEW_VALUES = 8  # up to here a bar for each value, beyond a histogram
_FIGURES = {  # title and unit of what statistics.png shows
    'duration': 'duration, s',
    'short side': 'short side, pixels',
    'fps': 'frames per second',
    'kB per second': 'kB per second of video',
}
_CONSTANTS = {  # the same of a value that all videos have
    'duration': '{:.4g} s',
    'short side': 'short side {:.4g}',
    'fps': '{:.4g} frames per second',
    'kB per second': '{:.4g} kB per second',
}


def statistics(source: BuiltSplit) -> dict[str, Any]:
    """Figures of a split, from its index alone.

    Args:
      source: the split.

    Returns:
      Numbers that describe it; for JSON.
    """
    index = source.index
    hours = float(index.facts['duration'].sum() / 3600)
    sizes, counts = np.unique(
        np.stack([index.facts['width'], index.facts['height']], 1), axis=0, return_counts=True
    )
    common = np.argsort(-counts, kind='stable')[:5]
    found = {
        'records': len(source),
        'shards': len(index.shards),
        'hours': hours,
        'frames': int(index.facts['num_frames'].sum()),
        'video_bytes': int(index.num_bytes.sum()),
        'sizes': {f'{sizes[k][0]} x {sizes[k][1]}': int(counts[k]) for k in common},
        'other_sizes': int(counts.sum() - counts[common].sum()),
    }
    for name, values in _distributions(source).items():
        low, median, high = np.percentile(values, [0, 50, 100]).tolist() if len(values) else [0] * 3
        found[name] = {'min': low, 'median': median, 'max': high}
    if isinstance(index.labels, LabelSets):
        found['classes of a video'] = {
            'none': int((index.labels.sizes == 0).sum()),
            'mean': float(index.labels.sizes.mean()) if len(source) else 0.0,
            'most': int(index.labels.sizes.max(initial=0)),
        }
    for head, names in enumerate(_heads(source)):
        videos = _counts(source, head, len(names))
        found[f'classes of head {head + 1}'] = {
            'number': len(names),
            'without a video': int((videos == 0).sum()),
            'fewest videos': int(videos.min()),
            'most videos': int(videos.max()),
        }
    if not source.class_names:
        found['captions'] = len(index.captions.texts)
    return found


def _heads(source: BuiltSplit) -> tuple[tuple[str, ...], ...]:
    names = source.class_names
    return names if names and isinstance(names[0], tuple) else (names,) if names else ()


def _distributions(source: BuiltSplit) -> dict[str, np.ndarray]:
    facts = source.index.facts
    return {
        'duration': facts['duration'],
        'short side': np.minimum(facts['height'], facts['width']),
        'fps': facts['fps'],
        'kB per second': source.index.num_bytes / 1e3 / np.maximum(facts['duration'], 1e-9),
    }


def draw_statistics(sources: Sequence[BuiltSplit], path: Path) -> None:
    """Histograms of duration, size, rate and bytes, a row a split; its title has the constants."""
    rows = []
    for source in sources:
        found = {name: np.asarray(v, float).round(3) for name, v in _distributions(source).items()}
        varied = {name: values for name, values in found.items() if len(np.unique(values)) > 1}
        said = ', '.join(
            _CONSTANTS[name].format(values[0])
            for name, values in found.items()
            if name not in varied and len(values)
        )
        videos = '1 video' if len(source) == 1 else f'{len(source):,} videos'
        said = f'{", all with" if len(source) > 1 else ":"} {said}' if said else ''
        rows.append((varied, f'{source.name}: {videos}{said}'))
    across = max(2, *(len(varied) for varied, _ in rows))
    width = max(3.6 * across, *(LETTER * (len(said) + 2) for _, said in rows))
    heights = [2.5 if varied else contact_sheet.HEAD for varied, _ in rows]
    with theme():
        figure = Figure(figsize=(width, sum(heights)), layout='constrained')
        parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (varied, said) in zip(parts, rows):
            middle = {} if varied else {'y': 0.5, 'va': 'center'}
            part.suptitle(said, x=0.01, ha='left', fontsize=10, weight='bold', **middle)
            axes = part.subplots(1, len(varied), squeeze=False)[0] if varied else ()
            for axis, (name, values) in zip(axes, varied.items()):
                _draw_distribution(axis, values)
                axis.set_title(f'{_FIGURES[name]}; median {np.median(values):.4g}')
                axis.set_ylabel('videos')
        figure.savefig(path, dpi=120)


def _draw_distribution(axis: Axes, values: np.ndarray) -> None:
    """A histogram; a bar for each value where there are few."""
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) <= FEW_VALUES:
        axis.bar(range(len(kinds)), counts, 0.7)
        axis.set_xticks(range(len(kinds)), [f'{kind:.4g}' for kind in kinds])
        axis.set_xlim(-1, len(kinds))
    else:
        axis.hist(values, bins=24, rwidth=0.88)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.grid(True, axis='y')


def _sheets(source: BuiltSplit, num_videos: int) -> Iterator[tuple[str, str, list[int]]]:
    """Yields file name, title and records of each contact sheet."""
    names = _heads(source)
    if not names:
        for first in range(0, min(len(source), MOST_SHEETS * num_videos), num_videos):
            records = list(range(first, min(first + num_videos, len(source))))
            yield f'{first:06d}', f'{source.name}, records from {first}', records
    for head, classes in enumerate(names):
        for label, name in enumerate(classes):
            members = _members(source, head, label)
            spread = np.linspace(0, len(members) - 1, min(num_videos, len(members)))
            plain = re.sub(r'[^\w-]+', '_', name)[:60]
            prefix = f'head{head + 1}_' if len(names) > 1 else ''
            title = f'{source.name}, {label}  {cut(name, 80)}: {len(members)} videos'
            yield (
                f'{prefix}{label:04d}_{plain}',
                title,
                members[spread.round().astype(int)].tolist(),
            )


def _counts(source: BuiltSplit, head: int, num_classes: int) -> np.ndarray:
    """(num_classes,) records of each class."""
    labels = source.index.labels
    if isinstance(labels, LabelSets):
        return labels.counts(num_classes)
    return np.bincount(labels[:, head], minlength=num_classes)


def _members(source: BuiltSplit, head: int, label: int) -> np.ndarray:
    """Numbers of the records of a class, ascending."""
    labels = source.index.labels
    if isinstance(labels, LabelSets):
        return labels.members(label)
    return np.flatnonzero(labels[:, head] == label)


def draw_sheet(source: BuiltSplit, title: str, records: Sequence[int], path: Path) -> None:
    """Draws frames of records, a row each; what cannot be read is said in its row.

    Args:
      source: the split.
      title: above all.
      records: their numbers.
      path: PNG to write.
    """
    rows = [_row(source, record) for record in records]
    heights = [contact_sheet.HEAD]
    heights += [contact_sheet.height(len(f), shape=f.shape[1:]) for _, f, _ in rows]
    with theme():
        figure = Figure(figsize=(contact_sheet.WIDTH, sum(heights)), layout='constrained')
        figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0.0, hspace=0.0)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        parts[0].suptitle(title, fontsize=11, x=0.01, ha='left', weight='bold')
        for part, (text, frames, numbers) in zip(parts[1:], rows):
            if len(frames):
                contact_sheet.draw(part, text, frames, numbers)
            else:
                part.suptitle(text, x=0.01, ha='left', color='#d1495b')
        figure.savefig(path, dpi=80)


def _row(source: BuiltSplit, record: int) -> tuple[str, np.ndarray, np.ndarray]:
    """What is said of a record, and its frames and their numbers; none if it cannot be read."""
    name = f'{record}  {cut(source.index.video_ids[record], 70)}'
    try:
        with open_video(source[record]) as video:
            numbers = contact_sheet.choose(video.num_frames, contact_sheet.COLUMNS)
            frames = video.frames(numbers)
            facts = f'{video.num_frames} frames, {video.duration:.2f} s'
    except DecodeError as error:
        return f'{name}: {error.kind}', np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, int)
    height, width = frames.shape[1:3]
    captions = source.index.captions[record]
    text = f'  “{cut(captions[0], 80)}” (1 of {len(captions)})' if captions else ''
    return f'{name}, {width} x {height}, {facts}{text}', frames, numbers


def check_record(source: BuiltSplit, index: int, full: bool = False) -> tuple[str, str] | None:
    """Compares a record with the index and decodes it.

    Args:
      source: the split.
      index: number of the record.
      full: decode every frame.

    Returns:
      What is wrong as (kind, reason); None if nothing is.
    """
    shard, position = source.place(index)
    first = index - position
    span = f'{source.name} {first} to {first + int(source.index.shard_lengths[shard]) - 1}'
    try:
        example = read_example(
            os.fspath(source.folder / source.index.shards[shard]), position, span
        )
    except OSError as error:
        return 'unreadable', str(error)
    content = example['video'].bytes_list.value[0]
    found, expected = Identity.of_example(example), source.expected(index)
    if found.crc32 != expected.crc32:
        return 'checksum', f'the video has not the checksum of the index, {len(content)} bytes'
    if found != expected:
        return 'mismatch', f'the record has {found}, the index {expected}'
    try:
        with open_file(content, name=source[index].path) as video:
            stated = int(source.index.facts['num_frames'][index])
            if video.num_frames != stated:
                return 'mismatch', f'{video.num_frames} frames, the index says {stated}'
            check_frames(video, 0, video.num_frames, full)
    except DecodeError as error:
        return error.kind, error.reason
    return None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dist_jax dataset inspect',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('folder', metavar='FOLDER', help='built by `dist_jax dataset build`')
    add('--splits', nargs='+', default=[], help='default: all')
    add('--out', default='', metavar='DIR', help='default: FOLDER/inspection')
    add('--videos', type=int, default=4, help='on a contact sheet (default %(default)s); 0: none')
    add('--full', action='store_true', help='decode every frame')
    add('--no_check', action='store_true', help='statistics and pictures only')
    add('--threads', type=int, default=num_cpus(), help='default: all cores')
    return parser


def _print_statistics(console: Console, found: dict[str, dict[str, Any]]) -> None:
    columns = ('split', 'records', 'shards', 'hours', 'GB', 'kB/s', 'seconds', 'fps')
    table = Table(*columns)
    for split, figures in found.items():
        table.add_row(
            split,
            str(figures['records']),
            str(figures['shards']),
            f'{figures["hours"]:.2f}',
            f'{figures["video_bytes"] / 1e9:.3f}',
            f'{figures["kB per second"]["median"]:.0f}',
            '{min:.1f} to {max:.1f}'.format(**figures['duration']),
            '{min:.4g} to {max:.4g}'.format(**figures['fps']),
        )
    console.print(table)
    for split, figures in found.items():
        sizes = ', '.join(f'{count} of {size}' for size, count in figures['sizes'].items())
        others = f', {figures["other_sizes"]} of other sizes' if figures['other_sizes'] else ''
        console.print(f'{split}: {sizes}{others}', soft_wrap=True)


def _check(
    console: Console, pool: ThreadPoolExecutor, sources: Sequence[BuiltSplit], full: bool
) -> list[dict[str, Any]]:
    bad = []
    with _progress(console) as bar:
        task = bar.add_task('check', total=sum(map(len, sources)))
        for source in sources:
            results = pool.map(lambda k, s=source: check_record(s, k, full), range(len(source)))
            for index, problem in enumerate(results):
                bar.advance(task)
                if problem is not None:
                    kind, reason = problem
                    path = source[index].path
                    entry = {'split': source.name, 'index': index, 'path': path}
                    bad.append(entry | {'kind': kind, 'reason': reason})
                    bar.update(task, description=f'check, {len(bad)} bad')
    return bad


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    console = Console()
    folder = Path(arguments.folder)
    try:
        if not is_built(folder):
            raise ValueError(f'{folder}: no data set of `dist_jax dataset build` (no index.json)')
        splits = arguments.splits or read_index(folder)['splits']
        sources = [BuiltSplit(folder, split) for split in splits]
    except ValueError as error:
        console.print(f'error: {error}', style='red', soft_wrap=True)
        return 2
    out = Path(arguments.out or folder / 'inspection')
    out.mkdir(parents=True, exist_ok=True)
    found = {source.name: statistics(source) for source in sources}
    text = json_text(found, indent=1) + '\n'
    (out / 'statistics.json').write_text(text, encoding='utf-8')
    draw_statistics(sources, out / 'statistics.png')
    _print_statistics(console, found)
    with ThreadPoolExecutor(max(arguments.threads, 1)) as pool:
        if arguments.videos > 0:
            sheets = [(s, *sheet) for s in sources for sheet in _sheets(s, arguments.videos)]
            for source in sources:
                (out / source.name).mkdir(exist_ok=True)
            with _progress(console) as bar:
                for source, name, title, records in bar.track(sheets, description='pictures'):
                    draw_sheet(source, title, records, out / source.name / f'{name}.png')
        bad = [] if arguments.no_check else _check(console, pool, sources, arguments.full)
    if not arguments.no_check:
        lines = ''.join(json_text(entry) + '\n' for entry in bad)
        (out / 'check.jsonl').write_text(lines, encoding='utf-8')
        checked = sum(map(len, sources))
        verdict = f'{len(bad)} of {checked} records are bad, see {out / "check.jsonl"}'
        verdict = verdict if bad else f'all {checked} records are right'
        console.print(verdict, soft_wrap=True)
    console.print(f'see {out}: statistics.png, and a sheet a class in its folders', soft_wrap=True)
    return 1 if bad else 0
