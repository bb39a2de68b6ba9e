"""Classification metrics of a finished evaluation, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MOST_NAMED = 10  # rows in a message
CAUSE = (
    'The likely cause is damaged weights, of the backbone or of the run, or numbers that bfloat16 '
    'cannot hold: convert the backbone again, take another checkpoint, or compute with '
    '--config.model.dtype=float32.'
)


class NonFiniteScoresError(FloatingPointError):
    """Scores are NaN or infinite, so there is no accuracy; the message names the rows."""


def check_finite(
    scores: Sequence[np.ndarray],
    name: Callable[[int], str] = 'row {}'.format,
    of: str = 'videos',
) -> None:
    """Refuses scores that no ranking can be made of.

    Args:
      scores: (N, num_classes) of each head.
      name: what the message calls a row.
      of: what rows are.

    Raises:
      NonFiniteScoresError: some are NaN or infinite, of any head.
    """
    fine = np.all([np.isfinite(head).all(1) for head in scores], axis=0)
    bad = np.flatnonzero(~fine)
    if len(bad):
        named = ', '.join(name(int(row)) for row in bad[:MOST_NAMED])
        more = f' and {len(bad) - MOST_NAMED} more' if len(bad) > MOST_NAMED else ''
        raise NonFiniteScoresError(
            f'{len(bad)} of {len(fine)} {of} have scores that are not finite numbers, so there '
            f'is no accuracy: {named}{more}. {CAUSE}'
        )


def classification(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracies of (N, num_classes) scores against (N,) labels.

    Ties count against us: a label is in the top k only if fewer than k classes score at least as
    much, so constant scores earn nothing.

    Returns:
      `top1`, `top5` and `mean_class_accuracy` in [0, 1] (classes without videos are left out);
      `per_class_accuracy` (num_classes,), NaN without videos; `per_class_count`;
      `confusion` (num_classes, num_classes) int64, rows are labels.

    Raises:
      NonFiniteScoresError: some scores are NaN or infinite.
    """
    check_finite([scores])
    num_classes = scores.shape[1]
    own = np.take_along_axis(scores, labels[:, None], 1)
    rank = (scores >= own).sum(1)  # 1 is best; the label itself counts
    correct = rank <= 1
    count = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels, correct, minlength=num_classes)
    with np.errstate(invalid='ignore'):
        per_class = np.where(count > 0, hits / count, np.nan)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    return {
        'top1': _mean(correct),
        'top5': _mean(rank <= 5),
        'mean_class_accuracy': float(np.nanmean(per_class)) if len(labels) else 0.0,
        'per_class_accuracy': per_class,
        'per_class_count': count,
        'confusion': confusion,
    }


def joint_top1(scores: list[np.ndarray], labels: np.ndarray) -> float:
    """Share of videos that every head has right (verb and noun); labels (N, heads).

    Raises:
      NonFiniteScoresError: some scores are NaN or infinite.
    """
    check_finite(scores)
    right = [head.argmax(1) == labels[:, i] for i, head in enumerate(scores)]
    return _mean(np.all(right, axis=0))


def worst_confusions(confusion: np.ndarray, most: int = 20) -> list[tuple[int, int, int]]:
    """(label, predicted, videos) of the most frequent mistakes, worst first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind='stable')[::-1][:most]
    pairs = (np.unravel_index(i, wrong.shape) for i in order)
    return [(int(a), int(b), int(wrong[a, b])) for a, b in pairs if wrong[a, b]]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
