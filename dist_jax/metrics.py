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
    """Scores are NaN or infinite, or of nothing, so there is no figure; the message names them."""


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


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the steps of precision over recall, of (N,) scores and (N,) labels, 0 or 1.

    The sum over thresholds of the precision there times the recall gained there, without
    interpolation, as scikit-learn has it: rows of equal scores are found together, and constant
    scores earn the share of rows that have the label. NaN without a label.
    """
    labels = np.asarray(labels, bool)
    if not labels.any():
        return float('nan')
    order = np.argsort(-scores, kind='stable')
    found = np.cumsum(labels[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each threshold
    gained = np.diff(found[last], prepend=0) / found[-1]
    return float((gained * found[last] / (last + 1)).sum())


def multi_label(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Average precisions of (N, num_classes) scores against (N, num_classes) labels, 0 or 1.

    Returns:
      `map`, the mean over the classes that any video has; `micro_map`, of all pairs of a video and
      a class as one ranking; `chance`, what `map` is of constant scores;
      `per_class_average_precision` (num_classes,), NaN without videos; `per_class_count`.

    Raises:
      NonFiniteScoresError: some scores are NaN or infinite, or no video has a class.
    """
    check_finite([scores])
    count = labels.sum(0, dtype=np.int64)
    if not count.any():
        raise NonFiniteScoresError(
            f'none of the {len(labels)} videos has a class, so there is no average precision'
        )
    pairs = zip(scores.T, labels.T)
    per_class = np.array([average_precision(*of_class) for of_class in pairs])
    return {
        'map': float(np.nanmean(per_class)),
        'micro_map': average_precision(scores.ravel(), labels.ravel()),
        'chance': float(count[count > 0].mean() / len(labels)),
        'per_class_average_precision': per_class,
        'per_class_count': count,
    }


def worst_confusions(confusion: np.ndarray, most: int = 20) -> list[tuple[int, int, int]]:
    """(label, predicted, videos) of the most frequent mistakes, worst first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None, kind='stable')[::-1][:most]
    pairs = (np.unravel_index(i, wrong.shape) for i in order)
    return [(int(a), int(b), int(wrong[a, b])) for a, b in pairs if wrong[a, b]]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
