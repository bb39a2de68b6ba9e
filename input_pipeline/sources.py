"""Opens lists of videos and built data sets.

Everything that training needs of a source is `len(source)` and `source[i] -> Record`; the number i
is the identity of a record.
"""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from input_pipeline.label_maps import ClassMap, read_label_map
from input_pipeline.list_formats import (
    FORMATS,
    LIST_FORMATS,
    Exists,
    Row,
    check_captions,
    check_subset,
    guess_format,
)
from input_pipeline.records import BuiltSplit, is_built, open_built
from input_pipeline.text_files import integer, quoted
from input_pipeline.video_list import Record, VideoList

# Classes that numbers without a label map may stand for, in lists of fewer videos than that.
MOST_UNNAMED_CLASSES = 1000


def open_source(
    list_path: str | os.PathLike,
    list_format: str = 'auto',
    root: str | os.PathLike = '',
    label_map: str | os.PathLike | Sequence[str | os.PathLike] = '',
    num_classes: int | tuple[int, ...] = 0,
    subset: str = '',
    purpose: str = '',
    usual_format: str = '',
    several: bool = False,
) -> VideoList | BuiltSplit:
    """Reads a list of videos, or opens a data set that `dist_jax dataset build` wrote.

    Args:
      list_path: the list file; for 'folder' and 'hmdb51' a folder, for 'ucf101' a file or the
        folder of all; the folder of a built data set, which of the other arguments needs `subset`
        only.
      list_format: one of `LIST_FORMATS`; 'auto' decides only where there is no doubt.
      root: folder that the paths in the list start from; '' means the folder of the list.
      label_map: file of class names, see `read_label_map`; one per head for labels with two heads.
        Without it, integer labels become the names '0', '1' and so on up to the largest, which
        must be below `MOST_UNNAMED_CLASSES` or the number of videos; other labels are numbered in
        sorted order ('folder', 'hmdb51' and lists with names).
      num_classes: expected number of classes, 0 for whatever comes; with integer labels and no
        label map it is also the upper bound. One per head for labels with two heads.
      subset: for 'hmdb51' and 'ucf101' train1 to test3; for CSV and JSON with a column split the
        value to keep; for a built data set the split. An error for lists that hold one split only.
      purpose: 'train' or 'val' for such a list of a run: where the list holds several splits and
        `subset` names none, it is the one that is meant; an error if that is not certain.
      usual_format: of the data set's own lists, for 'auto' where the file leaves it open.
      several: a video may have any number of classes, whatever list it is. Without, that is so of
        the lists that say it: a column or field `labels`, Charades, the format 'multi_label'.

    Returns:
      The records in the order of the list, with class names. Those of a list of captions have no
      label and the list no class names, whatever `label_map` and `num_classes` say.

    Raises:
      ValueError: naming file and line, if the list or a label is wrong, or the list is empty.
    """
    if '://' in os.fspath(list_path):
        raise ValueError(
            f'{list_path}: lists and built data sets are not read from a bucket; mount it or copy '
            'them to a disk'
        )
    path = Path(list_path)
    if not os.path.exists(path):
        field = f'data.{purpose}_list' if purpose else 'the list path'
        raise ValueError(f'{path}: no such list; set {field}')
    if is_built(path):
        if any(map(os.fspath, _listed(label_map))):
            raise ValueError(f'{path}: a built data set has its class names; leave label_map empty')
        return open_built(path, subset, num_classes, purpose, several)
    if list_format == 'auto':
        if several and usual_format in ('', 'auto', 'kinetics'):
            usual_format = 'multi_label'
        list_format = guess_format(path, usual_format)
    if list_format not in FORMATS:
        raise ValueError(f'list_format={list_format!r} must be one of {", ".join(LIST_FORMATS)}')
    root = Path(root) if os.fspath(root) else (path if path.is_dir() else path.parent)
    rows = read_rows(
        path,
        list_format,
        lambda name: os.path.exists(os.path.join(root, name)),
        subset,
        purpose,
        count_heads(label_map, num_classes),
        several,
    )
    heads = (
        [] if rows[0].captions else find_classes(path, list_format, rows, label_map, num_classes)
    )
    records = []
    for row in rows:
        label = find_labels(heads, row)
        own = frozenset(label) if row.several else label[0] if len(heads) == 1 else label
        records.append(
            Record(
                os.fspath(root / row.path),  # an absolute path stays as it is
                own,
                row.video_id or Path(row.path).stem,
                row.start,
                row.end,
                captions=row.captions,
            )
        )
    names = tuple(classes.names for classes in heads)
    return VideoList(records, names[0] if len(names) == 1 else names)


def count_heads(
    label_map: str | os.PathLike | Sequence[str | os.PathLike],
    num_classes: int | tuple[int, ...],
) -> int:
    """Labels of a video as far as the arguments of `open_source` tell; 0 if they do not."""
    if isinstance(num_classes, tuple):
        return len(num_classes)
    maps = [name for name in _listed(label_map) if os.fspath(name)]
    return len(maps) or int(num_classes > 0)


def find_labels(heads: Sequence[ClassMap], row: Row) -> tuple[int, ...]:
    """Class index of each head; of a row with several classes each of these once, ascending.

    Raises:
      ValueError: naming file and line, if one is no class.
    """
    if row.several:
        return tuple(sorted({heads[0].find(text, row.where) for text in row.labels}))
    return tuple(classes.find(text, row.where) for classes, text in zip(heads, row.labels))


