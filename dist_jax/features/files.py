"""The files of `dist_jax features`: npy a video, Parquet, or ArrayRecord.

    OUT/manifest.json    what the arrays are and what made them
    OUT/videos.jsonl     a line for each video, in order: its windows, or why there are none
    OUT/NAME/VIDEO.npy   (windows, ...) of each output NAME, and of spans
    OUT/part-HOST-NUMBER.parquet, .array_record     in their place
    OUT/.hosts/          journals of the hosts, while they are at work

Files appear whole, and before the journal says that they are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dist_jax.embedding.journal import Journal
from dist_jax.embedding.video import Video
from dist_jax.json_file import write_json
from dist_jax.whole_file import appearing

MANIFEST, VIDEOS, HOSTS = 'manifest.json', 'videos.jsonl', '.hosts'
SPANS = 'spans'
PART_BYTES = 2**26  # of arrays, after which a part ends
MOST_MANIFEST = 2**26  # bytes that are read

Arrays = Mapping[str, np.ndarray]


class FeatureStore(Protocol):
    """An `embed_videos.Store` that ends."""

    videos: Mapping[str, Video]
    next_row: int

    def add(self, videos: Sequence[tuple[Video, int]]) -> None: ...

    def close(self) -> None:
        """Writes what waits."""


class _Shapes:
    """Which outputs there are, and the shape of one window of each: known with the first."""

    def __init__(self, path: Path):
        self._path, self._known = path, path.exists()

    def note(self, video: Video) -> None:
        if not self._known and video.num_windows:
            found = {name: array.shape[1:] for name, array in video.read().items()}
            write_json(self._path, found)
            self._known = True


class NpyFiles:
    """A file for each output of each video."""

    def __init__(self, folder: Path, journal: Journal, host: int):
        self._folder, self._journal = folder, journal
        self._shapes = _Shapes(shapes_file(folder, host))

    @property
    def videos(self) -> Mapping[str, Video]:
        return self._journal.videos

    @property
    def next_row(self) -> int:
        return self._journal.next_row

    def add(self, videos: Sequence[tuple[Video, int]]) -> None:
        for video, next_row in videos:
            self._shapes.note(video)
            for name, array in video.read().items():
                path = self._folder / name / f'{video.path}.npy'
                path.parent.mkdir(parents=True, exist_ok=True)
                with appearing(path) as partial, open(partial, 'wb') as file:
                    np.save(file, array, allow_pickle=False)
            self._journal.add([(_without_arrays(video), next_row)])

    def close(self) -> None:
        """Nothing waits."""


class Parts:
    """Files of several videos: of one host, in order."""

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        host: int,
        suffix: str,
        write: Callable[[Path, Sequence[tuple[Video, Arrays]]], None],
    ):
        """Takes the parts.

        Args:
          folder: where they go.
          journal: of this host.
          host: its number.
          suffix: of the files.
          write: (path, videos with windows and their arrays) writes one.
        """
        self._folder, self._journal = folder, journal
        self._name = f'part-{host:05d}-{{:05d}}.{suffix}'
        self._write = write
        self._shapes = _Shapes(shapes_file(folder, host))
        self._number = len({video.file for video in journal.videos.values() if video.file})
        self._waiting: list[tuple[Video, int]] = []
        self._bytes = 0

    @property
    def videos(self) -> Mapping[str, Video]:
        return self._journal.videos

    @property
    def next_row(self) -> int:
        return self._journal.next_row

    def add(self, videos: Sequence[tuple[Video, int]]) -> None:
        for video, next_row in videos:
            self._shapes.note(video)
            self._waiting.append((video, next_row))
            self._bytes += sum(array.nbytes for array in video.read().values())
            if self._bytes >= PART_BYTES:
                self.close()

    def close(self) -> None:
        """Writes the part that waits."""
        if not self._waiting:
            return
        rows = [(video, video.read()) for video, _ in self._waiting if video.num_windows]
        name = self._name.format(self._number)
        if rows:
            self._write(self._folder / name, rows)
            self._number += 1
        self._journal.add(
            (dataclasses.replace(_without_arrays(video), file=name if video.num_windows else ''), n)
            for video, n in self._waiting
        )
        self._waiting, self._bytes = [], 0


def journal_file(folder: Path, host: int) -> Path:
    return folder / HOSTS / f'{host:05d}'


def shapes_file(folder: Path, host: int) -> Path:
    return folder / HOSTS / f'{host:05d}.json'


def _without_arrays(video: Video) -> Video:
    return dataclasses.replace(video, read=dict)


def write_parquet(path: Path, videos: Sequence[tuple[Video, Arrays]]) -> None:
    """A row for each window: video, window, start, end and the outputs, flattened.

    Raises:
      ValueError: pyarrow is not installed.
    """
    pyarrow, parquet = import_parquet()
    counts = [video.num_windows for video, _ in videos]
    names = [text(video.path) for video, _ in videos]
    spans = np.concatenate([arrays[SPANS] for _, arrays in videos])
    columns: dict[str, Any] = {
        'video': pyarrow.array([n for n, count in zip(names, counts) for _ in range(count)]),
        'window': pyarrow.array(np.concatenate([np.arange(n, dtype=np.int32) for n in counts])),
        'start': pyarrow.array(np.ascontiguousarray(spans[:, 0])),
        'end': pyarrow.array(np.ascontiguousarray(spans[:, 1])),
    }
    fields = [pyarrow.field(name, column.type) for name, column in columns.items()]
    for name in videos[0][1]:
        if name == SPANS:
            continue
        whole = np.concatenate([arrays[name] for _, arrays in videos])
        flat = pyarrow.array(whole.reshape(-1))
        size = int(np.prod(whole.shape[1:]))
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(flat, size)
        shape = json.dumps(whole.shape[1:])
        fields.append(pyarrow.field(name, columns[name].type, metadata={'shape': shape}))
    table = pyarrow.table(list(columns.values()), schema=pyarrow.schema(fields))
    with appearing(path) as partial:
        parquet.write_table(table, partial, compression='zstd')


def import_parquet() -> tuple[Any, Any]:
    """pyarrow and its Parquet, which is an extra.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("--format=parquet needs pip install 'dist_jax[parquet]'") from None
    return pyarrow, pyarrow.parquet


