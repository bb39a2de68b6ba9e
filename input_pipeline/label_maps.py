"""Class names and ids, in the formats in which data sets give them."""

import csv
import difflib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from input_pipeline.text_files import integer, read_json, read_lines, read_text


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
        number = integer(label)
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
        lines = [text for _, text in read_lines(path)]
        heads = [integer(line.split(maxsplit=1)[0]) for line in lines]
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
    content = read_json(path)
    if isinstance(content, list):
        return list(enumerate(map(str, content)))
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object name -> id or a list of names')
    pairs = [(integer(str(value)), key) for key, value in content.items()]
    if any(number is None for number, _ in pairs):
        pairs = [(integer(key), str(value)) for key, value in content.items()]
    if any(number is None for number, _ in pairs):
        raise ValueError(f'{path}: neither its keys nor its values are all integers')
    return pairs


def _label_pairs_csv(path: Path) -> list[tuple[int, str]]:
    lines = read_text(path).splitlines()
    rows = list(csv.reader(lines))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    id_column, name_column = 0, 1
    if 'id' in header:
        names = [k for k, cell in enumerate(header) if cell in ('name', 'key', 'label', 'class')]
        if not names:
            raise ValueError(f'{path}:1: column id without a column name, found {header}')
        id_column, name_column = header.index('id'), names[0]
        rows[0] = []
    elif all(integer(row[0]) is None for row in rows if row):
        # A name a line, with commas of its own.
        return list(enumerate(line.strip() for line in lines if line.strip()))
    pairs = []
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        if len(row) <= max(id_column, name_column) or integer(row[id_column]) is None:
            raise ValueError(f'{path}:{number}: expected "id,name", found {",".join(row)!r}')
        pairs.append((int(row[id_column]), row[name_column].strip()))
    return pairs
