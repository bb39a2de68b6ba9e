"""A few videos that a trained classifier saw: what it says of each, what is true, where it looked.

One video of a class is taken, the first of the list, so nothing is picked for its looks; but if
none of these is told wrongly, one that is takes the place of the last. Lengths are inches.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from ml_collections import ConfigDict

from dist_jax import attention_map, contact_sheet
from dist_jax.drawing import cut
from dist_jax.predict import shown_view
from dist_jax.tasks.api import labels_of
from dist_jax.trained import Trained
from dist_jax.video_model import Prediction, VideoModel
from input_pipeline.video_list import LabelledSource

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLIPS = 6
ROUNDS = 3  # videos of a class among which one that is told wrongly is looked for

COLUMNS = 2  # of videos on the sheet
FRAMES = 8  # of a strip at most
SIDE = 144  # pixels of a frame
FRAME, SEAM = 0.74, 0.03  # width of a frame, room between two
MARGIN, GAP = 0.16, 0.34  # around the sheet, between two columns
HEAD, LINE, SPACE, FOOT = 0.08, 0.23, 0.3, 0.5  # heights: above the texts, a text, below, the foot
RIGHT, WRONG = 'C2', 'C1'  # colours
LETTER = 0.118  # width of one of a verdict; of the other texts it is less
NARROWEST = 4.0  # width of a column


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video, and what a classifier says of it.

    Attributes:
      path: its file.
      video: (T, S, S, 3) uint8 RGB, as the model got it.
      said: the most probable class.
      share: its probability.
      truth: the class that it has.
      attention: (t, g, g) float32, see `Model.attention`; None where no query looks at patches.
    """

    path: str
    video: np.ndarray
    said: str
    share: float
    truth: str
    attention: np.ndarray | None = None

    @property
    def right(self) -> bool:
        return self.said == self.truth

    @property
    def verdict(self) -> str:
        """A sign and what was said; the sign tells right from wrong without colours."""
        return f'{"✓" if self.right else "✗"}  {self.said}'

    @property
    def sure(self) -> str:
        return f'{100 * self.share:.0f} % sure'

    @property
    def true(self) -> str:
        return f'true: {self.truth}'


def tell(trained: Trained, config: ConfigDict, source: LabelledSource) -> list[Clip]:
    """The videos of a list that are shown, in the order of their classes.

    Args:
      trained: a classifier with one head.
      config: of its run.
      source: the list; videos that cannot be read are passed over.

    Raises:
      ValueError: something else than a classifier, or one of several heads.
    """
    if len(labels_of(source)) != 1:
        raise ValueError(f'a list of {len(labels_of(source))} heads, and strips show one')
    (names,) = labels_of(source)
    rounds = _rounds(source.labels)
    records = [source[i] for i in itertools.chain(*rounds)]
    predictions = VideoModel(trained, config).predict_all(
        [record.path for record in records],
        most=1,
        attention=trained.model.attention is not None,
    )
    clips = (
        _clip(prediction, names[record.label])
        for prediction, record in zip(predictions, records)
        if not prediction.error
    )
    return choose(clips, len(rounds[0]))


def _rounds(labels: np.ndarray) -> list[list[int]]:
    """Numbers of the first videos of all classes, of the second ones, and so on: int (N,)."""
    of_class = [np.flatnonzero(labels == label)[:ROUNDS] for label in np.unique(labels)]
    return [[int(own[k]) for own in of_class if k < len(own)] for k in range(ROUNDS)]


def choose(clips: Iterator[Clip], num_classes: int) -> list[Clip]:
    """At most CLIPS of different classes, one of them told wrongly if there is one.

    Args:
      clips: one of each class, then others; no more are asked for than are needed.
      num_classes: of the first.
    """
    first = list(itertools.islice(clips, num_classes))
    shown = [first[i] for i in contact_sheet.choose(len(first), CLIPS)]
    if not all(clip.right for clip in shown):
        return shown
    wrong = next((clip for clip in itertools.chain(first, clips) if not clip.right), None)
    if wrong is None:
        return shown
    return [*[clip for clip in shown if clip.truth != wrong.truth][: CLIPS - 1], wrong]


