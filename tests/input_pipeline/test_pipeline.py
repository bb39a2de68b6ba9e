import dataclasses
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from streams import BAD, NAMES, READER, Note, assert_same, with_readers, write_seven
from video_files import decode_everything, pictures, write_video

from input_pipeline.batches import HostPart, Readers
from input_pipeline.decode import VideoReader
from input_pipeline.pipeline import (
    EvalReader,
    TrainReader,
    epoch_order,
    eval_batches,
    record_rng,
    train_batches,
)
from input_pipeline.sampling import PROTOCOLS
from input_pipeline.transforms import CentreCrop, Flip, RandomResizedCrop, apply
from input_pipeline.video_list import Record, VideoList
from input_pipeline.workers import Skipped


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return write_seven(tmp_path_factory.mktemp('videos'))


def train(source, reader=READER, **changes):
    options = {'batch_size': 4, 'seed': 7, 'num_steps': 6} | changes
    return list(train_batches(source, reader, **with_readers(options)))


def test_shapes_and_types(source):
    batches = train_batches(source, READER, batch_size=4, seed=7, num_steps=2)
    assert len(batches) == 2
    batch = next(batches)
    expected = {
        'video': ((4, 4, 32, 32, 3), np.uint8),
        'label': ((4,), np.int32),
        'mask': ((4,), np.float32),
        'index': ((4,), np.int64),
        'epoch': ((4,), np.int64),
        'path': ((4,), object),
        'error': ((4,), object),
    }
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == expected
    batches.close()


def test_every_epoch_holds_every_record_once_in_a_new_order(source):
    batches = train(source, batch_size=7, num_steps=3)
    for epoch, batch in enumerate(batches):
        assert sorted(batch['index']) == list(range(7))
        assert (batch['epoch'] == epoch).all()
        np.testing.assert_array_equal(batch['index'], epoch_order(7, epoch, 7))
    assert len({tuple(batch['index']) for batch in batches}) == 3


def test_without_shuffling_the_order_is_that_of_the_list(source):
    indices = np.concatenate([b['index'] for b in train(source, shuffle=False, num_steps=4)])
    np.testing.assert_array_equal(indices, np.arange(16) % 7)


def test_batches_do_not_depend_on_the_number_of_threads(source):
    one = train(source, num_threads=1)
    assert_same(one, train(source, num_threads=3, buffer_size=2))
    assert_same(one, train(source, num_threads=0))


def test_another_seed_gives_another_stream(source):
    assert (train(source)[0]['video'] != train(source, seed=8)[0]['video']).any()


@pytest.mark.parametrize('hosts', [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(source, hosts):
    whole = train(source)
    parts = [train(source, host=HostPart(j, hosts)) for j in range(hosts)]
    joined = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts)
    ]
    assert_same(whole, joined)


@pytest.mark.parametrize('hosts', [1, 2, 3, 5, 6, 10])
def test_hosts_together_read_every_record_once_an_epoch(source, hosts):
    steps, batch_size = 7, 30  # 30 epochs of 7 records, which no number of hosts divides
    seen = [
        (int(epoch), int(index))
        for j in range(hosts)
        for batch in train(source, num_steps=steps, batch_size=batch_size, host=HostPart(j, hosts))
        for epoch, index in zip(batch['epoch'], batch['index'])
    ]
    assert sorted(seen) == [(epoch, index) for epoch in range(30) for index in range(7)]


@pytest.mark.parametrize('step', [1, 5])
def test_starting_late_gives_the_same_later_batches(source, step):
    assert_same(train(source)[step:], train(source, start_step=step))


def test_starting_late_reads_nothing_earlier(source):
    class Counting:
        seen = 0

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            Counting.seen += 1
            return source[index]

    start = 10**9
    batches = train(Counting(), start_step=start, num_steps=start + 2)
    assert len(batches) == 2
    assert Counting.seen == 8


def test_a_finished_run_has_no_batches(source):
    batches = train_batches(source, READER, batch_size=4, seed=7, start_step=6, num_steps=6)
    assert len(batches) == 0
    assert list(batches) == []


def test_any_record_can_be_made_again_alone(source):
    for batch in train(source):
        for k, index in enumerate(batch['index']):
            if index == BAD:
                continue
            rng = record_rng(7, int(batch['epoch'][k]), int(index))
            (video,), (rows,) = READER.read(source[int(index)], rng)
            np.testing.assert_array_equal(video, batch['video'][k])
            assert rows.keys() == {'label'} and rows['label'] == batch['label'][k]


