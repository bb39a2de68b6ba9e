import json
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import sampling

GOLDEN = json.loads((Path(__file__).parents[1] / 'golden' / 'dist_sampling.json').read_text())


def test_segment_views_equal_all_recorded_rows():
    for row in GOLDEN['segment']:
        views = sampling.segment_test(row['video_length'], row['num_frames'], row['num_views'])
        assert views[row['view']].tolist() == row['index'], row


def test_interval_views_equal_all_recorded_rows():
    for row in GOLDEN['interval']:
        views = sampling.interval_test(
            row['video_length'], row['fps'], row['num_frames'], row['interval'], row['num_views']
        )
        assert views[row['view']].tolist() == row['index'], row


@pytest.mark.parametrize('num_total', [1, 5, 16, 75, 300])
@pytest.mark.parametrize('num_frames', [1, 8, 16])
def test_training_indices_are_in_range_ordered_and_seeded(num_total, num_frames):
    for seed in range(20):
        draws = [
            (
                sampling.segment_train(num_total, num_frames, rng),
                sampling.interval_train(num_total, 25.0, num_frames, 4, rng),
            )
            for rng in (np.random.default_rng(seed), np.random.default_rng(seed))
        ]
        for first, second in zip(*draws):
            assert first.shape == (num_frames,)
            assert first.dtype == np.int64
            assert first.min() >= 0
            assert first.max() < num_total
            assert (np.diff(first) >= 0).all()
            np.testing.assert_array_equal(first, second)


def test_training_draws_reach_every_place_of_each_segment():
    rng = np.random.default_rng(0)
    draws = np.stack([sampling.segment_train(100, 4, rng) for _ in range(4000)])
    for k in range(4):
        assert draws[:, k].min() == 25 * k
        assert draws[:, k].max() == min(25 * (k + 1), 99)
        assert draws[:, k].mean() == pytest.approx(25 * k + 12.5, abs=0.6)


def test_interval_follows_the_frame_rate():
    at_30 = sampling.interval_test(300, 30.0, 8, 8, 1)[0]
    at_60 = sampling.interval_test(600, 60.0, 8, 8, 1)[0]
    assert np.abs(at_60 / 60 - at_30 / 30).max() < 1 / 30


@pytest.mark.parametrize('arguments', [(0, 8, 1), (10, 0, 1), (10, 8, 0)])
def test_empty_requests_are_errors(arguments):
    with pytest.raises(ValueError, match='=0 must be at least 1'):
        sampling.segment_test(*arguments)
