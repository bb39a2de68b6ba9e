"""Lists of videos with labels, in the formats of the data sets and of the reference systems.

Everything that training needs of a source is `len(source)` and `source[i] -> Record`; the number i
is the identity of a record. `open_source` reads a list file into such a source.
"""

import csv
import difflib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Label = int | tuple[int, ...]
Names = tuple[str, ...]

VIDEO_SUFFIXES = ('.mp4', '.webm', '.avi', '.mkv', '.mov', '.m4v', '.mpg', '.mpeg', '.ts', '.flv')


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled video, or a part of one.

    Attributes:
      path: the video file, or a name that says where the video lies, for messages.
      label: class index from 0, or one per head.
      video_id: name of the video in the data set.
      start: seconds after the first frame where the part begins; None means the beginning.
      end: seconds where it ends; None means the end.
      load: gives the bytes of the video file where `path` is not a file; raises OSError.
    """

    path: str
    label: Label
    video_id: str
    start: float | None = None
    end: float | None = None
    load: Callable[[], bytes] | None = None


class VideoList:
    """Records in memory.

    Attributes:
      class_names: names by class index; one tuple per head where labels are tuples.
      num_classes: number of classes, or one number per head.
    """

    def __init__(self, records: Sequence[Record], class_names: Names | tuple[Names, ...]):
        self._records = list(records)
        self.class_names = class_names
        heads = bool(class_names) and isinstance(class_names[0], tuple)
        self.num_classes = tuple(map(len, class_names)) if heads else len(class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


@dataclass(frozen=True)
class _Row:
    """A line of a list before its label is known: `where` is 'file:line' for messages."""

    where: str
    path: str
    labels: tuple[str, ...]
    video_id: str = ''
    start: float | None = None
    end: float | None = None


class ClassMap:
    """The classes of one head: names in order, and what a list may call them.

    Attributes:
      names: class names by index.
      where: the file they come from, for messages.
    """

    def __init__(self, names: Sequence[str], ids: Sequence[int], where: str):
        """Numbers the classes in the given order; `ids` are the numbers that lists use for them.

        Raises:
          ValueError: if a name or an id is repeated or a name is empty.
        """
        for name in names:
            if not name:
                raise ValueError(f'{where}: empty class name')
        for what, values in (('class name', names), ('class id', ids)):
            twice = [value for value, number in Counter(values).items() if number > 1]
            if twice:
                raise ValueError(f'{where}: {what} {twice[0]!r} appears twice')
        self.names = tuple(names)
        self.where = where
        self._by_id = {number: k for k, number in enumerate(ids)}
        self._by_name = {name: k for k, name in enumerate(names)}

    def find(self, label: str, where: str) -> int:
        """Class index of a name or an id in a list; raises ValueError beginning with `where`."""
        if label in self._by_name:
            return self._by_name[label]
        number = _integer(label)
        if number is not None:
            if number not in self._by_id:
                raise ValueError(
                    f'{where}: label {number} is out of range, {self.where} has '
                    f'{min(self._by_id)} to {max(self._by_id)}'
                )
            return self._by_id[number]
        close = difflib.get_close_matches(label, self.names, 1, 0.6)
        hint = f'; did you mean {close[0]!r}?' if close else ''
        raise ValueError(f'{where}: label {label!r} is not a class of {self.where}{hint}')


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ('file:line', text) of the lines that are not blank."""
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip():
            yield f'{path}:{number}', line.strip()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8-sig')
    except FileNotFoundError as error:
        raise ValueError(f'{path}: no such list file') from error
    except IsADirectoryError as error:
        raise ValueError(f'{path}: is a folder, expected a list file') from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: is not UTF-8 text (byte {error.start})') from error


def _read_json(path: Path):
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}:{error.lineno}: not valid JSON: {error.msg}') from error


