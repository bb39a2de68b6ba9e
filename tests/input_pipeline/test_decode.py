import gc
import itertools
import os
import struct

import av
import cv2
import numpy as np
import pytest
import video_files
from video_files import decode_everything, pictures, write_video

from input_pipeline import decode
from input_pipeline.decode import KINDS, DecodeError, VideoReader

VIDEOS = {
    'long GOP': ('v.mp4', {'gop': 250}),
    'short GOP': ('v.mp4', {'gop': 8}),
    'B-frames': ('v.mp4', {'gop': 20, 'b_frames': 3, 'b_strategy': '0'}),
    'B-pyramid': ('v.mp4', {'gop': 30, 'b_frames': 8, 'x264-params': 'b-adapt=0:b-pyramid=normal'}),
    'open GOP': ('v.mp4', {'gop': 8, 'b_frames': 2, 'x264-params': 'open-gop=1'}),
    'intra refresh': ('v.mp4', {'gop': 10, 'x264-params': 'intra-refresh=1'}),
    'transport stream': ('v.ts', {'gop': 8, 'b_frames': 2}),
    'Matroska': ('v.mkv', {'gop': 8, 'b_frames': 2}),
    'webm': ('v.webm', {'codec': 'libvpx-vp9', 'gop': 8, 'cpu-used': '8'}),
    'webm, hidden frames': ('v.webm', {'codec': 'libvpx-vp9', 'auto-alt-ref': '1'}),
    'webm, VP8': ('v.webm', {'codec': 'libvpx', 'auto-alt-ref': '1', 'lag-in-frames': '16'}),
    'AVI': ('v.avi', {'codec': 'mpeg4', 'gop': 8}),
    'AVI, B-frames': ('v.avi', {'codec': 'mpeg4', 'gop': 8, 'b_frames': 2}),
    'AVI, H.264 B-frames': ('v.avi', {'gop': 8, 'b_frames': 2}),
    'program stream': ('v.mpg', {'codec': 'mpeg2video', 'gop': 8, 'b_frames': 2}),
    'variable rate': ('v.mp4', {'gop': 8, 'b_frames': 2, 'pts': np.cumsum(1 + np.arange(40) % 5)}),
    'MPEG-4': ('v.mp4', {'codec': 'mpeg4', 'gop': 8, 'qmax': '2'}),
    'MPEG-4, B-frames': ('v.mp4', {'codec': 'mpeg4', 'gop': 8, 'b_frames': 2}),
    'fragments': ('v.mp4', {'gop': 8, 'muxer': {'movflags': 'frag_keyframe+empty_moov'}}),
    'negative start': ('v.mp4', {'gop': 8, 'pts': np.arange(40) - 7}),
}


@pytest.mark.parametrize('cached', ['in memory', 'many bytes', 'many packets'])
@pytest.mark.parametrize('name', VIDEOS)
def test_any_frames_equal_those_of_decoding_everything(tmp_path, monkeypatch, name, cached):
    if cached == 'many bytes':
        monkeypatch.setattr(decode, 'MAX_CACHED_BYTES', 0)
    if cached == 'many packets':
        monkeypatch.setattr(decode, 'MAX_CACHED_PACKETS', 7)
    file, options = VIDEOS[name]
    path = write_video(tmp_path / file, **options)
    everything = decode_everything(path)
    last = len(everything) - 1
    draws = np.random.default_rng(0).integers(0, last + 1, (3, 6))
    with VideoReader(path) as video:
        assert video.num_frames == len(everything)
        for indices in ([0], [last], range(last + 1), [last, 0, 9, 9], [8, 16, 24], *draws):
            indices = np.array(indices)
            np.testing.assert_array_equal(video.frames(indices), everything[indices])


INDEXED = ('long GOP', 'short GOP', 'intra refresh', 'MPEG-4')


