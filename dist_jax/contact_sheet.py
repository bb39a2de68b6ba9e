"""Frames of a video side by side, as the pictures of `predict` show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

COLUMNS = 8
MOST_FRAMES = 16  # that a sheet shows
CELL, HEAD, CAPTION = 1.25, 0.26, 0.17  # inches: width of a frame, the title, a line under a frame
TALLEST = 2.0  # cell, in widths; frames that are narrower still leave white beside them
WIDTH = CELL * COLUMNS


def choose(num_frames: int, most: int = MOST_FRAMES) -> np.ndarray:
    """Numbers of the at most `most` frames that are shown, int, increasing, evenly spread."""
    places = np.linspace(0, num_frames - 1, min(num_frames, most))
    return np.unique(places.round()).astype(int)


def count(shown: int, num_frames: int) -> str:
    """'16 frames', '8 of 16 frames'."""
    return f'{shown} of {num_frames} frames' if shown < num_frames else f'{num_frames} frames'


def height(num_frames: int, captions: bool = False, shape: tuple[int, ...] = (1, 1)) -> float:
    """Inches that `draw` needs for so many frames of (height, width, ...) pixels and a title."""
    cell = CELL * min(shape[0] / shape[1], TALLEST)
    return HEAD + (cell + CAPTION * captions) * -(-num_frames // COLUMNS)


def draw(
    part: SubFigure,
    title: str,
    frames: Sequence[np.ndarray],
    numbers: Sequence[int],
    captions: Sequence[str] = (),
) -> None:
    """Draws frames in rows.

    Args:
      part: where to, `WIDTH` wide and `height` high.
      title: above.
      frames: (H, W, 3) uint8 RGB each.
      numbers: of the frames, in their corners.
      captions: a text under each frame; none if empty.
    """
    part.suptitle(title, fontsize=9.5, x=0.01, ha='left')
    grid = part.subplots(-(-len(frames) // COLUMNS), COLUMNS, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, frame, number in zip(grid.flat, frames, numbers):
        axis.imshow(frame)
        axis.text(
            0.03,
            0.96,
            str(number),
            transform=axis.transAxes,
            va='top',
            fontsize=7,
            color='white',
            bbox={'facecolor': 'black', 'alpha': 0.55, 'pad': 1.2, 'linewidth': 0},
        )
    for axis, text in zip(grid.flat, captions):
        axis.text(0.5, -0.03, text, transform=axis.transAxes, ha='center', va='top', fontsize=7.5)
