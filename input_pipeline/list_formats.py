"""Lists of videos, in the formats of the data sets and of the reference systems.

A parser takes a list file and yields a `Row` per video; labels are still text then. Copies of a
data set name their files differently: where a list gives no names, `exists` tells which rule fits.
Whatever bytes a list has, a parser raises no other error than ValueError and OSError.
"""

import dataclasses
import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from input_pipeline.label_maps import class_folders, is_hidden
from input_pipeline.text_files import (
    integer,
    number,
    quoted,
    read_csv,
    read_json,
    read_json_lines,
    read_lines,
    read_text,
    split_lines,
)
from input_pipeline.tokenizer import check_text

Exists = Callable[[str], bool]

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
# Of the formats that `decode` opens. A file of another suffix is skipped, and counted in the log.
# fmt: off
VIDEO_SUFFIXES = (
    '.mp4', '.m4v', '.mov', '.qt', '.3gp', '.3g2', '.f4v', '.mj2',
    '.webm', '.mkv', '.mk3d', '.avi', '.divx', '.wmv', '.asf', '.flv', '.swf',
    '.mpg', '.mpeg', '.mpe', '.m1v', '.m2v', '.mpv', '.vob', '.ts', '.mts', '.m2t', '.m2ts',
    '.ogv', '.ogm', '.ogg', '.gif', '.mxf', '.dv', '.dif', '.rm', '.rmvb', '.wtv', '.nut', '.ivf',
    '.h264', '.264', '.avc', '.hevc', '.h265', '.265', '.obu',
)
# fmt: on
_TRAIN = ('train', 'training')
_VALIDATION = ('val', 'valid', 'validate', 'validation', 'dev')
_TEST = ('test', 'testing')
# Splits that a list is taken to mean where its file holds several and none was chosen.
_MEANT = {
    'train': (_TRAIN,),
    'val': (_VALIDATION, _TEST),
    'validation': (_VALIDATION, _TEST),
    'test': (_TEST,),
}
# Formats whose files may hold several splits.
_WITH_SUBSETS = ('csv', 'json', 'ucf101', 'hmdb51', 'msrvtt')


def choose_split(splits: Iterable[str], where: str, subset: str, purpose: str) -> str:
    """Which split of a file that holds several to take.

    Args:
      splits: those that there are.
      where: the file, for messages.
      subset: the one that was asked for; '' for the one that the purpose means.
      purpose: see `sources.open_source`; of no purpose, the whole file is meant.

    Returns:
      One of `splits`, or '' for all of them.

    Raises:
      ValueError: if that split is not there, or it is not certain which one is meant.
    """
    splits = sorted(set(splits))
    if subset and subset not in splits:
        raise ValueError(f'{where}: no row has split {subset!r}, found {splits}')
    if subset or purpose not in _MEANT or not splits:
        return subset
    meant = _MEANT[purpose]
    for names in meant:
        fitting = [split for split in splits if split.lower() in names]
        if len(fitting) == 1:
            if len(splits) > 1:
                logging.info('%s: of the splits %s taking %r', where, splits, fitting[0])
            return fitting[0]
        if fitting:
            break
    others = set(_TRAIN + _VALIDATION + _TEST).difference(*meant)
    if len(splits) == 1 and splits[0].lower() not in others:
        return splits[0]  # a file of one split, under a name of its own
    raise ValueError(
        f'{where}: its rows have split {", ".join(map(quoted, splits))}, and which of them is the '
        f'{purpose} list is not certain; name one as subset{_field(purpose)}'
    )


def _field(purpose: str) -> str:
    return f' (data.{purpose}_subset)' if purpose in ('train', 'val') else ''


def check_subset(path: Path, list_format: str, subset: str, purpose: str) -> None:
    """Refuses a subset where the format of a list knows none; raises ValueError."""
    if subset and list_format not in _WITH_SUBSETS:
        raise _no_subset(path, subset, purpose, f'a list in format {list_format} holds one split')


