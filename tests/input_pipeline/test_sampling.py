import json
from pathlib import Path

import numpy as np
import pytest

from input_pipeline import sampling

FOLDER = Path(__file__).parents[1] / 'golden'
GOLDEN = json.loads((FOLDER / 'dist_sampling.json').read_text())
EVL = json.loads((FOLDER / 'evl_sampling.json').read_text())
SIDE4VIDEO = json.loads((FOLDER / 'side4video_sampling.json').read_text())


def test_segment_views_equal_all_recorded_rows():
    for row in GOLDEN['segment']:
        views = sampling.segment_test(row['video_length'], row['num_frames'], row['num_views'])
        assert views[row['view']].tolist() == row['index'], row


def test_interval_views_equal_all_recorded_rows():
    for row in GOLDEN['interval']:
        views = sampling.interval_test(
            row['video_length'], row['num_frames'], row['num_views'], row['interval'], row['fps']
        )
        assert views[row['view']].tolist() == row['index'], row


def test_stride_views_equal_all_recorded_rows():
    for row in EVL['eval_temporal']:
        views = sampling.stride_test(
            row['video_len'], row['num_frames'], row['num_temporal_views'], row['sampling_rate']
        )
        assert views.tolist() == row['indices'], row


def test_stride_views_beside_crops_equal_the_recorded_ones():
    row = EVL['eval_view_order']
    recorded = {tuple(view['frames']) for view in row['views']}
    views = sampling.stride_test(
        row['video_len'], row['num_frames'], row['num_temporal_views'], row['sampling_rate']
    )
    assert {tuple(view) for view in views.tolist()} == recorded


def test_stride_training_of_short_videos_equals_all_recorded_rows():
    for row in EVL['train_short']:
        indices = sampling.stride_train(
            row['video_len'], row['num_frames'], np.random.default_rng(0), row['sampling_rate']
        )
        assert indices.tolist() == row['indices'], row


def test_stride_training_starts_where_the_recorded_draws_do():
    rng = np.random.default_rng(0)
    for row in EVL['train_start']:
        draws = np.stack(
            [
                sampling.stride_train(
                    row['video_len'], row['num_frames'], rng, row['sampling_rate']
                )
                for _ in range(300)
            ]
        )
        assert (np.diff(draws) == row['sampling_rate']).all(), row
        assert draws[:, 0].min() == row['start_min'], row
        assert draws[:, 0].max() == row['start_max_inclusive'], row


def test_tsn_training_fills_the_recorded_ranges():
    rng = np.random.default_rng(0)
    for row in EVL['train_tsn']:
        low, high = np.array(row['low_high_inclusive']).T
        draws = np.stack(
            [sampling.tsn_train(row['video_len'], row['num_frames'], rng) for _ in range(600)]
        )
        assert (draws >= low).all() and (draws <= high).all(), row
        narrow = high - low < 60  # 600 draws reach both ends of these
        np.testing.assert_array_equal(draws.min(0)[narrow], low[narrow])
        np.testing.assert_array_equal(draws.max(0)[narrow], high[narrow])


def test_tsn_views_lie_in_the_parts_that_training_draws_from_and_spread():
    for row in EVL['train_tsn']:
        low, high = np.array(row['low_high_inclusive']).T
        for num_views in (1, 2, 5):
            views = sampling.tsn_test(row['video_len'], row['num_frames'], num_views)
            assert views.shape == (num_views, row['num_frames'])
            assert (views >= low).all() and (views <= high).all(), row
            assert (np.diff(views, axis=0) >= 0).all()
    assert sampling.tsn_test(81, 4, 1).tolist() == [[10, 30, 50, 70]]
    assert sampling.tsn_test(81, 4, 2).tolist() == [[5, 25, 45, 65], [15, 35, 55, 75]]


def test_side4video_views_equal_all_recorded_rows():
    rules = {'kinetics': sampling.tsn_shift_test, 'something': sampling.split_test}
    for row in SIDE4VIDEO['recognition']:  # no clips: the validation sampler
        views = rules[row['set']](row['num_total'], row['num_frames'], max(row['clips'], 1))
        assert views.tolist() == row['index'], row


def test_retrieval_frames_equal_the_recorded_rows_and_short_videos_repeat_theirs():
    for row in SIDE4VIDEO['retrieval']:
        found = sampling.block_test(row['num_total'], row['num_frames'], 1)[0]
        if row['num_total'] > row['num_frames']:
            assert found.tolist() == row['index'], row
        else:  # the reference repeats the first frame
            assert set(found) == set(range(row['num_total']))
    assert sampling.block_test(5, 12, 1).tolist() == [[0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4]]


def test_retrieval_by_strides_cuts_evenly_from_multiples():
    # d = 8: 0 8 .. 96, thirteen of which 12 are taken.
    expected = [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96]
    assert sampling.block_start_test(100, 12, 1).tolist() == [expected]
    assert sampling.block_start_test(3, 6, 1).tolist() == [[0, 0, 0, 1, 1, 2]]
    later = sampling.block_start_test(100, 12, 2)
    assert later.tolist() == [expected, list(range(4, 100, 8))]


@pytest.mark.parametrize('num_frames', [1, 6, 12, 16, 32])
def test_retrieval_shows_all_frames_of_a_short_video_and_no_other(num_frames):
    rng = np.random.default_rng(0)
    for num_total in range(1, num_frames + 1):
        for indices in (
            sampling.block_train(num_total, num_frames, rng),
            sampling.block_test(num_total, num_frames, 1)[0],
            sampling.block_start_test(num_total, num_frames, 1)[0],
        ):
            assert set(indices) == set(range(num_total)) and (np.diff(indices) >= 0).all()


