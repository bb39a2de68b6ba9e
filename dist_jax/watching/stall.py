"""A run that hangs ends itself: the stacks of all threads, then exit code 75.

The loop says after each step that it got there (`Watch.progress`), and what may take any time is
done inside `Watch.spared`. When nothing was said for `pod.stall_timeout`:

    at once         C writes the stacks (faulthandler), to the log and to `stacks.txt`
    2 s later       a thread tells the other processes, which write theirs, and ends this one
    15 s later      a timer of the C library ends it with the same code

The last is for a hang in C that holds Python's lock, inside which no thread of Python runs: neither
faulthandler's thread nor the timer need it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
from etils import epath

from dist_jax import ending, pod

log = logging.getLogger('dist_jax')

FILE = 'stacks.txt'
LEAVE_SECONDS = 2.0  # after the stacks
KILL_SECONDS = 15.0
# Passes on what comes, but makes the file only then; $1 is the file, $2 what to say before.
_TEE = (
    'trap "" TERM INT HUP; IFS= read -r line || exit 0; '
    '{ printf "%s\\n%s\\n" "$2" "$line"; cat; } | tee -a "$1" >&2'
)


class Watch:
    """Watches one loop of this process, while it is entered.

    Does nothing without a timeout, and where no command runs: a program that calls a training loop
    among other things is not ended.
    """

    def __init__(self, workdir: str | os.PathLike[str], seconds: float):
        """Prepares.

        Args:
          workdir: of the run, where the stacks are written.
          seconds: without progress; 0 for any time.
        """
        self._workdir = os.fspath(workdir)
        self._seconds = seconds if ending.ends_processes() else 0.0
        self._armed_at: float | None = None
        self._spared = 0
        self._stop = threading.Event()
        self._writer: subprocess.Popen[bytes] | None = None
        self._timer: _Timer | None = None

    def __enter__(self) -> Watch:
        if self._seconds <= 0:
            return self
        said = (
            f'dist_jax: no progress for {self._seconds:g} s (pod.stall_timeout). What every thread '
            'is at:'
        )
        with contextlib.suppress(OSError):
            self._writer = subprocess.Popen(
                ['/bin/sh', '-c', _TEE, 'sh', self._file(), said],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        self._timer = _Timer.make()
        if self._timer is None:
            log.info('no timer of the C library here: a hang that holds the lock of Python stays')
        pod.on_stall(self.write_stacks)
        threading.Thread(target=self._watch, name='stall', daemon=True).start()
        self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        if self._seconds <= 0:
            return
        self._stop.set()
        self._disarm()
        pod.on_stall(None)
        if self._timer is not None:
            self._timer.delete()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._writer.wait(5)

    def progress(self) -> None:
        """The loop has come further."""
        # Arming takes a thread of faulthandler: not more often than is needed.
        now = time.monotonic()
        if self._armed_at is not None and now - self._armed_at > min(1.0, self._seconds / 10):
            self._arm()

    @contextlib.contextmanager
    def spared(self) -> Iterator[None]:
        """Around what may take any time."""
        self._spared += 1
        self._disarm()
        try:
            yield
        finally:
            self._spared -= 1
            if not self._spared and self._seconds > 0 and not self._stop.is_set():
                self._arm()

    def write_stacks(self) -> None:
        """Writes the stacks of all threads now."""
        faulthandler.dump_traceback(self._target(), all_threads=True)

    def _file(self) -> str:
        folder, name = self._workdir, FILE
        if jax.process_count() > 1:
            name = f'{FILE.removesuffix(".txt")}_{jax.process_index()}.txt'
        if '://' in folder:  # C writes no buckets
            return os.path.join('/tmp', f'dist_jax_{os.getpid()}_{name}')
        return os.path.join(os.path.abspath(folder), name)

    def _target(self) -> int:
        return self._writer.stdin.fileno() if self._writer is not None else 2

    def _arm(self) -> None:
        self._armed_at = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds, file=self._target())
        if self._timer is not None:
            self._timer.set(self._seconds + KILL_SECONDS)

    def _disarm(self) -> None:
        if self._seconds <= 0:
            return
        self._armed_at = None
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.set(0.0)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(min(1.0, self._seconds / 10)):
            now, armed_at = time.monotonic(), self._armed_at
            if armed_at is None:
                looked = now
                continue
            if now - looked > self._seconds / 2:  # this process slept: it may go on
                looked = now
                self._arm()
                continue
            looked = now
            if now - armed_at > self._seconds + LEAVE_SECONDS:
                self._end(now - armed_at)

    def _end(self, seconds: float) -> None:
        if '://' in self._workdir:
            with contextlib.suppress(Exception):
                here = epath.Path(self._file())
                name = here.name.removeprefix(f'dist_jax_{os.getpid()}_')
                (epath.Path(self._workdir) / name).write_bytes(here.read_bytes())
        pod.leave_stalled(
            f'dist_jax: no progress for {seconds:.0f} s (pod.stall_timeout={self._seconds:g}): the '
            f'stacks of all threads are above and in {self._file()}. Exit code {ending.AGAIN}: the '
            'same command continues from the newest checkpoint.',
            round(seconds),
        )


class _Event(ctypes.Structure):
    """`struct sigevent` of 64-bit Linux, with a function that a new thread calls."""

    _fields_ = (
        ('value', ctypes.c_void_p),
        ('signal', ctypes.c_int),
        ('notify', ctypes.c_int),
        ('function', ctypes.c_void_p),
        ('attributes', ctypes.c_void_p),
        ('rest', ctypes.c_byte * 32),
    )


class _Time(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in ('every_seconds', 'every_nanoseconds', 'seconds', 'nanoseconds')
    )


_SIGEV_THREAD = 2
_CLOCK_MONOTONIC = 1


class _Timer:
    """A timer of the C library that ends the process with `ending.AGAIN`, whatever Python does.

    Its function is `_exit` itself, called with the code by a thread that the C library makes.
    """

    def __init__(self, library: ctypes.CDLL):
        event = _Event(
            value=ending.AGAIN,
            notify=_SIGEV_THREAD,
            function=ctypes.cast(library._exit, ctypes.c_void_p),
        )
        self._library, self._id = library, ctypes.c_void_p()
        if library.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)):
            raise OSError(ctypes.get_errno(), 'timer_create')

    @classmethod
    def make(cls) -> _Timer | None:
        """None where there are no such timers."""
        if not sys.platform.startswith('linux') or ctypes.sizeof(ctypes.c_void_p) != 8:
            return None
        for name in (None, 'librt.so.1'):  # beside the rest since glibc 2.34
            with contextlib.suppress(OSError, AttributeError):
                return cls(ctypes.CDLL(name, use_errno=True))
        return None

    def set(self, seconds: float) -> None:
        """Ends the process so many seconds from now; 0: not at all."""
        whole = int(seconds)
        value = _Time(seconds=whole, nanoseconds=int((seconds - whole) * 1e9))
        self._library.timer_settime(self._id, 0, ctypes.byref(value), None)

    def delete(self) -> None:
        self._library.timer_delete(self._id)
