"""Reader processes: the same batches as threads, whatever happens to a process."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from streams import BAD, NAMES, READER, assert_same, with_readers, write_seven

from input_pipeline.bad_videos import BadVideoLog
from input_pipeline.batches import HostPart, Readers
from input_pipeline.pipeline import EvalReader, TrainReader, eval_batches, train_batches
from input_pipeline.transforms import RandomResizedCrop
from input_pipeline.video_list import VideoList
from input_pipeline.workers import LENT, MOST_WORKERS, ReaderError, Skipped, usual_number

TIMEOUT_SECONDS = 30


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return write_seven(tmp_path_factory.mktemp('videos'))


def batches_of(source, reader=READER, **changes):
    options = {'batch_size': 4, 'seed': 7, 'num_steps': 6, 'num_workers': 2} | changes
    return train_batches(source, reader, **with_readers(options))


def train(source, reader=READER, **changes):
    return list(batches_of(source, reader, **changes))


def until(moment):
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not moment():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid):
    """Whether a process is there and not only waits to be collected."""
    with contextlib.suppress(OSError):
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return False


# What a record does to the process that loads it. Processes find these by name.


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Loads a video, after something has happened to the process: always, or only once."""

    path: str
    what: str
    once: str = ''
    tries: str = ''  # a file that grows by a byte each time

    def __call__(self):
        if self.tries:
            with open(self.tries, 'a') as file:
                file.write('.')
        if not self.once or not os.path.exists(self.once):
            if self.once:
                Path(self.once).touch()
            if self.what == 'hang':
                time.sleep(1000)
            os.kill(os.getpid(), signal.Signals[self.what])
        return Path(self.path).read_bytes()


