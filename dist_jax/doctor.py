"""Checks of the environment before anything is compiled, on every host and between hosts.

`dist_jax doctor` prints all of them. On several hosts `dist_jax train` runs them first and prints
what is not ok; one host alone soon finds out by itself.
Hosts exchange what they found through jax's coordinator: no collective operation, no compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from rich.table import Table

from dist_jax import experiment, paths, pod, recipe, train
from dist_jax.configs import base
from dist_jax.models import converted
from dist_jax.sharding import feed, make_mesh
from input_pipeline.decode import DecodeError
from input_pipeline.escape import Console, styled
from input_pipeline.machine import free_memory, num_cpus
from input_pipeline.pipeline import open_video
from input_pipeline.workers import LENT

log = logging.getLogger('dist_jax')

OK, WARNING, FAILED = 'ok', 'warning', 'failed'
PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'av')
CODE = ('dist_jax', 'dist_jax/configs', 'input_pipeline')  # rglob follows no link
CLOCK_SECONDS = 5.0  # hosts' clocks may differ by this much
DISK_GIB = 2.0  # free space for temporary files below which there is a warning
WAIT_SECONDS = 300  # for the slowest host
WORKDIR_SECONDS = 20.0  # for a workdir to answer; libraries of buckets try for minutes
MEMORY_SHARE = 0.5  # of free memory that batches may take without a warning
NAMED = 4  # hosts that a line names


class NotReadyError(RuntimeError):
    """A check failed; the message holds what and the way out."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
      name: what was looked at.
      state: OK, WARNING or FAILED.
      found: what was seen.
      help: the way out, if there is something to do.
    """

    name: str
    state: str
    found: str
    help: str = ''


@dataclasses.dataclass(frozen=True)
class Request:
    """What to check.

    Attributes:
      config: of the experiment, or None: nothing about data, backbone or batch is checked.
      workdir: of the run; '' for none.
      devices: expected number over all hosts; 0 if any number is right.
    """

    config: ConfigDict | None = None
    workdir: str = ''
    devices: int = 0


def run(request: Request) -> list[Check]:
    """All checks, in the order of the table; the same list on every host."""
    token = _first(uuid.uuid4().hex)
    own = _look(request, token)
    rows = _exchange('facts', own)
    usable = '' if own['workdir'] else request.workdir
    shared = _exchange('shared', _shared_workdir(usable, token, len(rows)))
    if request.workdir and not own['workdir']:
        with contextlib.suppress(Exception):
            _probe(request.workdir, token, jax.process_index()).unlink()
    checks = [
        _versions(rows),
        _code(rows),
        _processes(rows),
        _devices(rows, request.devices),
        _clock(rows),
        _disk(rows),
    ]
    if request.workdir:
        checks.append(_workdir(rows, shared, request.workdir))
    if request.config is not None:
        checks += [
            _config(rows),
            _batches(rows, request.config),
            _readers(rows, request.config),
            _merge(rows, 'backbone'),
            _merge(rows, 'training list'),
            _merge(rows, 'validation list'),
        ]
    return [check for check in checks if check is not None]


def check_before_training(config: ConfigDict, workdir: str) -> None:
    """Runs the checks, prints what is not ok, and stops a run that would fail later.

    Raises:
      NotReadyError: a check failed.
    """
    start = time.monotonic()
    checks = run(Request(config, workdir))
    failed = [check for check in checks if check.state == FAILED]
    if jax.process_index() == 0:
        for check in checks:
            if check.state == WARNING:
                log.warning('%s: %s. %s', check.name, check.found, check.help)
        log.info(
            'checked %d things on %d hosts in %.1f s',
            len(checks),
            jax.process_count(),
            time.monotonic() - start,
        )
    if failed:
        lines = [f'  {check.name}: {check.found}\n    {check.help}' for check in failed]
        raise NotReadyError(
            'the environment is not ready:\n'
            + '\n'.join(lines)
            + '\n`dist_jax doctor` with the same arguments shows all; --skip_checks trains anyway.'
        )


def print_table(checks: Sequence[Check], console: Console | None = None) -> None:
    """Prints the table, and below it what to do."""
    console = console or Console()
    table = Table('check', '', 'found')
    colours = {OK: 'green', WARNING: 'yellow', FAILED: 'bold red'}
    for check in checks:
        table.add_row(check.name, styled((check.state, colours[check.state])), check.found)
    console.print(table)
    for check in checks:
        if check.state != OK:
            console.print(f'{check.name}: {check.help}', soft_wrap=True)


# Between hosts.


def _exchange(name: str, value: Any) -> list[Any]:
    """JSON values of all hosts, by number.

    Raises:
      RuntimeError: a host did not come in time.
    """
    member = pod.current()
    if member is None:
        return [json.loads(json.dumps(value))]
    return [json.loads(text) for text in member.exchange(name, WAIT_SECONDS, json.dumps(value))]


def _first(value: str) -> str:
    return _exchange('token', value)[0]


def _hosts(rows: Sequence[dict[str, Any]], bad: Callable[[dict[str, Any]], Any]) -> str:
    """The hosts for which something is true, by number and name; '' for none."""
    found = [f'{i} ({row["host"]})' for i, row in enumerate(rows) if bad(row)]
    more = f' and {len(found) - NAMED} more' if len(found) > NAMED else ''
    return ', '.join(found[:NAMED]) + more


def _unlike(rows: Sequence[dict[str, Any]], field: str) -> str:
    """The hosts that do not say what most of them say."""
    values = [json.dumps(row[field], sort_keys=True) for row in rows]
    common = max(values, key=values.count)
    return _hosts(rows, lambda row: json.dumps(row[field], sort_keys=True) != common)


# On one host.


def _look(request: Request, token: str) -> dict[str, Any]:
    config = request.config
    facts: dict[str, Any] = {
        'host': socket.gethostname(),
        'versions': own_versions(),
        'code': code_sha256(),
        'platform': jax.default_backend(),
        'local_devices': jax.local_device_count(),
        'all_devices': jax.device_count(),
        'kind': jax.devices()[0].device_kind,
        'tpu_chips': pod.has_tpu(),
        'disk': shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
        'disk_at': tempfile.gettempdir(),
        'workdir': _own_workdir(request.workdir, token) if request.workdir else '',
        'cpus': num_cpus(),
        'all_cpus': os.cpu_count() or 1,
        'memory': free_memory(),
    }
    if config is not None:
        facts['config'] = hashlib.sha256(
            json.dumps(base.plain(config), sort_keys=True).encode()
        ).hexdigest()
        facts['backbone'] = _backbone(config)
        facts['training list'] = _list(config, 'train')
        facts['validation list'] = _list(config, 'val')
    facts['time'] = _time_together()
    return facts


def _time_together() -> float:
    """This host's clock at the moment when the last host came here."""
    member = pod.current()
    if member is not None:
        member.exchange('clock', WAIT_SECONDS)
    return time.time()


