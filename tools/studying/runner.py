"""Runs jobs one after the other; what is done stays done, what fails is written down.

    OUT/runs/NAME/job.json    command, exit code, seconds; of a failure the end of its log
    OUT/runs/NAME/job.log     what it printed
    OUT/cache                 compiled programs, shared by all

A job counts as done when its result is there and `job.json` says that this very command ended well.
Killed at any moment, the same study goes on: `dist_jax train` continues by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dist_jax import ending
from dist_jax.json_file import write_json
from dist_jax.progress import duration
from input_pipeline.escape import Console
from tools.studying.jobs import EXPECTED, RESULTS, RUNS, TRAIN, Job

RECORD, LOG = 'job.json', 'job.log'
LOG_LINES = 30  # of a failure
SETTLE_SECONDS = 5.0  # before a run is started again that says that another process has it
AGAIN_TRIES = 60

Execute = Callable[[Sequence[str], Path, Mapping[str, str]], int]


def environment(out: Path) -> dict[str, str]:
    """That of this process, with one cache of compiled programs for all jobs, and whole errors."""
    return os.environ | {
        'DIST_JAX_TRACEBACK': '1',
        'JAX_COMPILATION_CACHE_DIR': str((out / 'cache').absolute()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }


def execute(command: Sequence[str], log: Path, env: Mapping[str, str]) -> int:
    """Runs `python -m command`; the exit status. What ends this process ends it too."""
    with log.open('ab') as file:
        process = subprocess.Popen(
            [sys.executable, '-m', *command], stdout=file, stderr=subprocess.STDOUT, env=env
        )
        try:
            return process.wait()
        except BaseException:  # Ctrl-C, SIGTERM: a run saves where it is
            process.terminate()
            process.wait()
            raise


def record_of(out: Path, job: Job) -> dict[str, Any]:
    """What `job.json` says; {} where there is none that can be read."""
    try:
        found = dict(json.loads((job.folder(out) / RECORD).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        return {}
    whole = found.keys() >= {'command', 'code', 'seconds'}
    return found if whole and (not found['code'] or found.get('log')) else {}


def is_done(out: Path, job: Job) -> bool:
    """Whether its result is there, and is this command's.

    Raises:
      ValueError: another command made it, or of another run than the one that is there.
    """
    record = record_of(out, job)
    if record.get('code') != 0 or not job.result(out).exists():
        return False
    for name, digest in _digests(out, job).items():
        if record.get('needs', {}).get(name, digest) != digest:
            raise ValueError(
                f'{job.folder(out)} was made of another {name} than the one that is there. Delete '
                'that folder to run it again'
            )
    if record['command'] != list(job.command):
        changed = set(record['command']) ^ set(job.command)
        raise ValueError(
            f'{job.folder(out)} was made by another command, which differs in '
            f'{", ".join(sorted(changed))}. Delete that folder to run it again, or choose '
            'another --out'
        )
    return True


def failure_of(out: Path, job: Job) -> dict[str, Any]:
    """The record of a job that ended otherwise than well; {} where there is none."""
    record = record_of(out, job)
    return record if record.get('code', 0) != 0 else {}


def run(out: Path, jobs: Sequence[Job], start: Execute) -> list[Job]:
    """Runs what is not done.

    Args:
      out: folder of the study.
      jobs: in order.
      start: runs a command, as `execute` does.

    Returns:
      Those that failed, or need one that failed.

    Raises:
      ValueError: a folder holds the result of another command.
    """
    env = environment(out)
    done = [is_done(out, job) for job in jobs]  # all are looked at before any is started
    waiting = [job for job, ready in zip(jobs, done) if not ready]
    failed: dict[str, Job] = {}
    # Not `dist_jax.progress`, which asks jax: the devices are for the jobs alone.
    console = Console(stderr=True)
    columns = (
        TextColumn('[bold]study'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.description}'),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task('', total=len(jobs), completed=len(jobs) - len(waiting))
        for place, job in enumerate(waiting):
            left = duration(sum(expected(out, each, jobs) for each in waiting[place:]))
            bar.update(task, description=f'{job.name}, about {left} left')
            broken = [name for name in job.needs if name in failed]
            if broken:
                record = {'code': 1, 'seconds': 0.0, 'log': [f'needs {broken[0]}, which failed']}
                _write(out, job, record)
            else:
                record = _run(out, job, env, start)
            bar.advance(task)
            if record['code']:
                failed[job.name] = job
                told = f'FAILED with {record["code"]}: {record["log"][-1]}'
            else:
                told = duration(record['seconds'])
            number = len(jobs) - len(waiting) + place + 1
            left = duration(sum(expected(out, each, jobs) for each in waiting[place + 1 :]))
            said = f'{number}/{len(jobs)} {job.name}: {told}; about {left} left'
            bar.console.print(said, soft_wrap=True)
    return list(failed.values())


def expected(out: Path, job: Job, jobs: Sequence[Job]) -> float:
    """Seconds of a job: the mean of those of its row that are done, else a guess."""
    own = [each for each in jobs if (each.row, each.kind) == (job.row, job.kind)]
    records = [record_of(out, each) for each in own]
    found = [record['seconds'] for record in records if record.get('code') == 0]
    return statistics.mean(found) if found else EXPECTED[job.kind]


def _run(out: Path, job: Job, env: Mapping[str, str], start: Execute) -> dict[str, Any]:
    folder = job.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    log.unlink(missing_ok=True)
    command = [part.replace('{out}', str(out)) for part in job.command]
    started = time.monotonic()
    code = start(command, log, env)
    tries = 0
    while code == ending.AGAIN and tries < AGAIN_TRIES:
        # Stopped from outside, or what was started before this study was killed still runs.
        tries += 1
        time.sleep(SETTLE_SECONDS)
        code = start(command, log, env)
    record: dict[str, Any] = {'code': code, 'seconds': round(time.monotonic() - started, 2)}
    why = _lacking(job.result(out))
    if code or why:
        record |= {'code': code or 1, 'log': (code and _end(log)) or [why]}
    else:
        record['needs'] = _digests(out, job)
    _write(out, job, record)
    return record


def _lacking(result: Path) -> str:
    """Why there is no result; '' where there is one."""
    try:
        found = dict(json.loads(result.read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        return f'no {result.name} is there, or it cannot be read'
    return str(found.get('val_error', ''))


def _digests(out: Path, job: Job) -> dict[str, str]:
    """Of the results that it reads, by name of the job."""
    found = {name: (out / RUNS / name / RESULTS[TRAIN]) for name in job.needs}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in found.items()
        if file.exists()
    }


def _write(out: Path, job: Job, record: Mapping[str, Any]) -> None:
    job.folder(out).mkdir(parents=True, exist_ok=True)
    write_json(job.folder(out) / RECORD, {'command': list(job.command), **record})


def _end(log: Path) -> list[str]:
    if not log.exists():
        return []
    return log.read_bytes().decode('utf-8', 'replace').splitlines()[-LOG_LINES:]
