"""Services that watch a run beside TensorBoard: Weights & Biases, MLflow, trackio.

`config.log.report_to` names them. Each is an extra of the package and is imported only then, by the
first process. A thread of its own talks to each, so that a run never waits for a network: what
fails is one warning, and what a service does not take in time is left out. `WORKDIR/sinks.json`
remembers which run each service has made of this one, and a restart continues it.

Where the services are is said as they want it: WANDB_MODE, WANDB_API_KEY; MLFLOW_TRACKING_URI;
TRACKIO_DIR, TRACKIO_SPACE_ID.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
from etils import epath
from ml_collections import ConfigDict

from dist_jax.configs import base
from dist_jax.json_file import write_json

log = logging.getLogger('dist_jax')

FILE = 'sinks.json'
REPORT = 'report.html'
WAITING = 10_000  # rows that a service may lag behind
DONE, STOPPED, FAILED = 'done', 'stopped', 'failed'  # how a start of a run ends
# For the services to take what is left: machines go away, and other processes wait to be told.
FINISH_SECONDS = {DONE: 60.0, STOPPED: 10.0, FAILED: 10.0}

Figures = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a service is told of a run when it is opened.

    Attributes:
      project: what it belongs to.
      name: of the run.
      config: its fields, 'group.field' -> JSON value.
      folder: a local folder for files of the service.
      id: of the run that the service made earlier of the same workdir; '' for a new one.
    """

    project: str
    name: str
    config: Mapping[str, Any]
    folder: str
    id: str = ''


class Sink(Protocol):
    """A service, opened. All calls come from one thread.

    Attributes:
      id: of the run, under which it is found again.
    """

    id: str

    def scalars(self, step: int, figures: Figures) -> None:
        """Figures of a step, counted as updates done."""

    def report(self, step: int, summary: Figures, page: str) -> None:
        """The end: figures of the whole run, and its report as a page of HTML."""

    def close(self, how: str) -> None:
        """The last call of this start: DONE, STOPPED or FAILED."""


class _Wandb:
    def __init__(self, run: Run):
        import wandb

        self._html, self.id = wandb.Html, run.id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=self.id,
            resume='allow',
            dir=run.folder,
            config=dict(run.config),
            settings=wandb.Settings(console='off'),  # this process has its own streams
        )
        # Its own count of steps never goes back; a run that continues from a checkpoint does.
        self._run.define_metric('step')
        self._run.define_metric('*', step_metric='step')

    def scalars(self, step: int, figures: Figures) -> None:
        self._run.log({**figures, 'step': step})

    def report(self, step: int, summary: Figures, page: str) -> None:
        self._run.summary.update(dict(summary))
        self._run.log({'report': self._html(page, inject=False), 'step': step})

    def close(self, how: str) -> None:
        if how == STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=int(how != DONE))


# How a run may end in MLflow; fields of one call, characters of a value.
_MLFLOW_STATES = {DONE: 'FINISHED', STOPPED: 'KILLED', FAILED: 'FAILED'}
_MLFLOW_PARAMS, _MLFLOW_LENGTH = 100, 500


class _Mlflow:
    def __init__(self, run: Run):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        if run.id:
            self.id = run.id
            self._client.update_run(self.id, status='RUNNING')
            return
        found = self._client.get_experiment_by_name(run.project)
        experiment = (
            self._client.create_experiment(run.project) if found is None else found.experiment_id
        )
        self.id = self._client.create_run(experiment, run_name=run.name).info.run_id
        fields = [Param(name, str(value)[:_MLFLOW_LENGTH]) for name, value in run.config.items()]
        for start in range(0, len(fields), _MLFLOW_PARAMS):
            self._client.log_batch(self.id, params=fields[start : start + _MLFLOW_PARAMS])

    def scalars(self, step: int, figures: Figures) -> None:
        now = int(time.time() * 1000)
        rows = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self.id, metrics=rows)

    def report(self, step: int, summary: Figures, page: str) -> None:
        self.scalars(step, {f'final_{name}': value for name, value in summary.items()})
        self._client.log_text(self.id, page, REPORT)

    def close(self, how: str) -> None:
        self._client.set_terminated(self.id, _MLFLOW_STATES[how])


class _Trackio:
    def __init__(self, run: Run):
        import trackio

        # It knows runs by their names.
        self._library, self.id = trackio, run.id or f'{run.name}-{uuid.uuid4().hex[:6]}'
        self._run = trackio.init(
            project=run.project,
            name=self.id,
            config=dict(run.config),
            resume='allow',
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, step: int, figures: Figures) -> None:
        self._run.log(dict(figures), step=step)

    def report(self, step: int, summary: Figures, page: str) -> None:
        self.scalars(step, {f'final/{name}': value for name, value in summary.items()})
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, REPORT)
            with open(path, 'w', encoding='utf-8') as file:
                file.write(page)
            self._run.log_artifact(path, name=f'{self.id}-report')

    def close(self, how: str) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Run], Sink]] = {
    'wandb': _Wandb,
    'mlflow': _Mlflow,
    'trackio': _Trackio,
}


