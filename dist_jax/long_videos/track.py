"""What a classifier says of a video from window to window, and which part of time that is about.

Windows may overlap, and what is said of a moment is what the window says whose middle is nearest:
each window has a *turn*, from halfway to the one before to halfway to the one after, never outside
of the window itself. Turns do not overlap; between windows that leave gaps there are gaps.
"""

from __future__ import annotations

import array
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_jax.tasks.api import Labels

Scores = tuple[np.ndarray, ...]  # (num_classes,) float32 probabilities of each head
Scored = tuple[float, float, Scores]  # start and end of a window in seconds, and what it says

MOST_SMOOTH = 999  # windows whose scores are averaged; they are in memory together
MOST_COLUMNS = 1024  # of `Columns`, an even number
_SLACK = 1e-6  # seconds by which turns that touch may be apart


class Best(NamedTuple):
    """The most probable class of a head: its number, and its probability."""

    index: int
    probability: float


class Segment(NamedTuple):
    """Turns that follow each other without a gap and in which the same classes are best.

    Attributes:
      start: seconds.
      end: seconds.
      best: of each head, with the mean probability over the windows; None below a threshold.
      num_windows: whose turns these are.
    """

    start: float
    end: float
    best: tuple[Best | None, ...]
    num_windows: int


def smoothed(windows: Iterable[Scored], width: int) -> Iterator[Scored]:
    """Moving averages: the scores of a window are the mean of those of `width` around it.

    Near the ends of the video those that are there are averaged, as many before as after.

    Args:
      windows: of one video, in order of time.
      width: windows, an odd number up to `MOST_SMOOTH`; 1 changes nothing.

    Raises:
      ValueError: another width.
    """
    check_smooth(width)
    half = width // 2
    held: deque[Scored] = deque()
    place = 0  # in `held`, of the next one that comes out

    def mean(around: int) -> Scored:
        start, end, _ = held[place]
        own = [held[k][2] for k in range(place - around, place + around + 1)]
        return start, end, tuple(np.mean(head, axis=0) for head in zip(*own))

    for window in windows:
        held.append(window)
        # Out comes one whose share after it is there, or whose share before it is shorter.
        while place < len(held) and len(held) - 1 - place >= min(place, half):
            yield mean(min(place, half))
            place += 1
        while place > half:
            held.popleft()
            place -= 1
    while place < len(held):
        yield mean(min(place, len(held) - 1 - place, half))
        place += 1


def check_smooth(width: int) -> None:
    """Raises ValueError for a number of windows that has none in the middle, or too many."""
    if not 1 <= width <= MOST_SMOOTH or width % 2 == 0:
        raise ValueError(
            f'smooth={width} must be an odd number of windows, 1 for none and at most {MOST_SMOOTH}'
        )


class Track:
    """The most probable classes of all windows of a video: 8 bytes a class, 16 a window.

    Attributes:
      labels: class names of each head.
      most: classes that are kept of a window, for each head.
    """

    def __init__(self, labels: Labels, most: int):
        self.labels = labels
        self.most = tuple(min(most, len(names)) for names in labels)
        self._times = array.array('d')
        self._classes = array.array('i')
        self._shares = array.array('f')

    def __len__(self) -> int:
        return len(self._times) // 2

    def add(self, window: Scored) -> None:
        """Takes the next window."""
        start, end, scores = window
        self._times.extend((start, end))
        for head, most in zip(scores, self.most):
            first = np.argsort(-head, kind='stable')[:most]
            self._classes.extend(first.tolist())
            self._shares.extend(head[first].tolist())

    @property
    def spans(self) -> np.ndarray:
        """Starts and ends in seconds, (n, 2) float64."""
        return np.array(self._times).reshape(-1, 2)

    @property
    def end(self) -> float:
        """Seconds; where the last window ends."""
        return self._times[-1] if self._times else 0.0

    def turns(self) -> np.ndarray:
        """Where each window is the one to be asked, see the module: (n, 2) float64 seconds."""
        spans = self.spans
        middles = spans.mean(1)
        borders = (middles[1:] + middles[:-1]) / 2
        turns = spans.copy()
        turns[1:, 0] = np.maximum(turns[1:, 0], borders)
        turns[:-1, 1] = np.minimum(turns[:-1, 1], borders)
        return turns

    def heads(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Of each head the numbers of its classes, best first, and their probabilities.

        Both (n, most), int32 and float32.
        """
        shape = (len(self), sum(self.most))
        ends = np.cumsum(self.most)[:-1]
        classes = np.split(np.array(self._classes, np.int32).reshape(shape), ends, axis=1)
        shares = np.split(np.array(self._shares, np.float32).reshape(shape), ends, axis=1)
        return tuple(zip(classes, shares))

    def segments(self, threshold: float = 0.0) -> Iterator[Segment]:
        """The video in parts that have the same best classes, in order of time.

        Args:
          threshold: a best class of a window that is less probable is none.
        """
        if not len(self):
            return
        turns = self.turns()
        classes = np.stack([own[:, 0] for own, _ in self.heads()], axis=1)
        shares = np.stack([own[:, 0] for _, own in self.heads()], axis=1).astype(np.float64)
        classes = np.where(shares >= threshold, classes, -1)
        breaks = (classes[1:] != classes[:-1]).any(1) | (turns[1:, 0] > turns[:-1, 1] + _SLACK)
        starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self)]
        for first, stop in itertools.pairwise(starts):
            means = shares[first:stop].mean(0).tolist()
            best = tuple(
                None if index < 0 else Best(index, mean)
                for index, mean in zip(classes[first].tolist(), means)
            )
            yield Segment(float(turns[first, 0]), float(turns[stop - 1, 1]), best, stop - first)


class Columns:
    """The highest probability of every class in parts of a video, at most `MOST_COLUMNS`.

    Attributes:
      of_each: windows of a column; the last one may have fewer.
    """

    def __init__(self, num_classes: Sequence[int]):
        """Makes room for heads of so many classes."""
        self._peaks = tuple(np.zeros((MOST_COLUMNS, size), np.float32) for size in num_classes)
        self._windows = 0
        self.of_each = 1

    def add(self, scores: Scores) -> None:
        """Takes the scores of the next window."""
        if self._windows == self.of_each * MOST_COLUMNS:
            for peaks in self._peaks:
                peaks[: MOST_COLUMNS // 2] = np.maximum(peaks[::2], peaks[1::2])
                peaks[MOST_COLUMNS // 2 :] = 0
            self.of_each *= 2
        column = self._windows // self.of_each
        for peaks, head in zip(self._peaks, scores):
            np.maximum(peaks[column], head, out=peaks[column])
        self._windows += 1

    @property
    def peaks(self) -> tuple[np.ndarray, ...]:
        """Of each head (columns, num_classes) float32."""
        columns = math.ceil(self._windows / self.of_each)
        return tuple(peaks[:columns] for peaks in self._peaks)