def _clip(prediction: Prediction, truth: str) -> Clip:
    view = shown_view(prediction)
    ((said, share),) = prediction.top[0]
    attention = None if prediction.attention is None else prediction.attention[view]
    return Clip(prediction.path, prediction.video[view], said, share, truth, attention)


def frames(clip: Clip, side: int) -> list[np.ndarray]:
    """All frames, (T, side, side, 3) uint8 RGB: plain, and under the attention if there is one.

    A map stays until the next frame that the backbone sees.

    Args:
      clip: what is shown.
      side: pixels of a frame.
    """
    plain = np.stack(
        [cv2.resize(frame, (side, side), interpolation=cv2.INTER_LANCZOS4) for frame in clip.video]
    )
    if clip.attention is None:
        return [plain]
    stay = len(plain) // len(clip.attention)
    maps = np.repeat(clip.attention, stay, axis=0) / stay  # still shares of one whole
    return [plain, attention_map.overlay(plain, maps)]


def _strips(clip: Clip) -> list[np.ndarray]:
    """Those of `frames` that the sheet shows: of those that the backbone sees, if that is known."""
    num_frames = len(clip.video)
    seen = np.arange(num_frames)
    if clip.attention is not None:
        seen = attention_map.seen_frames(num_frames, len(clip.attention))
    shown = seen[contact_sheet.choose(len(seen), FRAMES)]
    return [row[shown] for row in frames(clip, SIDE)]


def draw(clips: Sequence[Clip]) -> Figure:
    """A sheet of videos: what was said and what is true, a strip of frames, one of attention."""
    from matplotlib.figure import Figure

    rows = [_strips(clip) for clip in clips]
    most = max(len(strip) for own in rows for strip in own)
    width = max(most * (FRAME + SEAM) - SEAM, NARROWEST)
    tall = max(len(own) for own in rows) * (FRAME + SEAM)
    down = HEAD + 2 * LINE + tall + SPACE
    size = (
        2 * MARGIN + COLUMNS * width + (COLUMNS - 1) * GAP,
        MARGIN + -(-len(clips) // COLUMNS) * down + FOOT,
    )
    figure = Figure(figsize=size)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    for i, (clip, own) in enumerate(zip(clips, rows)):
        x = MARGIN + i % COLUMNS * (width + GAP)
        _draw_clip(axis, x, MARGIN + i // COLUMNS * down, width, clip, own)
    foot = f'One video of a class, the first of the list; {_wrong(clips)}.'
    if clips[0].attention is not None:
        foot += (
            '\nLower strips: where the query of the model looked. Grey: an even share of its '
            'attention at most; glowing: more.'
        )
    axis.text(MARGIN, size[1] - MARGIN, foot, fontsize=9, alpha=0.75, va='bottom')
    axis.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect='auto')  # after pictures, which set them
    return figure


def _wrong(clips: Sequence[Clip]) -> str:
    """Which of the videos are told wrongly."""
    wrong = [not clip.right for clip in clips]
    if not any(wrong):
        return 'none that was looked at is told wrongly'
    if all(wrong):
        return 'all are told wrongly'
    if wrong.index(True) == len(clips) - 1:
        return 'and one that is told wrongly'
    return f'{sum(wrong)} of {len(clips)} are told wrongly'


def _draw_clip(
    axis: Axes, x: float, y: float, width: float, clip: Clip, rows: Sequence[np.ndarray]
) -> None:
    """Two lines of text, and the strips below them behind a bar."""
    colour = RIGHT if clip.right else WRONG
    first, second = y + HEAD + LINE / 2, y + HEAD + 1.5 * LINE
    verdict = cut(clip.verdict, int(width / LETTER) - len(clip.sure) - 1)
    axis.text(x, first, verdict, fontsize=12, weight='bold', color=colour, va='center')
    axis.text(x + width, first, clip.sure, fontsize=10, color=colour, ha='right', va='center')
    axis.text(x, second, cut(clip.true, int(width / LETTER)), fontsize=10, alpha=0.75, va='center')
    top = y + HEAD + 2 * LINE
    for strip in rows:
        for k, frame in enumerate(strip):
            left = x + k * (FRAME + SEAM)
            axis.imshow(frame, extent=(left, left + FRAME, top + FRAME, top))
        top += FRAME + SEAM