def test_the_same_record_differs_from_epoch_to_epoch(source):
    first, second = train(source, batch_size=7, num_steps=2)
    k, j = list(first['index']).index(0), list(second['index']).index(0)
    assert (first['video'][k] != second['video'][j]).any()


def test_a_clip_is_what_the_transforms_make_of_its_frames(source):
    reader = dataclasses.replace(READER, transforms=(RandomResizedCrop(READER.image_size), Flip()))
    record, rng = source[0], record_rng(0, 0, 0)
    with VideoReader(record.path) as video:
        protocol = PROTOCOLS[reader.sampling]
        indices = protocol.train(
            video.num_frames, reader.num_frames, rng, reader.interval, video.fps
        )
        expected, _ = apply(reader.transforms, video.frames(indices), 0, rng.spawn(1)[0])
    made = reader.read(record, record_rng(0, 0, 0))[0]
    np.testing.assert_array_equal(made[0], expected)


def test_a_bad_video_is_masked_and_named_in_its_place(source):
    seen = 0
    for batch in train(source, num_steps=7):  # four epochs
        bad = batch['index'] == BAD
        np.testing.assert_array_equal(batch['mask'], 1.0 - bad)
        assert (batch['error'][~bad] == '').all()
        for k in np.flatnonzero(bad):
            seen += 1
            assert batch['error'][k].startswith('not a video: ')
            assert batch['path'][k] == source[BAD].path
            assert batch['label'][k] == source[BAD].label
            assert not batch['video'][k].any()
    assert seen == 4


PAIRS = dataclasses.replace(READER, repeats=2)


def test_the_copies_of_a_record_are_neighbours_with_the_same_frames(source):
    plain = TrainReader(4, 48, transforms=(CentreCrop(48),), repeats=3)
    (batch,) = train_batches(source, plain, batch_size=6, seed=7, num_steps=1, shuffle=False)
    assert batch['index'].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch['label'].tolist() == [0, 0, 0, 1, 1, 1]
    for k in (1, 2, 4, 5):
        np.testing.assert_array_equal(batch['video'][k], batch['video'][k - k % 3])
    assert (batch['video'][0] != batch['video'][3]).any()


def test_copies_have_draws_of_their_own_and_the_first_is_the_only_one_of_a_single_run(source):
    pairs = train(source, PAIRS, batch_size=14)
    singles = train(source, batch_size=7)
    for pair, single in zip(pairs, singles):
        for key in pair:
            np.testing.assert_array_equal(pair[key][::2], single[key])
        good = pair['mask'][::2] > 0
        assert (pair['video'][1::2] != pair['video'][::2]).any((1, 2, 3, 4))[good].all()


def test_a_flip_swaps_the_label_of_its_copy_alone(source):
    reader = TrainReader(2, 48, transforms=(CentreCrop(48), Flip(0.5, ((0, 1),))), repeats=16)
    (batch,) = train_batches(source, reader, batch_size=16, seed=0, num_steps=1, shuffle=False)
    plain = batch['video'][batch['label'] == 0]
    flipped = batch['video'][batch['label'] == 1]
    assert len(plain) + len(flipped) == 16 and len(plain) and len(flipped)
    for video in flipped:
        np.testing.assert_array_equal(video[:, :, ::-1], plain[0])