@pytest.mark.parametrize('name', [n for n, (file, _) in VIDEOS.items() if file.endswith('.mp4')])
def test_an_index_says_what_the_packets_say(tmp_path, monkeypatch, name):
    file, options = VIDEOS[name]
    path = write_video(tmp_path / file, **options)
    found = []
    for codecs in (decode._INDEXED, ()):
        monkeypatch.setattr(decode, '_INDEXED', codecs)
        with VideoReader(path) as video:
            found.append((video.times.tolist(), video._key_packets.tolist(), video._pts.tolist()))
            assert (video._rows is not None) == (codecs != () and name in INDEXED)
    assert found[0] == found[1]


def test_a_file_that_is_cut_after_it_was_opened_is_named(tmp_path):
    path = write_video(tmp_path / 'v.mp4', muxer={'movflags': 'faststart'})
    with VideoReader(path) as video:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(DecodeError, match=r'truncated: packet .* is cut off'):
            video.frames([0, 39])


def test_a_late_frame_of_a_short_gop_costs_few_packets(tmp_path):
    path = write_video(tmp_path / 'v.mp4', pictures(80), gop=8)
    with VideoReader(path) as video:
        fed = []
        feed = video._feed
        video._feed = lambda first: itertools.chain.from_iterable(
            [(fed.append(number) or (number, packet))] for number, packet in feed(first)
        )
        video.frames([74])
    assert len(fed) <= 8


