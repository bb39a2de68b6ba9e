"""Lists of videos, in the formats of the data sets and of the reference systems.

A parser takes a list file and yields a `Row` per video; labels are still text then. Copies of a
data set name their files differently: where a list gives no names, `exists` tells which rule fits.
"""

import csv
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from input_pipeline.text_files import integer, read_json, read_lines, read_text

Exists = Callable[[str], bool]

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
VIDEO_SUFFIXES = ('.mp4', '.webm', '.avi', '.mkv', '.mov', '.m4v', '.mpg', '.mpeg', '.ts', '.flv')


@dataclass(frozen=True)
class Row:
    """A line of a list before its label is known.

    Attributes:
      where: 'file:line', for messages.
      path: the video, from the root.
      labels: names or ids, one per head; () in lists of captions.
      video_id: name in the data set; '' for the file's.
      start: seconds, see `Record`.
      end: seconds.
      captions: texts; () in lists of classes.
    """

    where: str
    path: str
    labels: tuple[str, ...] = ()
    video_id: str = ''
    start: float | None = None
    end: float | None = None
    captions: tuple[str, ...] = ()


def _rows_kinetics(path: Path, **unused) -> Iterator[Row]:
    for where, line in read_lines(path):
        fields = line.rsplit(maxsplit=1)
        if len(fields) < 2:
            raise ValueError(f'{where}: expected "path label", found {line!r}')
        yield Row(where, fields[0], (fields[1],))


_PATH_COLUMNS = ('path', 'video_path', 'file', 'filename', 'video')
_CAPTION_COLUMNS = ('captions', 'caption', 'sentence')
_LABEL_COLUMNS = ('label', 'class', 'label_id', 'class_id')


def _rows_csv(path: Path, exists: Exists, subset: str, **unused) -> Iterator[Row]:
    lines = read_text(path).splitlines()
    # Text has commas of its own: the delimiter is in every line.
    delimiter = max(';\t,', key=lambda sign: sum(sign in line for line in lines))
    rows = list(enumerate(csv.reader(lines, delimiter=delimiter), 1))
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    known = {
        *_PATH_COLUMNS,
        *_LABEL_COLUMNS,
        *_CAPTION_COLUMNS,
        'youtube_id',
        'verb_class',
        'video_id',
    }
    if not known & set(header):
        for number, row in rows:
            if not row:
                continue
            if len(row) < 2:
                raise ValueError(f'{path}:{number}: expected "path,label", found {row[0]!r}')
            yield Row(f'{path}:{number}', row[0].strip(), tuple(c.strip() for c in row[1:]))
        return
    table = []
    for number, row in rows[1:]:
        if not row:
            continue
        if len(row) < len(header):
            raise ValueError(
                f'{path}:{number}: {len(row)} fields, the header has {len(header)}: {row}'
            )
        table.append((f'{path}:{number}', dict(zip(header, (cell.strip() for cell in row)))))
    if 'split' in header and subset:
        splits = sorted({row['split'] for _, row in table})
        table = [(where, row) for where, row in table if row['split'] == subset]
        if not table:
            raise ValueError(f'{path}: no row has split {subset!r}, found {splits}')
    if 'youtube_id' in header and not set(_PATH_COLUMNS) & set(header):
        yield from _rows_kinetics_csv(path, table, header, exists)
    elif 'verb_class' in header:
        yield from _rows_epic_csv(path, table, header)
    else:
        yield from _rows_plain_csv(path, table, header)


def _one_of(names: Sequence[str], header: Sequence[str], path: Path, what: str) -> str:
    for name in names:
        if name in header:
            return name
    advice = '; a test list without labels cannot be used' if what == 'label' else ''
    raise ValueError(f'{path}:1: no {what} column ({", ".join(names)}), found {header}{advice}')


def _rows_plain_csv(path: Path, table: list, header: list[str]) -> Iterator[Row]:
    path_column = _one_of(_PATH_COLUMNS, header, path, 'path')
    if not set(_LABEL_COLUMNS) & set(header) and set(_CAPTION_COLUMNS) & set(header):
        yield from _rows_caption_csv(table, path_column, header)
        return
    label_column = _one_of(_LABEL_COLUMNS, header, path, 'label')
    second = f'{label_column}_2'
    for where, row in table:
        labels = (row[label_column], row[second]) if second in row else (row[label_column],)
        yield Row(
            where,
            row[path_column],
            labels,
            row.get('video_id') or row.get('youtube_id', ''),
            _seconds(row.get('start', ''), where),
            _seconds(row.get('end', ''), where),
        )