@pytest.mark.parametrize('hosts', [2, 3])
def test_copies_stay_together_for_any_number_of_hosts_and_any_start(source, hosts):
    whole = train(source, PAIRS, batch_size=12)
    indices = np.concatenate([b['index'] for b in whole])[::2]
    for epoch in range(5):  # six steps of six records, seven records an epoch
        assert sorted(indices[7 * epoch : 7 * epoch + 7]) == list(range(7))
    for start in (0, 4):
        parts = [
            train(source, PAIRS, batch_size=12, start_step=start, host=HostPart(j, hosts))
            for j in range(hosts)
        ]
        joined = [
            {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
            for step in zip(*parts)
        ]
        assert_same(whole[start:], joined)


def test_all_copies_of_a_bad_video_are_masked(source):
    for batch in train(source, PAIRS, batch_size=14, num_steps=2):
        assert batch['mask'].sum() == 12
        assert (batch['error'] != '').tolist() == (batch['index'] == BAD).tolist()


@pytest.mark.parametrize('options', [{'num_threads': 2}, {'num_workers': 2}])
def test_a_reader_brings_keys_of_its_own(source, options):
    reader = dataclasses.replace(PAIRS, annotate=Note())
    plain = train(source, PAIRS, batch_size=14, num_steps=2)
    for batch, other in zip(train(source, reader, batch_size=14, num_steps=2, **options), plain):
        vector, number = batch.pop('vector'), batch.pop('number')
        assert_same([batch], [other])
        assert (vector.shape, vector.dtype) == ((14, 3), np.float32)
        assert (number.shape, number.dtype) == ((14,), np.int32)
        for k, index in enumerate(batch['index']):
            if index == BAD:
                assert not vector[k].any() and not number[k]
                continue
            record = source[int(index)]
            rng = record_rng(7, int(batch['epoch'][k]), int(index)).spawn(2)[k % 2]
            label = record.label
            for transform in READER.transforms:
                _, label = transform(np.zeros((4, 48, 64, 3), np.uint8), label, rng)
            assert vector[k].tolist() == [len(record.path), label, int(index) + 0.5]
            assert number[k] == rng.integers(2**30)


@pytest.mark.parametrize('options', [{'num_threads': 2}, {'num_workers': 2}])
def test_tests_have_the_keys_too_and_draw_nothing(source, options):
    reader = EvalReader(4, 32, annotate=Note())
    batches = list(eval_batches(source, reader, batch_size=4, readers=Readers(**options)))
    plain = list(eval_batches(source, EvalReader(4, 32), batch_size=4))
    vector, number = (
        np.concatenate([batch.pop(key) for batch in batches]) for key in ('vector', 'number')
    )
    assert_same(batches, plain)
    assert (vector.dtype, number.dtype) == (np.float32, np.int32)
    assert number.tolist() == [0 if k in (BAD, 7) else -1 for k in range(8)]
    assert vector[:, 2].tolist() == [0 if k in (BAD, 7) else k + 0.5 for k in range(8)]


class Other(Note):
    """Makes rows that are not those of its spec."""

    def __call__(self, record, label, rng):
        return super().__call__(record, label, rng) | {'number': np.float32(1)}


class OwnLabel:
    """Rows that take the place of the class."""

    def __init__(self, key='label'):
        self.spec = {key: ((2,), np.float32)}

    def __call__(self, record, label, rng):
        return {'label': np.array([label, 1], np.float32)}


def test_own_keys_may_replace_the_label_and_nothing_else(source):
    reader = dataclasses.replace(READER, annotate=OwnLabel())
    (batch,) = train(source, reader, batch_size=4, num_steps=1, shuffle=False)
    assert batch['label'].tolist() == [[0, 1], [1, 1], [2, 1], [0, 0]]
    with pytest.raises(ValueError, match=r"annotate of the reader made rows .*'number'.* its spec"):
        train(source, dataclasses.replace(READER, annotate=Other()))
    with pytest.raises(ValueError, match=r"annotate makes \['mask'\], which every batch has"):
        EvalReader(4, 32, annotate=OwnLabel('mask'))


def test_a_wrong_transform_is_raised_and_names_the_record(source):
    reader = TrainReader(4, 32, transforms=(RandomResizedCrop(24),))
    batches = train_batches(source, reader, batch_size=4, seed=0, num_steps=2)
    with pytest.raises(ValueError, match='image_size of the reader and of its transforms'):
        list(batches)

    def broken(video, label, rng):
        raise KeyError('oops')

    batches = train_batches(
        source, TrainReader(4, 32, transforms=(broken,)), batch_size=4, seed=0, num_steps=2
    )
    with pytest.raises(KeyError, match='oops') as caught:
        list(batches)
    assert 'while reading record' in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'batch_size': 5, 'host': HostPart(0, 2)}, r'batch_size=5 .* multiple of host\.count=2'),
        ({'seed': -1}, 'seed=-1'),
        (
            {'reader': PAIRS, 'batch_size': 6, 'host': HostPart(0, 2)},
            r'batch_size=6 .* multiple of host\.count=2 times repeats=2',
        ),
    ],
)
def test_wrong_arguments_are_errors(source, options, message):
    with pytest.raises(ValueError, match=message):
        train(source, **options)
    with pytest.raises(ValueError, match=r'host\.index=2 must be in 0 to 1'):
        HostPart(2, 2)


def test_wrong_readers_are_errors():
    with pytest.raises(ValueError, match="sampling='dense' must be one of"):
        TrainReader(4, 32, sampling='dense')
    with pytest.raises(ValueError, match='num_frames=0'):
        EvalReader(0, 32)
    with pytest.raises(ValueError, match='num_crops=2'):
        EvalReader(4, 32, num_crops=2)
    with pytest.raises(ValueError, match="rounding='up'"):
        EvalReader(4, 32, rounding='up')
    with pytest.raises(ValueError, match='repeats=0 must be at least 1'):
        TrainReader(4, 32, repeats=0)
    for reader in (TrainReader, EvalReader):
        with pytest.raises(ValueError, match=r'interval=1\.5 must be a whole number'):
            reader(4, 32, 'stride', 1.5)


