"""Seven small videos, one of them broken, and how the tests of streams read and compare them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
from video_files import pictures, write_video

from input_pipeline.batches import Readers
from input_pipeline.pipeline import TrainReader
from input_pipeline.transforms import Flip, Grayscale, RandomResizedCrop
from input_pipeline.video_list import Record, VideoList

READER = TrainReader(4, 32, transforms=(Flip(), RandomResizedCrop(32), Grayscale(0.5)))
NAMES = tuple('abc')
BAD = 3  # number of the broken one


READERS = [field.name for field in fields(Readers)]


def with_readers(options):
    """Arguments of `train_batches` and `eval_batches`, with the fields of `Readers` among them."""
    readers = Readers(**{name: options.pop(name) for name in READERS if name in options})
    return options | {'readers': readers}


@dataclass(frozen=True)
class Note:
    """Rows of a task of its own: what the record is, and what it draws after the transforms."""

    spec: ClassVar = {'vector': ((3,), np.float32), 'number': ((), np.int32)}

    def __call__(self, record, label, rng):
        drawn = -1 if rng is None else rng.integers(2**30)
        vector = np.array([len(record.path), label, int(record.video_id) + 0.5], np.float32)
        return {'vector': vector, 'number': np.int32(drawn)}


def write_seven(folder: Path) -> VideoList:
    """Writes them; each has another length."""
    records = []
    for k in range(7):
        path = write_video(folder / f'{k}.mp4', pictures(10 + k, seed=k))
        records.append(Record(str(path), k % 3, str(k)))
    (folder / f'{BAD}.mp4').write_text('not a video')
    return VideoList(records, NAMES)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for key in batch:
            assert batch[key].dtype == other[key].dtype
            np.testing.assert_array_equal(batch[key], other[key])
