"""Windows over videos: clips from second to second, in order, every frame decoded once.

Memory does not grow with the length of a video: a clip comes out as soon as its last frame is
there, and frames are kept, already cut, as long as a later window needs them.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from input_pipeline.decode import DecodeError
from input_pipeline.pipeline import EvalReader
from input_pipeline.sampling import PROTOCOLS
from input_pipeline.video_list import Record

MAX_WINDOWS = 2**17  # of a video: 36 hours in steps of a second
MAX_OVERLAP = 64  # windows over one moment; their frames are in memory together
_SLACK = 1e-6  # seconds by which times that were computed in two ways may differ


class Window(NamedTuple):
    """A clip, and where it lies: `start` and `end` in seconds.

    Attributes:
      clip: (T, H, W, 3) uint8 RGB; of `WholeReader` all views, (V, T, H, W, 3).
      num_windows: that its video has, if it can be read to the end.
    """

    start: float
    end: float
    clip: np.ndarray
    num_windows: int = 1


class ClipReader(Protocol):
    """How a record becomes windows: `WindowReader` or `WholeReader`.

    Attributes:
      shape: of the `clip` of each.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, record: Record) -> Iterator[Window]: ...


@dataclass(frozen=True)
class WholeReader:
    """All views of a video, as an evaluation takes them, as one window.

    Attributes:
      views: makes them.
    """

    views: EvalReader

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip, (V, T, H, W, 3)."""
        return self.views.shape

    def read(self, record: Record) -> Iterator[Window]:
        """Reads the one window of a video.

        Raises:
          DecodeError: if the video cannot be read.
        """
        with self.views.open(record) as video:
            first, total = video.frame_range(record.start, record.end)
            times = video.times[first : first + total]
            seconds = float(times[-1] - times[0]) + 1 / video.fps
            yield Window(0.0, round(seconds, 6), self.views.take(video, first, total))


@dataclass(frozen=True)
class WindowReader:
    """How a record becomes clips.

    Attributes:
      views: how the frames of a window are chosen and cut: as one view of a whole video.
      window: seconds; 0 takes all of a video as one window.
      stride: seconds from one start to the next; not read where `window` is 0.
    """

    views: EvalReader
    window: float = 0.0
    stride: float = 0.0

    def __post_init__(self):
        if self.views.num_views != 1:
            raise ValueError(f'a window is one view, and not {self.views.num_views}')
        if not 0 <= self.window < np.inf:
            raise ValueError(f'window={self.window} must be a number of seconds, or 0')
        least = self.window / MAX_OVERLAP
        if self.window and not least <= self.stride < np.inf:
            raise ValueError(
                f'stride={self.stride} must be at least {least:g} seconds, a {MAX_OVERLAP}th of '
                f'window={self.window}'
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip, (T, H, W, 3)."""
        return self.views.shape[1:]

    def spans(self, duration: float) -> np.ndarray:
        """Where the windows of a video of this many seconds lie.

        Returns:
          (n, 2) float64, start and end in whole microseconds; n is at least 1. All are as long as
          the window, or the video if that is shorter: the last one is moved back to end with the
          video.

        Raises:
          ValueError: there are more than `MAX_WINDOWS`.
        """
        if not self.window or duration <= self.window + _SLACK:
            return np.round([[0.0, duration]], 6)
        last = duration - self.window
        count = np.ceil((last - _SLACK) / self.stride)
        if count >= MAX_WINDOWS:
            raise ValueError(f'more than {MAX_WINDOWS} windows in {duration:.0f} s')
        starts = np.append(np.arange(int(count)) * self.stride, last)
        return np.round(np.stack([starts, starts + self.window], axis=1), 6)

    def read(self, record: Record) -> Iterator[Window]:
        """Reads the windows of one video, in order of time.

        Args:
          record: what to read; times count from its start.

        Raises:
          DecodeError: if the video cannot be read, possibly after some of its windows came out.
        """
        views = self.views
        cut = views.cut()
        with views.open(record) as video:
            first, total = video.frame_range(record.start, record.end)
            times = video.times[first : first + total] - video.times[first]
            try:
                spans = self.spans(float(times[-1]) + 1 / video.fps)
            except ValueError as error:
                raise DecodeError(record.path, 'too large', str(error)) from error
            indices = first + self._indices(times, spans, video.fps)
            wanted, where = np.unique(indices, return_inverse=True)
            where = where.reshape(indices.shape)
            last_use = np.zeros(len(wanted), np.int64)
            np.maximum.at(last_use, where, np.arange(len(spans))[:, None])
            kept: dict[int, np.ndarray] = {}  # number in `wanted` -> cut frame
            there = done = 0
            for index, picture in video.pictures(wanted):
                if there == len(wanted) or index != wanted[there]:
                    continue  # of a shortcut that fails, or known: they start again
                kept[there] = cut(picture[None])[0, 0]
                there += 1
                while done < len(spans) and where[done].max() < there:
                    clip = np.stack([kept[k] for k in where[done].tolist()])
                    yield Window(*spans[done].tolist(), clip, len(spans))
                    for k in set(where[done].tolist()):
                        if last_use[k] == done:
                            del kept[k]
                    done += 1

    def _indices(self, times: np.ndarray, spans: np.ndarray, fps: float) -> np.ndarray:
        """Frames of each window, (n, T) int64, of frames at these times.

        A window without any has the one that is on screen when it starts.
        """
        views = self.views
        protocol = PROTOCOLS[views.sampling]
        begins = np.searchsorted(times, spans[:, 0] - _SLACK)
        ends = np.searchsorted(times, spans[:, 1] - _SLACK)
        begins = np.where(begins < ends, begins, np.maximum(begins - 1, 0))
        counts = np.maximum(ends - begins, 1)
        rows = {
            count: protocol.test(count, views.num_frames, 1, views.interval, fps)[0]
            for count in np.unique(counts).tolist()
        }
        return begins[:, None] + np.stack([rows[count] for count in counts.tolist()])