def test_close_ends_the_stream(source):
    batches = train_batches(source, READER, batch_size=4, seed=7, num_steps=100)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_labels_of_two_heads(source):
    records = [Record(source[k].path, (k, 2 * k), str(k)) for k in (0, 1)]
    pair = VideoList(records, (NAMES, NAMES))
    batch = train(pair, batch_size=2, num_steps=1, shuffle=False)[0]
    assert batch['label'].tolist() == [[0, 0], [1, 2]]
    last = list(eval_batches(pair, EvalReader(2, 32), batch_size=4))[-1]
    assert last['label'].shape == (4, 2)


def test_part_of_a_video_is_read_when_times_say_so(source):
    path = source[6].path  # 16 frames at 30 per second
    part = VideoList([Record(path, 0, 'part', 0.2, 0.4)], NAMES)
    batch = next(eval_batches(part, EvalReader(6, 48), batch_size=1))
    expected = decode_everything(path)[[6, 8, 8, 10, 10, 11], :, 8:56]
    np.testing.assert_array_equal(batch['video'][0, 0], expected)
    outside = VideoList([Record(path, 0, 'part', 7.0, 8.0)], NAMES)
    batch = next(eval_batches(outside, EvalReader(6, 48), batch_size=1))
    assert batch['error'][0].startswith('zero frames: no frame from 7.0 to 8.0 s')


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_every_sampling_reads(source, protocol):
    reader = TrainReader(4, 32, protocol, 2, (RandomResizedCrop(32),))
    batch = next(train_batches(source, reader, batch_size=7, seed=0, num_steps=1))
    assert batch['mask'].sum() == 6
    batch = next(eval_batches(source, EvalReader(4, 32, protocol, 2, 2), batch_size=7))
    assert batch['video'].shape == (7, 2, 4, 32, 32, 3)


def test_strided_views_are_frames_of_the_file(source):
    views, _ = EvalReader(4, 48, 'stride', 2, num_clips=3).read(source[6])
    everything = decode_everything(source[6].path)  # 16 frames, 48 x 64
    for view, start in zip(views, (0, 4, 9)):
        frames = everything[start : start + 7 : 2, :, 8:56]
        np.testing.assert_array_equal(view, frames)
    views, _ = EvalReader(4, 48, 'stride', 6).read(source[6])
    np.testing.assert_array_equal(views[0], everything[[0, 6, 12, 15], :, 8:56])


def test_rounding_moves_the_test_crops(source):
    nearest, down = (
        EvalReader(4, 33, rounding=rounding).read(source[0])[0] for rounding in ('nearest', 'down')
    )
    assert (nearest != down).any()


