"""Builds the shards of a folder with several processes of this machine.

A process that dies or hangs takes nothing with it: the shard is begun again, and the video at which
processes died twice, or one hung, is left out. Processes end when the one that started them ends.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from dist_jax.dataset.building.shards import ShardBuilder, Task

TRIES = 2  # of a video at which a process died, before it is left out
Progress = Callable[[int, int], None]


def build_shards(
    folder: str | os.PathLike,
    tasks: Sequence[Task],
    num_workers: int,
    timeout: float,
    progress: Progress = lambda videos, dropped: None,
) -> None:
    """Builds shards.

    Args:
      folder: of the build.
      tasks: the shards to build.
      num_workers: processes; 0 builds in this one, which a hostile video may then take with it.
      timeout: seconds after which a video is left out.
      progress: called with how many more videos were looked at and how many of them were dropped;
        the first is negative when a shard is begun again.

    Raises:
      RuntimeError: if a process fails for another reason than a video; with its traceback.
    """
    if not num_workers:
        builder = ShardBuilder(folder)
        for task in tasks:
            progress(*_counts(builder.build(task)))
        return
    waiting = deque(tasks)
    given_up: dict[Task, dict[int, tuple[str, str]]] = {}
    tries: Counter[tuple[Task, int | None]] = Counter()
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            workers = [worker for worker in workers if worker.process.is_alive() or worker.task]
            while waiting and len(workers) < num_workers:
                workers.append(_Worker(folder))
            for worker in workers:
                if waiting and worker.task is None:
                    task = waiting.popleft()
                    worker.begin(task, given_up.get(task, {}))
            wait([worker.connection for worker in workers], timeout=1.0)
            for worker in workers:
                lost = worker.receive(progress, timeout)
                if lost is None:
                    continue
                task, position, kind, reason = lost
                tries[task, position] += 1
                if tries[task, position] >= (1 if kind == 'timed out' else TRIES):
                    if position is None:
                        raise RuntimeError(f'{task}: {reason}, before it came to a video')
                    given_up.setdefault(task, {})[position] = (kind, reason)
                waiting.appendleft(task)
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()


@dataclass
class _Worker:
    """A process, seen from the one that started it."""

    folder: str | os.PathLike
    task: Task | None = None
    position: int | None = None  # of the video that it is at
    since: float = 0.0
    counted: int = 0  # videos of the task that were reported
    connection: Connection = field(init=False)
    process: multiprocessing.Process = field(init=False)

    def __post_init__(self):
        context = multiprocessing.get_context('spawn')
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.folder), daemon=True)
        # It has Ctrl-C blocked until it ignores it: the parent decides.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def begin(self, task: Task, given_up: dict[int, tuple[str, str]]) -> None:
        self.task, self.position, self.counted = task, None, 0
        self.since = time.monotonic()
        # A process that is gone already shows when its messages are read.
        try:
            self.connection.send((task, given_up))
        except OSError:
            return

    def receive(
        self, progress: Progress, timeout: float
    ) -> tuple[Task, int | None, str, str] | None:
        """Reads what the process says; returns the shard, video, kind and reason if it is lost."""
        try:
            while self.connection.poll():
                kind, value = self.connection.recv()
                self.since = time.monotonic()
                if kind == 'error':
                    raise RuntimeError(f'shard {self.task} cannot be built:\n{value}')
                if kind == 'video':
                    self.position = value
                    progress(value - self.counted, 0)
                    self.counted = value
                else:
                    videos, dropped = value
                    progress(videos - self.counted, dropped)
                    self.task = None
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            how = f'died of {signal.Signals(-code).name}' if code < 0 else f'ended with code {code}'
            return self._lost(progress, 'crashed', how)
        reading = self.task is not None and self.position is not None
        if reading and time.monotonic() - self.since > timeout:
            self.process.kill()
            self.process.join()
            return self._lost(progress, 'timed out', f'not read within {timeout:g} s')
        return None

    def _lost(self, progress: Progress, kind: str, how: str):
        task, self.task = self.task, None
        if task is None:
            return None
        progress(-self.counted, 0)
        reason = how if kind == 'timed out' else f'the process that read it {how}'
        return task, self.position, kind, reason


def _work(connection: Connection, folder: str | os.PathLike) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        builder = ShardBuilder(folder)
        while True:
            task, given_up = connection.recv()
            result = builder.build(task, given_up, lambda k: connection.send(('video', k)))
            connection.send(('done', _counts(result)))
    except (EOFError, ConnectionError):
        return  # nobody is waiting for it any more
    except Exception:
        connection.send(('error', traceback.format_exc()))


def _counts(result: dict[str, Any]) -> tuple[int, int]:
    dropped = len(result['problems'])
    return len(result['rows']) + dropped, dropped


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
