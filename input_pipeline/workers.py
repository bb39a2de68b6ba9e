"""Reader processes: they make the elements of a stream and write clips into memory of the trainer.

`ReaderPool` starts processes that each make one element after the other, on one thread. Clips go
into a ring of batch buffers in anonymous shared memory, everything else of an element through a
socket. A process is a fresh interpreter that imports what the stream needs and never jax.

Nothing outlives the trainer: a process dies with it, whatever ends it, and the memory has no name
that could stay behind in /dev/shm. A process that dies or takes too long over a record is ended and
replaced, and the record is tried once more in a fresh process. What fails twice becomes an element
that says so, now and when it comes up again (`Skipped`); all others are as they would have been.
"""

import collections
import contextlib
import ctypes
import functools
import mmap
import os
import pickle
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from input_pipeline.machine import num_cpus

KINDS = ('crashed', 'timed out')  # of elements that a process could not make, beside decode.KINDS
ATTEMPTS = 2  # processes that may fail over an element
AHEAD = 2  # elements that a process is given at a time, so that it does not wait for the next one
LENT = 3  # buffers that the consumer may keep; what it keeps beyond them is copied
ALIGNMENT = 64  # bytes, of arrays in shared memory
MOST_WORKERS = 128  # of `usual_number`; so many feed four v4 chips, see docs/performance.md
START_SECONDS = 120  # for a process to be ready
FAILED_STARTS = 3  # in a row, after which it is not the fault of a record

# What becomes of a clip beside its pixels: key -> array, one row of the batch.
Rows = dict[str, np.ndarray]

# What becomes of one record, S rows of a batch: lists of S entries, 'video' of arrays and 'rows' of
# `Rows`; and mask, index, epoch, path and error, which all its rows share.
Element = dict[str, Any]


class Stream(Protocol):
    """Random access to the elements of one host.

    Attributes:
      shape: of the videos of an element, (S, ...).
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def place(self, position: int) -> tuple[int, int]:
        """Record and epoch of an element; record -1 is padding."""

    def __call__(self, position: int, failure: tuple[str, str] | None = None) -> Element:
        """Makes an element; with `failure`, a (kind, reason), the one of a bad video instead."""


class Skipped:
    """Records that are not read any more, for they ended reader processes or kept them waiting.

    A record is skipped from the epoch on in which that happened: a run that starts again before it
    reads what it had read. The object may be shared by streams of the same source.
    """

    def __init__(self, known: Mapping[int, tuple[int, str, str]] | None = None):
        """Takes record -> (first epoch, kind, reason) of those that are known already."""
        self._known = dict(known or {})

    def __len__(self) -> int:
        return len(self._known)

    def add(self, stream: Stream, position: int, failure: tuple[str, str]) -> None:
        """Takes note that the record at a position of a stream failed, as (kind, reason)."""
        index, epoch = stream.place(position)
        if index not in self._known or epoch < self._known[index][0]:
            self._known[index] = (epoch, *failure)

    def find(self, stream: Stream, position: int) -> tuple[str, str] | None:
        """Why the record at a position is skipped, as (kind, reason); None if it is read."""
        if not self._known:
            return None
        index, epoch = stream.place(position)
        first, *failure = self._known.get(index, (np.inf,))
        return tuple(failure) if epoch >= first else None


def usual_number() -> int:
    """Processes for this machine: one a CPU, see `machine.num_cpus`, at most `MOST_WORKERS`.

    0, which means threads, where the system is not Linux.
    """
    if not hasattr(os, 'memfd_create'):
        return 0
    return min(num_cpus(), MOST_WORKERS)


class ReaderError(RuntimeError):
    """The reader processes cannot work."""


@dataclass(eq=False)
class _Batch:
    """One that is being made: where its clips go, and what is there of the rest."""

    slot: int
    elements: list[Element | Exception | None]
    missing: int


class _Task(NamedTuple):
    position: int
    batch: _Batch
    failures: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Slot and row of its clip."""
        return self.batch.slot, self.position % len(self.batch.elements)


@dataclass(eq=False)
class _Worker:
    """A process, what it was given and has not answered, and since when the first of it runs."""

    process: subprocess.Popen
    connection: Connection
    since: float
    ready: bool = False
    fresh: bool = True  # was given nothing so far
    tasks: collections.deque[_Task] = field(default_factory=collections.deque)