def write_array_record(path: Path, videos: Sequence[tuple[Video, Arrays]]) -> None:
    """A record for each video, a `tf.train.Example`.

    `video` is its name, `start_us` and `end_us` times in microseconds, and each output a flat list
    of float32 with `OUTPUT/shape`, windows first.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    with (
        appearing(path) as partial,
        contextlib.closing(ArrayRecordWriter(str(partial), 'group_size:1')) as writer,
    ):
        for video, arrays in videos:
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature['video'].bytes_list.value.append(os.fsencode(video.path))
            times = np.round(arrays[SPANS] * 1e6).astype(np.int64)
            feature['start_us'].int64_list.value.extend(times[:, 0].tolist())
            feature['end_us'].int64_list.value.extend(times[:, 1].tolist())
            for name, array in arrays.items():
                if name != SPANS:
                    feature[name].float_list.value.extend(array.astype(np.float32).reshape(-1))
                    feature[f'{name}/shape'].int64_list.value.extend(array.shape)
            # A message writes its map in an order that differs from process to process.
            writer.write(example.SerializeToString(deterministic=True))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON values, one a line; ASCII, also of names that are not UTF-8."""

    with appearing(path) as partial, open(partial, 'wb') as file:
        for row in rows:
            file.write((json.dumps(row, allow_nan=False) + '\n').encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of features that are complete; None where there is none.

    Raises:
      ValueError: it is none of ours, or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MOST_MANIFEST:
            raise ValueError
        found = json.loads(path.read_bytes())
        if found['format'] != 'dist_jax features' or not isinstance(found['settings'], dict):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f'{path} is no manifest of `dist_jax features`, or a damaged one; name another --out'
        ) from None
    return found


def text(name: str) -> str:
    """A name as UTF-8, with marks for bytes that are none."""
    return os.fsencode(name).decode('utf-8', 'replace')
