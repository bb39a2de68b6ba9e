"""One trainer a workdir: a file that says who trains there, with a heartbeat.

    WORKDIR/train.lock    JSON: host, process, when it started, and a number that grows every 10 s

A trainer that finds another's lock

    refuses     if its process lives on this machine and beats, or its beat moves
    takes over  at once, if its process is dead or silent for 60 s on this machine; otherwise when
                the beat has not moved for 60 s

No clock of another machine is compared. A process is known by machine (boot id), process namespace,
number and start time, since numbers and host names come again, in containers above all.

Not guaranteed: in a bucket and on a network disk without locks, two that start in the same second
both may come to write; one of them sees the other's lock and ends. A trainer that was suspended for
more than a minute may have lost its lock; it ends at its next beat, up to 10 s after it wakes up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from dist_jax import ending, pod
from dist_jax.models.converted import absolute_path

log = logging.getLogger('dist_jax')

FILE = 'train.lock'
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
DEATH_SECONDS = 2.0  # for a process that was killed to be gone
SETTLE_SECONDS = 2.0  # after which a file that was written without a lock is looked at again
POLL_SECONDS = 0.2  # on a disk; ten times that in a bucket
JOIN_SECONDS = 300.0  # that other hosts wait for the first one to have the lock


class InUseError(ending.AgainError):
    """Another process trains in the workdir; the message names it."""


@contextlib.contextmanager
def locked(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a workdir. Of several processes the first one does, for all.

    Args:
      workdir: folder or bucket; it is made if it is not there.

    Raises:
      InUseError: another trainer is at work there.
    """
    lock = None
    if jax.process_index() == 0:
        lock = _Lock(absolute_path(workdir) / FILE)
        lock.acquire()
    member = pod.current()
    if member is not None:  # no collective operation: these give up earlier
        member.exchange('lock', JOIN_SECONDS)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@dataclasses.dataclass(frozen=True)
class _Process:
    """What tells a process from all others.

    Attributes:
      boot: id of the machine since it was started; '' where there is none.
      namespace: of process numbers.
      pid: number in it.
      start: ticks from the start of the machine to that of the process.
    """

    boot: str
    namespace: str
    pid: int
    start: int

    @classmethod
    def own(cls) -> _Process:
        return cls(*_place(), os.getpid(), _start_ticks(os.getpid()) or 0)

    def same_machine(self) -> bool:
        return bool(self.boot) and self.boot == _place()[0]

    def here(self) -> bool:
        """Whether its number means something in this process."""
        return self.same_machine() and self.namespace == _place()[1]

    def alive(self) -> bool:
        """Whether it still runs; only where it is `here`."""
        return _start_ticks(self.pid) == self.start


@functools.cache
def _place() -> tuple[str, str]:
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return boot, os.readlink('/proc/self/ns/pid')
    except OSError:
        return '', ''


def _start_ticks(pid: int) -> int | None:
    """When a process started; None if it has ended, or is about to."""
    try:
        # The name in parentheses may hold anything.
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    exiting = int(fields[6]) & 4  # PF_EXITING of the kernel's flags
    return None if fields[0] in 'ZX' or exiting else int(fields[19])