def test_split_training_takes_each_part_once_and_all_of_a_short_video():
    rng = np.random.default_rng(0)
    draws = np.stack([sampling.split_train(21, 8, rng) for _ in range(500)])
    borders = [0, 2, 5, 7, 10, 13, 15, 18, 21]
    assert draws.min(0).tolist() == borders[:-1]
    assert draws.max(0).tolist() == [border - 1 for border in borders[1:]]
    for _ in range(20):
        short = sampling.split_train(5, 8, rng)
        assert set(short) == set(range(5)) and (np.diff(short) >= 0).all()


def test_wrapping_clips_start_where_they_fit_and_go_on_at_the_beginning():
    rng = np.random.default_rng(0)
    draws = np.stack([sampling.stride_wrap_train(70, 32, rng, 2) for _ in range(400)])
    assert set(draws[:, 0]) == set(range(7))  # 70 - 64, inclusive
    assert (np.diff(draws) == 2).all()
    assert sampling.stride_wrap_train(5, 4, rng, 3).tolist() == [0, 3, 1, 4]
    assert sampling.stride_wrap_test(5, 4, 2, 3).tolist() == [[0, 3, 1, 4]] * 2


@pytest.mark.parametrize('num_total', [64, 65, 75, 250, 300])
def test_ten_wrapping_views_follow_the_published_formula(num_total):
    starts = [int((k + 0.5) * (num_total - 64 + 1) / 10) for k in range(10)]
    views = sampling.stride_wrap_test(num_total, 32, 10, 2)
    assert views[:, 0].tolist() == starts
    assert (np.diff(views) == 2).all()


def test_blocks_leave_the_tail_out_in_training_and_take_middles_in_tests():
    rng = np.random.default_rng(0)
    draws = np.stack([sampling.block_train(30, 8, rng) for _ in range(400)])
    assert draws.min(0).tolist() == list(range(0, 24, 3))
    assert draws.max(0).tolist() == list(range(2, 24, 3))  # 24 to 29 never
    assert sampling.block_train(4, 8, rng).tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert sampling.block_test(30, 8, 1)[0].tolist() == [int((k + 0.5) * 30 / 8) for k in range(8)]


@pytest.mark.parametrize('protocol', sampling.PROTOCOLS.values(), ids=sampling.PROTOCOLS)
@pytest.mark.parametrize('num_total', [1, 5, 16, 75, 300])
@pytest.mark.parametrize('num_frames', [1, 8, 16])
def test_indices_are_in_range_ordered_and_seeded(protocol, num_total, num_frames):
    def check(indices, shape):
        assert indices.shape == shape
        assert indices.dtype == np.int64
        assert indices.min() >= 0
        assert indices.max() < num_total
        if protocol is not sampling.PROTOCOLS['stride_wrap']:
            assert (np.diff(indices) >= 0).all()

    for seed in range(20):
        first, second = (
            protocol.train(num_total, num_frames, np.random.default_rng(seed), 4, 25.0)
            for _ in range(2)
        )
        check(first, (num_frames,))
        np.testing.assert_array_equal(first, second)
    for num_views in (1, 3):
        check(protocol.test(num_total, num_frames, num_views, 4, 25.0), (num_views, num_frames))


def test_training_draws_reach_every_place_of_each_segment():
    rng = np.random.default_rng(0)
    draws = np.stack([sampling.segment_train(100, 4, rng) for _ in range(4000)])
    for k in range(4):
        assert draws[:, k].min() == 25 * k
        assert draws[:, k].max() == min(25 * (k + 1), 99)
        assert draws[:, k].mean() == pytest.approx(25 * k + 12.5, abs=0.6)


def test_interval_follows_the_frame_rate():
    at_30 = sampling.interval_test(300, 8, 1, 8, 30.0)[0]
    at_60 = sampling.interval_test(600, 8, 1, 8, 60.0)[0]
    assert np.abs(at_60 / 60 - at_30 / 30).max() < 1 / 30


def test_stride_does_not_follow_the_frame_rate():
    stride = sampling.PROTOCOLS['stride']
    at_30, at_60 = (stride.test(300, 8, 3, 8, fps) for fps in (30.0, 60.0))
    np.testing.assert_array_equal(at_30, at_60)


@pytest.mark.parametrize('protocol', sampling.PROTOCOLS.values(), ids=sampling.PROTOCOLS)
@pytest.mark.parametrize('arguments', [(0, 8, 1), (10, 0, 1), (10, 8, 0)])
def test_empty_requests_are_errors(protocol, arguments):
    with pytest.raises(ValueError, match='=0 must be at least 1'):
        protocol.test(*arguments, 1.0, 30.0)
    if arguments[2]:
        with pytest.raises(ValueError, match='=0 must be at least 1'):
            protocol.train(*arguments[:2], np.random.default_rng(0), 1.0, 30.0)


@pytest.mark.parametrize('interval', [0, 2.5])
def test_a_stride_is_a_whole_number_of_frames(interval):
    for rule in (sampling.stride_test, sampling.stride_wrap_test):
        with pytest.raises(ValueError, match=f'interval={interval} must be a whole number'):
            rule(100, 8, 1, interval)