@dataclass(frozen=True)
class End:
    """After the last window of a video.

    Attributes:
      error: '', or 'kind: reason' why it cannot be read; then what came of it counts for nothing.
    """

    error: str = ''


def read_windows(
    records: Iterable[Record], reader: ClipReader, num_threads: int = 2, ahead: int = 8
) -> Iterator[tuple[int, Window | End]]:
    """Windows of several videos, each read by one thread.

    Args:
      records: the videos; they are taken as they are needed.
      reader: makes the windows.
      num_threads: videos that are read at the same time, at least 1.
      ahead: windows of each that wait.

    Yields:
      (number of the record, window), all of a video in order of time, then its `End`; videos in the
      order of the records. It does not depend on the number of threads.
    """
    stop = threading.Event()

    def put(out: queue.Queue, item: Window | End | BaseException) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return out.put(item, timeout=0.1)

    def work(record: Record, out: queue.Queue) -> None:
        try:
            for window in reader.read(record):
                put(out, window)
                if stop.is_set():
                    return
            put(out, End())
        except DecodeError as error:
            put(out, End(f'{error.kind}: {error.reason}'))
        except BaseException as error:
            error.add_note(f'while reading {record.path}')
            put(out, error)

    left = enumerate(records)
    running: deque[tuple[int, queue.Queue]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            while True:
                while len(running) < num_threads and (each := next(left, None)) is not None:
                    number, record = each
                    running.append((number, queue.Queue(ahead)))
                    pool.submit(work, record, running[-1][1])
                if not running:
                    return
                number, out = running.popleft()
                item: Window | End | None = None
                while not isinstance(item, End):
                    item = out.get()
                    if isinstance(item, BaseException):
                        raise item
                    yield number, item
        finally:
            stop.set()
