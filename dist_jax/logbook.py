"""Where a run writes what it measures: console, JSON Lines, TensorBoard.

clu's writers need TensorFlow to be imported (clu 0.0.12, 2026-11); the event files here come from
tensorboardX, and the method names are clu's.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

METRICS_FILE = 'metrics.jsonl'


class Logbook:
    """Scalars of one run; continues the files of an earlier session.

    Only the first process writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], start_step: int, tensorboard: bool = True):
        """Opens the files and drops what was logged after `start_step`, to be measured again."""
        self._file = None
        self._events = None
        if jax.process_index() != 0:
            return
        path = Path(workdir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = [json.dumps(row) for row in read_metrics(path) if row['step'] <= start_step]
            partial = path.with_suffix('.partial')
            partial.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
            partial.rename(path)
        self._file = path.open('a', encoding='utf-8')
        if tensorboard:
            purge = start_step + 1 if start_step else None
            self._events = SummaryWriter(str(Path(workdir) / 'tensorboard'), purge_step=purge)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes figures of a step, counted as updates done."""
        if self._file is None:
            return
        # JSON knows no NaN.
        row = {k: v if math.isfinite(v) else str(v) for k, v in scalars.items()}
        self._file.write(json.dumps({'step': step, **row}) + '\n')
        self._file.flush()
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts to TensorBoard."""
        if self._events is not None:
            for name, text in texts.items():
                self._events.add_text(name, f'```\n{text}\n```', step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a killed run left half-written is dropped."""
    rows = []
    for line in Path(path).read_text(encoding='utf-8').splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Bar:
    """A progress bar on a terminal; plain lines where the output is a file.

    Use as a context manager. Only the first process prints.
    """

    def __init__(self, title: str, total: int, completed: int = 0):
        self._title, self._total, self._done = title, total, completed
        self._quiet = jax.process_index() != 0
        self._console = Console(stderr=True)
        self._progress = None
        if self._console.is_terminal and not self._quiet:
            self._progress = Progress(
                TextColumn('[bold]{task.description}'),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn('{task.fields[note]}'),
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

    def update(self, done: int, note: str | None = None) -> None:
        """Moves the bar; `note` stands beside it."""
        self._done = done
        if self._progress is not None:
            fields = {} if note is None else {'note': note}
            self._progress.update(self._task, completed=done, **fields)

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        else:
            print(f'{self._title} {self._done}/{self._total} {text}', file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'