class _Ring:
    """Batch buffers in anonymous memory that processes share by its file descriptor."""

    def __init__(self, fd: int, num_slots: int, shape: tuple[int, ...]):
        size = int(np.prod(shape))
        stride = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if os.fstat(fd).st_size < num_slots * stride:
            os.ftruncate(fd, num_slots * stride)
        whole = np.frombuffer(mmap.mmap(fd, num_slots * stride), np.uint8)
        self.slots = [whole[k * stride :][:size].reshape(shape) for k in range(num_slots)]


class _Lease:
    """Memory of a slot; when nothing refers to it any more, the slot is free."""

    def __init__(self, array: np.ndarray):
        self.__array_interface__ = array.__array_interface__
        self._array = array


class ReaderPool:
    """An iterator over batches whose elements are made by processes, in order.

    The clips of a batch lie in a buffer of the ring. The buffer is used again when nothing refers
    to the array any more: no view of it, and no `jax.Array` that shares its memory, as those on a
    CPU do. So a batch never changes while somebody holds it, and nobody has to give it back. The
    ring does not grow: of those who hold more than `LENT` buffers the next ones are copies.

    Attributes:
      pids: process numbers of the readers that run, for tests and figures.
      restarts: processes that were replaced.
    """

    def __init__(
        self,
        stream: Stream,
        collate: Callable[[list[Element | Exception], np.ndarray], Any],
        *,
        num_batches: int,
        batch_size: int,
        num_workers: int,
        buffer_size: int,
        record_timeout: float,
        skipped: Skipped,
    ):
        """Starts the processes.

        Args:
          stream: makes the elements.
          collate: (elements without their videos, all videos (b * S, ...)) -> batch; an element
            may be an exception that its making raised.
          num_batches: batches in all.
          batch_size: elements of a batch, b.
          num_workers: processes, at least 1.
          buffer_size: batches that are made ahead.
          record_timeout: seconds for one element, more than 0.
          skipped: records that are not read; those that fail are added.

        Raises:
          ValueError: if the stream cannot be pickled.
          ReaderError: if this system has no anonymous shared memory.
        """
        if not hasattr(os, 'memfd_create'):
            raise ReaderError('reader processes need Linux; set num_workers=0 to read in threads')
        self._collate = collate
        self._row_shape = stream.shape[1:]
        self._supervisor = _Supervisor(
            stream,
            num_batches,
            batch_size,
            num_workers,
            max(buffer_size, 1) + LENT,
            record_timeout,
            skipped,
        )
        # Also when it is dropped, and when the interpreter ends.
        self._stop = weakref.finalize(self, self._supervisor.stop)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in list(self._supervisor.workers)]

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    def __iter__(self) -> 'ReaderPool':
        return self

    def __next__(self) -> Any:
        supervisor = self._supervisor
        found = supervisor.finished.get() if self._stop.alive else None
        if not isinstance(found, _Batch):
            self.close()
            raise StopIteration if found is None else found
        video = supervisor.ring.slots[found.slot].reshape(-1, *self._row_shape)
        if len(supervisor.lent) < LENT:
            lease = _Lease(video)
            supervisor.lent.add(found.slot)
            weakref.finalize(lease, supervisor.take_back, found.slot).atexit = False
            video = np.asarray(lease)
        else:
            video = video.copy()
            supervisor.take_back(found.slot)
        return self._collate(found.elements, video)

    def close(self) -> None:
        """Ends the processes; no batch comes after it. Arrays that were handed out stay valid."""
        self._stop()


