"""Accuracies and confusions."""

import numpy as np
import pytest

from dist_jax import metrics

SCORES = np.array(
    [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]
)
LABELS = np.array([0, 2, 2, 1, 1])


def test_accuracies():
    found = metrics.classification(SCORES, LABELS)
    assert found['top1'] == 3 / 5
    np.testing.assert_allclose(found['per_class_accuracy'], [1.0, 0.5, 0.5])
    np.testing.assert_allclose(found['mean_class_accuracy'], 2 / 3)
    assert found['per_class_count'].tolist() == [1, 2, 2]
    assert found['confusion'].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_top5_counts_the_five_best():
    scores = np.arange(10.0)[None]
    tops = [metrics.classification(scores, np.array([label]))['top5'] for label in (9, 5, 4, 0)]
    assert tops == [1.0, 1.0, 0.0, 0.0]


def test_constant_scores_earn_nothing():
    found = metrics.classification(np.full((4, 10), 0.1), np.array([0, 1, 2, 3]))
    assert found['top1'] == 0.0 and found['top5'] == 0.0


def test_classes_without_videos_are_left_out_of_the_mean():
    found = metrics.classification(SCORES[:1], LABELS[:1])
    assert found['mean_class_accuracy'] == 1.0
    assert np.isnan(found['per_class_accuracy'][1])


def test_joint_accuracy_needs_every_column():
    labels = np.stack([LABELS, np.array([0, 2, 1, 0, 0])], 1)
    assert metrics.joint_top1([SCORES, SCORES], labels) == 2 / 5


def test_worst_confusions_come_first():
    confusion = np.array([[5, 2, 0], [0, 5, 7], [1, 0, 5]])
    assert metrics.worst_confusions(confusion, 2) == [(1, 2, 7), (0, 1, 2)]
    assert metrics.worst_confusions(np.eye(3, dtype=int)) == []


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_have_no_accuracy(value):
    scores = SCORES.copy()
    scores[3, 1] = value
    with pytest.raises(metrics.NonFiniteScoresError, match=r'1 of 5 videos .*: row 3\. .*weights'):
        metrics.classification(scores, LABELS)
    with pytest.raises(metrics.NonFiniteScoresError, match='row 3'):
        metrics.joint_top1([SCORES, scores], np.stack([LABELS, LABELS], 1))


def test_of_many_rows_without_numbers_the_first_are_named():
    with pytest.raises(metrics.NonFiniteScoresError, match=r'row 0, row 1, .*row 9 and 30 more'):
        metrics.classification(np.full((40, 8), np.nan), np.arange(40) % 8)
