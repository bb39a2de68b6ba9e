"""Where a run writes what it measures: JSON Lines that continue, TensorBoard.

clu's writers need TensorFlow to be imported (clu 0.0.12, 2026-11); the event files here come from
tensorboardX, and the method names are clu's. Its SummaryWriter is not used: a thread of it writes,
and when that ends with an error (a full disk), the next call waits for ever (2.6.5).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dist_jax.scalars import VALIDATION
from input_pipeline.escape import markdown

log = logging.getLogger('dist_jax')

METRICS_FILE = 'metrics.jsonl'
MIRROR_SECONDS = 30  # between copies to a bucket; a checkpoint copies too


class MetricWriter:
    """Scalars of one run; continues the files of an earlier session.

    Only the first process writes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        start_step: int,
        tensorboard: bool = True,
        evaluated: bool = True,
        also: Callable[[int, Mapping[str, float]], None] = lambda step, scalars: None,
    ):
        """Opens the files and drops what was logged after `start_step`, to be measured again.

        Args:
          workdir: of the run.
          start_step: updates done.
          tensorboard: write event files too.
          evaluated: the evaluation of `start_step` counts; otherwise its figures are dropped too.
          also: called with what `write_scalars` is called with, once it is written.
        """
        self._file = None
        self._also = also
        self._events: EventsWriter | None = None
        self._mirror: _Mirror | None = None
        if jax.process_index() != 0:
            return
        if '://' in os.fspath(workdir):
            self._mirror = _Mirror(epath.Path(workdir))
            workdir = self._mirror.local
        path = Path(workdir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [
                json.dumps(row)
                for row in read_metrics(path)
                if row['step'] < start_step
                or (row['step'] == start_step and (evaluated or not _is_evaluation(row)))
            ]
            partial = path.with_suffix('.partial')
            partial.write_text(''.join(f'{line}\n' for line in kept), encoding='utf-8')
            partial.rename(path)
        self._file = path.open('a', encoding='utf-8')
        if tensorboard:
            folder = Path(workdir) / 'tensorboard'
            folder.mkdir(exist_ok=True)
            self._folder = folder
            self._events = EventsWriter(str(folder / 'events'))
            if start_step:  # hides what was logged after it
                again = SessionLog(status=SessionLog.START)
                self._events.write_event(
                    Event(wall_time=time.time(), step=start_step + 1, session_log=again)
                )
            self._events.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes figures of a step, counted as updates done."""
        if self._file is None:
            return
        # JSON knows no NaN.
        row = {k: v if math.isfinite(v) else str(v) for k, v in scalars.items()}
        with _naming(self._file.name):
            self._file.write(json.dumps({'step': step, **row}) + '\n')
            self._file.flush()
        if self._events is not None:
            self._write_event(step, [summary.scalar(*pair) for pair in scalars.items()])
        if self._mirror is not None and self._mirror.due():
            self.flush()
        self._also(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts to TensorBoard."""
        if self._events is not None:
            parts = [summary.text(name, markdown(text)) for name, text in texts.items()]
            self._write_event(step, parts)

    def _write_event(self, step: int, parts: Sequence[Summary]) -> None:
        together = Summary(value=[value for part in parts for value in part.value])
        with _naming(self._folder):
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=together))
            self._events.flush()

    def flush(self) -> None:
        """Everything that was written is in the workdir now; a run may be killed after it."""
        if self._mirror is not None:
            self._mirror.copy()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            with _naming(self._file.name):
                self._file.close()
        if self._events is not None:
            with _naming(self._folder):
                self._events.close()
        if self._mirror is not None:
            self._mirror.copy()
            self._mirror.close()


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says where an error of writing was; Python says it of opening only."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


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
    """Rows of a metrics file; those that are not readable are left out.

    A killed run may leave its last line half-written, and a machine that lost its power zeros.
    """
    rows = []
    for line in epath.Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get('step'), int):
                rows.append(row)
    return rows


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith(VALIDATION) for name in row)