def _rows_caption_csv(table: list, path_column: str, header: list[str]) -> Iterator[Row]:
    """One caption a line; the lines of a video need not follow each other."""
    column = next(name for name in _CAPTION_COLUMNS if name in header)
    first, captions = {}, {}
    for where, row in table:
        name = row[path_column]
        first.setdefault(name, (where, row.get('video_id', '')))
        captions.setdefault(name, []).append(row[column])
    for name, (where, video_id) in first.items():
        yield Row(where, name, video_id=video_id, captions=tuple(captions[name]))


def _rows_kinetics_csv(path: Path, table: list, header: list[str], exists: Exists) -> Iterator[Row]:
    """Official lists: label,youtube_id,time_start,time_end,split; the files are trimmed clips."""
    _one_of(('label',), header, path, 'label')
    layouts: tuple[Callable[[dict], str], ...] = (
        lambda row: f'{_trimmed(row)}.mp4',
        lambda row: f'{row["label"]}/{_trimmed(row)}.mp4',
        lambda row: f'{row["label"].replace(" ", "_")}/{_trimmed(row)}.mp4',
        lambda row: f'{row["youtube_id"]}.mp4',
        lambda row: f'{row["label"]}/{row["youtube_id"]}.mp4',
        lambda row: f'{row["label"].replace(" ", "_")}/{row["youtube_id"]}.mp4',
    )
    layout = _best(layouts, [row for _, row in table], exists)
    for where, row in table:
        if not row['label']:
            raise ValueError(f'{where}: no label; a test list without labels cannot be used')
        yield Row(where, layout(row), (row['label'],), row['youtube_id'])


