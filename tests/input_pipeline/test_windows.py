"""Windows over videos: where they lie, that frames are those of the video, memory and order."""

import tracemalloc

import numpy as np
import pytest
from test_frame_folder import write_frames
from video_files import decode_everything, pictures, write_video

from input_pipeline.decode import DecodeError, VideoReader
from input_pipeline.pipeline import EvalReader
from input_pipeline.sampling import segment_test
from input_pipeline.video_list import Record
from input_pipeline.windows import MAX_WINDOWS, End, Window, WindowReader, read_windows

VIEWS = EvalReader(4, 48)


def record(path):
    return Record(str(path), (), str(path))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Videos of 40, 12 and 100 frames, one that is none and one that is damaged in the middle."""
    folder = tmp_path_factory.mktemp('windows')
    write_video(folder / 'a.mp4', fps=10)
    write_video(folder / 'b.mp4', pictures(12, seed=1), fps=10)
    write_video(folder / 'c.mkv', pictures(100, seed=2), fps=10, b_frames=2)
    (folder / 'd.mp4').write_bytes(b'no video')
    data = bytearray(
        write_video(folder / 'e.mp4', pictures(60, seed=3), fps=10, gop=10).read_bytes()
    )
    begin = data.find(b'mdat')
    damaged = begin + (len(data) - begin) * 6 // 10
    for place in range(damaged, damaged + 2000):
        data[place] ^= 0x55
    (folder / 'e.mp4').write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ('duration', 'window', 'stride', 'expected'),
    [
        (10.0, 0, 0, [(0, 10)]),
        (3.0, 4, 2, [(0, 3)]),
        (4.0, 4, 2, [(0, 4)]),
        (8.0, 4, 2, [(0, 4), (2, 6), (4, 8)]),
        (9.0, 4, 4, [(0, 4), (4, 8), (5, 9)]),
        (9.0, 4, 6, [(0, 4), (5, 9)]),
        (0.3 + 0.3 + 0.3, 0.3, 0.3, [(0, 0.3), (0.3, 0.6), (0.6, 0.9)]),
    ],
)
def test_windows_are_of_one_length_and_the_last_ends_with_the_video(
    duration, window, stride, expected
):
    spans = WindowReader(VIEWS, window, stride).spans(duration)
    np.testing.assert_allclose(spans, expected, atol=1e-9)


@pytest.mark.parametrize(
    ('window', 'stride', 'named'),
    [(-1, 1, 'window=-1'), (np.inf, 1, 'window'), (4, 0, 'stride=0'), (4, 0.01, 'at least 0.0625')],
)
def test_windows_that_cannot_be_are_refused(window, stride, named):
    with pytest.raises(ValueError, match=named):
        WindowReader(VIEWS, window, stride)
    with pytest.raises(ValueError, match='one view'):
        WindowReader(EvalReader(4, 48, num_clips=2))


def test_one_window_is_what_an_evaluation_sees(folder):
    for sampling in ('segment', 'block_start', 'stride_wrap'):
        views = EvalReader(4, 48, sampling=sampling, interval=2)
        (found,) = WindowReader(views).read(record(folder / 'c.mkv'))
        np.testing.assert_array_equal(found.clip, views.read(record(folder / 'c.mkv'))[0][0])
        assert (found.start, found.end) == pytest.approx((0, 10))


def test_the_frames_of_a_window_are_those_between_its_times(folder):
    frames = decode_everything(folder / 'c.mkv')
    with VideoReader(folder / 'c.mkv') as video:
        times = video.times
    reader = WindowReader(VIEWS, 2.0, 0.7)
    found = list(reader.read(record(folder / 'c.mkv')))
    assert len(found) == 13
    for start, end, clip, num_windows in found:
        assert num_windows == 13
        inside = np.flatnonzero((times > start - 1e-6) & (times < end - 1e-6))
        chosen = inside[segment_test(len(inside), 4, 1)[0]]
        np.testing.assert_array_equal(clip, frames[chosen][:, :, 8:56])


def test_times_that_leave_gaps_repeat_the_frame_that_is_shown(tmp_path):
    pts = np.array([0, 1, 2, 3, 60, 61, 62, 63])
    path = write_video(tmp_path / 'gap.mp4', pictures(8), fps=10, pts=pts)
    frames = decode_everything(path)[:, :, 8:56]
    found = list(WindowReader(VIEWS, 1.0, 1.0).read(record(path)))
    np.testing.assert_array_equal(found[0].clip, frames[segment_test(4, 4, 1)[0]])
    np.testing.assert_array_equal(found[3].clip, frames[[3] * 4])
    np.testing.assert_array_equal(found[-1].clip[-1], frames[7])


def test_folders_of_frames_have_windows_too(tmp_path):
    folder = write_frames(tmp_path / 'frames')
    found = list(WindowReader(VIEWS, 0.2, 0.1).read(record(folder)))
    assert [round(window.start, 3) for window in found] == [0, 0.1, 0.2]


def test_a_time_stamp_far_away_makes_no_million_windows(tmp_path):
    pts = np.array([0, 1, 2, 10**7])
    path = write_video(tmp_path / 'far.mkv', pictures(4), fps=10, pts=pts)
    with pytest.raises(DecodeError, match=f'too large: more than {MAX_WINDOWS} windows'):
        next(WindowReader(VIEWS, 1.0, 1.0).read(record(path)))


@pytest.mark.parametrize('num_threads', [1, 3])
def test_videos_come_in_order_and_broken_ones_end_with_a_reason(folder, num_threads):
    names = ['a.mp4', 'd.mp4', 'b.mp4', 'none.mp4', 'c.mkv', 'e.mp4']
    reader = WindowReader(VIEWS, 1.0, 1.0)
    found = list(read_windows([record(folder / n) for n in names], reader, num_threads, ahead=1))
    numbers = [number for number, _ in found]
    assert numbers == sorted(numbers) and set(numbers) == set(range(6))
    ends = {number: item.error for number, item in found if isinstance(item, End)}
    assert ends[0] == ends[2] == ends[4] == ''
    assert ends[1].startswith('not a video: ') and ends[3] == 'missing: no such file'
    assert ends[5].startswith('corrupt: ') and numbers.count(5) == 4  # after three windows
    alone = [window for name in names[:1] for window in reader.read(record(folder / name))]
    for (_, item), window in zip(found, alone):
        assert isinstance(item, Window) and (item.start, item.end) == window[:2]
        np.testing.assert_array_equal(item.clip, window.clip)


def test_errors_that_are_not_about_a_video_are_raised_and_readers_end(folder):
    class Broken(WindowReader):
        def read(self, record):
            yield Window(0, 1, np.zeros(self.shape, np.uint8))
            raise RuntimeError('a mistake')

    events = read_windows([record(folder / 'a.mp4')], Broken(VIEWS))
    next(events)
    with pytest.raises(RuntimeError, match='a mistake'):
        next(events)
    # One who stops listening waits for no reader.
    events = read_windows([record(folder / 'c.mkv')] * 9, WindowReader(VIEWS, 1.0, 0.1), 2, 1)
    next(events)
    events.close()


def test_every_frame_is_decoded_once_and_memory_does_not_grow(tmp_path, monkeypatch):
    frames = np.zeros((1200, 48, 64, 3), np.uint8)
    frames[:, 0, 0] = np.arange(1200)[:, None] % 251
    path = write_video(tmp_path / 'long.mp4', frames, fps=10, gop=50)
    asked = []
    pick = VideoReader._pick

    def counted(self, wanted, shortcuts):
        for index, frame in pick(self, wanted, shortcuts):
            asked.append(index)
            yield index, frame

    monkeypatch.setattr(VideoReader, '_pick', counted)
    peaks = []
    for window in (2.0, 4.0):
        asked.clear()
        tracemalloc.start()
        count = sum(1 for _ in WindowReader(VIEWS, window, window / 4).read(record(path)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == (120 - window) / (window / 4) + 1
        assert len(asked) == len(set(asked))
    # 4 clips of 4 frames of 48 x 48, and lists of the packets; all frames would be 8 MB.
    assert max(peaks) < 2.5e6, peaks
