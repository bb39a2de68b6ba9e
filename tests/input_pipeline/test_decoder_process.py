"""Views from a process that may die or hang."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from input_pipeline.decode import DecodeError
from input_pipeline.decoder_process import DecoderProcess
from input_pipeline.pipeline import EvalReader
from input_pipeline.video_list import Record

READER = EvalReader(num_frames=4, image_size=32, num_clips=2)


class Hanging(EvalReader):
    """Hangs over some videos, and dies over others."""

    def read(self, record):
        if 'hang' in record.path:
            signal.pause()
        if 'die' in record.path:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().read(record)


@pytest.fixture
def process(request):
    found = DecoderProcess(*request.param)
    yield found
    found.close()


@pytest.mark.parametrize('process', [(READER, 30)], indirect=True)
def test_views_are_those_of_the_reader(process, clips, tmp_path):
    path = str(clips / 'val' / '000000.mp4')
    wanted, _ = READER.read(Record(path, 0, path))
    np.testing.assert_array_equal(process.read(path), wanted)
    broken = tmp_path / 'broken\udcff.mp4'
    broken.write_bytes(b'nothing')
    with pytest.raises(DecodeError, match='not a video') as error:
        process.read(broken)
    assert error.value.kind == 'not a video'
    np.testing.assert_array_equal(process.read(path), wanted)


@pytest.mark.parametrize('process', [(READER, 30)], indirect=True)
def test_a_video_is_not_blamed_for_a_process_that_died_before(process, clips):
    path = str(clips / 'val' / '000000.mp4')
    process.start()
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert process.read(path).shape == READER.shape


HANGING = Hanging(num_frames=4, image_size=32)


@pytest.mark.parametrize('process', [(HANGING, 0.5)], indirect=True)
def test_a_process_that_hangs_or_dies_is_replaced(process, clips):
    path = str(clips / 'val' / '000000.mp4')
    for name, kind in (('die', 'crashed'), ('hang', 'timed out')):
        with pytest.raises(DecodeError) as error:
            process.read(name)
        assert error.value.kind == kind
    process.start()
    assert process.read(path).shape == HANGING.shape
