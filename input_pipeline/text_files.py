"""Text files from outside: what cannot be read is a ValueError that names file and line."""

import csv
import io
import json
import math
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from input_pipeline.regular_files import NotRegularError, describe, read_regular

MAX_BYTES = 2**29  # of a file; the lists of the largest sets have a fifth of it
# Python's own int and float also take '1_0', other scripts' digits, nan and inf.
_INTEGER = re.compile(r'-?[0-9]{1,18}')
_NUMBER = re.compile(r'-?[0-9]{1,18}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,3})?')
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')
_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 100


def integer(text: str) -> int | None:
    """The number that ASCII digits with or without a minus write; None for all else."""
    text = text.strip()
    return int(text) if _INTEGER.fullmatch(text) else None


def number(text: str) -> float | None:
    """The finite number of a decimal such as '12', '1.5' or '1e-05'; None for all else."""
    text = text.strip()
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def quoted(value: Any) -> str:
    """A value from a file for a message: escaped, and cut where it is long."""
    return _QUOTE.repr(value)


def split_lines(text: str) -> list[str]:
    """The lines of a text, which end at a newline, a carriage return or both.

    `str.splitlines` ends them at form feeds, U+0085 and U+2028 too, which names may have.
    """
    return re.split('\r\n|\r|\n', text)


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ('file:line', text) of the lines that are not blank."""
    for line_number, line in enumerate(split_lines(read_text(path)), 1):
        if line.strip():
            yield f'{path}:{line_number}', line.strip()


def read_text(path: Path) -> str:
    """The whole text of a UTF-8 file; names in it that are not stay the bytes that open files."""
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise ValueError(
                f'{path}: has {size} bytes, more than the {MAX_BYTES} that a list may have; is it '
                'a video?'
            )
        text = read_regular(path).decode('utf-8', 'surrogateescape').removeprefix('\ufeff')
    except FileNotFoundError as error:
        raise ValueError(f'{path}: no such list file') from error
    except NotRegularError as error:
        raise ValueError(f'{path}: {error}; expected a list file') from error
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({describe(error)})') from error
    if '\0' in text:  # UTF-16, or no text at all
        raise ValueError(f'{path}: is not UTF-8 text (zero at character {text.index(chr(0))})')
    return text


def read_csv(path: Path, delimiter: str = ',') -> list[tuple[str, list[str]]]:
    """The rows of a CSV file as ('file:line', fields); blank lines are left out.

    A quoted field may have newlines. What follows a quote that is not closed where it should be is
    an error: it would take the next rows for a part of a name.
    """
    lines = io.StringIO(read_text(path), newline='')
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        return [(f'{path}:{reader.line_num}', row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(
            f'{path}:{reader.line_num}: not CSV: {error}; is a quote not closed?'
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    text = read_text(path)
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}:{error.lineno}: not valid JSON: {error.msg}') from error
    except ValueError as error:
        raise ValueError(f'{path}: not valid JSON: {error}') from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ('file:line', content) of a JSON Lines file."""
    for where, line in read_lines(path):
        try:
            yield where, _loads(line)
        except ValueError as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f'{where}: not valid JSON: {message}') from error


def _loads(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse)
        # An escape may write half a surrogate pair, which is in no text. The halves that stand for
        # bytes that are not UTF-8 stay: `escape.json_text` writes names so.
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode('utf-8', 'surrogateescape')
    except RecursionError as error:
        raise ValueError('nested too deeply') from error
    except UnicodeEncodeError as error:
        raise ValueError(f'{quoted(error.object[error.start])} is no character') from error
    return value


def _refuse(name: str) -> None:
    raise ValueError(f'{name} is not a JSON value')
