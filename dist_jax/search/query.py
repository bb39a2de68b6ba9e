"""`dist_jax search`: the windows of an index that a sentence, or another video, is nearest to.

Every vector is compared: brute force on the devices, a part of the index after the other, so that
memory does not grow with it. docs/guides/search.md says to what size that is enough.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.table import Table

from dist_jax import contact_sheet, drawing
from dist_jax.embedding.embedder import Row
from dist_jax.json_file import write_json
from dist_jax.models.layers import exact_float32
from dist_jax.search.index_file import Index, IndexFileError
from dist_jax.search.index_model import IndexModel, Score
from dist_jax.times import clock
from input_pipeline.decode import DecodeError
from input_pipeline.escape import Console, styled
from input_pipeline.pipeline import open_video, reading
from input_pipeline.transforms import Resize
from input_pipeline.video_list import Record
from input_pipeline.windows import WindowReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

# Of vectors that are compared at once: what fits the caches of a CPU.
CHUNK_BYTES = 8 * 2**20
BATCH_SIZE = 4  # windows of another video that are embedded at once
FRAMES = contact_sheet.COLUMNS  # of a window in the picture
MOST_SHOWN = 20  # hits in the picture
SIDE = 160  # pixels of the shorter side of these


@dataclasses.dataclass(frozen=True)
class Hit:
    """A window that was found.

    Attributes:
      path: of the video, from the folder on.
      file: of the video, where it is looked for.
      start: seconds.
      end: seconds.
      score: the higher, the nearer.
      problem: '', or why the file is not the video that was indexed.
    """

    path: str
    file: str
    start: float
    end: float
    score: float
    problem: str = ''


@dataclasses.dataclass(frozen=True)
class Request:
    """What to search for, and what to write.

    Attributes:
      sentence: what is looked for; '' for `video`.
      video: a file like which others are looked for; '' for `sentence`.
      top: hits.
      all_windows: several of one video, too; otherwise the best of each.
      folder: of the videos, if they have moved; '' for the one in the index.
      picture: PNG of the hits.
      dark: on dark paper.
      json: file of the hits; '' for none.
    """

    sentence: str = ''
    video: str = ''
    top: int = 5
    all_windows: bool = False
    folder: str = ''
    picture: str = ''
    dark: bool = False
    json: str = ''


def run(index: Index, model: IndexModel, request: Request) -> int:
    """The command `search`: prints a table, writes a picture and JSON.

    Returns:
      The exit code, 0.

    Raises:
      ValueError: the other video cannot be read, or the index is of other vectors.
    """
    if jax.process_count() > 1:
        raise ValueError('search runs in one process; start it on a single host')
    # Folders that cannot be made are found before the work.
    for path in filter(None, (request.picture, request.json)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if request.video:
        score = model.score_of_rows(rows_of_video(index, model, request.video))
    else:
        score = model.score_of_sentence(request.sentence)
    loaded = time.monotonic()
    found = scores(index, score)
    hits = best(index, found, request.top, request.all_windows, request.folder)
    compared = time.monotonic()
    if request.json:
        write_json(
            Path(request.json),
            {
                'sentence': request.sentence,
                'video': request.video,
                'index': index.path,
                'hits': [dataclasses.asdict(hit) for hit in hits],
            },
        )
    query = request.sentence or request.video
    write_picture(request.picture, query, hits[:MOST_SHOWN], request.dark)
    _print(index, request, hits, (loaded - start, compared - loaded))
    return 0


def rows_of_video(index: Index, model: IndexModel, path: str) -> dict[str, np.ndarray]:
    """A video as an index would hold it.

    Raises:
      ValueError: it cannot be read, or the windows of the index are none.
    """
    windows = index.settings['windows']
    window, stride = (windows.get(name) for name in ('window', 'stride'))
    if not all(isinstance(each, (int, float)) for each in (window, stride)):
        raise IndexFileError(f'{index.path}: windows that are none: {windows}'[:200])
    reader = WindowReader(model.views, window, stride)
    items = list(model.embedder(BATCH_SIZE).embed([Record(path, (), path)], reader))
    _, done = items.pop()
    if done.error:
        raise ValueError(f'--video: {path} cannot be read: {done.error}')
    rows = [item for _, item in items if isinstance(item, Row)]
    return {name: np.stack([row.values[name] for row in rows]) for name in rows[0].values}


def scores(index: Index, score: Score) -> np.ndarray:
    """The score of every window, (W,) float32.

    Raises:
      IndexFileError: the vectors are of another size than the model's, or no numbers.
    """
    columns = {'vectors': index.vectors}
    if index.weights is not None:
        columns['weights'] = index.weights
    num_windows = len(index.vectors)
    found = np.empty(num_windows, np.float32)
    if not num_windows:
        return found
    rows = min(num_windows, max(1, CHUNK_BYTES // index.vectors[:1].nbytes))
    compiled = jax.jit(exact_float32(score))
    # The last part begins as far back as needed to be as long as the others.
    starts = [min(start, num_windows - rows) for start in range(0, num_windows, rows)]
    try:
        before = None
        for start in starts:
            part = {name: column[start : start + rows] for name, column in columns.items()}
            now = compiled(part)
            if before is not None:  # one is compared while the next is read
                found[before[0] : before[0] + rows] = before[1]
            before = start, now
    except TypeError as error:  # of shapes that do not fit
        raise IndexFileError(
            f'{index.path}: vectors of shape {index.vectors.shape[1:]} are none of its model'
        ) from error
    if before is not None:
        found[before[0] : before[0] + rows] = before[1]
    if not np.isfinite(found).all():
        raise IndexFileError(f'{index.path} is damaged: its vectors are not finite numbers')
    return found


def best(
    index: Index, found: np.ndarray, top: int, all_windows: bool = False, folder: str = ''
) -> list[Hit]:
    """The windows of the highest scores, best first; of equal ones, the first in the index.

    Args:
      index: of the windows.
      found: their scores, (W,).
      top: how many.
      all_windows: several of one video, too.
      folder: of the videos, if they have moved.
    """
    if all_windows:
        numbers = np.argsort(-found, kind='stable')[:top]
    else:
        videos = np.flatnonzero(np.diff(index.first))  # those with windows
        starts = index.first[videos]
        highest = np.maximum.reduceat(found, starts) if len(found) else found
        chosen = videos[np.argsort(-highest, kind='stable')[:top]]
        spans = [slice(*index.first[video : video + 2].tolist()) for video in chosen]
        numbers = [span.start + int(found[span].argmax()) for span in spans]
    folder = folder or index.places['folder']
    return [_hit(index, int(number), float(found[number]), folder) for number in numbers]


def _hit(index: Index, number: int, score: float, folder: str) -> Hit:
    video = int(index.video[number])
    name = index.name(video)
    file = os.path.join(folder, *name.split('/'))
    problem = ''
    try:
        now = os.stat(file)
        if (now.st_size, now.st_mtime_ns) != (index.sizes[video], index.times_ns[video]):
            problem = 'has changed since it was indexed'
    except OSError:
        problem = 'is not there any more'
    start, end = index.spans[number].tolist()
    return Hit(name, file, start, end, score, problem)


def _print(
    index: Index, request: Request, hits: Sequence[Hit], seconds: tuple[float, float]
) -> None:
    console = Console()
    table = Table('', 'score', 'video', 'from', 'to')
    table.columns[1].justify = table.columns[3].justify = table.columns[4].justify = 'right'
    table.columns[2].overflow = 'fold'
    for place, hit in enumerate(hits, 1):
        name = styled(hit.path, (f'  ({hit.problem})', 'yellow')) if hit.problem else hit.path
        row = (str(place), f'{hit.score:.3f}', name, clock(hit.start), clock(hit.end))
        table.add_row(*row)
    console.print(table)
    bad = len(index.unreadable())
    told = f'{len(index.vectors)} windows of {index.num_videos - bad} videos'
    told += f' ({bad} others could not be read)' if bad else ''
    console.print(f'{told}; model {seconds[0]:.1f} s, comparison {seconds[1]:.1f} s')
    shown = f' (the first {MOST_SHOWN})' if len(hits) > MOST_SHOWN else ''
    console.print(f'picture: {request.picture}{shown}', soft_wrap=True)


# The picture.


def read_strip(hit: Hit) -> tuple[list[np.ndarray], list[str]]:
    """Frames evenly over a window, and when each of them is shown.

    Raises:
      DecodeError: the video cannot be read.
    """
    record = Record(hit.file, (), hit.path)
    resize = Resize((SIDE,), 'smooth_bilinear')
    with reading(hit.file), open_video(record) as video:
        times = np.linspace(hit.start, hit.end, FRAMES, endpoint=False)
        numbers = np.unique(np.searchsorted(video.times, times + 1e-6, side='right') - 1)
        frames: dict[int, np.ndarray] = {}
        for number, picture in video.pictures(numbers.clip(0)):
            frames[number] = resize.resize(picture[None])[0]
        return [frames[n] for n in sorted(frames)], [clock(video.times[n]) for n in sorted(frames)]


def write_picture(path: str, query: str, hits: Sequence[Hit], dark: bool = False) -> None:
    """Writes a PNG: what was searched for, and a strip of frames for each hit.

    Args:
      path: file to write.
      query: the sentence, or the path of a video.
      hits: best first. Of a video that cannot be read any more there is a grey tile.
      dark: on dark paper.
    """
    strips: list[tuple[list[np.ndarray], list[str]] | str] = []
    for hit in hits:
        try:
            strips.append(read_strip(hit))
        except DecodeError as error:
            strips.append(f'{error.kind}: {error.reason}')
    picture = drawing.png(
        lambda: _sheet(query, hits, strips), drawing.DARK if dark else drawing.LIGHT
    )
    Path(path).write_bytes(picture)


def _sheet(
    query: str,
    hits: Sequence[Hit],
    strips: Sequence[tuple[list[np.ndarray], list[str]] | str],
) -> Figure:
    from matplotlib.figure import Figure

    heights = [0.4]  # inches
    for strip in strips:
        shape = (0.4, 1.0) if isinstance(strip, str) else strip[0][0].shape
        heights.append(contact_sheet.height(1, shape=shape))
    figure = Figure(figsize=(contact_sheet.WIDTH, sum(heights)), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0.0, hspace=0.0)
    head, *parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    title = drawing.cut(query, 100) if hits else f'{drawing.cut(query, 90)}: nothing'
    head.text(0.01, 0.5, title, fontsize=12, weight='bold', va='center')
    for place, (hit, strip, part) in enumerate(zip(hits, strips, parts), 1):
        times = f'{clock(hit.start)} to {clock(hit.end)}'
        title = f'{place}.  {drawing.cut(hit.path, 80)}   {times}   score {hit.score:.3f}'
        title += f'   ({hit.problem})' if hit.problem else ''
        if isinstance(strip, str):
            _draw_missing(part, title, strip)
        else:
            contact_sheet.draw(part, title, *strip)
    return figure


def _draw_missing(part: SubFigure, title: str, reason: str) -> None:
    part.suptitle(title, fontsize=9.5, x=0.01, ha='left')
    axis = part.subplots()
    axis.set_axis_off()
    axis.add_patch(_tile(axis))
    place = {'transform': axis.transAxes, 'ha': 'center', 'va': 'center'}
    axis.text(0.5, 0.5, drawing.cut(reason, 120), fontsize=8, **place)


def _tile(axis: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), 1, 1, transform=axis.transAxes, color='#808080', alpha=0.35, lw=0)
