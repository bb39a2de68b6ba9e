"""Reads files in a child process with a bound on time and memory, and says how each ended.

A child reads many files, so that importing the reader is paid once, and is replaced when it dies or
is killed. Linux only: peak memory is read, and reset before each file, through /proc.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Reader = Callable[..., None]  # of a path and options; raises what the reader raises

# How a file can end. All but the first two are bugs.
LOADED, REFUSED = 'loaded', 'refused'
BUGS = ('unclear', 'exception', 'crash', 'hang', 'memory')

_START_SECONDS = 180  # imports on a busy machine


@dataclasses.dataclass(frozen=True)
class Input:
    """A file or folder to read.

    Attributes:
      path: of it; its name is unlike any other.
      origin: how it was made, for the table.
      options: keyword arguments of the reader.
    """

    path: Path
    origin: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How reading ended.

    Attributes:
      kind: `LOADED`; `REFUSED`, by a ValueError or OSError that names the input; or one of `BUGS`,
        of which 'unclear' is such an error that does not.
      message: of the error; '' where it was read.
      seconds: wall time.
      mebibytes: peak of resident memory over what the process held before.
    """

    kind: str
    message: str
    seconds: float
    mebibytes: float


class Child:
    """A process that reads one file after the other; use it as a context manager."""

    def __init__(self, reader: Reader, warm: Sequence[Input], timeout: float, mebibytes: int):
        """Starts it.

        Args:
          reader: reads an input; importable by name.
          warm: good inputs, read first so that imports do not count; they must load.
          timeout: seconds an input.
          mebibytes: of memory an input.
        """
        self.reader, self.warm, self.timeout, self.mebibytes = reader, warm, timeout, mebibytes
        self.process = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *unused) -> None:
        self._end()

    def read(self, item: Input) -> Outcome:
        """Reads one input.

        Raises:
          RuntimeError: if a good input does not load.
        """
        if self.process is None:
            self._start()
        start = time.perf_counter()
        try:
            self.connection.send(item)
            if self.connection.poll(self.timeout):
                return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            name = signal.Signals(-code).name if code < 0 else f'exit code {code}'
            self._end()
            return Outcome('crash', name, time.perf_counter() - start, 0)
        peak = _memory(self.process.pid)['VmHWM']
        self._end()
        return Outcome('hang', f'more than {self.timeout} s', time.perf_counter() - start, peak)

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.reader, self.warm, self.mebibytes), daemon=True
        )
        self.process.start()
        theirs.close()
        try:
            problem = 'it takes too long'
            if self.connection.poll(_START_SECONDS):
                problem = self.connection.recv()
        except EOFError:
            problem = 'it died'
        if problem:
            self._end()
            raise RuntimeError(f'the reader cannot read what it should: {problem}')

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection: Connection, reader: Reader, warm: Sequence[Input], mebibytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for item in warm:
        try:
            reader(item.path, **item.options)
        except Exception:
            connection.send(f'{item.origin}: {traceback.format_exc()}')
            return
    # Without the limit the machine's memory would be the bound. Twice: libraries take more than
    # they touch, and what is touched is measured.
    limit = int(_memory('self')['VmData'] + 2 * mebibytes) << 20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    connection.send('')
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(_measured(reader, item, mebibytes))


def _measured(reader: Reader, item: Input, mebibytes: int) -> Outcome:
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    before, start = _memory('self')['VmRSS'], time.perf_counter()
    kind, message = LOADED, ''
    try:
        reader(item.path, **item.options)
    except MemoryError as error:
        kind, message = 'memory', f'{_place(error)}: {type(error).__name__}: {error}'
    except (ValueError, OSError) as error:
        # The message of an OSError from the system is complete with its file name.
        kind = REFUSED if item.path.name in str(error) else 'unclear'
        message = str(error)
        if kind == 'unclear':
            message = f'{_place(error)}: {type(error).__name__}: {message}'
    except Exception as error:
        kind, message = 'exception', f'{_place(error)}: {type(error).__name__}: {error}'
    seconds = time.perf_counter() - start
    peak = max(0.0, _memory('self')['VmHWM'] - before)
    if peak > mebibytes:
        kind, message = 'memory', f'{peak:.0f} MiB; {message}'
    return Outcome(kind, ascii(message[:1000])[1:-1], seconds, peak)


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{os.path.basename(frame.filename)}:{frame.lineno}'


def _memory(pid: int | str) -> dict[str, float]:
    """Figures of a process in MiB."""
    lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    pairs = (line.split() for line in lines if line.startswith('Vm'))
    return {name.rstrip(':'): int(kilobytes) / 1024 for name, kilobytes, _ in pairs}
