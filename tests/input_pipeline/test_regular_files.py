"""What is opened: regular files, never anything that waits; and what a failing disk does."""

import os
import socket

import pytest
from video_files import pictures, write_video

from input_pipeline import regular_files
from input_pipeline.decode import DecodeError, VideoReader
from input_pipeline.regular_files import NotRegularError, SteadyFile, open_regular, read_regular
from input_pipeline.sources import open_source
from input_pipeline.text_files import read_text


def make_socket(path):
    # The name of a socket must be short.
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(path.parent, os.O_PATH)
        listener.bind(f'/proc/self/fd/{folder}/{path.name}')
        os.close(folder)


SPECIAL = {
    'a FIFO': os.mkfifo,
    'a socket': make_socket,
    'a directory': lambda path: path.mkdir(),
    'a character device': lambda path: path.symlink_to('/dev/zero'),
}


@pytest.mark.parametrize('what', SPECIAL)
def test_what_is_no_regular_file_is_named_at_once(tmp_path, what):
    path = tmp_path / 'v.mp4'
    SPECIAL[what](path)
    with pytest.raises(NotRegularError, match=f'is {what}, not a regular file'):
        open_regular(path)
    with pytest.raises(DecodeError, match=f'not a video: is {what}'):
        VideoReader(path)
    with pytest.raises(ValueError, match=rf'v\.mp4: is {what}'):
        read_text(path)


@pytest.mark.parametrize('name', ['list.txt', 'list.csv', 'list.json'])
def test_a_list_that_is_a_fifo_does_not_hang(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match='is a FIFO'):
        open_source(tmp_path / name)


def test_a_fifo_that_takes_the_place_of_a_file_does_not_hang(tmp_path, monkeypatch):
    path = tmp_path / 'v.mp4'
    path.write_bytes(b'was here')
    before = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, 'stat', lambda _: before)
    with pytest.raises(NotRegularError, match='is a FIFO'):
        open_regular(path)


class FailingFile:
    """A file whose reads fail behind some place, the first few times."""

    def __init__(self, file, behind, failures):
        self._file, self._behind, self._failures = file, behind, failures

    def read(self, size=-1):
        if self._file.tell() >= self._behind and self._failures:
            self._failures.pop()
            raise OSError(116, 'Stale file handle')
        return self._file.read(size)

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.fixture
def disk(monkeypatch):
    """Makes reads fail: behind a place, a number of times."""
    monkeypatch.setattr(regular_files, 'RETRY_SECONDS', 0)

    def fail(behind, times):
        failures = [None] * times
        monkeypatch.setattr(
            regular_files,
            'open_regular',
            lambda path, buffering: FailingFile(open_regular(path, buffering), behind, failures),
        )

    return fail


@pytest.mark.parametrize('behind', [0, 1, 40_000])
def test_a_read_that_fails_once_is_tried_again(tmp_path, disk, behind):
    path = write_video(tmp_path / 'v.mp4', pictures(40, 240, 320), crf='0')
    content = path.read_bytes()
    with VideoReader(path) as video:
        frames = video.frames([0, 39])
    disk(behind, 1)
    assert read_regular(path) == content
    disk(behind, 1)
    with VideoReader(path) as video:
        assert (video.frames([0, 39]) == frames).all()


def test_opening_is_tried_again_unless_the_answer_stays(tmp_path, monkeypatch):
    path = tmp_path / 'v.mp4'
    path.write_bytes(b'content')
    errors = [OSError(116, 'Stale file handle')]

    def opening(name, buffering):
        if errors:
            raise errors.pop()
        return open_regular(name, buffering)

    monkeypatch.setattr(regular_files, 'RETRY_SECONDS', 0)
    monkeypatch.setattr(regular_files, 'open_regular', opening)
    assert read_regular(path) == b'content'
    errors += [PermissionError(13, 'Permission denied')]
    with pytest.raises(PermissionError):
        read_regular(path)


@pytest.mark.parametrize('suffix', ['.mp4', '.ts', '.mkv', '.avi'])
@pytest.mark.parametrize('behind', [0, 1, 40_000])
def test_a_read_that_goes_on_failing_is_named_with_its_error(tmp_path, disk, behind, suffix):
    path = write_video(tmp_path / f'v{suffix}', pictures(40, 240, 320), crf='0')
    assert path.stat().st_size > 80_000
    disk(behind, 1000)
    with pytest.raises(DecodeError) as caught, VideoReader(path) as video:
        video.frames([0, 39])
    assert (caught.value.kind, caught.value.reason) == ('unreadable', 'ESTALE: Stale file handle')
    with SteadyFile(path) as file, pytest.raises(OSError, match='Stale'):
        file.read(50_000) + file.read()
