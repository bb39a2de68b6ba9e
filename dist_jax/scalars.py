"""What figures are called, and how a person writes them: on pages, consoles and axes.

A figure is known by the end of its name: `val_top1` and `head_0_top1` are both a `top1`. A task
adds what it measures to SCALARS; what is not there stands under its own name, as a number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dist_jax.progress import duration

VALIDATION = 'val_'  # before the names of the figures of an evaluation
BASELINE = 'frame_only_'  # before those of the frame-only baseline
ZERO_SHOT = 'zero_shot_'  # before those of the frozen backbone on the words for what is seen
SHARE = 'share'
SECONDS = 'seconds'


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A kind of figure.

    Attributes:
      label: its name in words.
      unit: SHARE of 1, which is written in percent, SECONDS, or '' for a plain number.
      curve: what the curves are of that show it over the steps, 'accuracy'; '' for none.
      more_than: it says something of heads with more classes than this only.
    """

    label: str
    unit: str = ''
    curve: str = ''
    more_than: int = 0


SCALARS = {
    # Of runs.
    'seconds': Scalar('duration', SECONDS),
    'total_steps': Scalar('steps planned'),
    'num_videos': Scalar('videos'),
    'num_bad_videos': Scalar('unreadable videos'),
    'num_classes': Scalar('classes'),
    'trainable_parameters': Scalar('trained parameters'),
    'params_sha256': Scalar('SHA-256 of the parameters'),
    # Of classification. In the top-5 of five classes are all of them.
    'top1': Scalar('top-1', SHARE, curve='accuracy'),
    'top5': Scalar('top-5', SHARE, curve='accuracy', more_than=5),
    'mean_class_accuracy': Scalar('mean class accuracy', SHARE),
    f'{VALIDATION}mean_class_accuracy': Scalar('validation mean class', SHARE),
    'chance': Scalar('chance', SHARE),
    # Of classification with any number of classes.
    'map': Scalar('mAP', SHARE, curve='average precision'),
    'micro_map': Scalar('micro mAP', SHARE, curve='average precision'),
    # Of retrieval.
    't2v_r1': Scalar('text to video R@1', SHARE, curve='text-to-video recall'),
    't2v_r5': Scalar('text to video R@5', SHARE, curve='text-to-video recall'),
    't2v_r10': Scalar('text to video R@10', SHARE, curve='text-to-video recall'),
    'v2t_r1': Scalar('video to text R@1', SHARE, curve='video-to-text recall'),
    'v2t_r5': Scalar('video to text R@5', SHARE, curve='video-to-text recall'),
    'v2t_r10': Scalar('video to text R@10', SHARE, curve='video-to-text recall'),
    't2v_median_rank': Scalar('text to video median rank', curve='median rank'),
    't2v_mean_rank': Scalar('text to video mean rank'),
    'v2t_median_rank': Scalar('video to text median rank', curve='median rank'),
    'v2t_mean_rank': Scalar('video to text mean rank'),
    'ties': Scalar('queries with a tie', SHARE),
    'num_sentences': Scalar('sentences'),
    'num_skipped_sentences': Scalar('sentences of unreadable videos'),
    'rank_rule': Scalar('ranks'),
}
STARTS = {
    VALIDATION: 'validation ',
    BASELINE: 'frame-only baseline ',
    ZERO_SHOT: 'zero-shot on looks ',
}


def _find(name: str) -> tuple[str, Scalar]:
    """The longest end of a name that is in SCALARS, and its row."""
    ends = [end for end in SCALARS if f'_{name}'.endswith(f'_{end}')]
    end = max(ends, key=len, default='')
    return end, SCALARS.get(end, Scalar(''))


def telling(figures: Mapping[str, Any], num_classes: Sequence[int]) -> dict[str, Any]:
    """The figures that say something.

    Args:
      figures: by name; with several heads, `head_1_` stands before those of the second.
      num_classes: of each head; a head that is not there has any number.
    """

    def tells(name: str) -> bool:
        head = re.search(r'(?:^|_)head_(\d+)_', name)
        i = int(head[1]) if head else 0
        return i >= len(num_classes) or num_classes[i] > _find(name)[1].more_than

    return {name: value for name, value in figures.items() if tells(name)}


def label(name: str) -> str:
    """The name of a figure in words."""
    end, scalar = _find(name)
    start = name.removesuffix(end)
    for part, words in STARTS.items():
        start = start.replace(part, words)
    return start.replace('_', ' ') + scalar.label


def percent(share: float | None) -> str:
    """A share of 1; '-' where there is none."""
    return '-' if share is None or math.isnan(share) else f'{100 * share:.2f} %'


def show(name: str, value: Any) -> str:
    """A figure as a person writes it."""
    if value is None:
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, (list, tuple)):  # a figure of each head
        return ', '.join(show(name, each) for each in value)
    if isinstance(value, (int, float)):
        unit = _find(name)[1].unit
        if unit == SHARE:
            return percent(value)
        if unit == SECONDS:
            return f'{duration(value)} ({value:.1f} s)'
        return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'
    return str(value)