def with_trouble(source, index, what, once='', tries=''):
    records = [source[k] for k in range(len(source))]
    records[index] = dataclasses.replace(
        records[index], load=Trouble(records[index].path, what, str(once), str(tries))
    )
    return VideoList(records, NAMES)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A transform that raises."""

    def __call__(self, video, label, rng):
        raise KeyError('oops')


@dataclasses.dataclass(frozen=True)
class WithoutJax:
    """A transform that wants to be alone."""

    def __call__(self, video, label, rng):
        assert not {'jax', 'grain', 'tensorflow'} & sys.modules.keys()
        return RandomResizedCrop(32)(video, label, rng)


class Unwilling:
    """A source that does something when a process unpickles it."""

    def __init__(self, source, do):
        self.source, self.do = source, do

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]

    def __reduce__(self):
        return self.do


def fail():
    raise OSError('the bucket is gone')


@pytest.mark.parametrize('workers', [1, 3])
def test_batches_do_not_depend_on_the_number_of_processes(source, workers):
    assert_same(train(source, num_workers=workers), train(source, num_workers=0))


def test_a_run_continues_with_other_hosts_and_processes(source):
    straight = train(source, batch_size=12, num_workers=0)
    parts = [
        train(source, batch_size=12, start_step=4, host=HostPart(j, 3), num_workers=j)
        for j in range(3)
    ]
    joined = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, straight[4:])


def test_copies_of_a_record_are_the_same_rows(source):
    reader = dataclasses.replace(READER, repeats=2)
    assert_same(train(source, reader), train(source, reader, num_workers=0))


def test_evaluation_does_not_depend_on_processes(source):
    reader = EvalReader(4, 32, num_clips=2, num_crops=3)
    ours, theirs = (
        list(eval_batches(source, reader, batch_size=4, readers=Readers(num_workers=n)))
        for n in (2, 0)
    )
    assert_same(ours, theirs)


def test_processes_load_no_jax(source):
    reader = dataclasses.replace(READER, transforms=(WithoutJax(),))
    assert len(train(source, reader)) == 6


def test_batches_that_are_kept_do_not_change(source):
    batches = batches_of(source, num_steps=4 * LENT, buffer_size=1)
    kept, copies = [], []
    for batch in batches:
        kept.append(batch)
        copies.append(batch['video'].copy())
    for batch, video in zip(kept, copies):
        np.testing.assert_array_equal(batch['video'], video)


def test_arrays_on_the_device_do_not_change(source):
    import jax  # a process that finds its sources here must not import it

    arrays = []
    for batch in batches_of(source, num_steps=4 * LENT, buffer_size=1):
        arrays.append(jax.device_put(batch['video']))  # on a CPU it may share the memory
        del batch
    for array, batch in zip(arrays, train(source, num_steps=4 * LENT, num_workers=0)):
        np.testing.assert_array_equal(array, batch['video'])


def test_memory_of_a_batch_is_used_again(source):
    places = set()
    for batch in batches_of(source, num_steps=30, buffer_size=2):
        places.add(batch['video'].ctypes.data)
        del batch
    assert len(places) <= 2 + LENT


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_is_killed_leaves_no_trace_in_the_batches(source, how):
    batches = batches_of(source, num_steps=12)
    found = []
    for batch in batches:
        found.append(batch)
        if len(found) in (1, 4):
            os.kill(batches.worker_pids[0], how)
    assert_same(found, train(source, num_steps=12, num_workers=0))


def test_a_record_that_kills_its_process_once_is_read_the_second_time(source, tmp_path):
    trouble = with_trouble(source, 5, 'SIGKILL', tmp_path / 'once')
    batches = batches_of(trouble)
    assert_same([next(batches) for _ in range(6)], train(source, num_workers=0))
    assert (tmp_path / 'once').exists()
    assert batches.num_restarts == 1


@pytest.mark.parametrize(
    ('what', 'reason'),
    [
        ('SIGSEGV', 'crashed: ended 2 reader processes, the last with SIGSEGV'),
        ('hang', 'timed out: not read in 2 s, 2 times'),
    ],
)
def test_a_record_that_always_fails_is_named_and_nothing_else_changes(source, what, reason):
    index = 5
    trouble = with_trouble(source, index, what)
    found = train(trouble, record_timeout=2, num_steps=3)
    for batch, other in zip(found, train(source, num_workers=0, num_steps=3), strict=True):
        bad = batch['index'] == index
        assert (batch['error'][bad] == reason).all()
        assert (batch['mask'][bad] == 0).all() and not batch['video'][bad].any()
        assert (batch['path'][bad] == source[index].path).all()
        for key in batch:
            np.testing.assert_array_equal(batch[key][~bad], other[key][~bad])
    assert sum((batch['index'] == index).sum() for batch in found) > 0


def test_a_record_that_always_fails_is_tried_in_its_first_epoch_only(source, tmp_path):
    tries = tmp_path / 'tries'
    trouble = with_trouble(source, 5, 'SIGKILL', tries=tries)
    options = {'num_workers': 1, 'batch_size': 7, 'num_steps': 5}
    straight = train(trouble, **options)
    assert all(set(batch['index'][batch['mask'] == 0]) == {BAD, 5} for batch in straight)
    assert len(tries.read_text()) == 2

    log = BadVideoLog(tmp_path / 'bad_videos.jsonl', 0.5, 7)
    for batch in straight[:2]:
        log.add(batch)
    # A restart reads what the report says, and nothing twice.
    again = BadVideoLog(log.path, 0.5, 7)
    assert_same(train(trouble, **options, start_step=2, skipped=again.skipped), straight[2:])
    assert len(tries.read_text()) == 2
    # Without its line it has another chance.
    log.path.write_text('')
    train(trouble, **options, start_step=2, skipped=BadVideoLog(log.path, 0.5, 7).skipped)
    assert len(tries.read_text()) == 4


def test_evaluations_that_share_what_they_skip_try_a_record_once(source, tmp_path):
    tries = tmp_path / 'tries'
    trouble, skipped = with_trouble(source, 5, 'SIGKILL', tries=tries), Skipped()
    reader, readers = EvalReader(4, 32), Readers(num_workers=1)
    first, second = (
        list(eval_batches(trouble, reader, batch_size=4, readers=readers, skipped=skipped))
        for _ in range(2)
    )
    assert_same(first, second)
    assert len(tries.read_text()) == 2 and len(skipped) == 1


@dataclasses.dataclass(frozen=True)
class Shared:
    """A source that is read only where its arrays are memory that others share."""

    source: VideoList
    big: np.ndarray
    parent: int

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        assert (os.getpid() == self.parent) == self.big.flags.writeable
        assert self.big[-1] == 7
        return self.source[index]


def test_arrays_of_a_source_are_not_copied(source):
    big = np.full(1001, 7)
    found = train(Shared(source, big, os.getpid()))
    assert_same(found, train(source, num_workers=0))


def test_an_error_of_a_transform_is_raised_with_its_record(source):
    reader = TrainReader(4, 32, transforms=(Broken(),))
    batches = batches_of(source, reader)
    with pytest.raises(KeyError, match='oops') as caught:
        list(batches)
    assert 'while reading record' in caught.value.__notes__[0]
    assert 'in __call__' in caught.value.__notes__[1]  # where it was raised
    assert list(batches) == []


def test_one_process_a_cpu_unless_told_otherwise(source):
    batches = batches_of(source, num_workers=-1, num_steps=100)
    next(batches)
    assert len(batches.worker_pids) == usual_number() <= MOST_WORKERS
    batches.close()
    with pytest.raises(ValueError, match='num_workers=-2 must be -1 or more'):
        batches_of(source, num_workers=-2)


def test_what_cannot_be_sent_is_an_error_at_once(source):
    reader = TrainReader(4, 32, transforms=(lambda video, label, rng: (video, label),))
    with pytest.raises(ValueError, match=r'must be picklable.*num_workers=0'):
        train(source, reader)
    with pytest.raises(ValueError, match='record_timeout=0 more than 0 s'):
        train(source, record_timeout=0)


def test_processes_that_do_not_start_are_an_error(source):
    with pytest.raises(OSError, match='the bucket is gone'):
        train(Unwilling(source, (fail, ())))
    with pytest.raises(ReaderError, match=r'3 reader processes in a row .* exit code 7'):
        train(Unwilling(source, (os._exit, (7,))))


def test_close_ends_the_processes_and_keeps_what_was_handed_out(source):
    batches = batches_of(source, num_steps=100)
    batch = next(batches)
    video = batch['video'].copy()
    pids = batches.worker_pids
    assert len(pids) == 2
    batches.close()
    batches.close()
    assert not any(map(runs, pids))
    assert list(batches) == []
    np.testing.assert_array_equal(batch['video'], video)


def test_processes_end_with_the_iterator_that_is_dropped(source):
    batches = batches_of(source, num_steps=100)
    next(batches)
    pids = batches.worker_pids
    del batches
    assert not any(map(runs, pids))


TRAINER = """
import pathlib, sys, time
from input_pipeline.batches import Readers
from input_pipeline.pipeline import TrainReader, train_batches
from input_pipeline.video_list import Record, VideoList
from input_pipeline.transforms import RandomResizedCrop
source = VideoList([Record(sys.argv[1], 0, '')], ('0',))
reader = TrainReader(4, 32, transforms=(RandomResizedCrop(32),))
readers = Readers(num_workers=2, buffer_size=3)
batches = train_batches(source, reader, batch_size=4, seed=0, num_steps=10**6, readers=readers)
next(batches)
print(*batches.worker_pids, flush=True)
for batch in batches:
    time.sleep(0.01)
"""


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_die_with_their_trainer(source, how):
    before = set(os.listdir('/dev/shm'))
    trainer = subprocess.Popen(
        [sys.executable, '-c', TRAINER, source[6].path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])},
    )
    with trainer, contextlib.ExitStack() as stack:
        stack.callback(trainer.kill)
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2 and all(map(runs, pids))
        trainer.send_signal(how)
        assert trainer.wait(TIMEOUT_SECONDS) == -how
        until(lambda: not any(map(runs, pids)))
        shouted = trainer.stderr.read()
    assert shouted.count('Traceback') == (how == signal.SIGINT)  # of the trainer alone
    assert set(os.listdir('/dev/shm')) <= before


def test_ending_signals_of_a_group_leave_the_processes_to_the_trainer(source):
    batches = batches_of(source, num_steps=12)
    found = [next(batches)]
    pids = batches.worker_pids
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    found += [next(batches) for _ in range(5)]
    assert batches.worker_pids == pids
    assert_same(found, train(source, num_workers=0))
