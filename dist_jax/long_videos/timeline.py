"""A picture of what is said of a video over time: frames of it, and a strip for every class.

Lengths are inches.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import cv2
import numpy as np
from rich.cells import cell_len

from dist_jax.drawing import cut
from dist_jax.long_videos.track import Columns, Track
from dist_jax.times import clock
from input_pipeline.escape import terminal
from input_pipeline.windows import Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, MARGIN = 10.0, 0.16
SHARES = 0.62  # width to the right of the strips; to their left, names take what they need
LEAST_NAMES, MOST_NAMES = 1.0, 3.6
TITLE, FRAME, LINE, AXIS, FOOT = 0.36, 0.74, 0.27, 0.34, 0.24  # heights
SEAM = 0.05  # between frames, at least
GAP = 0.1  # between a name and its strip
STRIP = 0.7  # share of a line that a strip fills
LETTER = 0.064  # width of one of a name
MOST_ROWS = 10  # classes of a head
MOST_FRAMES = 10  # in the row of frames
PIXELS = 1600  # of a strip
SIDE = 96  # pixels of a frame
OF_WINDOW = 8  # frames that are kept of a window at most
NOTABLE = 0.1  # a class that is never best is shown if it gets there
TICKS = (*(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30), *(60 * m for m in (1, 2, 5, 10, 15, 30)))


class Thumbnails:
    """Small frames from all over a video, taken of its windows as they pass.

    Attributes:
      num_windows: of the video, once one was seen.
    """

    def __init__(self):
        self.num_windows = 0
        self._seen = 0
        self._every = 1
        self._kept: list[tuple[float, float, np.ndarray]] = []

    def see(self, window: Window) -> None:
        """Takes the next window, or leaves it out."""
        self.num_windows = window.num_windows
        if self._seen % self._every == 0:
            clip = window.clip
            places = np.linspace(0, len(clip) - 1, min(len(clip), OF_WINDOW)).round().astype(int)
            small = [
                cv2.resize(clip[k], (SIDE, SIDE), interpolation=cv2.INTER_AREA) for k in places
            ]
            self._kept.append((window.start, window.end, np.stack(small)))
            if len(self._kept) > 2 * MOST_FRAMES:
                del self._kept[1::2]
                self._every *= 2
        self._seen += 1

    def at(self, seconds: float) -> np.ndarray | None:
        """The frame nearest to a time, (SIDE, SIDE, 3) uint8 RGB; None if there is none at all."""
        if not self._kept:
            return None
        start, end, frames = min(self._kept, key=lambda own: abs((own[0] + own[1]) / 2 - seconds))
        place = (seconds - start) / max(end - start, 1e-9) * len(frames)
        return frames[min(max(int(place), 0), len(frames) - 1)]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What is drawn.

    Attributes:
      title: the first line.
      track: the best classes of all windows, at least one.
      columns: the highest probabilities of all classes.
      thumbnails: frames of the video.
      threshold: below it, a best class is none.
    """

    title: str
    track: Track
    columns: Columns
    thumbnails: Thumbnails
    threshold: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Line:
    """A class: its name, its share of the time as the best one, and its two strips (PIXELS,)."""

    name: str
    share: float
    strength: np.ndarray  # float, NaN where there is no window
    best: np.ndarray  # bool


def _lines(timeline: Timeline, head: int) -> tuple[list[_Line], int]:
    """The classes of a head that are shown, the most frequent first, and how many others were best.

    A pixel shows the column that its middle lies in.
    """
    track, columns = timeline.track, timeline.columns
    turns = track.turns()
    of_column = np.arange(len(track)) // columns.of_each
    firsts = np.flatnonzero(np.diff(of_column, prepend=-1))
    lasts = np.append(firsts[1:], len(track)) - 1
    middles = (np.arange(PIXELS) + 0.5) / PIXELS * track.end
    column = np.searchsorted(turns[firsts, 0], middles, side='right') - 1
    covered = (column >= 0) & (middles < turns[lasts[column], 1])
    if columns.of_each == 1:
        covered = covered | (len(track) == 1)
    classes, shares = track.heads()[head]
    best = np.where(shares[:, 0] >= timeline.threshold, classes[:, 0], -1)
    seconds = turns[:, 1] - turns[:, 0]
    peaks = columns.peaks[head]
    names = track.labels[head]
    said = best >= 0
    time = np.bincount(best[said], seconds[said], minlength=len(names))
    order = np.lexsort((np.arange(len(names)), -peaks.max(0), -time))
    shown = [k for k in order.tolist() if time[k] or peaks[:, k].max() >= NOTABLE][:MOST_ROWS]
    shown = shown or order[:1].tolist()
    marks = np.zeros((len(firsts), len(names)), bool)
    marks[of_column[said], best[said]] = True
    lines = [
        _Line(
            names[k],
            float(time[k] / seconds.sum()),
            np.where(covered, peaks[column, k], np.nan),
            covered & marks[column, k],
        )
        for k in shown
    ]
    return lines, int((time > 0).sum() - (time[shown] > 0).sum())