def _no_subset(path: Path, subset: str, purpose: str, reason: str) -> ValueError:
    return ValueError(
        f'{path}: subset={subset!r}{_field(purpose)} was asked for, but {reason}; leave it empty '
        'or name a list that holds several'
    )


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
      several: the labels are the classes of one head, any number of them.
    """

    where: str
    path: str
    labels: tuple[str, ...] = ()
    video_id: str = ''
    start: float | None = None
    end: float | None = None
    captions: tuple[str, ...] = ()
    several: bool = False


def _rows_kinetics(path: Path, exists: Exists, **unused) -> Iterator[Row]:
    """Lines of "path label", or of "path frames label" as lists of frame folders have them."""
    lines = []
    for where, line in read_lines(path):
        fields = line.rsplit(maxsplit=1)
        if len(fields) < 2:
            raise ValueError(f'{where}: expected "path label", found {quoted(line)}')
        lines.append((where, *fields))
    counted = [name.rsplit(maxsplit=1) for _, name, _ in lines]
    layouts: list[Callable[[str], str]] = [str]
    if all(len(fields) == 2 and integer(fields[1]) is not None for fields in counted):
        layouts.append(lambda name: name.rsplit(maxsplit=1)[0])
    layout = _best(layouts, [name for _, name, _ in lines], exists)
    for where, name, label in lines:
        yield Row(where, layout(name), (label,))


def _rows_multi_label(path: Path, **unused) -> Iterator[Row]:
    """Lines of "path 3,7,12" or "path 3 7 12", or of "path" alone where a video has no class."""
    for where, line in read_lines(path):
        fields = line.split()
        name, *labels = line.rsplit(maxsplit=len(fields) - _path_fields(fields))
        if any(integer(label) is None for label in labels):  # names, or commas
            labels = _split_labels(' '.join(labels), ',', where)
        yield Row(where, name, tuple(labels), several=True)


def _path_fields(fields: Sequence[str]) -> int:
    """How many fields of a line of classes are its path, which may have spaces.

    It ends with the last field that has the suffix of a video or picture. A path without one ends
    before all numbers, or before all between which there are commas, or before the last field.
    """
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    named = [k for k, field in enumerate(fields, 1) if field.lower().endswith(suffixes)]
    if named or len(fields) == 1:
        return named[-1] if named else 1
    end = len(fields) - 1
    while end > 1 and _go_together(fields[end - 1], fields[end]):
        end -= 1
    return end


def _go_together(first: str, second: str) -> bool:
    if first.endswith(',') or second.startswith(','):
        return True
    return integer(first) is not None and integer(second) is not None


def _split_labels(text: str, signs: str, where: str) -> tuple[str, ...]:
    """The classes of a text with any of these signs between them; none of a blank one."""
    labels = tuple(label.strip() for label in re.split(f'[{signs}]', text))
    if labels == ('',):
        return ()
    if not all(labels):
        raise ValueError(f'{where}: classes {quoted(text)}: one of them is empty')
    return labels


def _split_cell(text: str, where: str) -> tuple[str, ...]:
    """The classes of a field of a CSV: 'a;b', 'a|b', or '3,7' of whole numbers."""
    parts = text.split(',')
    numbers = len(parts) > 1 and all(integer(part) is not None for part in parts)
    return _split_labels(text, ',' if numbers else ';|', where)


_PATH_COLUMNS = ('path', 'video_path', 'file', 'filename', 'video')
_CAPTION_COLUMNS = ('captions', 'caption', 'sentence')
_LABEL_COLUMNS = ('label', 'class', 'label_id', 'class_id')
_SETS_COLUMN = 'labels'  # any number of classes
_CHARADES_COLUMNS = {'id', 'actions'}
_KNOWN_COLUMNS = {
    *_PATH_COLUMNS,
    *_LABEL_COLUMNS,
    *_CAPTION_COLUMNS,
    _SETS_COLUMN,
    'youtube_id',
    'verb_class',
    'video_id',
}


def _rows_csv(
    path: Path,
    exists: Exists,
    subset: str,
    purpose: str = '',
    num_heads: int = 0,
    several: bool = False,
    **unused,
) -> Iterator[Row]:
    lines = split_lines(read_text(path))
    # Text has commas of its own: the delimiter is in every line. So may be what is between classes.
    signs = ',\t;' if several else ';\t,'
    delimiter = max(signs, key=lambda sign: sum(sign in line for line in lines))
    rows = read_csv(path, delimiter)
    header = _header(rows)
    if not _KNOWN_COLUMNS & set(header) and not set(header) >= _CHARADES_COLUMNS:
        if subset:
            raise _no_subset(path, subset, purpose, 'the list has no header and no column split')
        yield from _rows_bare_csv(rows, exists, num_heads, several)
        return
    for column in _KNOWN_COLUMNS | _CHARADES_COLUMNS | {'split'}:
        if header.count(column) > 1:
            raise ValueError(f'{rows[0][0]}: column {column} appears twice, found {quoted(header)}')
    table = list(_table(rows))
    if 'split' in header:
        wanted = choose_split((row['split'] for _, row in table), str(path), subset, purpose)
        table = [(where, row) for where, row in table if not wanted or row['split'] == wanted]
    elif subset:
        raise _no_subset(path, subset, purpose, f'it has no column split, found {header}')
    if 'youtube_id' in header and not set(_PATH_COLUMNS) & set(header):
        yield from _rows_kinetics_csv(path, table, header, exists)
    elif set(header) >= _CHARADES_COLUMNS and not set(_PATH_COLUMNS) & set(header):
        yield from _rows_charades_csv(table, exists)
    elif 'verb_class' in header:
        yield from _rows_epic_csv(path, table, header)
    else:
        yield from _rows_plain_csv(path, table, header, exists, several)


def _header(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    return [cell.strip().lower() for cell in rows[0][1]] if rows else []


def _table(rows: Sequence[tuple[str, list[str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows below a header, by its names."""
    header = _header(rows)
    for where, row in rows[1:]:
        if len(row) < len(header):
            raise ValueError(
                f'{where}: {len(row)} fields, the header has {len(header)}: {quoted(row)}'
            )
        if any(cell.strip() for cell in row[len(header) :]):
            raise ValueError(
                f'{where}: {len(row)} fields, the header has {len(header)}: {quoted(row)}; put a '
                'field that holds a comma in quotes'
            )
        yield where, dict(zip(header, (cell.strip() for cell in row)))


