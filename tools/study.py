"""Trains all families in one small world, and says what became of what their papers claim.

    python -m tools.study --out=study/
    python -m tools.study --out=study/ --dry_run
    python -m tools.study --out=study/ --only=main,ablation
    python -m tools.study --out=study/ --size=full
    python -m tools.study --out=study/ --report_only

Runs of `dist_jax train` and `dist_jax evaluate`, one after the other, each in a process of its own
that shares compiled programs with the others: `tools/studying/rows.py` lists them,
`tools/studying/claims.py` what they test. What remains in the folder is `report.html`, one page
without other files; `results.md`, its tables; pictures; `study.json`, every figure; `runs/`.
Stopped at any moment, the same command goes on, and --size=full goes on from the small one. Exit
code 1: runs failed; the same command tries them again. What rows of other groups are compared with
is in the group `main`.
"""

from __future__ import annotations

import argparse
import collections
import signal
import sys
from collections.abc import Sequence, Set
from pathlib import Path

from rich.table import Table

from dist_jax import ending
from dist_jax.progress import duration
from input_pipeline.escape import Console
from tools.studying import jobs, lists, report, results, runner
from tools.studying.rows import GROUPS, SIZES


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing and writes the report; 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.study',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--out', default='study', help='folder of all (default %(default)s)')
    parser.add_argument('--size', default='small', choices=SIZES, help='default %(default)s')
    parser.add_argument(
        '--only', default='', metavar='GROUP[,GROUP]', help=f'of {", ".join(GROUPS)}'
    )
    parser.add_argument('--dry_run', action='store_true', help='show what would be run')
    parser.add_argument('--report_only', action='store_true', help='of what is done')
    arguments = parser.parse_args(argv)
    groups = [group for group in arguments.only.split(',') if group]
    if unknown := sorted(set(groups) - GROUPS.keys()):
        parser.error(f'--only: no {", ".join(unknown)}; there are: {", ".join(GROUPS)}')
    out, size, console = Path(arguments.out), SIZES[arguments.size], Console()
    planned = jobs.plan(size, groups)
    # The report is of all that the folder holds of this size, whatever was asked for now.
    everything = jobs.plan(size)
    try:
        done = {job.name for job in everything if runner.is_done(out, job)}
    except ValueError as error:
        parser.error(str(error))
    if arguments.dry_run:
        console.print(table(out, planned, done))
        return 0
    if arguments.report_only and not (out / report.WHERE).exists():
        parser.error(f'--report_only: {out} holds no study')
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not arguments.report_only:
            report.note_where(out)
            lists.prepare(out, size.world, jobs.rows_of(size, groups), console.print)
            runner.run(out, planned, runner.execute)
        failed = {
            job.name: record['log'] for job in everything if (record := runner.failure_of(out, job))
        }
        report.write(out, arguments.size, results.collect(out, everything), failed)
    except KeyboardInterrupt:
        console.print('stopped; the same command continues')
        return ending.AGAIN
    except (ValueError, OSError) as error:
        parser.error(str(error))
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print(f'see {out / report.REPORT}; beside it: {report.RESULTS}, {report.STUDY}')
    for name, log in failed.items():
        console.print(f'{name} failed: {log[-1]}', style='red', soft_wrap=True)
    return int(any(job.name in failed for job in planned))


def table(out: Path, planned: Sequence[jobs.Job], done: Set[str]) -> Table:
    """The jobs by row, with the minutes that those will take that are not done.

    Args:
      out: folder of the study.
      planned: jobs.
      done: names of those that are done, and others.
    """
    seconds = {
        job.name: 0.0 if job.name in done else runner.expected(out, job, planned) for job in planned
    }
    shown = Table('group', 'row', 'of', 'jobs', 'done', 'minutes left')
    rows = collections.defaultdict(list)
    for job in planned:
        key = job.group, job.test or job.row, job.kind if job.test else job.data
        rows[key].append(job.name)
    for key, own in rows.items():
        left = sum(map(seconds.get, own))
        shown.add_row(*key, str(len(own)), str(len(done & set(own))), f'{left / 60:.1f}')
    trainings = sum(job.kind == jobs.TRAIN for job in planned)
    shown.title = f'{trainings} runs and {len(planned) - trainings} evaluations, '
    shown.title += f'about {duration(sum(seconds.values()))} left'
    return shown


if __name__ == '__main__':
    sys.exit(main())
