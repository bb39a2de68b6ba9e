"""Which frames of a video a clip is made of: index arithmetic, unit frames.

`PROTOCOLS` names them. DiST: 'segment' cuts the whole video in equal parts and takes one frame of
each; 'interval' takes frames at a fixed spacing (in frames of a 30 fps video) from one place.
EVL: 'stride' takes every so many frames of the file, whatever its frame rate; 'tsn' takes one frame
of each equal part, as 'segment' does with other rounding.

All functions of a kind have one signature, and leave out what they do not need:
`train(num_total, num_frames, rng, interval, fps)` and
`test(num_total, num_frames, num_views, interval, fps)`. They return indices in [0, num_total);
short videos repeat frames.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

REFERENCE_FPS = 30.0  # the unit of `interval`


def _check(num_total: int, num_frames: int, num_views: int = 1) -> None:
    for name, value in (
        ('num_total', num_total),
        ('num_frames', num_frames),
        ('num_views', num_views),
    ):
        if value < 1:
            raise ValueError(f'{name}={value} must be at least 1')


def segment_train(
    num_total: int,
    num_frames: int,
    rng: np.random.Generator,
    interval: float = 1.0,
    fps: float = REFERENCE_FPS,
) -> np.ndarray:
    """One uniform position in each of `num_frames` equal segments.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the T draws.
      interval, fps: not used.

    Returns:
      (T,) int64, not decreasing.

    Source: DiST recipe, training side of segment-based sampling.
    """
    _check(num_total, num_frames)
    segment = num_total / num_frames
    positions = segment * (np.arange(num_frames) + rng.random(num_frames))
    return np.minimum(np.rint(positions), num_total - 1).astype(np.int64)


def segment_test(
    num_total: int,
    num_frames: int,
    num_views: int,
    interval: float = 1.0,
    fps: float = REFERENCE_FPS,
) -> np.ndarray:
    """One fixed position in each segment: its centre, or (view + 1) / num_views of it.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.
      interval, fps: not used.

    Returns:
      (V, T) int64, not decreasing along T.

    Source: DiST recipe, test side; agrees with the reference on every recorded row, including its
      rounding of halves to even.
    """
    _check(num_total, num_frames, num_views)
    segment = num_total / num_frames
    starts = segment * np.arange(num_frames)
    lengths = segment * np.arange(1, num_frames + 1) - starts
    views = np.array([0.5]) if num_views == 1 else np.arange(1, num_views + 1) / num_views
    positions = starts + lengths * views[:, None]
    return np.minimum(np.rint(positions), num_total - 1).astype(np.int64)


def _evenly(start: float, span: float, num_total: int, num_frames: int) -> np.ndarray:
    # The reference rounds the positions to float32 before it cuts them to integers; in float64 a
    # position just below an integer would come out one lower.
    positions = np.linspace(start, start + span - 1, num_frames).astype(np.float32)
    return np.clip(positions.astype(np.int64), 0, num_total - 1)


def interval_train(
    num_total: int,
    num_frames: int,
    rng: np.random.Generator,
    interval: float = 1.0,
    fps: float = REFERENCE_FPS,
) -> np.ndarray:
    """Frames at a fixed spacing in time from a uniform start.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the one draw.
      interval: spacing in frames of a 30 fps video.
      fps: frames per second of the video; the spacing follows it, so that clips of all videos cover
        the same time.

    Returns:
      (T,) int64, not decreasing.

    Source: DiST recipe, interval sampling.
    """
    _check(num_total, num_frames)
    span = num_frames * interval * fps / REFERENCE_FPS
    start = rng.uniform(0, max(num_total - span, 0))
    return _evenly(start, span, num_total, num_frames)


def interval_test(
    num_total: int,
    num_frames: int,
    num_views: int,
    interval: float = 1.0,
    fps: float = REFERENCE_FPS,
) -> np.ndarray:
    """Frames at a fixed spacing in time from fixed starts: the middle, or view / num_views of it.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.
      interval: spacing in frames of a 30 fps video.
      fps: frames per second of the video.

    Returns:
      (V, T) int64, not decreasing along T.

    Source: DiST recipe, test side of interval sampling; agrees with the reference on every row.
    """
    _check(num_total, num_frames, num_views)
    span = num_frames * interval * fps / REFERENCE_FPS
    slack = max(num_total - span, 0)
    starts = [slack / 2] if num_views == 1 else [slack * v / num_views for v in range(num_views)]
    return np.stack([_evenly(start, span, num_total, num_frames) for start in starts])


def _whole(interval: float) -> int:
    if interval < 1 or interval != int(interval):
        raise ValueError(
            f'interval={interval} must be a whole number of frames, at least 1, for stride sampling'
        )
    return int(interval)


def stride_train(
    num_total: int,
    num_frames: int,
    rng: np.random.Generator,
    interval: float = 1.0,
    fps: float = REFERENCE_FPS,
) -> np.ndarray:
    """Every `interval`-th frame from a uniform start.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the one draw.
      interval: spacing in frames of the file, a whole number.
      fps: not used.

    Returns:
      (T,) int64, not decreasing. A video that is too short starts at 0 and repeats the last
      multiple of `interval` that it has.

    Source: EVL, training side of its sampling by a fixed rate.
    """
    _check(num_total, num_frames)
    step = _whole(interval)
    steps = np.arange(num_frames, dtype=np.int64)
    slack = num_total - ((num_frames - 1) * step + 1)
    if slack < 0:
        return np.minimum(steps, (num_total - 1) // step) * step
    return rng.integers(slack + 1) + steps * step


def stride_test(
    num_total: int,
    num_frames: int,
    num_views: int,
    interval: float = 1.0,
    fps: float = REFERENCE_FPS,
) -> np.ndarray:
    """Every `interval`-th frame from fixed starts: the middle, or evenly from first to last.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.
      interval: spacing in frames of the file, a whole number.
      fps: not used.

    Returns:
      (V, T) int64, not decreasing along T. A video that is too short repeats its last frame, unlike
      in training.

    Source: EVL, test side; agrees with the reference on every recorded row, including its rounding
      of halves: down for one view, to even for several.
    """
    _check(num_total, num_frames, num_views)
    step = _whole(interval)
    slack = max(num_total - ((num_frames - 1) * step + 1), 0)
    views = range(num_views)
    starts = [slack // 2] if num_views == 1 else [round(slack / (num_views - 1) * v) for v in views]
    indices = np.array(starts, np.int64)[:, None] + np.arange(num_frames) * step
    return np.minimum(indices, num_total - 1)


def tsn_train(
    num_total: int,
    num_frames: int,
    rng: np.random.Generator,
    interval: float = 1.0,
    fps: float = REFERENCE_FPS,
) -> np.ndarray:
    """One uniform frame in each of `num_frames` equal parts, both borders of a part included.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the T draws.
      interval, fps: not used.

    Returns:
      (T,) int64, not decreasing; neighbours may both take the border that they share.

    Source: EVL, training side of its sampling with a stride that follows the video's length.
    """
    _check(num_total, num_frames)
    borders = np.rint((num_total - 1) / num_frames * np.arange(num_frames + 1)).astype(np.int64)
    return rng.integers(borders[:-1], borders[1:], endpoint=True)


def tsn_test(
    num_total: int,
    num_frames: int,
    num_views: int,
    interval: float = 1.0,
    fps: float = REFERENCE_FPS,
) -> np.ndarray:
    """One fixed frame in each part that `tsn_train` draws from: (2 view + 1) / (2 V) of it.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.
      interval, fps: not used.

    Returns:
      (V, T) int64, not decreasing along T; one view takes the middle of each part.

    Differs: the reference has no test side (its evaluation fails in this mode). Each part is cut
      into V equal ones and view v takes the middle of the v-th; halves round to even.
    """
    _check(num_total, num_frames, num_views)
    places = (2 * np.arange(num_views) + 1) / (2 * num_views)
    positions = (num_total - 1) / num_frames * (np.arange(num_frames) + places[:, None])
    return np.rint(positions).astype(np.int64)


class Protocol(NamedTuple):
    """A way to choose frames; the signatures are those of the module's text.

    Attributes:
      train: random indices of one clip, (T,) int64.
      test: fixed indices of all views, (V, T) int64.
    """

    train: Callable[[int, int, np.random.Generator, float, float], np.ndarray]
    test: Callable[[int, int, int, float, float], np.ndarray]


PROTOCOLS: dict[str, Protocol] = {
    'segment': Protocol(segment_train, segment_test),
    'interval': Protocol(interval_train, interval_test),
    'stride': Protocol(stride_train, stride_test),
    'tsn': Protocol(tsn_train, tsn_test),
}