def read_label_map(path: str | os.PathLike) -> ClassMap:
    """Reads class names and ids.

    Args:
      path: a text file with one name per line or "id name" lines, a CSV file with columns id and
        name (or key), a JSON file (object name -> id or id -> name, or a list of names), or a
        folder whose subfolders are the classes.

    Returns:
      The classes, ordered by id.

    Raises:
      ValueError: naming file and line, if something is missing, repeated or unreadable.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        pairs = list(enumerate(names))
    elif path.suffix == '.json':
        pairs = _label_pairs_json(path)
    elif path.suffix == '.csv':
        pairs = _label_pairs_csv(path)
    else:
        lines = [text for _, text in _read_lines(path)]
        heads = [_integer(line.split(maxsplit=1)[0]) for line in lines]
        numbered = None not in heads and sorted(heads) in (
            list(range(len(lines))),
            list(range(1, len(lines) + 1)),
        )
        if numbered and all(len(line.split(maxsplit=1)) == 2 for line in lines):
            pairs = [(k, line.split(maxsplit=1)[1]) for k, line in zip(heads, lines)]
        else:
            pairs = list(enumerate(lines))
    if not pairs:
        raise ValueError(f'{path}: no class names')
    pairs.sort(key=lambda pair: pair[0])
    ids, names = zip(*pairs)
    return ClassMap(names, ids, str(path))


def _label_pairs_json(path: Path) -> list[tuple[int, str]]:
    content = _read_json(path)
    if isinstance(content, list):
        return list(enumerate(map(str, content)))
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object name -> id or a list of names')
    pairs = [(_integer(str(value)), key) for key, value in content.items()]
    if any(number is None for number, _ in pairs):
        pairs = [(_integer(key), str(value)) for key, value in content.items()]
    if any(number is None for number, _ in pairs):
        raise ValueError(f'{path}: neither its keys nor its values are all integers')
    return pairs


def _label_pairs_csv(path: Path) -> list[tuple[int, str]]:
    rows = list(csv.reader(_read_text(path).splitlines()))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    id_column, name_column = 0, 1
    if 'id' in header:
        names = [k for k, cell in enumerate(header) if cell in ('name', 'key', 'label', 'class')]
        if not names:
            raise ValueError(f'{path}:1: column id without a column name, found {header}')
        id_column, name_column = header.index('id'), names[0]
        rows[0] = []
    pairs = []
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        if len(row) <= max(id_column, name_column) or _integer(row[id_column]) is None:
            raise ValueError(f'{path}:{number}: expected "id,name", found {",".join(row)!r}')
        pairs.append((int(row[id_column]), row[name_column].strip()))
    return pairs


def _rows_kinetics(path: Path, **unused) -> Iterator[_Row]:
    for where, line in _read_lines(path):
        fields = line.rsplit(maxsplit=1)
        if len(fields) < 2:
            raise ValueError(f'{where}: expected "path label", found {line!r}')
        yield _Row(where, fields[0], (fields[1],))


_PATH_COLUMNS = ('path', 'video_path', 'file', 'filename', 'video')
_LABEL_COLUMNS = ('label', 'class', 'label_id', 'class_id')


def _rows_csv(path: Path, root: Path, subset: str) -> Iterator[_Row]:
    lines = _read_text(path).splitlines()
    first = lines[0] if lines else ''
    delimiter = max(',;\t', key=first.count)
    rows = list(enumerate(csv.reader(lines, delimiter=delimiter), 1))
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    known = {*_PATH_COLUMNS, *_LABEL_COLUMNS, 'youtube_id', 'verb_class', 'video_id'}
    if not known & set(header):
        for number, row in rows:
            if not row:
                continue
            if len(row) < 2:
                raise ValueError(f'{path}:{number}: expected "path,label", found {row[0]!r}')
            yield _Row(f'{path}:{number}', row[0].strip(), tuple(c.strip() for c in row[1:]))
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
        yield from _rows_kinetics_csv(path, table, header, root)
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


def _rows_plain_csv(path: Path, table: list, header: list[str]) -> Iterator[_Row]:
    path_column = _one_of(_PATH_COLUMNS, header, path, 'path')
    label_column = _one_of(_LABEL_COLUMNS, header, path, 'label')
    second = f'{label_column}_2'
    for where, row in table:
        labels = (row[label_column], row[second]) if second in row else (row[label_column],)
        yield _Row(
            where,
            row[path_column],
            labels,
            row.get('video_id') or row.get('youtube_id', ''),
            _seconds(row.get('start', ''), where),
            _seconds(row.get('end', ''), where),
        )


def _rows_kinetics_csv(path: Path, table: list, header: list[str], root: Path) -> Iterator[_Row]:
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
    # Copies of Kinetics name their files differently: take the rule that finds most of a sample.
    sample = [row for _, row in table[:: max(1, len(table) // 50)]]
    layout = max(layouts, key=lambda rule: sum((root / rule(row)).exists() for row in sample))
    for where, row in table:
        if not row['label']:
            raise ValueError(f'{where}: no label; a test list without labels cannot be used')
        yield _Row(where, layout(row), (row['label'],), row['youtube_id'])


def _trimmed(row: dict) -> str:
    start, end = (int(float(row.get(name) or 0)) for name in ('time_start', 'time_end'))
    return f'{row["youtube_id"]}_{start:06d}_{end:06d}'


def _rows_epic_csv(path: Path, table: list, header: list[str]) -> Iterator[_Row]:
    """EPIC-Kitchens-100 lists: segments of long videos with a verb and a noun."""
    for column in ('noun_class', 'video_id', 'start_timestamp', 'stop_timestamp'):
        _one_of((column,), header, path, column)
    for where, row in table:
        person = row.get('participant_id') or row['video_id'].split('_')[0]
        yield _Row(
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


def _rows_ssv2_json(path: Path, root: Path, **unused) -> Iterator[_Row]:
    entries = _read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{path}: expected a list of objects with id and template')
    suffix = '.webm'
    if entries and not (root / f'{entries[0].get("id")}.webm').exists():
        suffix = '.mp4' if (root / f'{entries[0].get("id")}.mp4').exists() else '.webm'
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
        yield _Row(where, f'{entry["id"]}{suffix}', (label,), str(entry['id']))


def _rows_json(path: Path, **unused) -> Iterator[_Row]:
    if path.suffix == '.jsonl':
        entries = []
        for where, line in _read_lines(path):
            try:
                entries.append((where, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f'{where}: not valid JSON: {error.msg}') from error
    else:
        content = _read_json(path)
        if not isinstance(content, list):
            raise ValueError(f'{path}: expected a list of objects with path and label')
        entries = [(f'{path}[{number}]', entry) for number, entry in enumerate(content)]
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f'{where}: expected an object with path and label, found {entry!r}')
        path_field = next((name for name in _PATH_COLUMNS if name in entry), None)
        label_field = next((name for name in _LABEL_COLUMNS if name in entry), None)
        if path_field is None or label_field is None:
            raise ValueError(f'{where}: needs path and label, found {sorted(entry)}')
        label = entry[label_field]
        yield _Row(
            where,
            entry[path_field],
            tuple(map(str, label)) if isinstance(label, list) else (str(label),),
            str(entry.get('video_id', '')),
            _seconds(entry.get('start'), where),
            _seconds(entry.get('end'), where),
        )


def _rows_ucf101(path: Path, **unused) -> Iterator[_Row]:
    for where, line in _read_lines(path):
        fields = line.rsplit(maxsplit=1)
        name = fields[0].replace('\\', '/')
        if '/' not in name:
            raise ValueError(f'{where}: expected "Class/video.avi" with or without a number')
        # The test lists carry no numbers; the folder is the class in both.
        yield _Row(where, name, (name.split('/')[0],), Path(name).stem)


def _rows_hmdb51(path: Path, subset: str, **unused) -> Iterator[_Row]:
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
        for where, line in _read_lines(file):
            fields = line.rsplit(maxsplit=1)
            if len(fields) < 2 or fields[1] not in ('0', '1', '2'):
                raise ValueError(f'{where}: expected "video.avi 0|1|2", found {line!r}')
            if fields[1] == wanted:
                yield _Row(where, f'{name}/{fields[0]}', (name,), Path(fields[0]).stem)


def _rows_folder(path: Path, **unused) -> Iterator[_Row]:
    if not path.is_dir():
        raise ValueError(f'{path}: not a folder; "folder" wants FOLDER/class name/video.mp4')
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for file in sorted(folder.rglob('*')):
            if file.suffix.lower() in VIDEO_SUFFIXES:
                relative = file.relative_to(path).as_posix()
                yield _Row(str(file), str(file.absolute()), (folder.name,), relative)


_READERS: dict[str, Callable[..., Iterable[_Row]]] = {
    'kinetics': _rows_kinetics,
    'csv': _rows_csv,
    'ssv2_json': _rows_ssv2_json,
    'ucf101': _rows_ucf101,
    'hmdb51': _rows_hmdb51,
    'json': _rows_json,
    'folder': _rows_folder,
}
LIST_FORMATS = ('auto', *_READERS)


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
    elif path.suffix == '.csv':
        return 'csv'
    elif path.suffix == '.jsonl':
        return 'json'
    elif path.suffix == '.json':
        content = _read_json(path)
        first = content[0] if isinstance(content, list) and content else None
        if isinstance(first, dict):
            if 'template' in first or set(first) == {'id'}:
                return 'ssv2_json'
            if any(name in first for name in _PATH_COLUMNS):
                return 'json'
    else:
        lines = [line for _, line in itertools.islice(_read_lines(path), 100)]
        ends = [line.rsplit(maxsplit=1) for line in lines]
        if path.name.startswith(('trainlist', 'testlist')):
            return 'ucf101'
        if ends and all(len(end) == 2 and _integer(end[1]) is not None for end in ends):
            return 'kinetics'
    raise ValueError(
        f'{path}: cannot tell the format of this list; set it to one of {", ".join(_READERS)}'
    )


def open_source(
    list_path: str | os.PathLike,
    list_format: str = 'auto',
    root: str | os.PathLike = '',
    label_map: str | os.PathLike | Sequence[str | os.PathLike] = '',
    num_classes: int | tuple[int, ...] = 0,
    subset: str = '',
) -> VideoList:
    """Reads a list of videos.

    Args:
      list_path: the list file; for 'folder' and 'hmdb51' a folder.
      list_format: one of `LIST_FORMATS`; 'auto' decides only where there is no doubt.
      root: folder that the paths in the list start from; '' means the folder of the list.
      label_map: file of class names, see `read_label_map`; one per head for labels with two heads.
        Without it, integer labels become the names '0', '1' and so on, and other labels are
        numbered in sorted order ('folder', 'hmdb51' and lists with names).
      num_classes: expected number of classes, 0 for whatever comes; with integer labels and no
        label map it is also the upper bound. One per head for labels with two heads.
      subset: for 'hmdb51' train1 to test3; for CSV files with a column split the value to keep.

    Returns:
      The records in the order of the list, with class names.

    Raises:
      ValueError: naming file and line, if the list or a label is wrong, or the list is empty.
    """
    path = Path(list_path)
    if not path.exists():
        raise ValueError(f'{path}: no such list; set the list path')
    if list_format == 'auto':
        list_format = guess_format(path)
    if list_format not in _READERS:
        raise ValueError(f'list_format={list_format!r} must be one of {", ".join(LIST_FORMATS)}')
    root = Path(root) if os.fspath(root) else (path if path.is_dir() else path.parent)
    if list_format == 'ucf101' and not label_map:
        raise ValueError(f'{path}: UCF101 lists need label_map, the path of classInd.txt')
    rows = list(_READERS[list_format](path, root=root, subset=subset))
    if not rows:
        raise ValueError(f'{path}: the list has no videos')

    num_heads = len(rows[0].labels)
    for row in rows:
        if len(row.labels) != num_heads or not row.path:
            raise ValueError(f'{row.where}: expected a path and {num_heads} label(s) as above it')
    maps = [label_map] if isinstance(label_map, (str, os.PathLike)) else list(label_map)
    if maps == ['']:
        # The subfolders are the classes, those without a video too.
        maps = [path if list_format == 'folder' else ''] * num_heads
    counts = num_classes if isinstance(num_classes, tuple) else (num_classes,) * num_heads
    if len(maps) != num_heads or len(counts) != num_heads:
        raise ValueError(
            f'{path}: {num_heads} label(s) per video, but label_map has {len(maps)} and '
            f'num_classes={num_classes}'
        )
    heads = []
    for head, (name, count) in enumerate(zip(maps, counts)):
        classes = read_label_map(name) if name else _collect_classes(path, rows, head, count)
        if count and len(classes.names) != count:
            raise ValueError(
                f'{classes.where}: {len(classes.names)} classes, expected num_classes={count}; '
                'name the right label map, or use the data set "custom" for other classes'
            )
        heads.append(classes)

    records = []
    for row in rows:
        label = tuple(classes.find(text, row.where) for classes, text in zip(heads, row.labels))
        records.append(
            Record(
                os.fspath(root / row.path),  # an absolute path stays as it is
                label if num_heads > 1 else label[0],
                row.video_id or Path(row.path).stem,
                row.start,
                row.end,
            )
        )
    names = tuple(classes.names for classes in heads)
    return VideoList(records, names if num_heads > 1 else names[0])


def _collect_classes(path: Path, rows: Sequence[_Row], head: int, count: int) -> ClassMap:
    """Classes of a list that comes without a label map."""
    numbers = [_integer(row.labels[head]) for row in rows]
    if None in numbers:
        names = sorted({row.labels[head] for row in rows})
        return ClassMap(names, range(len(names)), str(path))
    for row, number in zip(rows, numbers):
        if number < 0 or (count and number >= count):
            limit = f'0 to {count - 1}' if count else '0 or more'
            raise ValueError(f'{row.where}: label {number} is out of range, expected {limit}')
    names = [str(number) for number in range(count or max(numbers) + 1)]
    return ClassMap(names, range(len(names)), str(path))
