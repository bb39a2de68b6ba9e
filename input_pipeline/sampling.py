"""Which frames of a video a clip is made of: index arithmetic, unit frames.

`PROTOCOLS` names the rules and says what each is for. A rule has a training and a test side,
`..._train(num_total, num_frames, rng, ...)` and `..._test(num_total, num_frames, num_views, ...)`;
where the spacing of frames is free, `interval` and, if it is in units of time, `fps` follow. They
return indices in [0, num_total); short videos repeat frames.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
) -> np.ndarray:
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


def segment_test(
    num_total: int,
    num_frames: int,
    num_views: int,
) -> np.ndarray:
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
            f'interval={interval} must be a whole number of frames, at least 1, where it counts '
            'frames of the file'
        )
    return int(interval)


def stride_train(
    num_total: int,
    num_frames: int,
    rng: np.random.Generator,
    interval: float = 1.0,
) -> np.ndarray:
    """Every `interval`-th frame from a uniform start.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the one draw.
      interval: spacing in frames of the file, a whole number.

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
) -> np.ndarray:
    """Every `interval`-th frame from fixed starts: the middle, or evenly from first to last.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.
      interval: spacing in frames of the file, a whole number.

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
) -> np.ndarray:
    """One uniform frame in each of `num_frames` equal parts, both borders of a part included.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the T draws.

    Returns:
      (T,) int64, not decreasing; neighbours may both take the border that they share.

    Source: EVL, training side of its sampling with a stride that follows the video's length.
    """
    _check(num_total, num_frames)
    borders = np.rint((num_total - 1) / num_frames * np.arange(num_frames + 1)).astype(np.int64)
    return rng.integers(borders[:-1], borders[1:], endpoint=True)


def _middles(num_views: int) -> np.ndarray:
    """Middles of V equal parts of 0 to 1, (V, 1)."""
    return ((2 * np.arange(num_views) + 1) / (2 * num_views))[:, None]


def tsn_test(
    num_total: int,
    num_frames: int,
    num_views: int,
) -> np.ndarray:
    """One fixed frame in each part that `tsn_train` draws from: (2 view + 1) / (2 V) of it.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.

    Returns:
      (V, T) int64, not decreasing along T; one view takes the middle of each part.

    Differs: the reference has no test side (its evaluation fails in this mode). Each part is cut
      into V equal ones and view v takes the middle of the v-th; halves round to even.
    """
    _check(num_total, num_frames, num_views)
    positions = (num_total - 1) / num_frames * (np.arange(num_frames) + _middles(num_views))
    return np.rint(positions).astype(np.int64)


def tsn_shift_test(num_total: int, num_frames: int, num_views: int) -> np.ndarray:
    """Frames evenly over the video, shifted from the start of each part to its end.

    Args:
      num_total: frames in the video, N.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.

    Returns:
      (V, T) int64, not decreasing along T: floor(shift + i N / T) with V shifts, cut to integers,
      from 0 to N / T - 1.

    Source: Side4Video, validation (V = 1) and test on Kinetics; agrees with the reference on every
      recorded row.
    Differs: for N < T, where the reference has no rule, all shifts are 0.
    """
    _check(num_total, num_frames, num_views)
    shifts = np.floor(np.linspace(0, max(num_total / num_frames - 1, 0), num_views))
    positions = shifts[:, None] + np.arange(num_frames) * num_total / num_frames
    return np.floor(positions).astype(np.int64) % num_total


def split_train(num_total: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """One uniform frame in each of `num_frames` parts, none shared, whose sizes differ by one.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the T draws.

    Returns:
      (T,) int64, not decreasing. A video of at most T frames gives all of them, and random ones a
      second time.

    Source: Side4Video, training on Something-Something.
    """
    _check(num_total, num_frames)
    if num_total <= num_frames:
        again = rng.integers(num_total, size=num_frames - num_total)
        return np.sort(np.concatenate([np.arange(num_total), again]))
    borders = np.arange(num_frames + 1) * num_total // num_frames
    return rng.integers(borders[:-1], borders[1:])


def split_test(num_total: int, num_frames: int, num_views: int) -> np.ndarray:
    """The same shift from the start of each part: (view + 1) / (V + 1) of its length.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.

    Returns:
      (V, T) int64, not decreasing along T; one view takes the middle of each part.

    Source: Side4Video, validation (V = 1) and test on Something-Something; agrees with the
      reference on every recorded row, including its rounding of starts to even. Its parts are those
      of `tsn_train`, not those of `split_train`.
    """
    _check(num_total, num_frames, num_views)
    length = (num_total - 1) / num_frames
    starts = np.rint(length * np.arange(num_frames))
    shifts = np.floor(np.arange(1, num_views + 1) * length / (num_views + 1))
    return (starts + shifts[:, None]).astype(np.int64)


def stride_wrap_train(
    num_total: int, num_frames: int, rng: np.random.Generator, interval: float = 1.0
) -> np.ndarray:
    """Every `interval`-th frame from a uniform start, going on from the beginning after the end.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the one draw.
      interval: spacing in frames of the file, a whole number.

    Returns:
      (T,) int64; decreasing only where it wraps around.

    Source: STS, training on Kinetics. Its clip is T * interval frames long, the frames after the
      last one taken included.
    """
    _check(num_total, num_frames)
    step = _whole(interval)
    start = rng.integers(max(num_total - num_frames * step, 0) + 1)
    return (start + np.arange(num_frames) * step) % num_total


def stride_wrap_test(
    num_total: int, num_frames: int, num_views: int, interval: float = 1.0
) -> np.ndarray:
    """Every `interval`-th frame from the middles of V equal parts of the possible starts.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.
      interval: spacing in frames of the file, a whole number.

    Returns:
      (V, T) int64; decreasing along T only where it wraps around.

    Source: STS, test on Kinetics (10 clips).
    """
    _check(num_total, num_frames, num_views)
    step = _whole(interval)
    places = max(num_total - num_frames * step, 0) + 1
    starts = (2 * np.arange(num_views) + 1) * places // (2 * num_views)
    return (starts[:, None] + np.arange(num_frames) * step) % num_total


def block_train(num_total: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """One uniform frame in each of `num_frames` blocks of floor(num_total / num_frames) frames.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      rng: source of the T draws.

    Returns:
      (T,) int64, not decreasing. Frames after the last block are never taken. A video that is too
      short gives its frames evenly, without a draw.

    Source: STS on Something-Something; Side4Video's retrieval.
    Differs: short videos follow STS, rounded and kept below num_total; the retrieval code repeats
      the first frame.
    """
    _check(num_total, num_frames)
    length = num_total // num_frames
    if not length:
        return _spread(num_total, num_frames)
    return np.arange(num_frames) * length + rng.integers(length, size=num_frames)


def _spread(num_total: int, num_frames: int) -> np.ndarray:
    even = np.rint(np.arange(num_frames) * num_total / num_frames).astype(np.int64)
    return np.minimum(even, num_total - 1)


def block_test(num_total: int, num_frames: int, num_views: int) -> np.ndarray:
    """One fixed frame in each of `num_frames` equal parts: (2 view + 1) / (2 V) of it, cut.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.

    Returns:
      (V, T) int64, not decreasing along T; one view takes the middle of each part.

    Source: STS on Something-Something; Side4Video's retrieval on VATEX, equal to the recorded rows
      of more than T frames.
    Differs: the references have one view. Of a video of at most T frames the retrieval code repeats
      the first; here its frames repeat evenly.
    """
    _check(num_total, num_frames, num_views)
    positions = num_total / num_frames * (np.arange(num_frames) + _middles(num_views))
    return np.floor(positions).astype(np.int64)


def block_start_test(num_total: int, num_frames: int, num_views: int) -> np.ndarray:
    """Frames 0, d, 2 d and so on with d = floor(num_total / num_frames): T of them, evenly.

    Args:
      num_total: frames in the video.
      num_frames: frames in the clip, T.
      num_views: clips of one video, V.

    Returns:
      (V, T) int64, not decreasing along T. View v starts floor(v d / V) frames later.

    Source: Side4Video's retrieval on MSR-VTT and MSVD.
    Differs: the reference has one view, and pretends that short videos have 30 frames.
    """
    _check(num_total, num_frames, num_views)
    step = max(num_total // num_frames, 1)
    views = [np.arange(view * step // num_views, num_total, step) for view in range(num_views)]
    return np.stack([v[np.linspace(0, len(v) - 1, num_frames).astype(np.int64)] for v in views])


@dataclass(frozen=True)
class Protocol:
    """A way to choose frames.

    Attributes:
      train_rule: (num_total, num_frames, rng, timing) -> random indices of one clip, (T,) int64.
      test_rule: (num_total, num_frames, num_views, timing) -> fixed indices of all views, (V, T).
      reads: the timing that both want: 'interval', 'fps'.
    """

    train_rule: Callable[..., np.ndarray]
    test_rule: Callable[..., np.ndarray]
    reads: tuple[str, ...] = ()

    def train(
        self,
        num_total: int,
        num_frames: int,
        rng: np.random.Generator,
        interval: float,
        fps: float,
    ) -> np.ndarray:
        """Indices of one training clip, (T,) int64."""
        return self.train_rule(num_total, num_frames, rng, **self._timing(interval, fps))

    def test(
        self, num_total: int, num_frames: int, num_views: int, interval: float, fps: float
    ) -> np.ndarray:
        """Indices of all test views, (V, T) int64."""
        return self.test_rule(num_total, num_frames, num_views, **self._timing(interval, fps))

    def _timing(self, interval: float, fps: float) -> dict[str, float]:
        timing = {'interval': interval, 'fps': fps}
        return {name: timing[name] for name in self.reads}


PROTOCOLS: dict[str, Protocol] = {
    # DiST, and the default of most data sets: the whole video in equal parts.
    'segment': Protocol(segment_train, segment_test),
    # DiST on UCF101, HMDB51 and EPIC-Kitchens: at a fixed spacing in time.
    'interval': Protocol(interval_train, interval_test, ('interval', 'fps')),
    # EVL on Kinetics: every so many frames of the file, whatever its frame rate.
    'stride': Protocol(stride_train, stride_test, ('interval',)),
    # EVL with a stride that follows the length of the video.
    'tsn': Protocol(tsn_train, tsn_test),
    # Side4Video on Kinetics.
    'tsn_shift': Protocol(tsn_train, tsn_shift_test),
    # Side4Video on Something-Something.
    'split': Protocol(split_train, split_test),
    # STS on Kinetics.
    'stride_wrap': Protocol(stride_wrap_train, stride_wrap_test, ('interval',)),
    # STS on Something-Something; Side4Video's retrieval on VATEX.
    'block': Protocol(block_train, block_test),
    # Side4Video's retrieval on MSR-VTT and MSVD.
    'block_start': Protocol(block_train, block_start_test),
}