def _rows_bare_csv(
    rows: Sequence[tuple[str, list[str]]], exists: Exists, num_heads: int, several: bool
) -> Iterator[Row]:
    """Rows without a header: path,label; path,frames,label; or a path and a label per head.

    Where there may be several classes: path,labels.
    """
    complete = _completion([row[0].strip() for _, row in rows], exists)
    for where, row in rows:
        name, *fields = (cell.strip() for cell in row)
        if not fields:
            raise ValueError(f'{where}: expected "path,label", found {quoted(row[0])}')
        if several:
            if len(fields) > 1:
                raise ValueError(
                    f'{where}: {len(row)} fields and no header; begin the list with the line '
                    '"path,labels" and put ; or | between the classes of a video'
                )
            yield Row(where, complete(name), _split_cell(fields[0], where), several=True)
            continue
        if len(fields) == 2 and num_heads == 1 and integer(fields[0]) is not None:
            fields = fields[1:]
        if len(fields) != max(num_heads, 1):
            raise ValueError(
                f'{where}: {len(row)} fields and no header that says what they are; begin the '
                'list with a line such as "path,num_frames,label" or "path,label,label_2"'
            )
        yield Row(where, complete(name), tuple(fields))


def _completion(names: Sequence[str], exists: Exists) -> Callable[[str], str]:
    """From the name in a list to the file: lists of ids leave the suffix out."""
    endings = ('',)
    if not any(name.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES) for name in names):
        endings = ('', '.webm', '.mp4', '.avi', '.mkv')
    return _best([f'{{}}{ending}'.format for ending in endings], names, exists)


def _one_of(names: Sequence[str], header: Sequence[str], path: Path, what: str) -> str:
    for name in names:
        if name in header:
            return name
    advice = '; a test list without labels cannot be used' if what == 'label' else ''
    raise ValueError(
        f'{path}:1: no {what} column ({", ".join(names)}), found {quoted(header)}{advice}'
    )


def _rows_plain_csv(
    path: Path, table: list, header: list[str], exists: Exists, several: bool
) -> Iterator[Row]:
    path_column = _one_of(_PATH_COLUMNS, header, path, 'path')
    sets = _SETS_COLUMN in header and _reads_sets(header, several)
    if not sets and not set(_LABEL_COLUMNS) & set(header) and set(_CAPTION_COLUMNS) & set(header):
        yield from _merged(_rows_caption_csv(table, path_column, header))
        return
    label_column = _SETS_COLUMN if sets else _one_of(_LABEL_COLUMNS, header, path, 'label')
    second = f'{label_column}_2'
    complete = _completion([row[path_column] for _, row in table], exists)
    for where, row in table:
        labels = (row[label_column], row[second]) if second in row else (row[label_column],)
        if sets:
            labels = _split_cell(row[label_column], where)
        elif several and len(_split_cell(row[label_column], where)) > 1:
            raise ValueError(
                f'{where}: {quoted(row[label_column])} in the column {label_column}, which has one '
                f'class a video; name the column {_SETS_COLUMN} if these are several'
            )
        yield Row(
            where,
            row[path_column] and complete(row[path_column]),
            labels,
            row.get('video_id') or row.get('youtube_id', ''),
            _seconds(row.get('start', ''), where),
            _seconds(row.get('end', ''), where),
            several=sets,
        )


