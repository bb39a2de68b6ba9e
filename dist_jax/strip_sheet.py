"""A sheet of videos that were found: a line of text a row, and the videos as strips of frames.

Lengths are inches. The videos are read when the sheet is drawn, long after they were scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dist_jax.drawing import cut
from input_pipeline.decode import DecodeError
from input_pipeline.pipeline import open_video, reading
from input_pipeline.transforms import ViewCrops
from input_pipeline.video_list import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAMES = 3  # of a strip
SIDE = 112  # pixels of a frame
WIDTH = 9.6  # of a sheet
MARGIN, GAP, APART = 0.12, 0.12, 0.12  # around a sheet, between tiles, before one that is apart
SEAM = 0.02  # between the frames of a strip
TITLE, LINE, CAPTION, SPACE = 0.34, 0.24, 0.2, 0.14  # heights; SPACE is below a row
RIGHT = 'C2'  # colour of what was looked for
LETTER = 0.058  # width of one of a caption


@dataclasses.dataclass(frozen=True)
class Tile:
    """A video on a sheet.

    Attributes:
      strip: called when it is drawn: (FRAMES, SIDE, SIDE, 3) uint8 RGB, or None for a grey tile.
      place: its number among those found.
      name: of the video.
      score: of the video.
      right: it is what was looked for, and gets a frame.
      apart: it is not one of the row.
    """

    strip: Callable[[], np.ndarray | None]
    place: str
    name: str
    score: float
    right: bool = False
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """What was looked for, and what was found.

    Attributes:
      text: what was looked for.
      note: at the end of the line.
      tiles: best first.
    """

    text: str
    note: str
    tiles: Sequence[Tile]


def read_strip(record: Record) -> np.ndarray | None:
    """Frames from the middles of equal parts of a video, (FRAMES, SIDE, SIDE, 3) uint8 RGB.

    None if it cannot be read any more.
    """
    try:
        with reading(record.path), open_video(record) as video:
            first, total = video.frame_range(record.start, record.end)
            places = ((np.arange(FRAMES) + 0.5) * total / FRAMES).astype(int)
            frames = video.frames(first + places)
            return ViewCrops(SIDE, interpolation='smooth_bilinear')(frames)[0]
    except DecodeError:
        return None


def draw(blocks: Sequence[tuple[str, Sequence[Row]]]) -> Figure:
    """Draws rows of tiles; all tiles of a sheet are of one size.

    Args:
      blocks: (title, rows), one below the other; no line for a title that is ''.
    """
    from matplotlib.figure import Figure

    rows = [row for _, block in blocks for row in block]
    across = max(len(row.tiles) for row in rows)
    room = WIDTH - 2 * MARGIN - (across - 1) * GAP - APART
    tile = min(room / across, WIDTH / 4)
    frame = (tile - (FRAMES - 1) * SEAM) / FRAMES
    down = LINE + frame + CAPTION + SPACE
    titles = sum(bool(title) for title, _ in blocks)
    height = 2 * MARGIN + titles * TITLE + len(rows) * down - SPACE
    figure = Figure(figsize=(WIDTH, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    y = MARGIN
    for title, block in blocks:
        if title:
            axis.text(MARGIN, y + TITLE / 2, title, fontsize=11, weight='bold', va='center')
            y += TITLE
        for row in block:
            _draw_line(axis, y, row)
            for i, each in enumerate(row.tiles):
                x = MARGIN + i * (tile + GAP) + each.apart * APART
                _draw_tile(axis, x, y + LINE, tile, frame, each)
            y += down
    axis.set(xlim=(0, WIDTH), ylim=(height, 0), aspect='auto')  # after pictures, which set them
    return figure


def _draw_line(axis: Axes, y: float, row: Row) -> None:
    place = {'y': y + LINE / 2, 'va': 'center'}
    axis.text(WIDTH - MARGIN, s=row.note, ha='right', fontsize=8, alpha=0.75, **place)
    room = WIDTH - 2 * MARGIN - LETTER * 1.1 * len(row.note) - GAP
    axis.text(MARGIN, s=cut(row.text, int(room / LETTER / 1.18)), fontsize=9, **place)


def _draw_tile(axis: Axes, x: float, y: float, width: float, height: float, tile: Tile) -> None:
    """A strip, and a line below it."""
    from matplotlib.patches import Rectangle

    strip = tile.strip()
    if strip is None:
        axis.add_patch(Rectangle((x, y), width, height, color='#808080', alpha=0.35, linewidth=0))
        axis.text(x + width / 2, y + height / 2, 'cannot be read', ha='center', va='center')
    else:
        for i, picture in enumerate(strip):
            left = x + i * (height + SEAM)
            axis.imshow(picture, extent=(left, left + height, y + height, y))
    if tile.right:
        axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=RIGHT, linewidth=2.5))
    style = {'y': y + height + CAPTION / 2 + 0.02, 'va': 'center', 'fontsize': 7.5}
    style |= {'color': RIGHT} if tile.right else {}
    place, score = ('✓ ' * tile.right) + tile.place, f'{tile.score:.2f}'
    axis.text(x, s=place, **style)
    axis.text(x + width, s=score, ha='right', **style)
    used = LETTER * (len(place) + 1.5)
    most = int((width - used) / LETTER - len(score) - 1.5)
    if most > 3:
        axis.text(x + used, s=cut(tile.name, most), **style)
