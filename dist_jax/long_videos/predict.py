"""What a trained model says of long videos over time: tables, subtitles, pictures, new videos."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict
from rich.table import Table

from dist_jax import drawing, metrics
from dist_jax.long_videos import annotate, timeline
from dist_jax.long_videos.track import Columns, Segment, Track
from dist_jax.predict import load_model, output_folder, picture_stems
from dist_jax.progress import Bar, duration
from dist_jax.times import clock, subtitle_clock
from dist_jax.video_model import VideoModel, WindowPrediction
from dist_jax.whole_file import appearing
from input_pipeline.decode import DecodeError
from input_pipeline.escape import Console, csv_cell, styled, subtitle, terminal

# What is written of a video: its kind, and the ending of its name.
ENDINGS = {'table': '.json', 'csv': '.csv', 'subtitles': '.srt', 'timeline': '.timeline.png'}
ANNOTATED = {'video': '.mp4'}
MOST_LISTED = 40  # segments of a video in the table on the console
_PER_NOTE = 16  # windows from one move of the bar to the next
_DIGITS = 6  # behind the point, of seconds and probabilities


@dataclasses.dataclass(frozen=True)
class Options:
    """How windows are laid and what is made of them.

    Attributes:
      window: seconds.
      stride: seconds from one start to the next; None for half a window.
      most: classes that are written of each window.
      smooth: windows over which scores are averaged, an odd number.
      threshold: a best class that is less probable is none in segments, subtitles and drawings.
      annotate: also write the video with the best class drawn on it.
      batch_size: windows of a step; None for 8, or more where there are more devices.
    """

    window: float
    stride: float | None = None
    most: int = 5
    smooth: int = 1
    threshold: float = 0.0
    annotate: bool = False
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found and written of a video.

    Attributes:
      path: of the video.
      track: the best classes of its windows.
      files: by kind; those that are written.
      error: '' or why windows are missing.
      problem: '' or why the annotated video is shorter, or is not there.
    """

    path: str
    track: Track
    files: dict[str, Path]
    error: str = ''
    problem: str = ''


def run(
    config: ConfigDict,
    workdir: str,
    step_number: int | str | None,
    paths: Sequence[str],
    options: Options,
    output: str = '',
    labels: str = '',
) -> int:
    """The command `predict --window`: prints a table, writes files about each video.

    Args:
      config: the run's, possibly with other paths or fusion.
      workdir: the run.
      step_number: of the checkpoint, or 'best'; None for the newest.
      paths: video files.
      options: see there.
      output: folder of the files; '' for WORKDIR/predictions.
      labels: file of class names to choose from instead of the run's; text head only.

    Returns:
      The exit code: 0, or 1 if a video could not be read to its end.

    Raises:
      ValueError: the run, the backbone, the labels or the options do not fit, or a video would be
        overwritten.
    """
    endings = ENDINGS | (ANNOTATED if options.annotate else {})
    folder = output_folder(workdir, output)
    stems = picture_stems(paths, tuple(endings.values()))
    files = [{kind: folder / (stem + end) for kind, end in endings.items()} for stem in stems]
    _check_apart(paths, [file for own in files for file in own.values()])
    model = load_model(config, workdir, step_number, labels)
    thumbnails = [timeline.Thumbnails() for _ in paths]
    videos = model.predict_windows_all(
        paths,
        options.window,
        options.stride,
        options.most,
        smooth=options.smooth,
        batch_size=options.batch_size,
        seen=lambda number, window: thumbnails[number].see(window),
    )
    results: list[Found] = []
    with Bar('predict', len(paths)) as bar:
        bar.line(f'{len(paths)} videos, compiling the step')
        for number, predictions in enumerate(videos):
            place = _Place(bar, paths, number, thumbnails[number], options.annotate)
            columns = Columns([len(names) for names in model.labels])
            found = _collect(model, paths[number], predictions, options, columns, place)
            found = dataclasses.replace(found, files=files[number])
            results.append(write(found, options, columns, thumbnails[number], place.drawn))
            thumbnails[number] = timeline.Thumbnails()  # frees the frames
    console = Console()
    for found in results:
        _print(console, found, options)
    return 1 if any(found.error or found.problem for found in results) else 0


