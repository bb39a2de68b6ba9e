"""How a command ends: exit codes, signals, a full disk.

    0    done
    1    an error
    2    wrong arguments, config or files: the same command would fail again
    74   a disk is full (EX_IOERR): free some space, then start the same command again
    75   stopped before the end (EX_TEMPFAIL): start the same command again, it continues
    130  Ctrl-C, and nothing more was done

SIGTERM ends a command with 75 at any time, and so does the first Ctrl-C of one that continues when
it is started again. A training loop that has made a step saves first: `hold` says so, and the loop
asks `asked` at places where it can stop. A second Ctrl-C leaves at once.

Signals are heard by a thread, since the main thread may be inside a compilation for minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from input_pipeline.escape import lines

log = logging.getLogger('dist_jax')

ERROR, WRONG, DISK_FULL, AGAIN, INTERRUPTED = 1, 2, 74, 75, 130
NAMES = {signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'Ctrl-C'}
# After a signal, for the loop to come to a place where it can stop; longer where steps are.
PATIENCE_SECONDS = 40.0
HOOK_SECONDS = 5.0  # for what is done before a process leaves at once


class StoppedError(Exception):
    """A stop was asked for, and the work at hand was left."""


class AgainError(RuntimeError):
    """Not now: the same command may be started again; exit code 75."""


# Leaving at once.

# Called by `leave_now`, the last one first; each must be quick and may be called in any thread.
before_exit: list[Callable[[], None]] = []
_last = threading.Lock()


def leave_now(code: int, message: str = '') -> None:
    """Ends this process from any thread, waiting for nothing. Does not return.

    Args:
      code: exit code.
      message: a line for the log; of two threads that end the process, one speaks.
    """
    _last.acquire()  # never released
    # Another thread may hold the locks of Python's streams for ever.
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b'\x1b[?25h')  # the cursor, which a progress bar hides
        if message:
            os.write(2, f'{lines(message)}\n'.encode(errors='backslashreplace'))
    hooks = threading.Thread(target=_run_hooks, daemon=True)
    hooks.start()
    hooks.join(HOOK_SECONDS)
    os._exit(code)


def _run_hooks() -> None:
    for hook in (*reversed(before_exit), sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(Exception):
            hook()


# Errors.

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXT = re.compile(r'no space left on device|disk quota exceeded|\bENOSPC\b', re.IGNORECASE)
_PATH = re.compile(r'["\'`]((?:file://)?/[^"\'`]+)["\'`]|(?:^|[\s:=])((?:file://)?/[^\s:;,"\']+)')


def code_of(error: BaseException) -> int:
    """Exit code of a command that an error ends."""
    if full_disk(error, ()):
        return DISK_FULL
    if isinstance(error, (AgainError, StoppedError)):
        return AGAIN
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return WRONG if isinstance(error, ValueError) else ERROR


def full_disk(error: BaseException, places: Sequence[str]) -> str:
    """What to say where a full disk is behind an error, on one line; '' where it is not.

    Libraries wrap it in errors of their own, with nothing but the text.

    Args:
      error: what ended the command.
      places: paths that it may have written to, for an error that does not say; others are ignored.
    """
    for each in _chain(error):
        text = str(each)
        by_number = isinstance(each, OSError) and each.errno in _FULL
        if not by_number and not _FULL_TEXT.search(text):
            continue
        name = getattr(each, 'filename', None)
        found = [a or b for a, b in _PATH.findall(text)]
        path = os.fsdecode(name) if isinstance(name, (str, bytes)) else ''
        path = (path or max(found, key=len, default='')).removeprefix('file://')
        known = [place for place in (*places, tempfile.gettempdir()) if _is_place(place)]
        path = path or min(known, key=_free)
        return (
            f'the disk is full: {path} ({_free(path) / 2**20:.1f} MiB free). Free some space and '
            'start the same command again; a run continues from its newest checkpoint.'
        )
    return ''


def _is_place(path: str) -> bool:
    """Whether something is there, or was to be made in a folder that is there."""
    folder = os.path.dirname(path)
    return os.path.exists(path) or (bool(folder) and os.path.isdir(folder))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__, *getattr(each, 'exceptions', ())]


def _free(path: str) -> float:
    """Free bytes where a file is or was to be."""
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return math.nan


# Signals.


@dataclasses.dataclass
class _Hold:
    """A loop that has something to save.

    Attributes:
      finish: waits for saves that run; called before leaving without another one.
      since: when it was at the last place where it could stop.
      usual: seconds from the one before to that one.
      stopping: it stops there, and may take its time to save.
      late: it did not come to the next one in time.
    """

    finish: Callable[[], None]
    since: float = dataclasses.field(default_factory=time.monotonic)
    usual: float = 0.0
    stopping: bool = False
    late: bool = False


class _Listener:
    """The signals of this process.

    Attributes:
      asked: the signal that asked this run to stop, here or in another process; '' for none.
      leave: (exit code, message) -> ends this process, and those that run with it.
    """

    def __init__(self, continues: bool, exits: bool):
        self.asked = ''
        self.leave: Callable[[int, str], None] = leave_now
        self._continues, self._exits = continues, exits
        self._hold: _Hold | None = None
        self._lock = threading.RLock()
        self._interrupts = 0
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}
        self._wake, self._bell = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name='signals', daemon=True)

    def start(self) -> None:
        """Takes the signals over.

        Raises:
          ValueError: in another thread than the main one.
        """
        wanted = [signal.SIGTERM]
        # A shell starts what it puts into the background deaf to Ctrl-C, and so it stays.
        if self._exits and self._continues and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            wanted.append(signal.SIGINT)
        for number in wanted:
            self._before[number] = signal.signal(number, self._note)
        if self._exits:
            self._wake.setblocking(False)
            self._before_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
            self._thread.start()

    def stop(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._exits:
            signal.set_wakeup_fd(self._before_fd)
            self._wake.close()
            self._thread.join()
        else:
            self._wake.close()
        self._bell.close()

    def _note(self, number: int, _: Any) -> None:
        if not self._exits:  # else the thread hears it, whatever the main thread does
            self.ask(NAMES[number])

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._bell], [], [], self._seconds_left())
            if not ready:
                self._late()
                continue
            numbers = self._bell.recv(64)
            if not numbers:
                return
            for number in numbers:
                if number in self._before:  # not a wake-up, and nobody else's signal
                    self._hear(number)

    def _hear(self, number: int) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                self.leave(INTERRUPTED, 'dist_jax: Ctrl-C again: left at once')
        self.ask(NAMES[number])

    def ask(self, name: str) -> None:
        """Asks this process to stop: at the next place of its loop, or at once if it has none."""
        with self._lock:
            first = not self.asked
            if first:
                self.asked, self._asked_at = name, time.monotonic()
            at_once = self._exits and self._hold is None
        if at_once:
            what = 'nothing has to be saved' if self._continues else 'it was not at its end'
            self.leave(
                AGAIN, f'dist_jax: {name}: {what}. Exit code {AGAIN}: start the same command again.'
            )
        elif first and self._exits:
            more = '; Ctrl-C again leaves at once' if name == 'Ctrl-C' else ''
            log.warning('%s: saving, then exit code %d%s', name, AGAIN, more)
            with contextlib.suppress(OSError):
                self._wake.send(b'\0')  # there is a deadline from now on

    @property
    def exits(self) -> bool:
        return self._exits

    @property
    def holds(self) -> bool:
        return self._hold is not None

    def hold(self, finish: Callable[[], None]) -> None:
        with self._lock:
            now = time.monotonic()
            if self._hold is None:
                self._hold = _Hold(finish)
            self._hold.usual, self._hold.since = now - self._hold.since, now

    def stopping(self) -> None:
        with self._lock:
            if self._hold is not None:
                self._hold.stopping = True

    def release(self) -> None:
        with self._lock:
            self._hold = None

    def _seconds_left(self) -> float | None:
        """Until this process leaves without another save."""
        with self._lock:
            hold = self._hold
            if not self.asked or hold is None or hold.stopping or hold.late:
                return None
            patience = max(PATIENCE_SECONDS, 2 * hold.usual)
            return max(self._asked_at + patience - time.monotonic(), 0.0)

    def _late(self) -> None:
        with self._lock:
            hold = self._hold
            if self._seconds_left() != 0.0:
                return
            hold.late = True
        # Saves may take long; this thread goes on to hear signals.
        threading.Thread(target=self._give_up, args=(hold,), daemon=True).start()

    def _give_up(self, hold: _Hold) -> None:
        with contextlib.suppress(Exception):
            hold.finish()
        if self._hold is hold and not hold.stopping:  # it has not come there in the meantime
            self.leave(
                AGAIN,
                f'dist_jax: {self.asked}: nothing has ended for '
                f'{time.monotonic() - self._asked_at:.0f} s. Exit code {AGAIN}: the same command '
                'continues from the newest checkpoint.',
            )


_listener: _Listener | None = None


def listen(continues: bool, exits: bool = True) -> bool:
    """Takes the signals over until `stop_listening`.

    Args:
      continues: the command continues when it is started again, so Ctrl-C stops it like SIGTERM.
      exits: a signal may end the process; otherwise it only asks, for a program that calls a
        training loop among other things.

    Returns:
      Whether it does: not where somebody listens already, or in another thread than the main one.
    """
    global _listener
    if _listener is not None:
        return False
    listener = _Listener(continues, exits)
    try:
        listener.start()
    except ValueError:
        return False
    _listener = listener
    return True


def stop_listening() -> None:
    """Gives the signals back to whom they belonged before."""
    global _listener
    if _listener is not None:
        _listener.stop()
        _listener = None


def ends_processes() -> bool:
    """Whether this process is a command, which may end itself."""
    return _listener is not None and _listener.exits


def leave_with(leave: Callable[[int, str], None]) -> None:
    """Says how this process ends itself and those that run with it: (exit code, message)."""
    if _listener is not None:
        _listener.leave = leave


def asked() -> str:
    """The signal that asked this run to stop; '' for none."""
    return _listener.asked if _listener is not None else ''


def asked_of_loop() -> str:
    """The same, where a loop will stop for it and the command does not end at once."""
    return _listener.asked if _listener is not None and _listener.holds else ''


def ask(name: str) -> None:
    """Asks this process to stop, as a signal would; for one that another process got."""
    if _listener is not None:
        _listener.ask(name)


def hold(finish: Callable[[], None]) -> None:
    """From now on a signal asks and does not end the process. Call it where a loop can stop.

    Args:
      finish: waits for saves that run.
    """
    if _listener is not None:
        _listener.hold(finish)


def stopping() -> None:
    """The loop has stopped; there is no deadline for what it saves."""
    if _listener is not None:
        _listener.stopping()


def release() -> None:
    """The loop has nothing to save any more."""
    if _listener is not None:
        _listener.release()