def _reads_sets(fields: Iterable[str], several: bool) -> bool:
    """Whether the field of several classes counts: others win unless several are wanted."""
    return several or not {*_LABEL_COLUMNS, *_CAPTION_COLUMNS} & set(fields)


def _rows_charades_csv(table: list, exists: Exists) -> Iterator[Row]:
    """Charades: id and actions, 'c092 11.90 21.20;c147 0.00 12.60', class, start and end of each.

    A video has the classes of all its actions; the times are checked and not used.
    """
    names = [row['id'] for _, row in table]
    complete = _best(
        [f'{{}}{ending}'.format for ending in ('.mp4', '', '.webm', '.mkv', '.avi')], names, exists
    )
    for (where, row), name in zip(table, names):
        if not name:
            raise ValueError(f'{where}: no id')
        actions = _split_labels(row['actions'], ';', where)
        labels = tuple(_charades_class(action, where) for action in actions)
        yield Row(where, complete(name), labels, name, several=True)


def _charades_class(action: str, where: str) -> str:
    label, *times = action.split()
    seconds = [number(time) for time in times]
    known = re.fullmatch('c[0-9]{3}', label) and len(times) == 2
    if not known or any(time is None or time < 0 for time in seconds):
        raise ValueError(
            f"{where}: action {quoted(action)}, expected 'c092 11.90 21.20': its class, and its "
            'start and end in seconds'
        )
    return str(int(label[1:]))


def _rows_caption_csv(table: list, path_column: str, header: list[str]) -> Iterator[Row]:
    """One caption a line."""
    column = next(name for name in _CAPTION_COLUMNS if name in header)
    for where, row in table:
        yield Row(
            where,
            row[path_column],
            video_id=row.get('video_id', ''),
            start=_seconds(row.get('start', ''), where),
            end=_seconds(row.get('end', ''), where),
            captions=(row[column],),
        )


def _merged(rows: Iterable[Row]) -> Iterator[Row]:
    """One row for a video, with all its captions; its rows need not follow each other."""
    first, captions = {}, {}
    for row in rows:
        check_captions(row)
        video = (row.path, row.start, row.end)
        first.setdefault(video, row)
        captions.setdefault(video, []).extend(row.captions)
    for video, row in first.items():
        yield dataclasses.replace(row, captions=tuple(captions[video]))


def check_captions(row: Row) -> None:
    """Raises ValueError, naming the line, if there is no caption or one that is no text."""
    if not row.captions or not all(caption.strip() for caption in row.captions):
        raise ValueError(f'{row.where}: no caption')
    for caption in row.captions:
        try:
            check_text(caption)
        except ValueError as error:
            raise ValueError(f'{row.where}: {error}') from error


def _rows_kinetics_csv(path: Path, table: list, header: list[str], exists: Exists) -> Iterator[Row]:
    """Official lists: label,youtube_id,time_start,time_end,split; the files are trimmed clips."""
    _one_of(('label',), header, path, 'label')
    entries = []
    for where, row in table:
        if not row['label']:
            raise ValueError(f'{where}: no label; a test list without labels cannot be used')
        entries.append((row['label'], row['youtube_id'], _trimmed(row, where)))
    layouts: tuple[Callable[[tuple[str, str, str]], str], ...] = (
        lambda entry: f'{entry[2]}.mp4',
        lambda entry: f'{entry[0]}/{entry[2]}.mp4',
        lambda entry: f'{entry[0].replace(" ", "_")}/{entry[2]}.mp4',
        lambda entry: f'{entry[1]}.mp4',
        lambda entry: f'{entry[0]}/{entry[1]}.mp4',
        lambda entry: f'{entry[0].replace(" ", "_")}/{entry[1]}.mp4',
    )
    layout = _best(layouts, entries, exists)
    for (where, _), entry in zip(table, entries):
        yield Row(where, layout(entry), (entry[0],), entry[1])


