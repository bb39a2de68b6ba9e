"""Text files from outside: what cannot be read is a ValueError that names file and line."""

import json
from collections.abc import Iterator
from pathlib import Path


def integer(text: str) -> int | None:
    """The number, or None if it is none."""
    try:
        return int(text)
    except ValueError:
        return None


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ('file:line', text) of the lines that are not blank."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            yield f'{path}:{number}', line.strip()


def read_text(path: Path) -> str:
    """The whole text of a UTF-8 file."""
    try:
        return path.read_text(encoding='utf-8-sig')
    except FileNotFoundError as error:
        raise ValueError(f'{path}: no such list file') from error
    except IsADirectoryError as error:
        raise ValueError(f'{path}: is a folder, expected a list file') from error
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: is not UTF-8 text (byte {error.start})') from error


def read_json(path: Path):
    """The content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}:{error.lineno}: not valid JSON: {error.msg}') from error