def draw(timeline: Timeline) -> Figure:
    """Draws a row of frames, and for each head strips of its classes over one axis of time."""
    from matplotlib.figure import Figure

    heads = [_lines(timeline, head) for head in range(len(timeline.track.labels))]
    tall = sum(len(lines) + (others > 0) for lines, others in heads) * LINE
    tall += (len(heads) - 1) * LINE / 2
    height = 2 * MARGIN + TITLE + FRAME + LINE + tall + AXIS + FOOT
    figure = Figure(figsize=(WIDTH, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    longest = max(cell_len(terminal(line.name)) for lines, _ in heads for line in lines)
    names = min(max(LETTER * longest + GAP, LEAST_NAMES), MOST_NAMES)
    left, room = MARGIN + names, WIDTH - 2 * MARGIN - names - SHARES
    y = MARGIN
    axis.text(
        MARGIN, y + TITLE / 2 - 0.05, timeline.title, fontsize=10.5, weight='bold', va='center'
    )
    y += TITLE
    _draw_frames(axis, timeline, left, room, y)
    y += FRAME
    _draw_text(axis, WIDTH - MARGIN, y + LINE / 2, 'is best', ha='right', alpha=0.75)
    y += LINE
    top = y
    for lines, others in heads:
        for line in lines:
            _draw_line(axis, line, left, room, y)
            y += LINE
        if others:
            text = f'and {others} more classes, each best for less of the time'
            _draw_text(axis, left, y + LINE / 2, text, alpha=0.75)
            y += LINE
        y += LINE / 2
    y -= LINE / 2
    _draw_axis(axis, timeline.track.end, left, room, top, y)
    _draw_legend(axis, timeline, left, room, y + AXIS + FOOT / 2)
    axis.set(xlim=(0, WIDTH), ylim=(height, 0), aspect='auto')  # after pictures, which set them
    return figure


def _draw_text(axis: Axes, x: float, y: float, text: str, **style: object) -> None:
    axis.text(x, y, text, **{'fontsize': 8, 'va': 'center', **style})


def _draw_frames(axis: Axes, timeline: Timeline, left: float, room: float, y: float) -> None:
    """Frames in the middles of equal parts of the time."""
    count = min(MOST_FRAMES, int(room / (FRAME + SEAM)))
    for k in range(count):
        place = (k + 0.5) / count
        picture = timeline.thumbnails.at(place * timeline.track.end)
        if picture is not None:
            x = left + place * room - FRAME / 2
            axis.imshow(picture, extent=(x, x + FRAME, y + FRAME, y))


def _draw_line(axis: Axes, line: _Line, left: float, room: float, y: float) -> None:
    """A name, a strip as dark as the class is probable, a mark under it, a share."""
    from matplotlib import colors, rcParams

    paper, colour = (
        np.array(colors.to_rgb(value)) for value in (rcParams['figure.facecolor'], 'C0')
    )
    there = ~np.isnan(line.strength)
    strength = np.where(there, 0.06 + 0.94 * np.nan_to_num(line.strength), 0.0)[:, None]
    strip = np.repeat((paper + strength * (colour - paper))[None], 2, axis=0)
    middle = y + LINE / 2
    half = STRIP * LINE / 2
    place = {'extent': (left, left + room, middle + half, middle - half), 'aspect': 'auto'}
    axis.imshow(strip, interpolation='nearest', **place)
    mark = np.zeros((1, len(line.best), 4))
    mark[..., :3] = colors.to_rgb('C1')
    mark[..., 3] = line.best
    place['extent'] = (left, left + room, middle + half, middle + 0.6 * half)
    axis.imshow(mark, interpolation='nearest', **place)
    name = cut(line.name, int((left - MARGIN - GAP) / LETTER + 1e-6))
    _draw_text(axis, left - GAP, middle, name, ha='right')
    share = f'{100 * line.share:.0f} %' if line.share >= 0.005 or not line.share else '< 1 %'
    _draw_text(axis, WIDTH - MARGIN, middle, share, ha='right')


def _draw_axis(axis: Axes, end: float, left: float, room: float, top: float, bottom: float) -> None:
    """Times below the strips, and a thin line at each through all of them."""
    from matplotlib import rcParams

    for at in ticks(end):
        x = left + at / end * room if end else left
        axis.plot((x, x), (top, bottom + 0.06), color=rcParams['grid.color'], lw=0.6, zorder=-1)
        _draw_text(axis, x, bottom + 0.16, tick(at), ha='center', alpha=0.75)


def ticks(end: float) -> np.ndarray:
    """Times at which there is a tick, float64, five to ten of them from 0 to `end` seconds."""
    hours = (3600 * k for k in (1, 2, 5, 10))
    step = next((s for s in (*TICKS, *hours) if end / s <= 10), 3600 * math.ceil(end / 36000))
    return np.arange(math.floor(end / step + 1e-9) + 1) * step


def tick(seconds: float) -> str:
    """A time as 2:03, or 0:02.5 where tenths are told apart."""
    text = clock(seconds)
    return text.removesuffix('.0')


def _draw_legend(axis: Axes, timeline: Timeline, left: float, room: float, y: float) -> None:
    """What colours and marks mean."""
    from matplotlib import colors, rcParams

    paper, colour = (
        np.array(colors.to_rgb(value)) for value in (rcParams['figure.facecolor'], 'C0')
    )
    scale = 0.06 + 0.94 * np.linspace(0, 1, 64)[None, :, None]
    axis.imshow(
        paper + scale * (colour - paper),
        extent=(left + 0.08, left + 0.88, y + 0.05, y - 0.05),
        aspect='auto',
    )
    _draw_text(axis, left, y, '0', fontsize=7.5, alpha=0.75)
    of_each = timeline.columns.of_each
    text = '1  probability'
    text += f' (the highest of {of_each} windows in a row)' if of_each > 1 else ''
    _draw_text(axis, left + 0.93, y, text, fontsize=7.5, alpha=0.75)
    text = 'the best class' + f', if ≥ {timeline.threshold:g}' * (timeline.threshold > 0)
    _draw_text(axis, left + room, y, text, fontsize=7.5, alpha=0.75, ha='right')
    x = left + room - 0.056 * len(text) - 0.33
    axis.plot((x, x + 0.25), (y, y), color='C1', lw=3, solid_capstyle='butt')
