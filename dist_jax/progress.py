"""How far a command is: a bar on a terminal, lines in a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from input_pipeline.escape import Console, lines, terminal


class Bar:
    """A progress bar on a terminal; plain lines where the output is a file.

    There, a line says how far it is whenever nothing else was printed for `silence` seconds.
    Use as a context manager. Only the first process prints.
    """

    def __init__(self, title: str, total: int, completed: int = 0, silence: float = 10.0):
        self._title, self._total, self._done = title, total, completed
        self._silence = silence
        self._printed = time.monotonic()
        self._first: tuple[float, int] | None = None  # when, and how much was done
        self._quiet = jax.process_index() != 0
        self._console = Console(stderr=True)
        self._progress = None
        if self._console.is_terminal and not self._quiet:
            self._progress = Progress(
                TextColumn('{task.description}', style='bold', markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn('{task.fields[note]}', markup=False),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(
                self._title, total=self._total, completed=self._done, note=''
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, note: str | None = None, total: int | None = None) -> None:
        """Moves the bar; `note` stands beside it, `total` is another one from now on."""
        self._done = done
        self._total = self._total if total is None else total
        if self._progress is not None:
            fields = {} if note is None else {'note': terminal(note)}
            self._progress.update(self._task, completed=done, total=self._total, **fields)
            return
        now = time.monotonic()
        if self._first is None:  # what came before is compilation, and says nothing of the rest
            self._first = now, done
        if now - self._printed >= self._silence and done < self._total:
            since, had = self._first
            left = ''
            if done > had:
                seconds = (now - since) / (done - had) * (self._total - done)
                left = f', ETA {duration(seconds)}'
            where = f', {note}' if note else ''
            self.line(f'{100 * done / self._total:.0f} %{left}{where}')

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        self._printed = time.monotonic()
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.console.print(text)
        else:
            said = lines(f'{self._title} {self._done}/{self._total} {text}')
            print(said, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'
