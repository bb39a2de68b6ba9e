"""What jobs left, read into one table: a record for each run and each test."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dist_jax.metric_writer import METRICS_FILE, read_metrics
from dist_jax.scalars import VALIDATION
from tools.studying import runner
from tools.studying.jobs import MEMORY, TRAIN, Job

Record = dict[str, Any]


def collect(out: Path, jobs: Iterable[Job]) -> list[Record]:
    """Records of all jobs that are done, in their order.

    Each has `name`, `row`, `data`, `seed`, `test` ('' for a run itself), `figures` of the test list
    by name, `num_classes` of each head, `seconds`, and `job_seconds` of the whole process. One that
    trained has `trainable_parameters`, `steps`, `clips_seen`, `step_seconds`, of it
    `data_wait_seconds` for clips and `compute_seconds` for the rest, `clips_per_second` and
    `training_seconds` (all steps without waiting; compilation is in none); the first run of a row
    of the main table `memory`, in bytes by kind.

    Raises:
      ValueError: a file cannot be read.
    """
    jobs = [job for job in jobs if runner.is_done(out, job)]
    memory = {job.needs[0]: _read(job.result(out)) for job in jobs if job.kind == MEMORY}
    found = []
    for job in jobs:
        if job.kind == MEMORY:
            continue
        record = {
            'name': job.name,
            'row': job.row,
            'data': job.data,
            'seed': job.seed,
            'test': job.test,
            'job_seconds': runner.record_of(out, job)['seconds'],
        }
        result = _read(job.result(out))
        if job.kind == TRAIN:
            folder = job.folder(out)
            clips = _read(folder / 'config.json')['batch_size']
            record |= _trained(result, read_metrics(folder / METRICS_FILE), clips)
        else:
            record |= {
                'figures': _figures(result),
                'num_classes': [len(classes) for classes in result.get('per_class', ())],
                'seconds': result['seconds'],
            }
        if job.name in memory:
            record['memory'] = memory[job.name]
        found.append(record)
    return found


def _read(path: Path) -> Record:
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f'{path} cannot be read ({error}); delete its folder, and the study makes it again'
        ) from None


def _trained(
    summary: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]], batch_size: int
) -> Record:
    # The first line is also of what comes before the first step; compilation is in none.
    timed = [row for row in metrics if 'step_seconds' in row]
    timed = timed[1:] or timed
    compute = statistics.median(row['compute_seconds'] for row in timed)
    return {
        'figures': _figures(
            {
                name.removeprefix(VALIDATION): value
                for name, value in summary.items()
                if name.startswith(VALIDATION)
            }
        ),
        'num_classes': summary.get('num_classes', []),
        'trainable_parameters': summary['trainable_parameters'],
        'steps': summary['step'],
        'clips_seen': summary['step'] * batch_size,
        'step_seconds': statistics.median(row['step_seconds'] for row in timed),
        'compute_seconds': compute,
        'data_wait_seconds': statistics.median(row['data_wait_seconds'] for row in timed),
        'clips_per_second': statistics.median(row['clips_per_second'] for row in timed),
        'training_seconds': compute * summary['step'],
        'seconds': summary['seconds'],
    }


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if not isinstance(value, bool)}


class Cells:
    """Records by row and data, 'dist/motion', and by name of a test."""

    def __init__(self, records: Iterable[Record]):
        self._runs: dict[str, list[Record]] = {}
        for record in records:
            key = record['test'] or f'{record["row"]}/{record["data"]}'
            self._runs.setdefault(key, []).append(record)

    def runs(self, key: str) -> list[Record]:
        """Those of a cell, one a seed; [] where nothing is there."""
        return self._runs.get(key, [])

    def values(self, key: str, figure: str) -> list[float]:
        """A figure of each of them: one of the test list, or of the run itself."""
        found = (_value(record, figure) for record in self.runs(key))
        return [value for value in found if value is not None]


def _value(record: Record, figure: str) -> float | None:
    if figure == 'memory':
        return record['memory']['total'] if 'memory' in record else None
    return record['figures'].get(figure, record.get(figure))