def names(config: ConfigDict) -> tuple[str, ...]:
    """The services that a config names.

    Raises:
      ValueError: one that is not known, or not installed.
    """
    found = tuple(name.strip() for name in config.log.report_to.split(',') if name.strip())
    for name in found:
        if name not in SINKS:
            raise ValueError(f'log.report_to={name!r} is not one of {", ".join(SINKS)}')
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"log.report_to={name!r} is not installed here: pip install 'dist_jax[{name}]'"
            )
    return found


class Sinks:
    """All services of a run. Only the first process has any."""

    def __init__(self, config: ConfigDict, workdir: str | os.PathLike[str]):
        """Prepares; nothing is opened before `open`.

        Raises:
          ValueError: see `names`.
        """
        self._threads: list[_Thread] = []
        self._config, self._workdir = config, os.fspath(workdir)
        self._names = names(config) if jax.process_index() == 0 else ()
        self._how = DONE

    def open(self, config: Mapping[str, Any]) -> None:
        """Starts to talk to the services.

        Args:
          config: of the run, as JSON values.
        """
        if not self._names:
            return
        folder = self._workdir
        if '://' in folder:
            folder = tempfile.mkdtemp(prefix='dist_jax_')
        ids = _Ids(epath.Path(self._workdir) / FILE)
        for name in self._names:
            run = Run(
                self._config.log.project,
                os.path.basename(os.path.normpath(self._workdir)) or 'run',
                base.flat(config),
                folder,
                ids.known.get(name, ''),
            )
            self._threads.append(_Thread(name, run, ids.remember))

    def scalars(self, step: int, figures: Figures) -> None:
        """Figures of a step, counted as updates done; those that are no numbers are left out."""
        kept = _finite(figures)
        for thread in self._threads:
            thread.put(lambda sink: sink.scalars(step, kept))

    def report(self, summary: Mapping[str, Any]) -> None:
        """The end of a run whose summary and report are in its workdir."""
        if not self._threads:
            return
        kept, step = _finite(summary), summary['step']
        page = (epath.Path(self._workdir) / REPORT).read_text()
        for thread in self._threads:
            thread.put(lambda sink: sink.report(step, kept, page))

    def stopped(self) -> None:
        """This start ends before the run does."""
        self._how = STOPPED

    def failed(self) -> None:
        """This start ends with an error."""
        self._how = FAILED

    def close(self) -> None:
        """Waits for the services, together for as long as `FINISH_SECONDS` say."""
        how = self._how
        until = time.monotonic() + FINISH_SECONDS[how]
        for thread in self._threads:
            thread.put(lambda sink: sink.close(how))
            thread.put(None)
        for thread in self._threads:
            thread.wait(until - time.monotonic())
        self._threads = []


@contextlib.contextmanager
def watched(config: ConfigDict, workdir: str | os.PathLike[str]) -> Iterator[Sinks]:
    """The services of a run, closed at the end of this start.

    Raises:
      ValueError: see `names`.
    """
    found = Sinks(config, workdir)
    try:
        yield found
    except BaseException:
        found.failed()
        raise
    finally:
        found.close()


class _Ids:
    """Which runs of the services this one is, in a file."""

    def __init__(self, path: epath.Path):
        self._path, self._lock = path, threading.Lock()
        self.known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            self.known = {str(k): v for k, v in found.items() if isinstance(v, str)}

    def remember(self, name: str, own: str) -> None:
        with self._lock:
            if self.known.get(name) != own:
                self.known[name] = own
                write_json(self._path, self.known)


class _Thread:
    """The thread that talks to one service."""

    def __init__(self, name: str, run: Run, remember: Callable[[str, str], None]):
        self._name, self._run, self._remember = name, run, remember
        self._queue: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(WAITING)
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f'sink {name}', daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Sink], None] | None) -> None:
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._warn('it is too slow; rows are left out')

    def wait(self, seconds: float) -> None:
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._warn('it has not taken all in time')

    def _work(self) -> None:
        sink: Sink | None = None
        try:
            sink = SINKS[self._name](self._run)
            self._remember(self._name, sink.id)
        except BaseException as error:  # some libraries exit where they may not ask
            self._warn(error)
        while (call := self._queue.get()) is not None:
            if sink is not None:
                try:
                    call(sink)
                except BaseException as error:
                    self._warn(error)

    def _warn(self, reason: object) -> None:
        if not self._warned:
            self._warned = True
            text = str(reason).strip() or type(reason).__name__
            log.warning(
                'log.report_to: %s: %s. The run goes on without it; metrics.jsonl has everything',
                self._name,
                text.splitlines()[0][:300],
            )


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
