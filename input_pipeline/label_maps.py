"""Class names and ids, in the formats in which data sets give them."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from input_pipeline.text_files import integer, quoted, read_csv, read_json, read_lines

# What systems and programs put beside the files of others.
_NOT_DATA = {
    '__MACOSX',
    '@eaDir',
    '#recycle',
    '$RECYCLE.BIN',
    'lost+found',
    'System Volume Information',
}
_LONGEST_NAME = 1000  # characters of a class name


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set: .git, __MACOSX, @eaDir."""
    return name.startswith('.') or name in _NOT_DATA


def class_folders(path: Path) -> list[str]:
    """The class names of a folder of class folders, sorted."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))


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
            if len(name) > _LONGEST_NAME:
                raise ValueError(
                    f'{where}: a class name of {len(name)} characters, {quoted(name)}; is it a '
                    'list of class names?'
                )
        for what, values in (('class name', names), ('class id', ids)):
            twice = [value for value, number in Counter(values).items() if number > 1]
            if twice:
                raise ValueError(f'{where}: {what} {quoted(twice[0])} appears twice')
        self.names = tuple(names)
        self.where = where
        self._by_id = {number: k for k, number in enumerate(ids)}
        self._by_name = {name: k for k, name in enumerate(names)}

    def find(self, label: str, where: str) -> int:
        """Class index of a name or an id in a list; raises ValueError beginning with `where`."""
        if label in self._by_name:
            return self._by_name[label]
        number = integer(label)
        if number is not None:
            if number not in self._by_id:
                raise ValueError(
                    f'{where}: label {number} is out of range, {self.where} has '
                    f'{min(self._by_id)} to {max(self._by_id)}'
                )
            return self._by_id[number]
        near = label if len(label) <= _LONGEST_NAME else ''
        close = difflib.get_close_matches(near, self.names, 1, 0.6)
        hint = f'; did you mean {close[0]!r}?' if close else ''
        raise ValueError(f'{where}: label {quoted(label)} is not a class of {self.where}{hint}')


def read_label_map(path: str | os.PathLike) -> ClassMap:
    """Reads class names and ids.

    Args:
      path: a text file with one name per line or "id name" lines (Charades: "c000 name"), a CSV
        file with columns id and name (or key), a JSON file (object name -> id or id -> name, or
        a list of names), or a folder whose subfolders are the classes.

    Returns:
      The classes, ordered by id.

    Raises:
      ValueError: naming file and line, if something is missing, repeated or unreadable.
    """
    path = Path(path)
    if path.is_dir():
        pairs = list(enumerate(class_folders(path)))
    elif path.suffix.lower() == '.json':
        pairs = _label_pairs_json(path)
    elif path.suffix.lower() == '.csv':
        pairs = _label_pairs_csv(path)
    else:
        lines = [text for _, text in read_lines(path)]
        heads = [_line_id(line.split(maxsplit=1)[0]) for line in lines]
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


def _line_id(text: str) -> int | None:
    return int(text[1:]) if re.fullmatch('c[0-9]{3}', text) else integer(text)


def _label_pairs_json(path: Path) -> list[tuple[int, str]]:
    content = read_json(path)
    if isinstance(content, list):
        for place, name in enumerate(content):
            if not isinstance(name, str):
                raise ValueError(f'{path}[{place}]: expected a class name, found {quoted(name)}')
        return list(enumerate(content))
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object name -> id or a list of names')
    pairs = [(_class_id(value), key) for key, value in content.items()]
    if any(number is None for number, _ in pairs):
        pairs = [(integer(key), value) for key, value in content.items()]
    if not all(number is not None and isinstance(name, str) for number, name in pairs):
        raise ValueError(
            f'{path}: neither its keys nor its values are all integers, with names opposite'
        )
    return pairs


def _class_id(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return integer(value) if isinstance(value, str) else None


def _label_pairs_csv(path: Path) -> list[tuple[int, str]]:
    rows = read_csv(path)
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    id_column, name_column = 0, 1
    if 'id' in header:
        names = [k for k, cell in enumerate(header) if cell in ('name', 'key', 'label', 'class')]
        if not names:
            raise ValueError(f'{path}:1: column id without a column name, found {quoted(header)}')
        id_column, name_column = header.index('id'), names[0]
        rows = rows[1:]
    elif all(integer(row[0]) is None for _, row in rows):
        # A name a line, with commas of its own.
        return list(enumerate(line for _, line in read_lines(path)))
    pairs = []
    for where, row in rows:
        wide = len(row) > max(id_column, name_column)
        number = integer(row[id_column]) if wide else None
        if number is None:
            raise ValueError(f'{where}: expected "id,name", found {quoted(",".join(row))}')
        pairs.append((number, row[name_column].strip()))
    return pairs