class _Place:
    """Moves the bar: by windows for a single video, by videos for several."""

    def __init__(
        self,
        bar: Bar,
        paths: Sequence[str],
        number: int,
        thumbnails: timeline.Thumbnails,
        annotate: bool,
    ):
        self._bar, self._thumbnails = bar, thumbnails
        self._alone, self._number = len(paths) == 1, number
        self._name = '' if self._alone else f'{paths[number]}, '
        self._rounds = 1 + annotate

    def windows(self, done: int, seconds: float) -> None:
        """So many are done, up to this time."""
        if self._alone or done % _PER_NOTE == 0:
            total = max(self._thumbnails.num_windows, done)
            self._move(done, total, f'{self._name}at {duration(seconds)}')

    def drawn(self, seconds: float, end: float) -> None:
        """A frame at this time is drawn on, of so many seconds."""
        total = self._thumbnails.num_windows
        done = total + int(total * seconds / end)
        self._move(done, total, f'{self._name}drawing at {duration(seconds)}')

    def _move(self, done: int, total: int, note: str) -> None:
        if self._alone:
            self._bar.update(done, note, total * self._rounds)
        else:
            self._bar.update(self._number, note)


def _check_apart(paths: Sequence[str], files: Iterable[Path]) -> None:
    """Raises ValueError if a file would be written in place of a video that is read."""
    videos = {(found.st_dev, found.st_ino): path for path in paths for found in _stat(path)}
    for file in files:
        for found in _stat(file):
            path = videos.get((found.st_dev, found.st_ino))
            if path is not None:
                raise ValueError(f'{file} would overwrite {path}: name another folder by --output')


def _stat(path: str | Path) -> Iterator[os.stat_result]:
    """What is known of a file that is there."""
    try:
        yield os.stat(path)
    except OSError:
        return


def _collect(
    model: VideoModel,
    path: str,
    predictions: Iterator[WindowPrediction],
    options: Options,
    columns: Columns,
    place: _Place,
) -> Found:
    """The windows of a video that can be read; fills `columns`, too."""
    track = Track(model.labels, options.most)
    error = ''
    try:
        for start, end, _, scores in predictions:
            track.add((start, end, scores))
            columns.add(scores)
            place.windows(len(track), end)
    except DecodeError as problem:
        error = f'cannot be read: {problem.kind}: {problem.reason}'
    except metrics.NonFiniteScoresError:
        error = f'scores are not finite numbers. {metrics.CAUSE}'
    if error and len(track):
        error = f'from {clock(track.end)} on {error}'
    return Found(path, track, {}, error)


def write(
    found: Found,
    options: Options,
    columns: Columns,
    thumbnails: timeline.Thumbnails,
    on_frame: Callable[[float, float], None],
) -> Found:
    """Writes the files about a video; of one without windows, only that which says why.

    Args:
      found: of the video; `files` says where to.
      options: see there.
      columns: highest probabilities of all classes.
      thumbnails: frames of the video.
      on_frame: called with the time of an annotated frame, and that of the end.

    Returns:
      The same, with what was not or not wholly written.
    """
    files, track = found.files, found.track
    _write_json(files['table'], found, options)
    if not len(track):
        return dataclasses.replace(found, files={'table': files['table']})
    _write_csv(files['csv'], track)
    _write_subtitles(files['subtitles'], track, options.threshold)
    title = _title(found, options)
    drawn = timeline.Timeline(title, track, columns, thumbnails, options.threshold)
    with appearing(files['timeline']) as partial, drawing.theme():
        timeline.draw(drawn).savefig(partial, format='png', dpi=110)
    if 'video' not in files:
        return found
    problem = annotate.write(
        *(files['video'], found.path, track, options.threshold),
        on_frame=lambda seconds: on_frame(seconds, track.end),
    )
    return dataclasses.replace(found, problem=problem)


def _title(found: Found, options: Options) -> str:
    name = drawing.cut(os.path.join(*Path(found.path).parts[-2:]), 60)
    text = f'{name}   {clock(found.track.end)}, windows of {options.window:g} s'
    text += f', {options.smooth} averaged' if options.smooth > 1 else ''
    return text + ('   (incomplete)' if found.error else '')


def _rows(track: Track, head: int) -> Iterator[list[dict[str, Any]]]:
    """For each window the classes of a head and their probabilities, best first."""
    names = track.labels[head]
    for classes, shares in zip(*track.heads()[head]):
        yield [
            {'label': names[index], 'probability': round(share, _DIGITS)}
            for index, share in zip(classes.tolist(), shares.tolist())
        ]


def _segment(track: Track, segment: Segment) -> dict[str, Any]:
    """JSON values."""
    best = [
        {'label': names[own.index], 'probability': round(own.probability, _DIGITS)} if own else None
        for names, own in zip(track.labels, segment.best)
    ]
    times = {'start': round(segment.start, _DIGITS), 'end': round(segment.end, _DIGITS)}
    return times | {'windows': segment.num_windows, 'best': best}


