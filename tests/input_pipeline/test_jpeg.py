"""JPEG pictures: Pillow's pixels, and nothing that a file says is believed."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from video_files import pictures

from input_pipeline import decode
from input_pipeline.decode import KINDS, DecodeError, VideoReader
from input_pipeline.jpeg import JpegReader, open_file
from input_pipeline.pipeline import EvalReader, TrainReader, record_rng
from input_pipeline.sampling import PROTOCOLS
from input_pipeline.transforms import Flip, RandomResizedCrop
from input_pipeline.video_list import Record

HEIGHT, WIDTH = 150, 210
PICTURE = Image.fromarray(pictures(1, HEIGHT, WIDTH)[0])


def encoded(picture=PICTURE, kind='JPEG', orientation=0, **options):
    if orientation:
        options['exif'] = Image.Exif()
        options['exif'][0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def by_pillow(content):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert('RGB'))


def read(source, **options):
    with open_file(source, **options) as video:
        return video.frames([0])[0]


ORDINARY = {
    'colours at half resolution': encoded(quality=90),
    'colours across': encoded(subsampling='4:2:2'),
    'all colours': encoded(subsampling='4:4:4'),
    'progressive': encoded(progressive=True),
    'with restarts': encoded(restart_marker_rows=1),
    'grey': encoded(PICTURE.convert('L')),
    'RGB': encoded(keep_rgb=True),
    'junk behind': encoded() + b'junk',
    'fill before markers': encoded().replace(b'\xff\xdb', b'\xff\xff\xff\xdb'),
    'fill first': encoded(progressive=True).replace(b'\xff\xd8', b'\xff\xd8\xff\xff\xff', 1),
}


@pytest.mark.parametrize('name', ORDINARY)
def test_ordinary_pictures_have_the_pixels_of_pillow(tmp_path, name):
    content = ORDINARY[name]
    path = tmp_path / 'picture.png'  # the content decides
    path.write_bytes(content)
    for source in (content, path):
        with open_file(source) as video:
            assert isinstance(video, JpegReader)
            assert (video.num_frames, video.size) == (1, (HEIGHT, WIDTH))
            np.testing.assert_array_equal(video.frames([0, 0])[1], by_pillow(content))
    with open_file(content, jpeg_decoder='ffmpeg') as other:
        assert isinstance(other, VideoReader)
        assert (other.fps, other.duration) == (video.fps, video.duration)
        assert np.abs(other.frames([0])[0].astype(int) - by_pillow(content)).mean() < 6


@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_turned_upright_by_their_exif_orientation(orientation):
    ours = encoded(orientation=orientation, subsampling='4:4:4', quality=95)
    np.testing.assert_array_equal(read(ours), by_pillow(ours))
    for content in (ours, encoded(kind='PNG', orientation=orientation)):
        found, expected = read(content, jpeg_decoder='ffmpeg'), by_pillow(content)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 3


ALL_COLOURS = encoded(subsampling='4:4:4')
UNUSUAL = {
    'CMYK': (encoded(PICTURE.convert('CMYK'), subsampling='4:4:4', quality=95), 1),
    'PNG under the name of a JPEG': (encoded(kind='PNG'), 1),
    'a header of many parts': (ALL_COLOURS[:2] + b'\xff\xe5\0\2' * 2**14 + ALL_COLOURS[2:], 1),
    'two pictures': (2 * ALL_COLOURS, 2),
}


@pytest.mark.parametrize('name', UNUSUAL)
def test_unusual_files_go_through_ffmpeg(tmp_path, name):
    content, num_frames = UNUSUAL[name]
    path = tmp_path / 'n02105855_2933.JPEG'
    path.write_bytes(content)
    for source in (content, path):
        with open_file(source) as video:
            assert isinstance(video, VideoReader)
            assert video.num_frames == num_frames
            found = video.frames([0])[0]
        assert np.abs(found.astype(int) - by_pillow(content)).max() <= 4


def test_the_first_picture_of_an_indexed_file_is_read():
    preview = PICTURE.resize((21, 15))
    content = encoded(kind='MPO', save_all=True, append_images=[preview], quality=90)
    with open_file(content) as video:
        assert isinstance(video, JpegReader)
        assert (video.num_frames, video.size) == (1, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(read(content), by_pillow(content))


def sized(height, width):
    """A picture that claims another size."""
    content = bytearray(encoded())
    at = content.index(b'\xff\xc0') + 5
    content[at : at + 4] = height.to_bytes(2, 'big') + width.to_bytes(2, 'big')
    return bytes(content)


def of_scans(count):
    content = encoded(progressive=True)
    at = content.rindex(b'\xff\xda')
    scan, end = content[at:-2], content[-2:]
    return content[:at] + scan * count + end


def without_tables():
    content = encoded()
    at = content.index(b'\xff\xdb')
    return content[:at] + b'\xff\xfe' + content[at + 2 :]


FAILURES = {
    'no bytes': ('empty', b''),
    'a start alone': ('truncated', b'\xff\xd8\xff'),
    'half a picture': ('truncated', encoded()[: len(encoded()) // 2]),
    'no end': ('truncated', encoded()[:-2]),
    'huge': ('too large', sized(65500, 65500)),
    'a strip': ('too large', sized(8, 2000)),
    'progressive without end': ('too large', of_scans(decode.MAX_SCANS + 1)),
    'no tables': ('corrupt', without_tables()),
    'text': ('not a video', b'once upon a time' * 10),
}


@pytest.mark.parametrize('name', FAILURES)
def test_failures_are_decode_errors_of_a_kind(tmp_path, name):
    kind, content = FAILURES[name]
    path = tmp_path / 'picture.JPEG'
    path.write_bytes(content)
    with pytest.raises(DecodeError) as caught:
        read(path)
    assert (caught.value.kind, caught.value.path) == (kind, str(path))
    if name != 'no tables':  # for which FFmpeg takes others
        with pytest.raises(DecodeError):
            read(path, jpeg_decoder='ffmpeg')


def test_a_picture_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(cv2, 'imdecode', None)
    for content in (encoded(), encoded(orientation=6), encoded(progressive=True)):
        with pytest.raises(DecodeError, match='too large: 210 x 150 is over max_pixels=31499'):
            open_file(content, max_pixels=WIDTH * HEIGHT - 1)
    open_file(encoded(), max_pixels=WIDTH * HEIGHT)


def test_paths_that_are_no_files_fail_as_those_of_videos(tmp_path):
    for path, kind in ((tmp_path, 'not a video'), (tmp_path / 'none.jpg', 'missing')):
        with pytest.raises(DecodeError) as caught:
            open_file(path)
        assert caught.value.kind == kind


def test_mutated_pictures_fail_cleanly_or_decode_the_same_twice():
    rng = np.random.default_rng(0)
    seeds = [
        ORDINARY['colours at half resolution'],
        ORDINARY['progressive'],
        encoded(orientation=6),
    ]
    read_by_us = 0
    for k in range(300):
        mutated = bytearray(seeds[k % 3])
        for at in rng.integers(2, 700 if k % 2 else len(mutated), rng.integers(1, 6)):
            mutated[at] = rng.integers(256)
        try:
            with open_file(bytes(mutated), max_pixels=2**16) as video:
                read_by_us += isinstance(video, JpegReader)
                first = video.frames([0])
                np.testing.assert_array_equal(first, read(bytes(mutated), max_pixels=2**16)[None])
        except DecodeError as error:
            assert error.kind in KINDS
    assert read_by_us > 100


def test_frame_numbers_and_times_are_those_of_one_frame():
    with open_file(encoded()) as ours, VideoReader(encoded()) as other:
        for part in ((None, None), (0.0, None), (None, 0.01), (0.0, 5.0)):
            assert ours.frame_range(*part) == other.frame_range(*part) == (0, 1)
        for part in ((0.1, None), (None, 0.0), (1.0, 2.0)):
            for video in (ours, other):
                with pytest.raises(DecodeError, match='zero frames: no frame from'):
                    video.frame_range(*part)
        for numbers in ([1], [-1], []):
            with pytest.raises(IndexError):
                ours.frames(numbers)


@pytest.mark.parametrize('sampling', PROTOCOLS)
def test_both_decoders_lead_to_the_same_draws(tmp_path, sampling):
    path = tmp_path / 'p.jpg'
    path.write_bytes(encoded(quality=95, subsampling='4:4:4'))
    transforms = (RandomResizedCrop(32, (0.08, 1.0), interpolation='smooth_bicubic'), Flip())
    reader = TrainReader(1, 32, sampling, transforms=transforms, repeats=3)
    other = dataclasses.replace(reader, jpeg_decoder='ffmpeg')
    clips, theirs = (
        r.read(Record(str(path), 0, ''), record_rng(0, 1, 2))[0] for r in (reader, other)
    )
    for clip, their in zip(clips, theirs):
        difference = np.abs(clip.astype(int) - their)
        assert 0 < difference.max() <= 4
    views = [EvalReader(1, 32, sampling, jpeg_decoder=d) for d in ('libjpeg', 'ffmpeg')]
    made = [view.read(Record(str(path), 0, ''))[0].astype(int) for view in views]
    assert np.abs(made[0] - made[1]).max() <= 4


def test_a_wrong_decoder_is_named():
    with pytest.raises(ValueError, match="jpeg_decoder='pillow' must be one of"):
        TrainReader(1, 32, jpeg_decoder='pillow')


@pytest.mark.parametrize(('crop', 'short'), [(0.95, 235), (0.875, 256)])
def test_views_of_a_picture_are_those_of_pillow_and_torchvision(tmp_path, crop, short):
    assert int(224 / crop) == short
    picture = Image.fromarray(pictures(1, 300, 401)[0])
    path = tmp_path / 'p.jpg'
    path.write_bytes(encoded(picture, quality=90))
    reader = EvalReader(
        1, 224, size=(short,), rounding='torchvision', interpolation='smooth_bicubic'
    )
    width = short * 401 // 300
    resized = Image.open(path).resize((width, short), Image.Resampling.BICUBIC)
    top, left = round((short - 224) / 2), round((width - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    np.testing.assert_array_equal(reader.read(Record(str(path), 0, ''))[0][0, 0], expected)