def test_frames_come_as_contiguous_uint8_of_the_right_shape(tmp_path):
    with VideoReader(write_video(tmp_path / 'v.mp4')) as video:
        frames = video.frames([3, 1])
    assert frames.shape == (2, 48, 64, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous


def test_frames_look_like_what_was_written(tmp_path):
    written = pictures(12)
    with VideoReader(write_video(tmp_path / 'v.mp4', written, qp='1')) as video:
        frames = video.frames(np.arange(12))
    assert np.abs(frames.astype(int) - written).mean() < 20  # colour at half resolution
    order = [np.abs(frames[k].astype(int) - written).mean((1, 2, 3)).argmin() for k in range(12)]
    assert order == list(range(12))


@pytest.mark.parametrize('rotation', [90, 180, -90])
def test_rotation_metadata_turns_frames_upright(tmp_path, rotation):
    path = write_video(tmp_path / 'v.mp4', rotation=rotation)
    upright = np.rot90(decode_everything(path), rotation // 90, (1, 2))
    with VideoReader(path) as video:
        assert video.rotation == rotation % 360
        assert video.size == upright.shape[1:3]
        frames = video.frames([2, 30])
    np.testing.assert_array_equal(frames, upright[[2, 30]])
    assert frames.flags.c_contiguous


def test_mirroring_display_matrix_is_honoured(tmp_path):
    path = write_video(tmp_path / 'v.mp4', rotation=180)
    data = bytearray(path.read_bytes())
    at = data.rindex(b'tkhd') + 4 + 40  # the matrix of a version 0 track header
    assert struct.unpack('>i', data[at : at + 4])[0] == -(2**16)
    data[at + 16 : at + 20] = struct.pack('>i', 2**16)  # d = 1: mirrored left to right only
    path.write_bytes(data)
    everything = decode_everything(path)
    with VideoReader(path) as video:
        np.testing.assert_array_equal(video.frames([5])[0], everything[5][:, ::-1])


def test_frames_do_not_wait_for_the_garbage_collector(tmp_path):
    path = write_video(tmp_path / 'v.mp4')
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with VideoReader(path) as video:
                video.frames(np.arange(20))
        left = sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert left < 10  # of 60; the first of a file is asked whether it is turned


def test_bytes_read_like_a_file(tmp_path):
    path = write_video(tmp_path / 'v.mp4')
    with VideoReader(path.read_bytes()) as video:
        np.testing.assert_array_equal(video.frames([7]), decode_everything(path)[[7]])


def test_rate_duration_and_times(tmp_path):
    with VideoReader(write_video(tmp_path / 'v.mp4', pictures(30), b_frames=2, fps=10)) as video:
        assert video.fps == pytest.approx(10)
        assert video.duration == pytest.approx(3)
        np.testing.assert_allclose(video.times, np.arange(30) / 10, atol=1e-6)
        assert video.frame_range(1.0, 2.0) == (10, 10)
        assert video.frame_range(None, None) == (0, 30)
        with pytest.raises(DecodeError, match='zero frames: no frame from 8'):
            video.frame_range(8.0, 9.0)


def test_index_out_of_range_is_an_error(tmp_path):
    with VideoReader(write_video(tmp_path / 'v.mp4')) as video:
        for indices in ([40], [-1], []):
            with pytest.raises(IndexError, match='outside 0 to 39'):
                video.frames(indices)


def test_content_decides_not_the_name(tmp_path):
    path = write_video(tmp_path / 'v.mp4')
    wrong = path.rename(tmp_path / 'v.avi')
    with VideoReader(wrong) as video:
        assert video.num_frames == 40


def _cut(path, share, suffix='.mp4', **options):
    data = write_video(path.with_name(f'whole{suffix}'), **options).read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _flip_bits(path):
    data = bytearray(write_video(path, gop=250).read_bytes())
    for at in np.random.default_rng(0).integers(1200, len(data) - 2500, 100):
        data[at] ^= 0x55
    path.write_bytes(data)


def _write_picture(path, suffix, share=1.0):
    content = cv2.imencode(suffix, cv2.GaussianBlur(pictures(1)[0], (0, 0), 6))[1].tobytes()
    path.write_bytes(content[: int(len(content) * share)])
    return content


def _lie_about_size(path):
    """Large frames in the stream, small ones in the header."""
    data = bytearray(write_video(path, pictures(1, 1024, 1024)).read_bytes())
    at = data.rindex(b'avc1')
    data[at + 28 : at + 32] = struct.pack('>HH', 64, 48)
    path.write_bytes(data)


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_a_still_image_is_one_frame(tmp_path, suffix):
    path = tmp_path / f'picture{suffix}'
    content = _write_picture(path, suffix)
    for source in (path, content):
        with VideoReader(source) as video:
            assert (video.num_frames, video.frame_range(None, None)) == (1, (0, 1))
            frame = video.frames([0, 0])[1]
    expected = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.abs(frame.astype(int) - expected).mean() < 3


def _write_strip(path, height, width):
    path.write_bytes(cv2.imencode('.png', np.zeros((height, width, 3), np.uint8))[1].tobytes())


def _lie_about_samples(path):
    """80 million samples of one byte, in a file of a few thousand."""
    data = bytearray(write_video(path).read_bytes())
    at = data.index(b'stsz')
    data[at + 8 : at + 16] = struct.pack('>II', 1, 80_000_000)
    path.write_bytes(data)


FAILURES = {
    'missing file': ('missing', lambda path: None),
    'empty file': ('empty', lambda path: path.write_bytes(b'')),
    'folder': ('not a video', lambda path: path.mkdir()),
    'FIFO': ('not a video', os.mkfifo),
    'device': ('not a video', lambda path: path.symlink_to('/dev/zero')),
    'failing disk': ('unreadable', lambda path: path.symlink_to('/proc/self/mem')),
    'text': ('not a video', lambda path: path.write_text('once upon a time\n' * 500)),
    'random bytes': ('not a video', lambda path: path.write_bytes(bytes(range(7, 256)) * 99)),
    'half a JPEG': ('truncated', lambda path: _write_picture(path, '.jpg', 0.5)),
    'head of a JPEG': ('truncated', lambda path: _write_picture(path, '.jpg', 0.01)),
    'half a PNG': ('corrupt', lambda path: _write_picture(path, '.png', 0.5)),
    'playlist': ('not a video', lambda path: path.write_text('#EXTM3U\n#EXTINF:1,\nv.ts\n')),
    'audio only': ('no video stream', video_files.write_audio),
    'no frames': ('zero frames', video_files.write_without_frames),
    'half an mp4': ('truncated', lambda path: _cut(path, 0.5)),
    'most of an mp4': ('truncated', lambda path: _cut(path, 0.99)),
    'half an mp4, index in front': (
        'truncated',
        lambda path: _cut(path, 0.6, muxer={'movflags': 'faststart'}),
    ),
    'half a webm': ('truncated', lambda path: _cut(path, 0.5, '.webm', codec='libvpx-vp9')),
    'half an AVI': ('truncated', lambda path: _cut(path, 0.5, '.avi', codec='mpeg4')),
    'flipped bits': ('corrupt', _flip_bits),
    'large frames': ('too large', lambda path: write_video(path, pictures(1, 1024, 1024))),
    'large frames, small header': ('too large', _lie_about_size),
    'wide strip': ('too large', lambda path: _write_strip(path, 1, 100_000)),
    'high strip': ('too large', lambda path: _write_strip(path, 20_000, 10)),
    'made-up samples': ('corrupt', _lie_about_samples),
}


@pytest.mark.parametrize('name', FAILURES)
def test_failures_are_decode_errors_of_a_kind(tmp_path, name):
    kind, make = FAILURES[name]
    path = tmp_path / 'v.mp4'
    make(path)
    with pytest.raises(DecodeError) as caught, VideoReader(path, max_pixels=2**19) as video:
        video.frames(np.arange(video.num_frames))
    assert caught.value.kind == kind
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f'{path}: {kind}: ')
    assert '\n' not in str(caught.value)


def test_every_kind_of_failure_is_tested():
    assert {kind for kind, _ in FAILURES.values()} == set(KINDS)


@pytest.mark.parametrize('suffix', ['.mp4', '.ts', '.avi', '.mkv'])
def test_a_video_of_too_many_packets_is_refused(tmp_path, monkeypatch, suffix):
    path = write_video(tmp_path / f'v{suffix}')
    monkeypatch.setattr(decode, 'MAX_PACKETS', 39)
    with pytest.raises(DecodeError, match='too large: more than 39 packets'):
        VideoReader(path)
    monkeypatch.setattr(decode, 'MAX_PACKETS', 40)
    with VideoReader(path) as video:
        assert video.num_frames == 40


def test_a_file_of_too_many_boxes_is_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / 'v.mp4')
    monkeypatch.setattr(decode, 'MAX_BOXES', 5)
    with pytest.raises(DecodeError, match='too large: more than 5 boxes'):
        VideoReader(path)


def test_pictures_of_the_widest_shape_are_read(tmp_path):
    path = tmp_path / 'v.png'
    _write_strip(path, 10, 10 * decode.MAX_ASPECT)
    with VideoReader(path) as video:
        assert video.size == (10, 10 * decode.MAX_ASPECT)


def test_frames_that_together_are_too_large_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / 'v.mp4')
    monkeypatch.setattr(decode, 'MAX_CLIP_BYTES', 3 * 48 * 64 * 3)
    with VideoReader(path) as video:
        assert len(video.frames([0, 1, 2])) == 3
        with pytest.raises(DecodeError, match='too large: 4 frames of 64 x 48'):
            video.frames([0, 1, 2, 2])
        assert [index for index, _ in video.pictures([5, 7, 3, 9, 5])] == [3, 5, 7, 9]


def test_mutated_files_fail_cleanly_or_decode(tmp_path):
    data = write_video(tmp_path / 'v.mp4', pictures(10)).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        mutated = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            mutated[at] = rng.integers(256)
        try:
            with VideoReader(bytes(mutated), max_pixels=2**16) as video:
                video.frames(np.linspace(0, video.num_frames - 1, 4).astype(int))
        except DecodeError as error:
            assert error.kind in KINDS