def _write_json(path: Path, found: Found, options: Options) -> None:
    """All windows and segments, one a line, never all in memory as JSON."""
    track = found.track
    stride = options.window / 2 if options.stride is None else options.stride
    head = {
        'path': found.path,
        'error': found.error,
        'end': round(track.end, _DIGITS),
        'window': options.window,
        'stride': stride,
        'smooth': options.smooth,
        'threshold': options.threshold,
    }
    segments = (_segment(track, segment) for segment in track.segments(options.threshold))
    heads = [_rows(track, head) for head in range(len(track.labels))]
    windows = (
        {'start': start, 'end': end, 'top': list(top)}
        for (start, end), *top in zip(track.spans.round(_DIGITS).tolist(), *heads)
    )
    with appearing(path) as partial, open(partial, 'w', encoding='utf-8') as file:
        file.write(json.dumps(head, indent=1, allow_nan=False).removesuffix('\n}'))
        _write_list(file, 'segments', segments)
        _write_list(file, 'windows', windows)
        file.write('\n}\n')


def _write_list(file: IO[str], name: str, items: Iterable[Any]) -> None:
    file.write(f',\n {json.dumps(name)}: [')
    for number, item in enumerate(items):
        file.write((',' if number else '') + '\n  ' + json.dumps(item, allow_nan=False))
    file.write('\n ]')


def _write_csv(path: Path, track: Track) -> None:
    """A row a window and head."""
    most = max(track.most)
    columns = ['start', 'end', 'head']
    for k in range(1, most + 1):
        columns += [f'class_{k}', f'probability_{k}']
    with appearing(path) as partial, open(partial, 'w', encoding='utf-8', newline='') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(columns)
        heads = [_rows(track, head) for head in range(len(track.labels))]
        for (start, end), *rows in zip(track.spans.round(_DIGITS).tolist(), *heads):
            for head, row in enumerate(rows):
                cells: list[Any] = [start, end, head]
                for entry in row:
                    cells += [csv_cell(entry['label']), entry['probability']]
                table.writerow(cells + [''] * (len(columns) - len(cells)))


def _write_subtitles(path: Path, track: Track, threshold: float) -> None:
    """SubRip: a subtitle a segment, a line a head; none overlaps another."""
    with appearing(path) as partial, open(partial, 'w', encoding='utf-8', newline='') as file:
        number = 0
        for segment in track.segments(threshold):
            start, end = (subtitle_clock(each) for each in (segment.start, segment.end))
            lines = [
                f'{subtitle(names[own.index])} ({100 * own.probability:.0f} %)'
                for names, own in zip(track.labels, segment.best)
                if own
            ]
            if lines and start != end:
                number += 1
                file.write('\n'.join([str(number), f'{start} --> {end}', *lines, '', '']))


def _print(console: Console, found: Found, options: Options) -> None:
    track = found.track
    segments = [each for each in track.segments(options.threshold) if any(each.best)]
    if segments:
        _print_segments(console, found, segments)
    elif len(track):
        console.print(f'{found.path}: no class is as probable as {options.threshold:g}')
    if found.error:
        console.print(styled((f'{found.path} {found.error}', 'bold red')), soft_wrap=True)
    if found.problem:
        text = f'{found.files["video"]} does not show all of it: {found.problem}'
        console.print(styled((text, 'bold red')), soft_wrap=True)
    for kind, file in found.files.items():
        if file.exists():
            console.print(f'{kind}: {file}', soft_wrap=True)


def _print_segments(console: Console, found: Found, segments: Sequence[Segment]) -> None:
    labels = found.track.labels
    table = Table('from', 'to', title=styled(found.path), title_justify='left')
    table.columns[0].justify = table.columns[1].justify = 'right'
    for head in range(len(labels)):
        table.add_column('class' if len(labels) == 1 else f'head {head}', overflow='fold')
        table.add_column('probability', justify='right', no_wrap=True)
    for segment in segments[:MOST_LISTED]:
        cells = [clock(segment.start), clock(segment.end)]
        for names, own in zip(labels, segment.best):
            cells.append(terminal(names[own.index]) if own else '')
            cells.append(f'{100 * own.probability:.2f} %' if own else '')
        table.add_row(*cells)
    console.print(table)
    if len(segments) > MOST_LISTED:
        console.print(f'and {len(segments) - MOST_LISTED} more')