def read_rows(
    path: Path,
    list_format: str,
    exists: Exists,
    subset: str = '',
    purpose: str = '',
    num_heads: int = 0,
    several: bool = False,
) -> list[Row]:
    """Reads a list whose format is known.

    Args:
      path: list file or folder.
      list_format: a key of `FORMATS`.
      exists: whether a name from the root is a video, for lists that leave the names open.
      subset: see `open_source`.
      purpose: likewise.
      num_heads: labels of a video, where that is known; 0 where it is not.
      several: see `open_source`.

    Returns:
      At least one row. All have labels, equally many, or any number of classes, or captions.

    Raises:
      ValueError: naming file and line, if the list is wrong or empty.
    """
    check_subset(path, list_format, subset, purpose)
    parse = FORMATS[list_format]
    rows = list(
        parse(
            path,
            exists=exists,
            subset=subset,
            purpose=purpose,
            num_heads=num_heads,
            several=several,
        )
    )
    if not rows:
        raise ValueError(f'{path}: the list has no videos')
    if rows[0].several:
        _check_sets(rows)
        return rows
    num_heads = len(rows[0].labels)
    for row in rows:
        if len(row.labels) != num_heads or not row.path or row.several:
            raise ValueError(f'{row.where}: expected a path and {num_heads} label(s) as above it')
        if not num_heads:
            check_captions(row)
    if several and num_heads > 1:
        raise ValueError(
            f'{path}: a label for each of {num_heads} heads, where any number of classes of one '
            "head is expected; name one column or field 'labels'"
        )
    if not several or not num_heads:
        return rows
    return [dataclasses.replace(row, several=True) for row in rows]


def _check_sets(rows: Sequence[Row]) -> None:
    for row in rows:
        if not row.several or not row.path:
            raise ValueError(f"{row.where}: expected a path and 'labels' as above it")
    counts = Counter((row.path, row.start, row.end) for row in rows)
    if len(counts) < len(rows):
        twice = next(row for row in rows if counts[row.path, row.start, row.end] > 1)
        logging.warning(
            '%s: %d lines are of a video that another line has, too, as %s: each line says of a '
            'video of its own which classes it has, and that it has no others; put all classes of '
            'a video into one line',
            twice.where,
            len(rows) - len(counts),
            quoted(twice.path),
        )


def find_classes(
    path: Path,
    list_format: str,
    rows: Sequence[Row],
    label_map: str | os.PathLike | Sequence[str | os.PathLike] = '',
    num_classes: int | tuple[int, ...] = 0,
) -> list[ClassMap]:
    """The classes of every head of rows with labels; arguments as of `open_source`.

    Raises:
      ValueError: if label maps and labels do not fit.
    """
    if list_format == 'ucf101' and not label_map and path.is_dir():
        label_map = path / 'classInd.txt'
    if list_format == 'ucf101' and not label_map:
        raise ValueError(f'{path}: UCF101 lists need label_map, the path of classInd.txt')
    num_heads = 1 if rows[0].several else len(rows[0].labels)
    maps = _listed(label_map)
    if maps == [''] or not maps:
        # The subfolders are the classes, those without a video too.
        maps = [path if list_format in ('folder', 'image_folder') else ''] * num_heads
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
    return heads


def _listed(label_map: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str | os.PathLike]:
    return [label_map] if isinstance(label_map, (str, os.PathLike)) else list(label_map)


def _collect_classes(path: Path, rows: Sequence[Row], head: int, count: int) -> ClassMap:
    """Classes of a list that comes without a label map."""
    labelled = [
        (row, label)
        for row in rows
        for label in (row.labels if row.several else (row.labels[head],))
    ]
    numbers = [integer(label) for _, label in labelled]
    if not labelled and not count:
        raise ValueError(f'{path}: no video has a class; set label_map, which names the classes')
    if all(number is None for number in numbers) and labelled:
        for row, label in labelled:
            _check_name(row, label)
        names = sorted({label for _, label in labelled})
        return ClassMap(names, range(len(names)), str(path))
    # The names are made from the largest number: a wrong column must not become a million classes.
    limit = count or max(MOST_UNNAMED_CLASSES, len(rows))
    for (row, label), number in zip(labelled, numbers):
        if number is None:
            raise ValueError(
                f'{row.where}: label {quoted(label)} is no whole number, as other '
                'labels of the list are; set label_map if the numbers are names'
            )
        if number < 0 or number >= limit:
            reason = (
                ''
                if count
                else (
                    f'; without a label map the classes are 0 to the largest label, and a list of '
                    f'{len(rows)} videos may have {limit}: set label_map if the label is right'
                )
            )
            raise ValueError(
                f'{row.where}: label {number} is out of range, expected 0 to {limit - 1}{reason}'
            )
    names = [str(number) for number in range(count or max(numbers) + 1)]
    return ClassMap(names, range(len(names)), str(path))


def _check_name(row: Row, name: str) -> None:
    """Refuses what only looks like a class name: an empty label, nan, 1.0 and 1_0."""
    try:
        float(name or 'nan')
    except ValueError:
        return
    raise ValueError(
        f'{row.where}: label {quoted(name)} is neither a whole number nor a class name; set '
        'label_map if it is a name'
    )