def own_versions() -> dict[str, str]:
    """Of Python and of the packages that take part in a run."""
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def code_sha256() -> str:
    """Digest of the Python files that take part in a run."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted({file for folder in CODE for file in (root / folder).rglob('*.py')}):
        digest.update(file.relative_to(root).as_posix().encode() + b'\0')
        digest.update(file.read_bytes() + b'\0')
    return digest.hexdigest()


def _probe(workdir: str, token: str, number: int) -> epath.Path:
    return converted.absolute_path(workdir) / f'.doctor-{token}-{number}'


def _own_workdir(workdir: str, token: str) -> str:
    """'' if this host can write and read there, or why not, soon."""
    answer: list[str] = []
    thread = threading.Thread(
        target=lambda: answer.append(_try_workdir(workdir, token)), daemon=True
    )
    thread.start()
    thread.join(WORKDIR_SECONDS)
    return answer[0] if answer else f'no answer within {WORKDIR_SECONDS:.0f} s'


def _try_workdir(workdir: str, token: str) -> str:
    path = _probe(workdir, token, jax.process_index())
    if workdir.startswith('gs://'):
        # The second deletes old checkpoints, at the first save that makes one superfluous.
        for name in ('gcsfs', 'google.cloud.storage'):
            if not _importable(name):
                return f'{name} is not installed'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(token.encode())
        if path.read_bytes() != token.encode():
            return 'what was written comes back changed'
    except Exception as error:  # buckets raise what their library raises
        return _reason(error)
    return ''


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of what it lies in
        return False


def _shared_workdir(workdir: str, token: str, count: int) -> list[int]:
    """Hosts whose file this host does not see."""
    if not workdir:
        return []
    missing = []
    for number in range(count):
        try:
            seen = _probe(workdir, token, number).read_bytes() == token.encode()
        except Exception:
            seen = False
        if not seen:
            missing.append(number)
    return missing


def _backbone(config: ConfigDict) -> dict[str, str]:
    try:
        if config.backbone.checkpoint in paths.MADE and experiment.sized_backbone(config):
            return {'found': f'{config.backbone.checkpoint}, made in the workdir'}
        backbone = experiment.find_backbone(config, '')
        if backbone is None:
            return {'found': 'none'}
    except Exception as error:
        return {'problem': _reason(error)}
    return {'found': f'{backbone.name} {backbone.params_sha256[:12]}'}


def _list(config: ConfigDict, split: str) -> dict[str, Any]:
    """Reads a list, and its first, middle and last video; one that is broken stops no run."""
    field = f'{split}_list'
    if not config.data[field]:
        if recipe.dataset_info(config).generate is not None:
            return {'found': 'made in the workdir'}
        if split == 'val':
            return {'found': 'none'}
    try:
        source = recipe.open_split(config, split)
    except Exception as error:
        return {'problem': _reason(error)}
    looked = sorted({0, len(source) // 2, len(source) - 1})
    bad = []
    for position in looked:
        record = source[position]
        try:
            with open_video(record) as video:
                video.frame_range(record.start, record.end)
        except DecodeError as error:
            bad.append(f'video {position}: {_reason(error)}')
    if len(bad) == len(looked):
        return {'problem': bad[0]}
    found = f'{len(source)} videos, {recipe.list_sha256(source)[:12]}; '
    size = {'videos': len(source)}
    found += f'{len(looked) - len(bad)} of {len(looked)} looked at can be read'
    return {'found': found, **size, **({'warning': bad[0]} if bad else {})}


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


# The lines of the table.


def _versions(rows: list[dict[str, Any]]) -> Check:
    own = rows[0]['versions']
    found = ', '.join(f'{name} {version}' for name, version in own.items())
    unlike = _unlike(rows, 'versions')
    if unlike:
        return Check(
            'versions',
            FAILED,
            f'{found}; others on {unlike}',
            'Install the same versions on every host: pip install the same requirements again.',
        )
    if rows[0]['platform'] == 'tpu' and 'libtpu' not in own:
        return Check('versions', WARNING, found, 'libtpu is not installed by pip.')
    return Check('versions', OK, found)


def _code(rows: list[dict[str, Any]]) -> Check:
    found = f'dist_jax {rows[0]["code"][:12]}'
    unlike = _unlike(rows, 'code')
    if not unlike:
        return Check('code', OK, found)
    return Check(
        'code',
        FAILED,
        f'{found}; another on {unlike}',
        'The hosts would compile different programs and hang. Copy the same code to every host.',
    )


def _config(rows: list[dict[str, Any]]) -> Check:
    unlike = _unlike(rows, 'config')
    if not unlike:
        return Check('config', OK, rows[0]['config'][:12])
    return Check(
        'config',
        FAILED,
        f'another on {unlike}',
        'Start the same command, with the same --config fields, on every host.',
    )


def _processes(rows: list[dict[str, Any]]) -> Check:
    expected = 1
    hosts = os.environ.get('TPU_PROCESS_ADDRESSES') or os.environ.get('TPU_WORKER_HOSTNAMES')
    if hosts:
        expected = len(hosts.split(','))
    expected *= int(os.environ.get('MEGASCALE_NUM_SLICES') or 1)
    names = {row['host'] for row in rows}
    found = f'{len(rows)} on {len(names)} hosts' if len(rows) > 1 else '1'
    if hosts and len(rows) < expected:
        return Check(
            'processes',
            FAILED,
            f'{found}; the machine names {expected} workers',
            'Start the same command on every worker (gcloud ... --worker=all).',
        )
    return Check('processes', OK, found)


def _devices(rows: list[dict[str, Any]], expected: int) -> Check:
    total = rows[0]['all_devices']
    counts = sorted({row['local_devices'] for row in rows})
    found = f'{total} x {rows[0]["kind"]}, {"/".join(map(str, counts))} a host'
    idle = _hosts(rows, lambda row: row['tpu_chips'] and row['platform'] != 'tpu')
    if idle:
        return Check(
            'devices',
            FAILED,
            f'{found}; TPU chips that jax does not use on {idle}',
            "Install dist_jax with '.[tpu]', unset JAX_PLATFORMS, and end other processes that "
            'hold the chips (sudo lsof /dev/accel* /dev/vfio/*).',
        )
    if len(counts) > 1:
        odd = _unlike(rows, 'local_devices')
        return Check(
            'devices',
            FAILED,
            f'{found}; other numbers on {odd}',
            'Every host must have as many: a chip may be broken or in use; restart the host.',
        )
    if expected and total != expected:
        return Check(
            'devices',
            FAILED,
            f'{found}; expected {expected}',
            'Start the command on all hosts of the slice, or correct --devices.',
        )
    return Check('devices', OK, found)


def _clock(rows: list[dict[str, Any]]) -> Check | None:
    if len(rows) == 1:
        return None
    times = [row['time'] for row in rows]
    skew = max(times) - min(times)
    found = f'{skew:.2f} s apart'
    if skew <= CLOCK_SECONDS:
        return Check('clocks', OK, found)
    middle = sorted(times)[len(times) // 2]
    odd = _hosts(rows, lambda row: abs(row['time'] - middle) > CLOCK_SECONDS / 2)
    return Check(
        'clocks',
        WARNING,
        f'{found}: {odd}',
        'Requests to buckets are refused when clocks differ by minutes: sudo chronyc makestep.',
    )


def _disk(rows: list[dict[str, Any]]) -> Check:
    least = min(rows, key=lambda row: row['disk'])
    found = f'{least["disk"]:.1f} GiB free in {least["disk_at"]}'
    low = _hosts(rows, lambda row: row['disk'] < DISK_GIB)
    if not low:
        return Check('local disk', OK, found)
    return Check('local disk', WARNING, f'{found} on {low}', 'Delete files there, or set TMPDIR.')


def _workdir(rows: list[dict[str, Any]], shared: list[list[int]], workdir: str) -> Check:
    bad = _hosts(rows, lambda row: row['workdir'])
    if bad:
        reason = next(row['workdir'] for row in rows if row['workdir'])
        rights = (
            'See that the hosts have a network that leads there (curl https://storage.googleapis.com)'
            ". Install '.[tpu]' (gcsfs, google-cloud-storage), and give the service account of the "
            'hosts roles/storage.objectAdmin on the bucket.'
            if '://' in workdir
            else 'Choose a --workdir that every host can write to.'
        )
        return Check('workdir', FAILED, f'cannot be used on {bad}: {reason}', rights)
    if any(shared):
        blind = [
            f'{i} does not see {missing[:NAMED]}' for i, missing in enumerate(shared) if missing
        ]
        return Check(
            'workdir',
            FAILED,
            f'{workdir} is not one folder: {"; ".join(blind[:NAMED])}',
            'Checkpoints need one place that all hosts see: a bucket (gs://...) or a shared disk.',
        )
    seen = 'written and read' if len(rows) == 1 else f'written and read by all {len(rows)}'
    return Check('workdir', OK, f'{workdir} {seen}')


def _batches(rows: list[dict[str, Any]], config: ConfigDict) -> Check:
    videos = rows[0]['training list'].get('videos')
    try:
        experiment.check(config, make_mesh(**config.mesh))
        if videos:
            train.make_plan(config, videos)
    except ValueError as error:
        return Check('batch', FAILED, _reason(error), 'Set the field that is named.')
    found = f'{config.batch_size} clips, {config.eval.batch_size} in evaluation'
    clips = (videos or 0) * config.data.repeats
    if videos and clips < config.batch_size:
        return Check(
            'batch',
            WARNING,
            f'{found}; the training list has {videos} videos, so one batch holds several epochs',
            f'Set --config.batch_size to {clips} at most, and scale optimizer.peak_lr with it.',
        )
    return Check('batch', OK, found)


def _batch_bytes(config: ConfigDict) -> tuple[int, int]:
    """Bytes of the clips of a host: (those of a training batch, of an evaluation batch)."""
    data, test = config.data, config.eval
    parts = feed(make_mesh(**config.mesh)).count
    clip = math.prod(recipe.train_reader(config).shape)
    views = math.prod(recipe.eval_reader(config).shape) if data.val_list else 0
    return config.batch_size * clip // parts, test.batch_size * views // parts


def _readers(rows: list[dict[str, Any]], config: ConfigDict) -> Check | None:
    """CPUs for the readers, and memory for the batches that they make ahead."""
    try:
        train_bytes, eval_bytes = _batch_bytes(config)
    except ValueError:
        return None  # the line of the batch says it
    readers = recipe.readers(config)
    processes = readers.num_processes
    # Readers of the training list keep their batches while an evaluation has its own.
    extra = LENT if processes else readers.num_threads
    fixed = train_bytes * extra + eval_bytes * (recipe.EVAL_AHEAD + extra)
    total = train_bytes * max(readers.buffer_size, 1) + fixed
    fewest = min(rows, key=lambda row: row['cpus'])
    who = f'{processes} processes' if processes else f'{readers.num_threads} threads'
    found = f'{who} a host, {fewest["cpus"]} CPUs'
    if fewest['cpus'] < fewest['all_cpus']:
        found += f' of {fewest["all_cpus"]} (limits of this process or its container)'
    found += f'; batches of {total / 2**30:.1f} GiB'
    known = [row for row in rows if row['memory'] is not None]
    if not known:
        return Check('readers', OK, found)
    least = min(known, key=lambda row: row['memory'])
    found += f', {least["memory"] / 2**30:.1f} GiB free'
    if total <= MEMORY_SHARE * least['memory']:
        return Check('readers', OK, found)
    low = _hosts(rows, lambda row: row['memory'] and total > MEMORY_SHARE * row['memory'])
    fitting = int((MEMORY_SHARE * least['memory'] - fixed) // max(train_bytes, 1))
    way = 'Set --config.batch_size or --config.eval.batch_size lower, or use more hosts.'
    if fitting >= 1:
        way = f'Set --config.data.buffer_size={fitting} (now {readers.buffer_size}); or: {way}'
    state = FAILED if total > least['memory'] else WARNING
    return Check('readers', state, f'{found} on {low}', way)


def _merge(rows: list[dict[str, Any]], name: str) -> Check:
    bad = _hosts(rows, lambda row: 'problem' in row[name])
    if bad:
        reason = next(row[name]['problem'] for row in rows if 'problem' in row[name])
        if all('problem' in row[name] for row in rows):
            field = 'backbone.checkpoint' if name == 'backbone' else 'the fields of data'
            return Check(name, FAILED, reason, f'Correct {field} in the command.')
        return Check(
            name,
            FAILED,
            f'{reason} (on {bad})',
            'The same path must lead to the same files on every host.',
        )
    unlike = _unlike(rows, name)
    if unlike:
        return Check(
            name,
            FAILED,
            f'{rows[0][name]["found"]}; another on {unlike}',
            'The hosts must read the same: copy it again, or use one shared place.',
        )
    if 'warning' in rows[0][name]:
        found = f'{rows[0][name]["found"]} ({rows[0][name]["warning"]})'
        return Check(name, WARNING, found, '`dist_jax check` reads all of a list.')
    return Check(name, OK, rows[0][name]['found'])
