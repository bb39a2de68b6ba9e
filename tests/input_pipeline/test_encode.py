import io

import av
import cv2
import numpy as np
import pytest
from video_files import decode_everything, pictures, write_audio, write_video

from input_pipeline.decode import DecodeError, VideoReader
from input_pipeline.encode import join_jpegs, transcode


def _smooth(num_frames, height=96, width=128):
    return np.stack([cv2.GaussianBlur(p, (0, 0), 8) for p in pictures(num_frames, height, width)])


def _read(source):
    with VideoReader(source) as video:
        return video.frames(np.arange(video.num_frames)), video.times, video.fps


@pytest.mark.parametrize('codec, crf', [('h264', 12), ('mpeg4', 2), ('jpeg', 2)])
@pytest.mark.parametrize(
    'name, options',
    [
        ('plain.mp4', {}),
        ('reordered.mp4', {'b_frames': 2}),
        ('turned.mp4', {'rotation': 90}),
        ('upside.mp4', {'rotation': 180}),
        ('film.mp4', {'fps': 24}),
        ('vp9.webm', {'codec': 'libvpx-vp9'}),
        ('xvid.avi', {'codec': 'mpeg4', 'qmin': '2', 'qmax': '2'}),
    ],
)
def test_keeps_pictures_and_times_at_the_new_size(tmp_path, codec, crf, name, options):
    path = write_video(tmp_path / name, _smooth(30), **options)
    expected, times, fps = _read(path)
    content = transcode(str(path), 48, 8, crf, codec)
    frames, new_times, new_fps = _read(content)
    assert min(frames.shape[1:3]) == 48
    assert new_fps == pytest.approx(fps, abs=1e-4)
    np.testing.assert_allclose(new_times, times, atol=1e-5)
    size = frames.shape[2], frames.shape[1]
    small = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in expected])
    assert np.abs(small.astype(int) - frames).mean() < 4
    # The same again, from memory.
    assert transcode(path.read_bytes(), 48, 8, crf, codec) == content


@pytest.mark.parametrize('codec', ['h264', 'mpeg4'])
def test_key_frames_stand_where_they_were_asked_for(tmp_path, codec):
    path = write_video(tmp_path / 'a.mp4', gop=250)
    with av.open(io.BytesIO(transcode(str(path), 32, 8, 23, codec))) as container:
        assert not container.streams.video[0].codec_context.has_b_frames
        keys = [k for k, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    assert keys == [0, 8, 16, 24, 32]


@pytest.mark.parametrize('codec', ['h264', 'mpeg4', 'jpeg'])
@pytest.mark.parametrize('matrix, limits', [(1, 1), (5, 2), (1, 2)])
def test_colours_survive_every_matrix_and_range(tmp_path, codec, matrix, limits):
    colours = np.array([[220, 30, 40], [30, 200, 60], [40, 50, 210], [128, 128, 128]], np.uint8)
    flags = np.repeat(np.repeat(colours[None], 32, 0), 16, 1)
    path = tmp_path / 'flags.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=25, options={'crf': '5'})
        stream.width, stream.height, stream.pix_fmt = 64, 32, 'yuv420p'
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, limits
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(flags, format='rgb24').reformat(
                format='yuv420p', dst_colorspace=matrix, dst_color_range=limits
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    before, after = _read(path)[0], _read(transcode(str(path), 32, 8, 4, codec))[0]
    assert np.abs(before[:, :, 8::16].astype(int) - flags[:, 8::16]).max() < 8
    assert np.abs(after[:, :, 8::16].astype(int) - before[:, :, 8::16]).max() < 8


def test_cuts_the_part_that_a_reader_would_take(tmp_path):
    path = write_video(tmp_path / 'long.mp4', _smooth(90), gop=25, b_frames=2)
    content = transcode(str(path), 96, 8, 5, start=1.0, end=2.0)
    with VideoReader(path) as long:
        first, count = long.frame_range(1.0, 2.0)
        expected = long.frames(np.arange(first, first + count))
        assert transcode(long, 96, 8, 5, start=1.0, end=2.0) == content
        with pytest.raises(DecodeError, match='no frame from 7'):
            transcode(long, 96, 8, 5, start=7.0, end=8.0)
    frames = _read(content)[0]
    assert len(frames) == count == 30
    assert np.abs(expected.astype(int) - frames).mean() < 2


def test_small_videos_are_not_enlarged_and_sides_become_even(tmp_path):
    path = write_video(tmp_path / 'a.webm', pictures(5, 45, 63), codec='libvpx-vp9')
    assert _read(transcode(str(path), 256, 8, 23))[0].shape == (5, 44, 62 + 2, 3)


def test_sound_stays_behind_and_a_file_without_pictures_is_refused(tmp_path):
    with pytest.raises(DecodeError, match='no video stream'):
        transcode(str(write_audio(tmp_path / 'a.mp4')), 64, 8, 23)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((64, 8, 23, 'vp9'), 'codec='),
        ((0, 8, 23, 'h264'), 'short_side=0'),
        ((64, 0, 23, 'h264'), 'keyframe_interval=0'),
        ((64, 8, 52, 'h264'), 'crf=52 must be in 0 to 51'),
        ((64, 8, 1, 'jpeg'), 'crf=1 must be in 2 to 31'),
        ((64, 8, 32, 'mpeg4'), 'crf=32 must be in 2 to 31'),
    ],
)
def test_refuses_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        transcode(b'', *arguments)


def test_joined_jpegs_are_the_same_pictures():
    pictures_ = [cv2.imencode('.jpg', picture)[1].tobytes() for picture in _smooth(7)]
    frames, times, fps = _read(join_jpegs(pictures_, 12))
    assert fps == pytest.approx(12)
    np.testing.assert_allclose(times, np.arange(7) / 12)
    for picture, frame in zip(pictures_, frames, strict=True):
        np.testing.assert_array_equal(_read(picture)[0][0], frame)
        plain = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.abs(plain.astype(int) - frame).mean() < 2
    assert all(picture in join_jpegs(pictures_, 12) for picture in pictures_)
    with pytest.raises(ValueError, match='no pictures'):
        join_jpegs([], 12)


def test_numbered_frames_keep_uneven_times_and_decode_alike_from_anywhere(tmp_path):
    uneven = np.cumsum(np.random.default_rng(0).integers(1, 9, 40))
    path = write_video(tmp_path / 'a.mp4', pictures(40, 64, 80), fps=240, pts=uneven)
    content = transcode(str(path), 64, 8, 3, 'mpeg4')
    (tmp_path / 'b.mp4').write_bytes(content)
    whole = decode_everything(tmp_path / 'b.mp4')
    with VideoReader(content) as video:
        np.testing.assert_allclose(video.times, (uneven - uneven[0]) / 240, atol=1e-5)
        for k in (0, 7, 8, 15, 39):
            np.testing.assert_array_equal(video.frames([k])[0], whole[k])


@pytest.mark.parametrize('codec', ['h264', 'mpeg4'])
def test_the_same_video_gives_the_same_bytes_every_time(tmp_path, codec):
    path = write_video(tmp_path / 'a.mp4', _smooth(24))
    contents = {transcode(path.read_bytes(), 48, 8, 20, codec) for _ in range(25)}
    assert len(contents) == 1
