import cv2
import numpy as np
import pytest
from video_files import pictures

from input_pipeline import decode
from input_pipeline.decode import MAX_PIXELS, DecodeError
from input_pipeline.frame_folder import FrameFolder
from input_pipeline.pipeline import EvalReader, open_video
from input_pipeline.video_list import Record


def write_frames(folder, name='{:05d}.png', frames=None):
    folder.mkdir()
    for number, picture in enumerate(pictures(12) if frames is None else frames, 1):
        cv2.imwrite(str(folder / name.format(number)), picture[..., ::-1])
    return folder


@pytest.mark.parametrize('name', ['{:05d}.png', 'img_{}.PNG', 'clip3-{}.png'])
def test_frames_come_in_the_order_of_their_numbers(tmp_path, name):
    folder = write_frames(tmp_path / 'video', name)
    for junk in ('.00001.png', 'Thumbs.db', 'notes1.txt'):
        (folder / junk).write_text('')
    with open_video(Record(str(folder), 0, 'video')) as video:
        assert (video.num_frames, video.fps, video.size) == (12, 30.0, (48, 64))
        assert video.frame_range(None, None) == (0, 12)
        np.testing.assert_array_equal(video.frames([11, 0, 9, 0]), pictures(12)[[11, 0, 9, 0]])
    views, _ = EvalReader(4, 48, num_crops=3).read(Record(str(folder), 0, 'video'))
    assert views.shape == (3, 4, 48, 48, 3)


def test_only_the_frames_that_are_asked_for_are_read(tmp_path):
    folder = write_frames(tmp_path / 'video')
    (folder / '00005.png').write_bytes(b'')
    with FrameFolder(folder, MAX_PIXELS) as video:
        assert len(video.frames([0, 3, 5])) == 3
        with pytest.raises(DecodeError, match=r'00005\.png: empty'):
            video.frames([4])
        with pytest.raises(IndexError):
            video.frames([12])


def test_pictures_that_together_are_too_large_are_refused(tmp_path, monkeypatch):
    folder = FrameFolder(write_frames(tmp_path / 'video'), MAX_PIXELS)
    monkeypatch.setattr(decode, 'MAX_CLIP_BYTES', 2 * folder.frames([0]).nbytes)
    assert len(folder.frames([0, 1])) == 2
    with pytest.raises(DecodeError, match='too large: 3 frames'):
        folder.frames([0, 1, 1])


def test_a_part_in_seconds_is_refused(tmp_path):
    video = FrameFolder(write_frames(tmp_path / 'video'), MAX_PIXELS)
    with pytest.raises(DecodeError, match='has no times'):
        video.frame_range(0.0, 1.0)


def test_wrong_folders_are_decode_errors(tmp_path):
    (tmp_path / 'empty').mkdir()
    write_frames(tmp_path / 'twice', frames=pictures(1))
    cv2.imwrite(str(tmp_path / 'twice/1.png'), pictures(1)[0])
    write_frames(tmp_path / 'unnumbered', 'cover.png', pictures(1))
    write_frames(tmp_path / 'sizes', frames=[pictures(1)[0], pictures(1, 24, 32)[0]])
    for name, message in {
        'empty': 'not a video: a folder without JPEG or PNG',
        'twice': 'have the same number',
        'unnumbered': "'cover.png' has no number",
        'sizes': 'corrupt: .*has shape',
        'missing': 'unreadable',
    }.items():
        with pytest.raises(DecodeError, match=message) as caught:
            FrameFolder(tmp_path / name, MAX_PIXELS).frames([0, 1])
        assert caught.value.path == str(tmp_path / name)
    with pytest.raises(DecodeError, match=r'00001\.png'):
        FrameFolder(tmp_path / 'sizes', 100).frames([0])
