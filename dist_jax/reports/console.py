"""The key figures of a run and of an evaluation on the console, and what to do next."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich.table
from etils import epath

from dist_jax.metric_writer import METRICS_FILE
from dist_jax.scalars import label, show, telling
from dist_jax.tasks.api import Figures, Table
from input_pipeline.escape import Console, styled


def print_summary(workdir: str | os.PathLike[str], summary: Mapping[str, Any]) -> None:
    """Prints the key figures of a run, what to look at, and how to go on."""
    if jax.process_index() != 0:
        return
    console = Console()
    workdir = os.fspath(workdir)
    if summary.get('interrupted'):
        _print_stopped(console, summary)
        return
    summary = telling(summary, summary.get('num_classes', ()))
    console.print(_pairs([(label(name), show(name, value)) for name, value in summary.items()]))
    found = [
        (name, text)
        for name, text in (
            ('report.html', 'curves, tables, config'),
            ('summary.json', 'these figures'),
            (METRICS_FILE, 'what was logged'),
            ('tensorboard', f'tensorboard --logdir={os.path.join(workdir, "tensorboard")}'),
        )
        if (epath.Path(workdir) / name).exists()
    ]
    steps = [(os.path.join(workdir, name), text) for name, text in found]
    steps.append((f'dist_jax evaluate --workdir={workdir}', 'the test protocol, other lists'))
    if 'num_classes' in summary:
        steps.append((f'dist_jax predict --workdir={workdir} VIDEO', 'single videos'))
    _print_steps(console, steps)


def print_release(folder: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Prints what is in a release of a run, its card last.

    Args:
      folder: where it lies.
      metadata: what it says of itself.
    """
    console = Console()
    with open(os.path.join(folder, 'README.md'), encoding='utf-8', errors='replace') as file:
        console.print(file.read(), soft_wrap=True)
    names = ['config.json', 'README.md', *metadata['files']]
    sizes = [(name, os.path.getsize(os.path.join(folder, name))) for name in names]
    console.print(_pairs([(f'{folder}/{name}', f'{size:,} bytes') for name, size in sizes]))


def print_steps(steps: Sequence[tuple[str, str]]) -> None:
    """Prints (what to do or to look at, what that is)."""
    _print_steps(Console(), steps)


def print_comparison(
    workdir: str | os.PathLike[str],
    summary: Mapping[str, Any],
    table: Table,
    files: Mapping[str, str],
) -> None:
    """Prints what several models are worth, and what to look at.

    Args:
      workdir: the run of the last one.
      summary: of that run; a stopped one says how to go on, and nothing else.
      table: of all.
      files: in the run's folder, what is in each; those that are not there are left out.
    """
    if jax.process_index() != 0:
        return
    console = Console()
    if summary.get('interrupted'):
        _print_stopped(console, summary)
        return
    console.print(_rich_table(table))
    folder = epath.Path(os.fspath(workdir))
    there = [(os.fspath(folder / name), text) for name, text in files.items()]
    _print_steps(console, [(path, text) for path, text in there if epath.Path(path).exists()])


def print_evaluation(stored: Mapping[str, Any], figures: Figures) -> None:
    """Prints the key figures of an evaluation, its short tables and what was unreadable.

    Args:
      stored: what `evaluation.json` holds.
      figures: the evaluation.
    """
    if jax.process_index() != 0:
        return
    console = Console()
    skipped = ('seconds', 'num_bad_videos')
    console.print(
        _pairs(
            [
                (label(name), show(name, value))
                for name, value in telling(stored, figures.num_classes).items()
                if not isinstance(value, (list, dict)) and name not in skipped
            ]
        )
    )
    for table in figures.brief:
        console.print(_rich_table(table))
    bad = stored.get('bad_videos', ())
    if bad:
        said = f'{len(bad)} videos could not be read and are in no figure'
        console.print(
            styled((said, 'bold red'), f', for example {bad[0][0]}: {bad[0][1]}'), soft_wrap=True
        )


def _rich_table(table: Table) -> rich.table.Table:
    """A table whose first column are names, and whose others are figures."""
    found = rich.table.Table(title=table.title, title_justify='left', title_style='')
    for i, name in enumerate(table.columns):
        found.add_column(name, justify='right' if i else 'left')
    for row in table.rows:
        found.add_row(*row)
    return found


def _print_stopped(console: Console, summary: Mapping[str, Any]) -> None:
    console.print(
        f'Stopped and saved at step {summary["step"]} of {summary.get("total_steps", "?")}. '
        'The same command continues.',
        soft_wrap=True,
    )


def _pairs(rows: Sequence[tuple[str, str]]) -> rich.table.Table:
    table = rich.table.Table(show_header=False)
    table.add_column(style='bold')
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def _print_steps(console: Console, steps: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in steps)
    for name, text in steps:
        console.print(styled(f'  {name:{width}}  ', (text, 'dim')), soft_wrap=True)