class _Supervisor:
    """The trainer's side of the processes, on a thread of its own.

    All processes are started by this thread: Linux ends them when the thread does.
    """

    def __init__(
        self,
        stream: Stream,
        num_batches: int,
        batch_size: int,
        num_workers: int,
        num_slots: int,
        timeout: float,
        skipped: Skipped,
    ):
        self._stream = stream
        self._skipped = skipped
        self._batch_size = batch_size
        self._num_positions = num_batches * batch_size
        self._num_workers = min(num_workers, self._num_positions)
        self._num_slots = num_slots
        self._timeout = timeout
        self._stream_fd = _share(stream)
        self._ring_fd = os.memfd_create('dist_jax batches')
        self.ring = _Ring(self._ring_fd, num_slots, (batch_size, *stream.shape))

        self.workers: set[_Worker] = set()
        self.restarts = 0
        self._failed_starts = 0
        self._free = list(range(num_slots))
        self._batches: collections.deque[_Batch] = collections.deque()  # being made, in order
        self._tasks: collections.deque[_Task] = collections.deque()  # not given to a process
        self._retries: collections.deque[_Task] = collections.deque()  # each for a fresh process
        self._next = 0  # position of the next task

        # Shared with the consumer: single operations on these are atomic.
        self.finished: queue.SimpleQueue[_Batch | Exception | None] = queue.SimpleQueue()
        self.lent: set[int] = set()
        self._returned: collections.deque[int] = collections.deque()
        self._wake, self._bell = socket.socketpair()
        self._wake.setblocking(False)
        self._bell.setblocking(False)
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name='reader processes', daemon=True)
        self._thread.start()

    # Called by the consumer.

    def take_back(self, slot: int) -> None:
        """Frees a slot; may run at any time, in any thread, inside a garbage collection."""
        self.lent.discard(slot)
        self._returned.append(slot)
        self._ring_bell()

    def stop(self) -> None:
        self._stopping = True
        self._ring_bell()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _ring_bell(self) -> None:
        with contextlib.suppress(OSError):  # closed, or full: it will wake up anyhow
            self._wake.send(b'.')

    # The thread.

    def _run(self) -> None:
        # The processes have these blocked from their first moment on, until `serve` ignores them.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            for _ in range(self._num_workers):
                self._start()
            while not self._stopping:
                self._take_slots()
                self._feed()
                if not self._work_left():
                    break
                for key, _ in self._selector.select(self._seconds_left()):
                    self._receive(key.data)
                self._end_late_ones()
            self.finished.put(None)
        except BaseException as error:
            self.finished.put(error)
        finally:
            for worker in list(self.workers):
                self._end(worker)
            self._selector.close()
            self._wake.close()
            self._bell.close()
            os.close(self._stream_fd)
            os.close(self._ring_fd)

    def _work_left(self) -> bool:
        return bool(self._batches) or self._next < self._num_positions

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (theirs.fileno(), self._stream_fd, self._ring_fd)
            slots = (self._num_slots, self._batch_size)
            call = f'serve({os.getpid()}, {fds}, {slots})'
            process = subprocess.Popen(
                [sys.executable, '-c', f'from input_pipeline.workers import serve; {call}'],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                env=os.environ
                | {
                    'PYTHONPATH': os.pathsep.join(path or os.getcwd() for path in sys.path),
                    'OMP_NUM_THREADS': '1',
                    'OPENBLAS_NUM_THREADS': '1',
                },
                process_group=0,  # Ctrl-C is for the trainer, which ends them
            )
        worker = _Worker(process, Connection(ours.detach()), time.monotonic())
        self.workers.add(worker)
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)

    def _end(self, worker: _Worker) -> int:
        """Kills a process that may be dead already; its exit code."""
        self.workers.discard(worker)
        self._selector.unregister(worker.connection)
        worker.connection.close()
        worker.process.kill()
        return worker.process.wait()

    def _take_slots(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        while self._free and self._next < self._num_positions:
            batch = _Batch(self._free.pop(), [None] * self._batch_size, self._batch_size)
            self._batches.append(batch)
            end = self._next + self._batch_size
            self._tasks.extend(_Task(position, batch) for position in range(self._next, end))
            self._next = end

    def _feed(self) -> None:
        """Gives tasks to those who have the fewest; what failed goes to a fresh process."""
        for depth in range(AHEAD):
            for worker in self.workers:
                if not worker.ready or len(worker.tasks) != depth:
                    continue
                tasks = self._retries if worker.fresh and self._retries else self._tasks
                self._finish_skipped(tasks)
                if not tasks:
                    continue
                task = tasks[0]
                try:
                    worker.connection.send((task.position, *task.place))
                except OSError:  # it died; the end of its messages says so
                    continue
                tasks.popleft()
                if not worker.tasks:
                    worker.since = time.monotonic()
                worker.tasks.append(task)
                worker.fresh = False

    def _finish_skipped(self, tasks: collections.deque[_Task]) -> None:
        """Takes those from the front whose records are not read."""
        while tasks and (failure := self._skipped.find(self._stream, tasks[0].position)):
            task = tasks.popleft()
            self._finish(task, self._failed(task, failure))

    def _receive(self, worker: _Worker | None) -> None:
        if worker is None:
            with contextlib.suppress(BlockingIOError):
                self._bell.recv(4096)
            return
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker, 'crashed')
            return
        worker.since = time.monotonic()
        if worker.tasks:
            self._finish(worker.tasks.popleft(), message)
        elif message is None:
            worker.ready = True
            self._failed_starts = 0
        else:
            raise message

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        for worker in list(self.workers):
            if now > self._deadline(worker) and not worker.connection.poll():
                self._lose(worker, 'timed out')

    def _deadline(self, worker: _Worker) -> float:
        if worker.tasks:
            return worker.since + self._timeout
        return np.inf if worker.ready else worker.since + START_SECONDS

    def _seconds_left(self) -> float | None:
        """Until the first process is late."""
        first = min(map(self._deadline, self.workers))
        return None if first == np.inf else max(first - time.monotonic(), 0)

    def _lose(self, worker: _Worker, kind: str) -> None:
        """Replaces a process that died or is late; its first task is the reason, others are not."""
        code = self._end(worker)
        how = f'exit code {code}' if code >= 0 else signal.Signals(-code).name
        if worker.tasks:
            task = worker.tasks.popleft()
            task = task._replace(failures=task.failures + 1)
            reason = {
                'crashed': f'ended {ATTEMPTS} reader processes, the last with {how}',
                'timed out': f'not read in {self._timeout:g} s, {ATTEMPTS} times',
            }[kind]
            logging.warning('element %d of the stream %s a reader process', task.position, kind)
            if task.failures < ATTEMPTS:
                self._retries.append(task)
            else:
                self._skipped.add(self._stream, task.position, (kind, reason))
                self._finish(task, self._failed(task, (kind, reason)))
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == FAILED_STARTS:
                raise ReaderError(
                    f'{FAILED_STARTS} reader processes in a row did not start, the last ended with '
                    f'{how}; num_workers=0 reads in threads of this process'
                )
        self._tasks.extendleft(reversed(worker.tasks))
        self.restarts += 1
        self._start()

    def _failed(self, task: _Task, failure: tuple[str, str]) -> Element | Exception:
        make = functools.partial(self._stream, failure=failure)
        return _make(make, self.ring, task.position, *task.place)

    def _finish(self, task: _Task, element: Element | Exception) -> None:
        task.batch.elements[task.place[1]] = element
        task.batch.missing -= 1
        while self._batches and not self._batches[0].missing:
            self.finished.put(self._batches.popleft())