def _best(layouts: Sequence[Callable[[Any], str]], entries: Sequence[Any], exists: Exists):
    """The rule from an entry to its file name that finds most of a sample."""
    if len(layouts) == 1:
        return layouts[0]
    sample = entries[:: max(1, len(entries) // 50)]
    return max(layouts, key=lambda rule: sum(exists(rule(entry)) for entry in sample))


def _trimmed(row: dict, where: str) -> str:
    times = []
    for name in ('time_start', 'time_end'):
        value = number(row.get(name) or '0')
        if value is None or value < 0:
            raise ValueError(f'{where}: {name} {quoted(row[name])} is not a number of seconds')
        times.append(f'{int(value):06d}')
    return f'{row["youtube_id"]}_{times[0]}_{times[1]}'


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


def _seconds(time: Any, where: str) -> float | None:
    """Seconds of 12.5, '12.5' or 'hh:mm:ss.ff'; None where there is none."""
    if time is None or time == '':
        return None
    known = isinstance(time, (str, int, float)) and not isinstance(time, bool)
    parts = [number(part) for part in str(time).split(':')] if known else [None]
    if len(parts) > 3 or any(part is None or part < 0 for part in parts):
        raise ValueError(f'{where}: {quoted(time)} is not a time (seconds or hh:mm:ss)')
    return functools.reduce(lambda total, part: 60 * total + part, parts, 0.0)


def _objects(content: Any, where: str, fields: str) -> list[dict[str, Any]]:
    """A JSON value that must be a list of objects."""
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f'{where}: expected a list of objects with {fields}')
    return content


def _text(entry: dict[str, Any], name: str, where: str) -> str:
    """A field of a JSON object that must be a text."""
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{where}: {name} must be a text, found {quoted(value)}')
    return value


def _name(value: Any, name: str, where: str) -> str:
    """A JSON value that may be a text or a whole number: an id or a label."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f'{where}: {name} must be a text or a whole number, found {quoted(value)}')
    return str(value)


def _texts(entry: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A field of a JSON object that must be a text or a list of texts."""
    value = entry[name]
    if isinstance(value, list):
        return tuple(_text({name: text}, name, where) for text in value)
    return (_text(entry, name, where),)


def _rows_ssv2_json(path: Path, exists: Exists, **unused) -> Iterator[Row]:
    entries = []
    for place, entry in enumerate(_objects(read_json(path), str(path), 'id and template')):
        where = f'{path}[{place}]'
        if 'id' not in entry:
            raise ValueError(f'{where}: no field id, found {quoted(sorted(entry))}')
        field = 'template' if entry.get('template') else 'label'
        if not entry.get(field):
            raise ValueError(
                f'{where}: no template and no label; this is a test list without labels, use the '
                'train or the validation list'
            )
        label = _text(entry, field, where).replace('[', '').replace(']', '')
        entries.append((where, _name(entry['id'], 'id', where), label))
    layout = _best(
        (lambda entry: f'{entry[1]}.webm', lambda entry: f'{entry[1]}.mp4'), entries, exists
    )
    for entry in entries:
        yield Row(entry[0], layout(entry), (entry[2],), entry[1])


def _rows_json(
    path: Path, subset: str, purpose: str = '', several: bool = False, **unused
) -> Iterator[Row]:
    if path.suffix.lower() == '.jsonl':
        entries = list(read_json_lines(path))
    else:
        content = _objects(read_json(path), str(path), 'path and label')
        entries = [(f'{path}[{place}]', entry) for place, entry in enumerate(content)]
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(
                f'{where}: expected an object with path and label, found {quoted(entry)}'
            )
    if any('split' in entry for _, entry in entries):
        splits = [_text(entry, 'split', where) for where, entry in entries]
        wanted = choose_split(splits, str(path), subset, purpose)
        entries = [pair for pair, split in zip(entries, splits) if not wanted or split == wanted]
    elif subset:
        raise _no_subset(path, subset, purpose, 'its objects have no field split')
    rows = [_json_row(where, entry, several) for where, entry in entries]
    yield from rows if any(row.labels or row.several for row in rows) else _merged(rows)


def _json_row(where: str, entry: dict[str, Any], several: bool) -> Row:
    path_field = next((name for name in _PATH_COLUMNS if name in entry), None)
    sets = _SETS_COLUMN in entry and _reads_sets(entry, several)
    label_columns = (_SETS_COLUMN,) if sets else _LABEL_COLUMNS
    label_field = next((name for name in label_columns if name in entry), None)
    caption_field = next((name for name in _CAPTION_COLUMNS if name in entry), None)
    if path_field is None or (label_field is None and caption_field is None):
        raise ValueError(f'{where}: needs path and label, found {quoted(sorted(entry))}')
    return Row(
        where,
        _text(entry, path_field, where),
        () if label_field is None else _labels(entry[label_field], where),
        _name(entry.get('video_id', ''), 'video_id', where),
        _seconds(entry.get('start'), where),
        _seconds(entry.get('end'), where),
        _texts(entry, caption_field, where) if label_field is None else (),
        sets,
    )


def _labels(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(_name(label, 'label', where) for label in values)


def _rows_msrvtt(path: Path, subset: str, purpose: str = '', **unused) -> Iterator[Row]:
    """MSR-VTT: the official JSON with videos and sentences, or a CSV of the retrieval splits.

    A CSV lists video ids. Its column sentence is the caption (test of 1k-A); without one the
    captions come from MSRVTT_data.json beside it (train of 9k and 7k).
    """
    if path.suffix.lower() == '.json':
        videos, captions = _read_msrvtt_json(path)
        wanted = choose_split((split for _, split in videos), str(path), subset, purpose)
        for place, (name, split) in enumerate(videos):
            if not wanted or split == wanted:
                where = f'{path}.videos[{place}]'
                yield Row(where, f'{name}.mp4', video_id=name, captions=captions.get(name, ()))
        return
    if subset:
        raise _no_subset(path, subset, purpose, 'a CSV of MSR-VTT is one split')
    rows = read_csv(path)
    header = _header(rows)
    if 'video_id' not in header:
        raise ValueError(f'{path}:1: no column video_id, found {quoted(header)}')
    if 'sentence' in header:
        yield from _merged(
            Row(
                where,
                f'{row["video_id"]}.mp4',
                video_id=row['video_id'],
                captions=(row['sentence'],),
            )
            for where, row in _table(rows)
        )
        return
    captions = _read_msrvtt_json(_beside(path, 'MSRVTT_data.json'))[1]
    for where, row in _table(rows):
        name = row['video_id']
        yield Row(where, f'{name}.mp4', video_id=name, captions=captions.get(name, ()))


def _beside(path: Path, name: str) -> Path:
    """The file that a list of ids takes its captions from."""
    file = path.parent / name
    if not file.exists():
        raise ValueError(
            f'{path}: the captions of its ids are read from {name} beside it, but {file} is missing'
        )
    return file


def _read_msrvtt_json(path: Path) -> tuple[list[tuple[str, str]], dict[str, tuple[str, ...]]]:
    """Name and split of each video, and the captions by name."""
    content = read_json(path)
    if not isinstance(content, dict) or not {'videos', 'sentences'} <= content.keys():
        raise ValueError(f'{path}: not the MSR-VTT format, an object with videos and sentences')
    captions = {}
    sentences = _objects(content['sentences'], f'{path}.sentences', 'video_id and caption')
    for place, sentence in enumerate(sentences):
        where = f'{path}.sentences[{place}]'
        name = _name(sentence.get('video_id'), 'video_id', where)
        captions.setdefault(name, []).append(_text(sentence, 'caption', where))
    where = f'{path}.videos'
    videos = [
        (
            _name(video.get('video_id'), 'video_id', where),
            _name(video.get('split', ''), 'split', where),
        )
        for video in _objects(content['videos'], where, 'video_id and split')
    ]
    return videos, {name: tuple(texts) for name, texts in captions.items()}


def _rows_msvd(path: Path, exists: Exists, **unused) -> Iterator[Row]:
    """MSVD: a list of video ids, with AllVideoDescriptions.txt ("id caption" lines) beside it."""
    captions = {}
    for _, line in read_lines(_beside(path, 'AllVideoDescriptions.txt')):
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
    entries = []
    for place, entry in enumerate(_objects(read_json(path), str(path), 'videoID and enCap')):
        where = f'{path}[{place}]'
        if 'videoID' not in entry or not entry.get('enCap'):
            raise ValueError(
                f'{where}: needs videoID and enCap, found {quoted(sorted(entry))}; a list without '
                'captions cannot be used'
            )
        name = _name(entry['videoID'], 'videoID', where)
        entries.append((where, name, _texts(entry, 'enCap', where)))
    layouts = (
        lambda entry: f'{entry[1]}.mp4',
        lambda entry: f'{entry[1].rsplit("_", 2)[0]}.mp4',
        lambda entry: f'{entry[1]}.webm',
        lambda entry: f'{entry[1]}.mkv',
    )
    layout = _best(layouts, entries, exists)
    for where, name, texts in entries:
        yield Row(where, layout((where, name, texts)), video_id=name, captions=texts)


def _fold(path: Path, subset: str, purpose: str) -> tuple[str, str]:
    """'train' or 'test', and the number of the official split, of 'train1', 'test3' or 'train'."""
    subset = subset or {'train': 'train1', 'val': 'test1'}.get(purpose, '')
    found = re.fullmatch(r'(train|test)([0-9]?)', subset)
    if not found:
        raise ValueError(
            f'{path}: subset={subset!r} must be train or test, with the split: train1, test3'
        )
    return found[1], found[2] or '1'


def _rows_ucf101(path: Path, subset: str, purpose: str = '', **unused) -> Iterator[Row]:
    if path.is_dir():
        kind, fold = _fold(path, subset, purpose)
        path = path / f'{kind}list0{fold}.txt'
    elif subset and path.stem != 'list0'.join(_fold(path, subset, purpose)):
        raise _no_subset(path, subset, purpose, 'a list of UCF101 is one split')
    for where, line in read_lines(path):
        fields = line.rsplit(maxsplit=1)
        name = fields[0].replace('\\', '/')
        if '/' not in name:
            raise ValueError(f'{where}: expected "Class/video.avi" with or without a number')
        # The test lists carry no numbers; the folder is the class in both.
        yield Row(where, name, (name.split('/')[0],), Path(name).stem)


def _rows_hmdb51(path: Path, subset: str, purpose: str = '', **unused) -> Iterator[Row]:
    kind, fold = _fold(path, subset, purpose)
    files = sorted(path.glob(f'*_test_split{fold}.txt')) if path.is_dir() else []
    if not files:
        raise ValueError(f'{path}: no files *_test_split{fold}.txt; give the folder of split files')
    wanted = {'train': '1', 'test': '2'}[kind]
    for file in files:
        name = file.name.removesuffix(f'_test_split{fold}.txt')
        for where, line in read_lines(file):
            fields = line.rsplit(maxsplit=1)
            if len(fields) < 2 or fields[1] not in ('0', '1', '2'):
                raise ValueError(f'{where}: expected "video.avi 0|1|2", found {quoted(line)}')
            if fields[1] == wanted:
                yield Row(where, f'{name}/{fields[0]}', (name,), Path(fields[0]).stem)


def _rows_folder(
    path: Path, purpose: str = '', suffixes: Sequence[str] = VIDEO_SUFFIXES, **unused
) -> Iterator[Row]:
    if not path.is_dir():
        raise ValueError(f'{path}: not a folder; it should hold FOLDER/class name/file')
    _refuse_splits(path, purpose, suffixes)
    absolute = os.fspath(path.absolute())
    skipped: Counter[str] = Counter()
    for folder in class_folders(path):
        for name in files_below(path, folder):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes:
                yield Row(f'{path}/{name}', f'{absolute}/{name}', (folder,), name)
            else:
                skipped[suffix or 'without a suffix'] += 1
    if skipped:
        kinds = ', '.join(f'{count} {suffix}' for suffix, count in skipped.most_common(10))
        more = f' and {len(skipped) - 10} other suffixes' if len(skipped) > 10 else ''
        logging.warning(
            '%s: skipped %d files whose suffix is none of those that are read: %s%s',
            path,
            skipped.total(),
            kinds,
            more,
        )
    with os.scandir(path) as entries:
        loose = sum(os.path.splitext(entry.name)[1].lower() in suffixes for entry in entries)
    if loose:
        logging.warning('%s: skipped %d files that lie in no class folder', path, loose)


def files_below(path: str | os.PathLike, folder: str = '') -> list[str]:
    """Files in all depths of a folder, sorted; hidden ones are left out, links are followed.

    Args:
      path: where their names start.
      folder: in it, which is looked through; '' for all.

    Returns:
      Names from `path` on. A folder that several links lead to, or that holds itself, counts once.
    """
    found = []
    for top, files in _walk(Path(path, folder)):
        place = top.relative_to(path)
        found += [(place / name).as_posix() for name in files]
    return sorted(found, key=lambda name: name.split('/'))


def _walk(path: Path) -> Iterator[tuple[Path, list[str]]]:
    seen: set[tuple[int, int]] = set()
    for top, folders, files in os.walk(path, onerror=_raise, followlinks=True):
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield Path(top), [name for name in files if not is_hidden(name)]


def _raise(error: OSError) -> None:
    raise error


def _refuse_splits(path: Path, purpose: str, suffixes: Sequence[str]) -> None:
    """Says so where a folder holds the splits of a data set, not its classes."""
    names = class_folders(path)
    if not names or not all(name.lower() in _TRAIN + _VALIDATION + _TEST for name in names):
        return
    for name in names:
        with os.scandir(path / name) as entries:
            if any(os.path.splitext(entry.name)[1].lower() in suffixes for entry in entries):
                return  # classes of such names
    choices = ' or '.join(f'{path}/{name}' for name in names)
    field = f'set data.{purpose}_list to' if purpose in ('train', 'val') else 'name'
    beside = _lists_in(path)
    lists = f' if it holds class folders, else the list of its videos: {beside}' if beside else ''
    raise ValueError(
        f'{path}: holds the splits {", ".join(names)}, not classes; {field} {choices}{lists}'
    )


def _lists_in(folder: Path) -> str:
    """At most three files of a folder whose names are of lists of splits, as words_train.txt."""
    with os.scandir(folder) as entries:
        stems = {entry.name: os.path.splitext(entry.name) for entry in entries}
    found = sorted(
        name
        for name, (stem, suffix) in stems.items()
        if suffix.lower() in ('.txt', '.csv', '.json', '.jsonl')
        and re.split('[_.-]', stem.lower())[-1] in _TRAIN + _VALIDATION + _TEST
    )
    return ' or '.join(os.path.join(folder, name) for name in found[:3])


def _refuse_one_class(path: Path) -> None:
    """Says what is missing where a folder holds no videos, or holds them without class folders."""
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if not is_hidden(entry.name))
    if not names:
        raise ValueError(f'{path}: the folder is empty')
    videos = [name for name in names if name.lower().endswith(VIDEO_SUFFIXES)]
    if videos:
        beside = _lists_in(path.absolute().parent)
        raise ValueError(
            f'{path}: holds videos ({videos[0]}, ...) but no class folders; name '
            f'{path.absolute().parent} if {path.name} is one of the classes, else a list of the '
            f'videos with their labels{f", as {beside}" if beside else ""}'
        )


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
    'multi_label': _rows_multi_label,
}
LIST_FORMATS = ('auto', *FORMATS)


