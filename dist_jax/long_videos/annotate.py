"""A video with what a model says of it drawn on its frames.

Frames are read, drawn on and encoded one after the other; sound is left behind.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator

import cv2
import numpy as np

from dist_jax import drawing
from dist_jax.long_videos.track import Track
from dist_jax.whole_file import appearing
from input_pipeline.decode import DecodeError
from input_pipeline.encode import write_pictures
from input_pipeline.escape import terminal
from input_pipeline.pipeline import OpenVideo, open_video, reading
from input_pipeline.video_list import Record

# Pixels of the short and the long side: smaller frames are enlarged by a whole number, so that text
# on them can be read, larger ones are made smaller.
LEAST_SIDE, MOST_SIDE, MOST_LONG = 240, 720, 1920
_SLACK = 1e-6  # seconds by which times that were computed in two ways may differ
_DARK = 0.62  # of the ground behind text


def write(
    path: str | os.PathLike[str],
    source: str,
    track: Track,
    threshold: float = 0.0,
    on_frame: Callable[[float], None] = lambda seconds: None,
) -> str:
    """Writes an H.264 mp4 of a video, up to its last window.

    Args:
      path: file to write.
      source: the video.
      track: what was said of its windows, at least of one.
      threshold: a best class that is less probable is not shown.
      on_frame: called with the time of each frame.

    Returns:
      '' or why it ends early; there is no file if no frame could be read again.
    """
    said = _Said(track, threshold)
    problem = ''

    def drawn(video: OpenVideo) -> Iterator[tuple[float, np.ndarray]]:
        nonlocal problem
        times = video.times[: np.searchsorted(video.times, track.end - _SLACK)]
        done = 0
        try:
            with reading(source):
                for number, picture in video.pictures(np.arange(len(times))):
                    if number != done:
                        continue  # of a shortcut that fails: they start again
                    frame = resized(picture)
                    said.draw(times[number], frame)
                    yield float(times[number]), frame
                    on_frame(float(times[number]))
                    done += 1
        except DecodeError as error:
            if not done:
                raise
            problem = f'{error.kind}: {error.reason}'

    try:
        with reading(source):
            opened = open_video(Record(source, (), source))
        with opened as video, appearing(path) as partial:
            write_pictures(partial, drawn(video), video.fps)
    except DecodeError as error:
        return f'{error.kind}: {error.reason}'
    return problem


def size(height: int, width: int) -> tuple[int, int]:
    """Height and width, even, of an annotated frame of a video of this size in pixels."""
    short, long = sorted((height, width))
    if short < LEAST_SIDE:
        scale = max(1, min(math.ceil(LEAST_SIDE / short), MOST_LONG // long))
    else:
        scale = min(1.0, MOST_SIDE / short)
    scale = min(scale, MOST_LONG / long)
    height, width = (max(2, 2 * round(side * scale / 2)) for side in (height, width))
    return height, width


def resized(picture: np.ndarray) -> np.ndarray:
    """A copy of a frame (H, W, 3) in the size of annotated ones."""
    height, width = size(*picture.shape[:2])
    if (height, width) == picture.shape[:2]:
        return picture.copy()
    kind = cv2.INTER_AREA if height < picture.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(picture, (width, height), interpolation=kind)


class _Said:
    """Draws the best classes of the window whose turn it is."""

    def __init__(self, track: Track, threshold: float):
        self._labels = track.labels
        self._turns = track.turns()
        self._heads = [(own[:, 0], shares[:, 0]) for own, shares in track.heads()]
        self._threshold = threshold
        self._band = functools.lru_cache(maxsize=64)(band)

    def draw(self, seconds: float, frame: np.ndarray) -> None:
        """Draws on a frame (H, W, 3) uint8."""
        turn = int(np.searchsorted(self._turns[:, 0], seconds + _SLACK, side='right')) - 1
        if turn < 0 or seconds > self._turns[turn, 1] + _SLACK:
            return
        lines = tuple(
            (names[classes[turn]], round(float(shares[turn]), 3))
            for names, (classes, shares) in zip(self._labels, self._heads)
            if shares[turn] >= self._threshold
        )
        if lines:
            light, alpha = self._band(lines, *frame.shape[:2])
            ground = frame[-len(light) :]
            ground[:] = (ground * (1 - alpha) + light).round().astype(np.uint8)


def band(
    lines: tuple[tuple[str, float], ...], height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """What is drawn at the foot of a frame: a name, a percentage and a bar for each line.

    Returns:
      The light that is added, (h, W, 3) float32 of 0 to 255, and how much of the frame it hides,
      (h, W, 1) float32 of 0 to 1.
    """
    from PIL import Image, ImageDraw

    letters = max(9, min(max(12, round(0.045 * height)), width // 20))
    step = min(round(1.9 * letters), height // len(lines))
    band = Image.new('RGBA', (width, step * len(lines)), (0, 0, 0, round(255 * _DARK)))
    pen = ImageDraw.Draw(band)
    pad, thick = max(2, letters // 2), max(2, letters // 5)
    for number, (name, share) in enumerate(lines):
        y = number * step
        font = drawing.font(letters, text=name)
        percent = f'{100 * share:.0f} %'
        room = width - 3 * pad - font.getlength(percent)
        pen.text((pad, y + step * 0.42), fitted(name, font, room), 'white', font, 'lm')
        pen.text((width - pad, y + step * 0.42), percent, 'white', font, 'rm')
        bar = (pad, y + step - thick - 1, pad + (width - 2 * pad) * share, y + step - 2)
        pen.rectangle((pad, bar[1], width - pad, bar[3]), (255, 255, 255, 80))
        if bar[2] > bar[0] + 1:
            pen.rectangle(bar, drawing.DARK['cycle'][0])
    pixels = np.asarray(band, np.float32)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha, alpha


def fitted(name: str, font: drawing.FreeTypeFont, room: float) -> str:
    """A name, cut to so many pixels."""
    name = terminal(name)
    if font.getlength(name) <= room:
        return name
    while name and font.getlength(name + '…') > room:
        name = name[:-1]
    return name.rstrip() + '…'
