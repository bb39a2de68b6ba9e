"""`dist_jax index`: embeds a folder of videos into one file that `dist_jax search` reads.

What is in the file already, or in the journal of a run that was stopped, is not embedded again: a
video is known by its path, its size and the time of its last change. Videos that could not be read
are tried again whenever the command is started, but for those of a journal.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
from rich.table import Table

from dist_jax.embedding.journal import Journal
from dist_jax.embedding.runner import check_same, embed_videos, find_file
from dist_jax.search import index_file
from dist_jax.search.index_file import VECTORS, Index, Video
from dist_jax.search.index_model import IndexModel, preprocessing
from input_pipeline.escape import Console, terminal
from input_pipeline.windows import WindowReader

log = logging.getLogger('dist_jax')

JOURNAL = '.partial'  # after the name of the index
MOST_THREADS = 16  # videos that are read at the same time
MOST_LISTED = 50  # unreadable videos in the table


@dataclasses.dataclass(frozen=True)
class Request:
    """What to index.

    Attributes:
      folder: whose videos.
      names: of the videos, from the folder on.
      others: how many files have other suffixes, by suffix.
      out: the index.
      reader: makes the windows, of clips as the model sees them.
      batch_size: windows of a step.
    """

    folder: str
    names: Sequence[str]
    others: Mapping[str, int]
    out: str
    reader: WindowReader
    batch_size: int


def run(request: Request, model: IndexModel) -> int:
    """The command `index`.

    Returns:
      The exit code: 0, or 1 if no video could be read; then there is no index.

    Raises:
      ValueError: there is an index of another model, other settings or another folder.
      InUseError: another process makes it.
    """
    if jax.process_count() > 1:
        raise ValueError('index runs in one process; start it on a single host')
    reader = request.reader
    settings = {
        'model': model.identity,
        'preprocessing': preprocessing(reader.views),
        'windows': {'window': reader.window, 'stride': reader.stride if reader.window else 0},
    }
    places = {'folder': os.path.realpath(request.folder), 'model': model.place}
    old = index_file.read(request.out) if os.path.exists(request.out) else None
    if old is not None:
        check_same(request.out, old.settings, settings)
        _check_folder(old, places['folder'])
    os.makedirs(os.path.dirname(os.path.abspath(request.out)), exist_ok=True)
    with Journal(request.out + JOURNAL, request.out) as journal:
        if journal.settings:
            check_same(journal.path, journal.settings, settings)
        else:
            journal.begin(settings)
        _say_others(request)
        videos, embedded = _embed(request, model, old, journal)
        readable = any(video.num_windows for video in videos)
        if readable and not (old and old.places == places and _same(old.videos(), videos)):
            index_file.write(request.out, places, settings, videos)
        journal.remove()
    _print(request, videos, embedded)
    return 0 if readable else 1


def _embed(
    request: Request,
    model: IndexModel,
    old: Index | None,
    journal: Journal,
) -> tuple[list[Video], int]:
    """All videos of the folder in order, with their windows, and how many were embedded."""
    known = {video.path: video for video in old.videos() if not video.error} if old else {}
    known |= journal.videos
    items = [find_file(request.folder, name) for name in request.names]
    embedded = embed_videos(
        'index',
        items,
        known,
        journal,
        lambda: model.embedder(request.batch_size),
        request.reader,
        {'vectors': VECTORS}.get,
    )
    known |= journal.videos
    return [known[name] for name in request.names], embedded


def _same(old: Sequence[Video], new: Sequence[Video]) -> bool:
    """Whether an index of these videos would be that of those."""
    names = ('path', 'size', 'time_ns', 'error')
    rows = [[[getattr(video, name) for name in names] for video in each] for each in (old, new)]
    return rows[0] == rows[1]


def _check_folder(old: Index, folder: str) -> None:
    """Refuses to replace the videos of another folder; one that is gone was moved."""
    before = old.places['folder']
    if before != folder and os.path.isdir(before):
        raise ValueError(
            f'{old.path} is the index of {before}, not of {folder}; name another --out, or delete '
            'the file'
        )


def _say_others(request: Request) -> None:
    if request.others:
        most = Counter(request.others).most_common(10)
        kinds = ', '.join(f'{count} {suffix}' for suffix, count in most)
        log.info(
            '%s: left out %d files whose suffix is not that of a video: %s',
            *(request.folder, sum(request.others.values()), kinds),
        )


def _print(request: Request, videos: Sequence[Video], embedded: int) -> None:
    console = Console()
    bad = [video for video in videos if video.error]
    if bad:
        table = Table('video', 'cannot be read', title_justify='left')
        for video in bad[:MOST_LISTED]:
            table.add_row(*map(terminal, (video.path, video.error)))
        console.print(table)
        if len(bad) > MOST_LISTED:
            console.print(f'and {len(bad) - MOST_LISTED} more; the index holds all of them')
    windows = sum(video.num_windows for video in videos)
    if not windows:
        console.print(f'none of {len(videos)} videos could be read: there is no index')
        return
    told = f'{len(videos) - len(bad)} videos, {windows} windows'
    told += f'; {len(bad)} cannot be read and are listed in it' if bad else ''
    told += f'; {embedded} were new, changed or tried again' if embedded < len(videos) else ''
    size = os.path.getsize(request.out) / 2**20
    console.print(f'index: {request.out} ({size:.1f} MiB): {told}', soft_wrap=True)
    console.print(f"search it: dist_jax search {request.out} 'what to look for'", soft_wrap=True)