# Of lists that are text files; their lines look alike, so the data set decides.
_TEXT_FORMATS = ('kinetics', 'multi_label', 'ucf101', 'msvd')
_JSON_FORMATS = ('ssv2_json', 'json', 'msrvtt', 'vatex')


def guess_format(list_path: str | os.PathLike, usual: str = '') -> str:
    """Names the format of a list where that is certain.

    Args:
      list_path: list file or folder.
      usual: the format of the data set's own lists, for what the file leaves open; '' or 'auto'
        if it has none.

    Returns:
      One of `LIST_FORMATS` other than 'auto'.

    Raises:
      ValueError: if it is not certain.
    """
    path = Path(list_path)
    suffix = path.suffix.lower()
    if path.is_dir():
        found = _guess_folder(path, usual)
        if found:
            return found
        _refuse_one_class(path)
    elif suffix in ('.csv', '.tsv'):
        return _guess_csv(path, usual)
    elif suffix == '.jsonl':
        return 'json'
    elif suffix == '.json':
        found = _guess_json(read_json(path))
        if found or usual in _JSON_FORMATS:
            return found or usual
    else:
        lines = [line for _, line in itertools.islice(read_lines(path), 100)]
        if not lines:
            raise ValueError(f'{path}: the list is empty')
        if usual in _TEXT_FORMATS:
            return usual
        if path.name.startswith(('trainlist', 'testlist')):
            return 'ucf101'
        ends = [line.rsplit(maxsplit=1) for line in lines]
        if all(len(end) == 2 and integer(end[1]) is not None for end in ends):
            return 'kinetics'
    raise ValueError(
        f'{path}: cannot tell the format of this list; set it to one of {", ".join(FORMATS)} '
        '(data.list_format)'
    )


def _guess_csv(path: Path, usual: str) -> str:
    header = set(_header(read_csv(path))) if usual == 'msrvtt' else set()
    ids_alone = 'video_id' in header and not header & set(_PATH_COLUMNS)
    return usual if ids_alone else 'csv'


def _guess_json(content: Any) -> str:
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
    return ''


def _guess_folder(path: Path, usual: str) -> str:
    if any(path.glob('*_test_split[0-9].txt')):
        return 'hmdb51'
    if any(path.glob('*list0[0-9].txt')):
        return 'ucf101'
    if usual == 'image_folder':  # found at once, not after a look at a million names
        return usual
    images = False
    for folder in class_folders(path):
        for top, files in _walk(path / folder):
            suffixes = {os.path.splitext(name)[1].lower() for name in files}
            if suffixes & set(VIDEO_SUFFIXES):
                return 'folder'
            images |= top == path / folder and bool(suffixes & set(IMAGE_SUFFIXES))
    return 'image_folder' if images else ''
