"""Which frames of a video a clip is made of: index arithmetic, unit frames.

Two protocols of DiST. 'segment' cuts the whole video in equal parts and takes one frame of each;
'interval' takes frames at a fixed spacing (in frames of a 30 fps video) from one place. All
functions return indices in [0, num_total); short videos repeat frames.
"""

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


def segment_train(num_total: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """One uniform position in each of `num_frames` equal segments.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the T draws.

    Returns:
      (T,) int64, not decreasing.

    Source: DiST recipe, training side of segment-based sampling.
    """
    _check(num_total, num_frames)
    segment = num_total / num_frames
    positions = segment * (np.arange(num_frames) + rng.random(num_frames))
    return np.minimum(np.rint(positions), num_total - 1).astype(np.int64)


def segment_test(num_total: int, num_frames: int, num_views: int) -> np.ndarray:
    """One fixed position in each segment: its centre, or (view + 1) / num_views of it.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.

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
    num_total: int, fps: float, num_frames: int, interval: float, rng: np.random.Generator
) -> np.ndarray:
    """Frames at a fixed spacing from a uniform start.

    Args:
      num_total: frames in the video.
      fps: frames per second of the video; the spacing follows it, so that clips of all videos cover
        the same time.
      num_frames: frames in the clip, T.
      interval: spacing in frames of a 30 fps video.
      rng: source of the one draw.

    Returns:
      (T,) int64, not decreasing.

    Source: DiST recipe, interval sampling.
    """
    _check(num_total, num_frames)
    span = num_frames * interval * fps / REFERENCE_FPS
    start = rng.uniform(0, max(num_total - span, 0))
    return _evenly(start, span, num_total, num_frames)


def interval_test(
    num_total: int, fps: float, num_frames: int, interval: float, num_views: int
) -> np.ndarray:
    """Frames at a fixed spacing from fixed starts: the middle, or view / num_views of the slack.

    Args:
      num_total: frames in the video.
      fps: frames per second of the video.
      num_frames: frames in the clip, T.
      interval: spacing in frames of a 30 fps video.
      num_views: clips of one video, V.

    Returns:
      (V, T) int64, not decreasing along T.

    Source: DiST recipe, test side of interval sampling; agrees with the reference on every row.
    """
    _check(num_total, num_frames, num_views)
    span = num_frames * interval * fps / REFERENCE_FPS
    slack = max(num_total - span, 0)
    starts = [slack / 2] if num_views == 1 else [slack * v / num_views for v in range(num_views)]
    return np.stack([_evenly(start, span, num_total, num_frames) for start in starts])