class _Lock:
    """The lock of one workdir, of this process or not."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._local = '://' not in os.fspath(path)
        self._content = {
            'host': socket.gethostname(),
            'process': dataclasses.asdict(_Process.own()),
            'started': time.strftime('%Y-%m-%d %H:%M:%S %z'),
            'token': uuid.uuid4().hex,
            'beat': 0,
        }
        self._partial = path.with_name(f'.{FILE}.{self._content["token"][:8]}')
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='workdir lock', daemon=True)

    def acquire(self) -> None:
        """Takes the lock, after a wait where it may be left over.

        Raises:
          InUseError: somebody else has it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        found, since, waiting = self._read(), time.monotonic(), False
        while not self._take(found):
            spent = time.monotonic() - since
            now = self._read()
            if now is None or now['token'] != found['token']:
                found, since, waiting = now, time.monotonic(), False
            elif now['beat'] != found['beat'] or (_beats_here(now) and spent > DEATH_SECONDS):
                raise InUseError(self._refusal(now))
            elif spent > STALE_SECONDS:
                self._take(now, stale=True)
                break
            elif not waiting and not _beats_here(now):
                waiting = True
                log.warning(
                    '%s: left by %s, or it still trains: waiting up to %.0f s for a heartbeat',
                    self._path,
                    _name(now),
                    STALE_SECONDS,
                )
            time.sleep(POLL_SECONDS * (1 if self._local else 10))
        if not self._local:
            time.sleep(SETTLE_SECONDS)
        found = self._read()
        if found is None or found['token'] != self._content['token']:
            raise InUseError(self._refusal(found or self._content))
        ending.before_exit.append(self._remove)
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back."""
        self._stop.set()
        self._thread.join()
        ending.before_exit.remove(self._remove)
        self._remove()

    def _remove(self) -> None:
        """Removes the file if it is still this process's."""
        self._stop.set()
        with contextlib.suppress(Exception):  # buckets raise what their library raises
            found = self._read()
            if found is not None and found['token'] == self._content['token']:
                self._path.unlink()
            if self._local:
                self._partial.unlink(missing_ok=True)

    def _take(self, found: dict[str, Any] | None, stale: bool = False) -> bool:
        """Writes the own lock if the found one is none, or is not needed by anybody."""
        with self._alone():
            now = self._read()
            if (now and now['token']) != (found and found['token']):
                return False  # somebody was quicker
            if now is not None:
                if not stale and not _is_void(now):
                    return False
                log.warning('%s: %s has ended without a word; taken over', self._path, _name(now))
            self._write()
            return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Between the trainers that start on this machine, and on a disk with locks on others."""
        if not self._local:
            yield
            return
        folder = os.open(os.fspath(self._path.parent), os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a disk without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _refusal(self, content: dict[str, Any]) -> str:
        return (
            f'{self._path.parent} is in use: {_name(content)} trains there. End it, or choose '
            f'another --workdir. (If it does not run any more, its lock is void '
            f'{STALE_SECONDS:.0f} s after its last beat.)'
        )

    def _read(self) -> dict[str, Any] | None:
        """What is there; None for nothing, or for what no trainer has written."""
        try:
            found = json.loads(self._path.read_bytes())
            _Process(**found['process'])
            float(found['time'])
            return found if {'token', 'beat', 'host', 'started'} <= found.keys() else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _write(self) -> None:
        self._content['beat'] += 1
        self._content['time'] = time.monotonic()  # the same clock for all of a machine
        data = json.dumps(self._content).encode()
        if not self._local:  # an object appears whole
            self._path.write_bytes(data)
            return
        self._partial.write_bytes(data)
        self._partial.replace(self._path)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                found = self._read()
                if found is not None and found['token'] != self._content['token']:
                    ending.leave_now(
                        ending.AGAIN,
                        f'dist_jax: {self._path} was taken over by {_name(found)}, since this '
                        'process was not heard for a minute; it ends here.',
                    )
                if not self._stop.is_set():
                    self._write()
            except Exception as error:  # a full disk, a bucket out of reach: the next one may do
                log.debug('cannot write %s: %s', self._path, error)


def _is_void(content: dict[str, Any]) -> bool:
    """Whether the holder was on this machine and is dead or silent; False if it was elsewhere."""
    process = _Process(**content['process'])
    dead = process.here() and not process.alive()
    return dead or (process.same_machine() and _silence(content) > STALE_SECONDS)


def _beats_here(content: dict[str, Any]) -> bool:
    """Whether the holder is a process that lives here."""
    return _Process(**content['process']).here() and not _is_void(content)


def _silence(content: dict[str, Any]) -> float:
    """Seconds since the last beat of a holder on this machine."""
    return time.monotonic() - content['time']


def _name(content: dict[str, Any]) -> str:
    return (
        f'process {content["process"]["pid"]} on {content["host"]} (started {content["started"]})'
    )
