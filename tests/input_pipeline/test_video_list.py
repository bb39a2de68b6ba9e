"""Lists in memory: what was put in comes out, and processes share it."""

import functools
import operator
import pickle

import numpy as np
import pytest

from input_pipeline.video_list import Record, VideoList

NAMES = ('a', 'b')
LISTS = {
    'plain': ([Record('/v/ä 1.mp4', 1, 'ä 1'), Record('/v/2.mp4', 0, '')], NAMES),
    'two heads': ([Record('1', (0, 1), '1'), Record('2', (1, 0), '2')], (NAMES, NAMES)),
    'parts': (
        [Record('1', 0, '1', 0.1, 7.25), Record('1', 0, '1', None, 3.0), Record('1', 1, '1')],
        NAMES,
    ),
    'with loaders': (
        [Record('1', 0, '1', load=functools.partial(bytes, 3)), Record('2', 1, '2')],
        NAMES,
    ),
    'names that are not UTF-8': ([Record('/v/\udcff\udc80.mp4', 0, '\udcfe')], NAMES),
    'captions': ([Record('1', (), '1', captions=('ä', 'b c')), Record('2', (), '2')], ()),
    'empty': ([], NAMES),
}


@pytest.mark.parametrize('name', LISTS)
def test_records_come_out_as_they_went_in(name):
    records, class_names = LISTS[name]
    source = VideoList(records, class_names)
    copy = pickle.loads(pickle.dumps(source))
    for found in (source, copy, pickle.loads(pickle.dumps(copy))):
        assert len(found) == len(records)
        assert list(found) == records or [r.load and r.load() for r in found] == [b'\0\0\0', None]
        for record in found:
            labels = record.label if isinstance(record.label, tuple) else (record.label,)
            assert all(type(label) is int for label in labels)
        assert found.class_names == class_names
        with pytest.raises(IndexError):
            found[len(records)]
    assert source.num_classes == {'two heads': (2, 2), 'captions': 0}.get(name, 2)
    if records:
        assert source[-1].path == records[-1].path and source[np.int64(0)].path == records[0].path


@pytest.mark.parametrize('load', [None, operator.attrgetter('x')])
def test_what_processes_copy_does_not_grow_with_the_list(load):
    records = [Record(f'/data/{k:08d}.mp4', k % 2, str(k), k, k + 0.5, load) for k in range(3000)]
    source = VideoList(records, NAMES)
    outside = []
    content = pickle.dumps(source, 5, buffer_callback=outside.append)
    assert len(content) < 3000 < sum(buffer.raw().nbytes for buffer in outside)
    copy = pickle.loads(content, buffers=outside)
    assert copy[2999].path == '/data/00002999.mp4' and copy[2999].end == 2999.5


def test_a_loader_that_cannot_be_pickled_works_where_it_is():
    source = VideoList([Record('1', 0, '1', load=lambda: b'here')], NAMES)
    assert source[0].load() == b'here'
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(source)