def _best(layouts: Sequence[Callable[[Any], str]], entries: Sequence[Any], exists: Exists):
    """The rule from an entry to its file name that finds most of a sample."""
    sample = entries[:: max(1, len(entries) // 50)]
    return max(layouts, key=lambda rule: sum(exists(rule(entry)) for entry in sample))


def _trimmed(row: dict) -> str:
    start, end = (int(float(row.get(name) or 0)) for name in ('time_start', 'time_end'))
    return f'{row["youtube_id"]}_{start:06d}_{end:06d}'


def _rows_epic_csv(path: Path, table: list, header: list[str]) -> Iterator[Row]:
    """EPIC-Kitchens-100 lists: segments of long videos with a verb and a noun."""
    for column in ('noun_class', 'video_id', 'start_timestamp', 'stop_timestamp'):
        _one_of((column,), header, path, column)
    for where, row in table:
        person = row.get('participant_id') or row['video_id'].split('_')[0]
        yield Row(
            where,
            f'{person}/videos/{row["video_id"]}.MP4',
            (row['verb_class'], row['noun_class']),
            row.get('narration_id') or row['video_id'],
            _seconds(row['start_timestamp'], where),
            _seconds(row['stop_timestamp'], where),
        )


def _seconds(text: str | float | None, where: str) -> float | None:
    """Seconds of '12.5' or 'hh:mm:ss.ff'."""
    if text is None or text == '':
        return None
    try:
        total = 0.0
        for part in str(text).split(':'):
            total = 60 * total + float(part)
        return total
    except ValueError as error:
        raise ValueError(f'{where}: {text!r} is not a time (seconds or hh:mm:ss)') from error


def _rows_ssv2_json(path: Path, exists: Exists, **unused) -> Iterator[Row]:
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{path}: expected a list of objects with id and template')
    layout = _best(
        (lambda entry: f'{entry.get("id")}.webm', lambda entry: f'{entry.get("id")}.mp4'),
        entries,
        exists,
    )
    for number, entry in enumerate(entries):
        where = f'{path}[{number}]'
        if 'id' not in entry:
            raise ValueError(f'{where}: no field id, found {sorted(entry)}')
        label = entry.get('template') or entry.get('label')
        if not label:
            raise ValueError(
                f'{where}: no template and no label; this is a test list without labels, use the '
                'train or the validation list'
            )
        label = label.replace('[', '').replace(']', '')
        yield Row(where, layout(entry), (label,), str(entry['id']))


def _rows_json(path: Path, **unused) -> Iterator[Row]:
    if path.suffix == '.jsonl':
        entries = []
        for where, line in read_lines(path):
            try:
                entries.append((where, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f'{where}: not valid JSON: {error.msg}') from error
    else:
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(f'{path}: expected a list of objects with path and label')
        entries = [(f'{path}[{number}]', entry) for number, entry in enumerate(content)]
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f'{where}: expected an object with path and label, found {entry!r}')
        path_field = next((name for name in _PATH_COLUMNS if name in entry), None)
        label_field = next((name for name in _LABEL_COLUMNS if name in entry), None)
        caption_field = next((name for name in _CAPTION_COLUMNS if name in entry), None)
        if path_field is None or (label_field is None and caption_field is None):
            raise ValueError(f'{where}: needs path and label, found {sorted(entry)}')
        yield Row(
            where,
            entry[path_field],
            () if label_field is None else _texts(entry[label_field]),
            str(entry.get('video_id', '')),
            _seconds(entry.get('start'), where),
            _seconds(entry.get('end'), where),
            _texts(entry[caption_field]) if label_field is None else (),
        )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _rows_msrvtt(path: Path, subset: str, **unused) -> Iterator[Row]:
    """MSR-VTT: the official JSON with videos and sentences, or a CSV of the retrieval splits.

    A CSV lists video ids. Its column sentence is the caption (test of 1k-A); without one the
    captions come from MSRVTT_data.json beside it (train of 9k).
    """
    if path.suffix == '.json':
        videos, captions = _read_msrvtt_json(path)
        for number, video in enumerate(videos):
            if not subset or video.get('split') == subset:
                where, name = f'{path}.videos[{number}]', video['video_id']
                yield Row(where, f'{name}.mp4', video_id=name, captions=captions.get(name, ()))
        return
    rows = list(csv.DictReader(read_text(path).splitlines()))
    if not rows or 'video_id' not in rows[0]:
        raise ValueError(f'{path}:1: no column video_id, found {list(rows[0]) if rows else []}')
    own = 'sentence' in rows[0]
    captions = {} if own else _read_msrvtt_json(path.parent / 'MSRVTT_data.json')[1]
    for number, row in enumerate(rows, 2):
        name = row['video_id']
        texts = (row['sentence'],) if own else captions.get(name, ())
        yield Row(f'{path}:{number}', f'{name}.mp4', video_id=name, captions=texts)


def _read_msrvtt_json(path: Path) -> tuple[list[dict], dict[str, tuple[str, ...]]]:
    content = read_json(path)
    try:
        captions = {}
        for sentence in content['sentences']:
            captions.setdefault(str(sentence['video_id']), []).append(str(sentence['caption']))
        videos = [video | {'video_id': str(video['video_id'])} for video in content['videos']]
    except (KeyError, TypeError) as error:
        raise ValueError(f'{path}: not the MSR-VTT format (videos, sentences): {error}') from error
    return videos, {name: tuple(texts) for name, texts in captions.items()}


def _rows_msvd(path: Path, exists: Exists, **unused) -> Iterator[Row]:
    """MSVD: a list of video ids, with AllVideoDescriptions.txt ("id caption" lines) beside it."""
    captions = {}
    for _, line in read_lines(path.parent / 'AllVideoDescriptions.txt'):
        if not line.startswith('#'):
            name, _, text = line.partition(' ')
            captions.setdefault(name, []).append(text.strip())
    entries = list(read_lines(path))
    layout = _best(
        (lambda entry: f'{entry[1]}.avi', lambda entry: f'{entry[1]}.mp4'), entries, exists
    )
    for where, name in entries:
        texts = tuple(captions.get(name, ()))
        yield Row(where, layout((where, name)), video_id=name, captions=texts)


def _rows_vatex(path: Path, exists: Exists, **unused) -> Iterator[Row]:
    """VATEX: videoID (a YouTube id with start and end) and enCap, its English captions."""
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{path}: expected a list of objects with videoID and enCap')
    for number, entry in enumerate(entries):
        if 'videoID' not in entry or not entry.get('enCap'):
            raise ValueError(
                f'{path}[{number}]: needs videoID and enCap, found {sorted(entry)}; a list without '
                'captions cannot be used'
            )
    layouts = (
        lambda entry: f'{entry["videoID"]}.mp4',
        lambda entry: f'{entry["videoID"].rsplit("_", 2)[0]}.mp4',
        lambda entry: f'{entry["videoID"]}.webm',
        lambda entry: f'{entry["videoID"]}.mkv',
    )
    layout = _best(layouts, entries, exists)
    for number, entry in enumerate(entries):
        name, texts = str(entry['videoID']), _texts(entry['enCap'])
        yield Row(f'{path}[{number}]', layout(entry), video_id=name, captions=texts)


def _rows_ucf101(path: Path, **unused) -> Iterator[Row]:
    for where, line in read_lines(path):
        fields = line.rsplit(maxsplit=1)
        name = fields[0].replace('\\', '/')
        if '/' not in name:
            raise ValueError(f'{where}: expected "Class/video.avi" with or without a number')
        # The test lists carry no numbers; the folder is the class in both.
        yield Row(where, name, (name.split('/')[0],), Path(name).stem)


def _rows_hmdb51(path: Path, subset: str, **unused) -> Iterator[Row]:
    subset = subset or 'train'
    kind, split = subset.rstrip('0123456789'), subset.lstrip('abcdefghijklmnopqrstuvwxyz') or '1'
    if kind not in ('train', 'test'):
        raise ValueError(f'subset={subset!r} must be train or test, with the split: train1, test3')
    files = sorted(path.glob(f'*_test_split{split}.txt')) if path.is_dir() else []
    if not files:
        raise ValueError(
            f'{path}: no files *_test_split{split}.txt; give the folder of split files'
        )
    wanted = {'train': '1', 'test': '2'}[kind]
    for file in files:
        name = file.name.removesuffix(f'_test_split{split}.txt')
        for where, line in read_lines(file):
            fields = line.rsplit(maxsplit=1)
            if len(fields) < 2 or fields[1] not in ('0', '1', '2'):
                raise ValueError(f'{where}: expected "video.avi 0|1|2", found {line!r}')
            if fields[1] == wanted:
                yield Row(where, f'{name}/{fields[0]}', (name,), Path(fields[0]).stem)


def _rows_folder(path: Path, suffixes: Sequence[str] = VIDEO_SUFFIXES, **unused) -> Iterator[Row]:
    if not path.is_dir():
        raise ValueError(f'{path}: not a folder; it should hold FOLDER/class name/file')
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for file in sorted(folder.rglob('*')):
            if file.suffix.lower() in suffixes:
                relative = file.relative_to(path).as_posix()
                yield Row(str(file), str(file.absolute()), (folder.name,), relative)


FORMATS: dict[str, Callable[..., Iterable[Row]]] = {
    'kinetics': _rows_kinetics,
    'csv': _rows_csv,
    'ssv2_json': _rows_ssv2_json,
    'ucf101': _rows_ucf101,
    'hmdb51': _rows_hmdb51,
    'json': _rows_json,
    'folder': _rows_folder,
    'image_folder': functools.partial(_rows_folder, suffixes=IMAGE_SUFFIXES),
    'msrvtt': _rows_msrvtt,
    'msvd': _rows_msvd,
    'vatex': _rows_vatex,
}
LIST_FORMATS = ('auto', *FORMATS)


def guess_format(list_path: str | os.PathLike) -> str:
    """Names the format of a list where that is certain.

    Args:
      list_path: list file or folder.

    Returns:
      One of `LIST_FORMATS` other than 'auto'.

    Raises:
      ValueError: if it is not certain.
    """
    path = Path(list_path)
    if path.is_dir():
        if any(path.glob('*_test_split[0-9].txt')):
            return 'hmdb51'
        if any(file.suffix.lower() in VIDEO_SUFFIXES for file in path.glob('*/*')):
            return 'folder'
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.glob('*/*')):
            return 'image_folder'
    elif path.suffix == '.csv':
        return 'csv'
    elif path.suffix == '.jsonl':
        return 'json'
    elif path.suffix == '.json':
        content = read_json(path)
        if isinstance(content, dict) and {'videos', 'sentences'} <= set(content):
            return 'msrvtt'
        first = content[0] if isinstance(content, list) and content else None
        if isinstance(first, dict):
            if 'template' in first or set(first) == {'id'}:
                return 'ssv2_json'
            if any(name in first for name in _PATH_COLUMNS):
                return 'json'
            if 'videoID' in first:
                return 'vatex'
    else:
        lines = [line for _, line in itertools.islice(read_lines(path), 100)]
        ends = [line.rsplit(maxsplit=1) for line in lines]
        if path.name.startswith(('trainlist', 'testlist')):
            return 'ucf101'
        if ends and all(len(end) == 2 and integer(end[1]) is not None for end in ends):
            return 'kinetics'
    raise ValueError(
        f'{path}: cannot tell the format of this list; set it to one of {", ".join(FORMATS)}'
    )
