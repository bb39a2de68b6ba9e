"""Where a run writes what it measures: console, JSON Lines, TensorBoard.

clu's writers need TensorFlow to be imported (clu 0.0.12, 2026-11); the event files here come from
tensorboardX, and the method names are clu's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from input_pipeline.escape import Console, lines, markdown

log = logging.getLogger('dist_jax')

METRICS_FILE = 'metrics.jsonl'
MIRROR_SECONDS = 30  # between copies to a bucket; a checkpoint copies too


class Logbook:
    """Scalars of one run; continues the files of an earlier session.

    Only the first process writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], start_step: int, tensorboard: bool = True):
        """Opens the files and drops what was logged after `start_step`, to be measured again."""
        self._file = None
        self._events = None
        self._mirror: _Mirror | None = None
        if jax.process_index() != 0:
            return
        if '://' in os.fspath(workdir):
            self._mirror = _Mirror(epath.Path(workdir))
            workdir = self._mirror.local
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
        if self._mirror is not None and self._mirror.due():
            self.flush()

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts to TensorBoard."""
        if self._events is not None:
            for name, text in texts.items():
                self._events.add_text(name, markdown(text), step)

    def flush(self) -> None:
        """Everything that was written is in the workdir now; a run may be killed after it."""
        if self._events is not None:
            self._events.flush()
        if self._mirror is not None:
            self._mirror.copy()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._mirror is not None:
            self._mirror.copy()
            self._mirror.close()


class _Mirror:
    """Files that grow, of a workdir in a bucket: written here, and copied there as whole objects.

    A bucket cannot append. A copy that fails is a warning and is made up for by the next.

    Attributes:
      local: the folder to write to; it holds the metrics of earlier sessions.
    """

    def __init__(self, bucket: epath.Path):
        self._bucket = bucket
        self.local = Path(tempfile.mkdtemp(prefix='dist_jax_'))
        self._copied: dict[Path, int] = {}  # file -> bytes
        self._since = time.monotonic()
        if (bucket / METRICS_FILE).exists():
            (self.local / METRICS_FILE).write_bytes((bucket / METRICS_FILE).read_bytes())

    def due(self) -> bool:
        return time.monotonic() - self._since > MIRROR_SECONDS

    def copy(self) -> None:
        self._since = time.monotonic()
        for file in sorted(p for p in self.local.rglob('*') if p.is_file()):
            data = file.read_bytes()
            if self._copied.get(file) == len(data):
                continue
            target = self._bucket / file.relative_to(self.local).as_posix()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                self._copied[file] = len(data)
            except OSError as error:
                log.warning('cannot write %s (%s); trying again later', target, error)

    def close(self) -> None:
        shutil.rmtree(self.local, ignore_errors=True)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a killed run left half-written is dropped."""
    rows = []
    for line in epath.Path(path).read_bytes().decode('utf-8', 'replace').splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


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
            self.line(f'{100 * done / self._total:.0f} %{left}')

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
