"""What is taken from a foreign checkpoint: limits that no real one reaches, and how to quote it.

Time and memory that a file costs are bounded by its size, whatever it says of itself: a few hundred
bytes can name themselves, each other twice at every level, or sizes beyond any disk.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAX_TENSORS = 100_000
MAX_NAME = 512  # characters of a tensor's name
MAX_AXES = 32
MAX_JSON_BYTES = 16 << 20

_quote = reprlib.Repr()
_quote.maxlevel, _quote.maxstring, _quote.maxother, _quote.maxlong = 2, 200, 200, 60


def shown(value: Any) -> str:
    """A value of a file for a message: one short line, without control characters."""
    return _quote.repr(value)


def check_tensors(tensors: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Refuses tensors that no network has, before anything is computed from them.

    Raises:
      ValueError: too many, names that cannot be printed, or more content than the file can give:
        views of one storage may overlap, but not without end.
    """
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f'{path}: {len(tensors)} tensors, more than {MAX_TENSORS}')
    for name in tensors:
        check_name(name, path)
    size = os.path.getsize(path)
    total = sum(array.nbytes for array in tensors.values())
    if total > 4 * size + (16 << 20):
        raise ValueError(
            f'{path}: a file of {size} bytes declares tensors of {total} bytes; refused'
        )


def check_name(name: str, path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a name of a tensor that is endless or cannot be printed."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(
            f'{path}: a tensor is named {shown(name)}; expected at most {MAX_NAME} printable '
            'characters'
        )


def read_json(path: Path) -> Any:
    """The content of a JSON file beside a checkpoint.

    Raises:
      ValueError: not JSON, nested too deeply, or larger than `MAX_JSON_BYTES`.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f'{path}: {size} bytes of JSON, more than {MAX_JSON_BYTES}')
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except RecursionError:
        raise ValueError(f'{path}: JSON that is nested too deeply') from None
    except ValueError as error:
        raise ValueError(f'{path}: not JSON ({error})') from None
