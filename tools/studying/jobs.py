"""From rows to commands: which processes a study is made of, in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.studying import lists
from tools.studying.rows import EVERY_RUN, ROWS, TESTS, Data, Row, Size, Test

RUNS = 'runs'  # folder of a study; a job has a folder in it
TRAIN, EVALUATE, MEMORY = 'train', 'evaluate', 'memory'
# What a job leaves when it is done.
RESULTS = {TRAIN: 'summary.json', EVALUATE: 'evaluation.json', MEMORY: 'memory.json'}
# Seconds of a job on two quiet cores, for a plan; where one has been run, its own time counts.
EXPECTED = {TRAIN: 50.0, EVALUATE: 12.0, MEMORY: 10.0}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
      name: of its folder.
      kind: TRAIN, EVALUATE or MEMORY.
      command: after `python -m`, with {out} for the folder of the study.
      group: part of the study.
      data: key of `World.data`: what it is trained or tested on.
      row: name of the row.
      seed: of training.
      test: name of the test, of EVALUATE.
      needs: names of the jobs whose results it reads.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    group: str
    data: str
    row: str
    seed: int = 0
    test: str = ''
    needs: tuple[str, ...] = ()

    def folder(self, out: Path) -> Path:
        """Where it works."""
        return out / RUNS / self.name

    def result(self, out: Path) -> Path:
        """The file that is there when it is done."""
        return self.folder(out) / RESULTS[self.kind]


def rows_of(size: Size, groups: Sequence[str] = ()) -> list[Row]:
    """The rows of a size, with those that they start from; `groups` leaves others out."""
    chosen = {
        row.name: row
        for row in ROWS
        if any(size.seeds(row, data) for data in row.data)
        and (not size.only or row.name in size.only)
        and (not groups or row.group in groups)
    }
    wanted = {row.start for row in chosen.values()} | chosen.keys()
    if any(test.group in groups for test in TESTS):
        wanted |= {test.row for test in TESTS if test.group in groups}
    return [row for row in ROWS if row.name in wanted]


def plan(size: Size, groups: Sequence[str] = ()) -> list[Job]:
    """All jobs of a size, in an order in which what is needed comes before."""
    rows = rows_of(size, groups)
    tests = [
        test
        for test in TESTS
        if (not groups or test.group in groups) and (not size.only or test.name in size.only)
    ]
    by_name = {row.name: row for row in rows}
    jobs = [job for row in rows for job in _runs(size, row)]
    jobs += [
        _evaluation(size, by_name[test.row], test, seed)
        for test in tests
        if test.row in by_name
        for seed in range(size.seeds(by_name[test.row], test.trained_on))
    ]
    jobs += [_memory(size, row) for row in rows if row.group == 'main' and row.trained]
    return jobs


def _runs(size: Size, row: Row) -> Iterator[Job]:
    for data in row.data:
        for seed in range(size.seeds(row, data)):
            name = _run_name(row.name, data, seed)
            kind, folder = (TRAIN, 'workdir') if row.trained else (EVALUATE, 'output')
            command = (
                'dist_jax',
                kind,
                f'--{folder}={{out}}/{RUNS}/{name}',
                _config(size, row),
                *_given(_fields(size, row, data) | {'seed': seed}),
            )
            needs = (_run_name(row.start, 'pictures'),) if row.start else ()
            yield Job(name, kind, command, row.group, data, row.name, seed, needs=needs)


def _evaluation(size: Size, row: Row, test: Test, seed: int) -> Job:
    run, name = _run_name(row.name, test.trained_on, seed), f'{test.name}_seed{seed}'
    data = size.world.data[test.data]
    fields = {**test_list(data), **test.fields}
    command = (
        'dist_jax',
        EVALUATE,
        f'--workdir={{out}}/{RUNS}/{run}',
        f'--output={{out}}/{RUNS}/{name}',
        *_given(fields),
    )
    needs = (run,)
    return Job(
        name, EVALUATE, command, test.group, test.data, row.name, seed, test.name, needs=needs
    )


def _memory(size: Size, row: Row) -> Job:
    """What the compiler says of the train step; the cache has it from the run itself."""
    data = row.data[0]
    run = _run_name(row.name, data)
    name = f'{row.name}_{MEMORY}'
    command = (
        'tools.studying.memory',
        f'--json={{out}}/{RUNS}/{name}/{RESULTS[MEMORY]}',
        _config(size, row),
        *_given(_fields(size, row, data)),
    )
    return Job(name, MEMORY, command, row.group, data, row.name, needs=(run,))


def _run_name(row: str, data: str, seed: int = 0) -> str:
    return f'{row}_{data}_seed{seed}'


def _config(size: Size, row: Row) -> str:
    return f'--config=configs/{row.config}.py:{size.world.variant}{row.form}'


def _fields(size: Size, row: Row, data: str) -> dict[str, object]:
    """Fields of a run, over those of its variant; what is more special comes later."""
    found = size.world.data[data]
    listed = f'{{out}}/{lists.DATA}/{found.folder}/{found.train}'
    if row.share < 100:
        listed = f'{{out}}/{lists.share_of(Path(), found, row.share)}'
    start = {'init_from': f'{{out}}/{RUNS}/{_run_name(row.start, "pictures")}'} if row.start else {}
    return {
        **EVERY_RUN,
        'num_steps': size.steps,
        **test_list(found),
        'data.train_list': listed,
        **start,
        **size.world.fields.get(row.config, {}),
        **row.fields,
    }


def test_list(data: Data) -> dict[str, str]:
    """Fields that say what an evaluation reads."""
    root = f'{{out}}/{lists.DATA}/{data.folder}'
    return {
        'data.name': data.name,
        'data.root': root,
        'data.val_list': f'{root}/{data.test}',
        'data.label_map': f'{root}/{data.labels}' if data.labels else '',
    }


def _given(fields: dict[str, object]) -> Iterator[str]:
    for name, value in fields.items():
        yield f'--config.{name}={value}'