def _share(stream: Stream) -> int:
    """File descriptor of memory that holds the stream, once for all processes; see `_shared`.

    Arrays lie outside the pickle, so that no process copies them.
    """
    arrays: list[pickle.PickleBuffer] = []
    try:
        content = pickle.dumps(stream, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f'cannot be sent to reader processes: {error}. Sources, readers and transforms must be '
            'picklable (define them at the top of a module); num_workers=0 reads in this process'
        ) from error
    parts = [memoryview(content), *(array.raw() for array in arrays)]
    with open(os.memfd_create('dist_jax stream'), 'wb', closefd=False) as file:
        pickle.dump([len(part) for part in parts], file)
        for part in parts:
            file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
            file.write(part)
        return file.fileno()


def _shared(fd: int) -> Stream:
    """The stream from `_share`; its arrays are the shared memory and cannot be written to."""
    memory = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    sizes = pickle.load(memory)
    view, start, parts = memoryview(memory), memory.tell(), []
    for size in sizes:
        start += -start % ALIGNMENT
        parts.append(view[start : start + size])
        start += size
    return pickle.loads(parts[0], buffers=parts[1:])


def _make(
    make: Callable[[int], Element], ring: _Ring, position: int, slot: int, row: int
) -> Element | Exception:
    """An element whose video lies in the ring, or what its making raised."""
    try:
        element = make(position)
        for target, video in zip(ring.slots[slot][row], element.pop('video')):
            target[...] = video
    except Exception as error:
        return error
    return element


# The process.


def serve(parent: int, fds: tuple[int, int, int], slots: tuple[int, int]) -> None:
    """What a reader process runs: it makes the elements that it is told to, until it is alone.

    Args:
      parent: process number of the trainer.
      fds: of the socket, of the pickled stream and of the ring.
      slots: number of slots and elements of a batch.
    """
    # The default of these would end processes that the trainer still needs for its last step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies when the trainer does
    if os.getppid() != parent:  # it is dead already
        return
    with contextlib.suppress(OSError), open('/proc/self/oom_score_adj', 'w') as file:
        file.write('500')  # if memory runs out, this one goes first: it can be replaced
    connection = Connection(fds[0])
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer left
        try:
            stream = _shared(fds[1])
        except Exception as error:
            connection.send(_portable(error))
            return
        num_slots, batch_size = slots
        ring = _Ring(fds[2], num_slots, (batch_size, *stream.shape))
        connection.send(None)
        while True:
            made = _make(stream, ring, *connection.recv())
            connection.send(_portable(made) if isinstance(made, Exception) else made)


def _portable(error: Exception) -> Exception:
    """An exception that pickle brings over, with its notes; where it was raised becomes a note."""
    error.add_note(''.join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        portable = RuntimeError(f'{type(error).__name__}: {error}')
        portable.__notes__ = error.__notes__
        return portable
    return error