@pytest.mark.parametrize('hosts', [1, 2])
def test_evaluation_reads_every_record_once_and_pads_the_rest(source, hosts):
    reader = EvalReader(4, 32, num_clips=2, num_crops=3)
    parts = [
        eval_batches(source, reader, batch_size=4, host=HostPart(j, hosts)) for j in range(hosts)
    ]
    assert {len(part) for part in parts} == {2}
    steps = list(zip(*parts))
    assert len(steps) == 2
    indices, masks, errors = (
        np.concatenate([batch[key] for step in steps for batch in step])
        for key in ('index', 'mask', 'error')
    )
    assert indices.tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    assert masks.tolist() == [1, 1, 1, 0, 1, 1, 1, 0]
    assert [bool(error) for error in errors] == [k == BAD for k in range(8)]
    assert steps[0][0]['video'].shape == (4 // hosts, 6, 4, 32, 32, 3)


def test_views_of_a_video_are_clips_outside_and_crops_inside(source):
    reader = EvalReader(4, 48, num_clips=2, num_crops=3)
    views, _ = reader.read(source[0])
    everything = decode_everything(source[0].path)
    # Ten frames in four segments: 2 views at 1/2 and at the end of each segment.
    for clip, frames in enumerate(([1, 4, 6, 9], [2, 5, 8, 9])):
        for crop, left in enumerate((0, 8, 16)):
            expected = everything[frames][:, :, left : left + 48]
            np.testing.assert_array_equal(views[3 * clip + crop], expected)


def test_evaluation_is_the_same_every_time(source):
    reader = EvalReader(4, 32)
    first, second = (
        list(eval_batches(source, reader, batch_size=3, readers=Readers(num_threads=n)))
        for n in (0, 3)
    )
    assert_same(first, second)


def test_records_that_load_their_bytes_give_the_clips_of_their_files(source):
    loading = VideoList(
        [
            dataclasses.replace(r, path=f'shard#{k}', load=Path(r.path).read_bytes)
            for k, r in enumerate(source[i] for i in range(len(source)))
        ],
        source.class_names,
    )
    for a, b in zip(train(source), train(loading)):
        np.testing.assert_array_equal(a['video'], b['video'])
    assert train(loading)[0]['path'][0].startswith('shard#')


def test_a_record_that_does_not_load_is_named_in_its_place(source):
    def load():
        raise OSError('the shard is gone')

    broken = dataclasses.replace(source[0], path='shard#0', load=load)
    (batch,) = train_batches(
        VideoList([broken], source.class_names), READER, batch_size=1, seed=0, num_steps=1
    )
    assert batch['mask'].tolist() == [0]
    assert (batch['path'][0], batch['error'][0]) == ('shard#0', 'unreadable: the shard is gone')


@dataclasses.dataclass(frozen=True)
class Raising:
    """A transform that raises, for clips of some height."""

    error: Exception
    height: int

    def __call__(self, video, label, rng):
        if video.shape[1] == self.height:
            raise self.error
        return video, label


@pytest.mark.parametrize(
    ('error', 'said'),
    [
        (MemoryError('Unable to allocate 140 GiB'), 'too large: not enough memory: Unable to'),
        (
            cv2.error('dsize.area() > 0\nin function resize'),
            'unreadable: error: dsize.area() > 0 in',
        ),
        (OSError(5, 'Input/output error'), 'unreadable: EIO: Input/output error'),
        (OverflowError('too much'), 'unreadable: OverflowError: too much'),
    ],
)
def test_what_happens_to_one_video_alone_makes_it_unreadable(source, tmp_path, error, said):
    path = write_video(tmp_path / 'v.mp4', pictures(8, 40, 56))
    pair = VideoList([source[0], Record(str(path), 1, 'odd')], NAMES)
    reader = TrainReader(4, 32, transforms=(Raising(error, 40), RandomResizedCrop(32)))
    (batch,) = train_batches(pair, reader, batch_size=2, seed=0, num_steps=1, shuffle=False)
    assert batch['mask'].tolist() == [1, 0]
    assert batch['error'][1].startswith(said) and '\n' not in batch['error'][1]


def test_a_file_that_cannot_be_read_does_not_end_the_stream(source, tmp_path):
    path = tmp_path / 'v.mp4'
    path.symlink_to('/proc/self/mem')  # reading it is an I/O error
    pair = VideoList([source[0], Record(str(path), 1, 'bad')], NAMES)
    training = train_batches(pair, READER, batch_size=2, seed=0, num_steps=1, shuffle=False)
    for batch in (*training, *eval_batches(pair, EvalReader(4, 32), batch_size=2)):
        assert batch['mask'].tolist() == [1, 0]
        assert batch['error'][1] == 'unreadable: EIO: Input/output error'


def test_views_do_not_keep_whole_frames(tmp_path):
    path = str(write_video(tmp_path / 'v.mp4', pictures(40, 480, 640)))
    tracemalloc.start()
    EvalReader(10, 32, num_clips=4).read(Record(path, 0, ''))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 480 * 640 * 3


@pytest.mark.parametrize('options', [{'num_threads': 2}, {'num_workers': 1}])
def test_skipped_records_are_not_read_from_their_epoch_on(source, options):
    failure = ('timed out', 'not read in 60 s, 2 times')
    skipped = Skipped({2: (1, *failure), 5: (0, *failure)})
    batches = train(source, batch_size=7, num_steps=3, skipped=skipped, **options)
    for epoch, (batch, other) in enumerate(zip(batches, train(source, batch_size=7, num_steps=3))):
        for row, index in enumerate(batch['index']):
            if index == 5 or (index == 2 and epoch >= 1):
                assert batch['error'][row] == 'timed out: not read in 60 s, 2 times'
                assert not batch['mask'][row] and not batch['video'][row].any()
            else:
                np.testing.assert_array_equal(batch['video'][row], other['video'][row])
    reader = EvalReader(4, 32)
    found = list(
        eval_batches(source, reader, batch_size=4, skipped=skipped, readers=Readers(**options))
    )
    errors = [error for batch in found for error in batch['error']]
    assert [k for k in range(8) if errors[k].startswith('timed out')] == [5]


def test_a_stream_of_skipped_records_alone_ends(source):
    skipped = Skipped({k: (0, 'crashed', 'before') for k in range(7)})
    for options in ({'num_workers': 2}, {'num_workers': 0}):
        batches = train(source, skipped=skipped, num_steps=20, **options)
        assert len(batches) == 20 and not any(batch['mask'].any() for batch in batches)
