"""What a running `dist_jax index` or `features` has embedded so far: a file that grows.

    a line of JSON that says of what, then for each video a line of JSON and the bytes of its arrays

Videos are added in groups, mostly of one. Killed at any moment, the file ends with a whole group or
with a part of one, which is cut off.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dist_jax import ending
from dist_jax.embedding.video import Video

FORMAT = 'dist_jax index journal 1'
MOST_LINE = 2**20  # bytes of a line of JSON
_ALIGNMENT = 8  # bytes; spaces at the end of a line
_FIELDS = ('path', 'size', 'time_ns', 'error', 'num_windows', 'file')


class InUseError(ending.AgainError):
    """Another process makes the same."""


class Journal:
    """Locked as long as it is open. Use it as a context manager.

    Attributes:
      settings: what the arrays are of; {} in a new one.
      videos: what is in it, by path.
      next_row: `embed.Done.next_row` of the last video.
    """

    def __init__(self, path: str, of: str):
        """Opens a journal, or makes one.

        Args:
          path: of the file.
          of: what is being made, for a message.

        Raises:
          InUseError: another process has it.
          OSError: it cannot be written.
        """
        self.path = path
        self._file = _locked(path, of)
        self.settings: dict[str, Any] = {}
        self.videos: dict[str, Video] = {}
        self.next_row = 0
        self._removed = False
        self._read()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *unused: Any) -> None:
        if not self.videos:
            self.remove()
        self._file.close()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Starts it anew."""
        self._file.seek(0)
        self._file.truncate()
        self.videos, self.next_row, self.settings = {}, 0, dict(settings)
        self._file.write(_line({'format': FORMAT, 'settings': self.settings}))
        self._file.flush()

    def add(self, videos: Iterable[tuple[Video, int]]) -> None:
        """Writes down a group of videos with their arrays, each with its `next_row`."""
        group = list(videos)
        known = []
        for number, (video, next_row) in enumerate(group, 1):
            arrays = video.read()
            data = b''.join(leaf.tobytes() for leaf in arrays.values())
            data += bytes(-len(data) % _ALIGNMENT)
            row = {name: getattr(video, name) for name in _FIELDS} | {
                'next_row': next_row,
                'follow': len(group) - number,
                'arrays': [[name, leaf.dtype.name, leaf.shape] for name, leaf in arrays.items()],
                'bytes': len(data),
                'crc32': zlib.crc32(data),
            }
            self._file.write(_line(row))
            known.append((row, self._file.tell()))
            self._file.write(data)
        self._file.flush()
        self._know(known)

    def remove(self) -> None:
        """Deletes the file, which nobody needs any more."""
        if not self._removed:
            os.unlink(self.path)
        self._removed = True

    def _read(self) -> None:
        """Takes what is whole and cuts off the rest."""
        whole = 0
        self._file.seek(0)
        try:
            head = json.loads(self._file.readline(MOST_LINE))
            if head['format'] == FORMAT:
                self.settings = dict(head['settings'])
                whole = self._file.tell()
            group = []
            while self.settings:
                row = json.loads(self._file.readline(MOST_LINE))
                group.append((row, self._file.tell()))
                # Of a damaged number of bytes no more is read than there is.
                data = self._file.read(min(row['bytes'], os.fstat(self._file.fileno()).st_size))
                if len(data) != row['bytes'] or zlib.crc32(data) != row['crc32']:
                    break
                if not row.get('follow'):
                    self._know(group)
                    group, whole = [], self._file.tell()
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self._file.seek(whole)
        self._file.truncate()

    def _know(self, group: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        for row, place in group:
            read = functools.partial(self._arrays, row['arrays'], place)
            fields = {name: row[name] for name in _FIELDS if name in row}
            self.videos[row['path']] = Video(**fields, read=read)
            self.next_row = row['next_row']

    def _arrays(
        self, arrays: Sequence[tuple[str, str, Sequence[int]]], place: int
    ) -> dict[str, np.ndarray]:
        found = {}
        for name, kind, shape in arrays:
            dtype = np.dtype(kind)
            flat = np.fromfile(self.path, dtype, math.prod(shape), offset=place)
            found[name] = flat.reshape(shape)
            place += flat.nbytes
        return found


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(',', ':')).encode()
    return text + b' ' * (-(len(text) + 1) % _ALIGNMENT) + b'\n'


def _locked(path: str, of: str) -> Any:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        file = os.fdopen(fd, 'r+b')
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have been done with it in the meantime, and have deleted it.
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return file
        except BlockingIOError:
            file.close()
            raise InUseError(
                f'{of} is being made by another process; wait for it, or name another --out'
            ) from None
        file.close()
