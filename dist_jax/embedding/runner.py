"""Videos through an `Embedder` into a store, each once: what `index` and `features` do alike."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dist_jax.embedding.embedder import Done, Embedder, Row
from dist_jax.embedding.video import Video
from dist_jax.metrics import CAUSE
from dist_jax.progress import Bar, duration
from input_pipeline.escape import terminal
from input_pipeline.machine import num_cpus
from input_pipeline.video_list import Record
from input_pipeline.windows import ClipReader

MOST_THREADS = 16  # videos that are read at the same time


class Item(NamedTuple):
    """A video to embed: as it will be stored, without windows, and where it is read from."""

    video: Video
    record: Record


class Store(Protocol):
    """What keeps the videos of a run, and knows those of one that was stopped.

    Attributes:
      videos: what is in it, by path.
      next_row: see `embed.Done`; of the last video that is in it.
    """

    videos: Mapping[str, Video]
    next_row: int

    def add(self, videos: Sequence[tuple[Video, int]]) -> None:
        """Takes videos with their arrays, each with its `next_row`."""


def find_file(folder: str, name: str) -> Item:
    """A file of a folder; one that is gone has no size."""
    path = os.path.join(folder, name)
    try:
        found = os.stat(path)
        video = Video(name, found.st_size, found.st_mtime_ns)
    except OSError:
        video = Video(name, 0, 0)
    return Item(video, Record(path, (), path))


def is_same(one: Video | None, other: Video) -> bool:
    """Whether a file is the one that it was."""
    return one is not None and (one.size, one.time_ns) == (other.size, other.time_ns)


def embed_videos(
    title: str,
    items: Sequence[Item],
    known: Mapping[str, Video],
    store: Store,
    make_embedder: Callable[[], Embedder],
    reader: ClipReader,
    dtype_of: Callable[[str], np.dtype | None],
) -> int:
    """Embeds what is not known, in order, into the store.

    Args:
      title: of the progress bar.
      items: the videos.
      known: those that need not be embedded again, by path, if they are what they were.
      store: takes the others.
      make_embedder: loads the model; it is called if there is anything to do.
      reader: makes the windows.
      dtype_of: name -> the dtype that it is stored in; None for that of the computation.

    Returns:
      How many were embedded, or tried.

    Raises:
      FloatingPointError: what the model gives of a video are no numbers.
    """
    left = [item for item in items if not is_same(known.get(item.video.path), item.video)]
    if not left:
        return 0
    done = len(items) - len(left)
    with Bar(title, len(items), done) as bar:
        bar.line(f'{len(left)} of {len(items)} videos to embed, loading the model')
        embedder = make_embedder()
        threads = min(num_cpus(), MOST_THREADS)
        rows: list[Row] = []
        found = embedder.embed(
            (item.record for item in left),
            reader,
            first_row=store.next_row,
            num_threads=threads,
        )
        with contextlib.closing(found):
            for video, item in _numbered(left, found):
                if isinstance(item, Row):
                    rows.append(item)
                    if len(rows) % 64 == 0:
                        bar.update(done, f'{video.path}, {duration(item.end)}')
                    continue
                store.add([(_with_rows(video, rows, item, dtype_of), item.next_row)])
                rows = []
                done += 1
                bar.update(done, '')
    return len(left)


def _numbered(
    items: Sequence[Item], found: Iterator[tuple[int, Row | Done]]
) -> Iterator[tuple[Video, Row | Done]]:
    for number, item in found:
        yield items[number].video, item


def _with_rows(
    video: Video, rows: Sequence[Row], done: Done, dtype_of: Callable[[str], np.dtype | None]
) -> Video:
    """A video as it is stored.

    Raises:
      FloatingPointError: its vectors are no numbers.
    """
    if done.error:
        return dataclasses.replace(video, error=done.error)
    arrays: dict[str, np.ndarray] = {
        'spans': np.array([(row.start, row.end) for row in rows], np.float64)
    }
    for name in rows[0].values:
        leaf = np.stack([row.values[name] for row in rows])
        with np.errstate(over='ignore'):  # to infinity, which is found
            arrays[name] = leaf.astype(dtype_of(name) or leaf.dtype)
        if not np.isfinite(arrays[name]).all():
            raise FloatingPointError(f'{video.path}: {name} are not finite numbers. {CAUSE}')
    return dataclasses.replace(video, num_windows=len(rows), read=lambda: arrays)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines that name what differs between settings and the groups of `new`."""
    return [
        f'{name}: {terminal(old[part].get(name))[:80]} there, {terminal(value)[:80]} now'
        for part in new
        for name, value in sorted({**dict.fromkeys(old[part]), **new[part]}.items())
        if old[part].get(name) != value
    ]


def check_same(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError, naming what differs, if what is there was made with something else."""
    unlike = differences(old, new)
    if unlike:
        raise ValueError(
            f'{path} was made with another model or other settings, and all of it has the same:\n  '
            + '\n  '.join(unlike)
            + '\nName another --out, or delete what is there.'
        )
