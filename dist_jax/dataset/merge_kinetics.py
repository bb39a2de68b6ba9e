"""Merges Kinetics-400, -600 and -700 into Kinetics-710.

examples:
  dist_jax dataset merge-kinetics --out k710 --k700_edition 2020 \\
      --k400 train=k400/train.csv val=k400/val.csv test=k400/test.csv videos=/data/k400 \\
      --k600 train=k600/train.csv val=k600/val.csv test=k600/test.csv videos=/data/k600 \\
      --k700 train=k700/train.csv val=k700/val.csv test=k700/test.csv videos=/data/k700
      lists of the videos that are there
  dist_jax dataset merge-kinetics --out k710 --k700_edition 2020 --overwrite \\
      --k400 train=... val=... test=... videos=/data/k400 broken=bad_k400.jsonl ...
      without those that `dist_jax check --report bad_k400.jsonl` could not read
  dist_jax dataset merge-kinetics --out k710_clean_val --rule clean_val --k700_edition 2019 ...
      another published rule; `--rule` lists them

The tables are the official CSV files. Without `videos`, lists hold what the tables say. A key may
be given twice. docs/guides/kinetics710.md explains rules, outputs and what was decided.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dist_jax.dataset.merging import kinetics
from dist_jax.dataset.merging.kinetics import REASONS, RULES, SETS
from input_pipeline.escape import Console
from input_pipeline.kinetics import SYNONYMS
from input_pipeline.text_files import read_json

KEYS = tuple(field.name for field in fields(kinetics.Inputs))
MOST_NAMED = 10  # classes in a warning
COLOURS = {'k400': '#264653', 'k600': '#2a9d8f', 'k700': '#e9c46a'}


def parse_inputs(source: str, words: Sequence[str]) -> kinetics.Inputs:
    """Reads 'train=FILE' words; paths become absolute.

    Raises:
      ValueError: another word.
    """
    found: dict[str, list[str]] = {key: [] for key in KEYS}
    for word in words:
        key, _, value = word.partition('=')
        if key not in found or not value:
            raise ValueError(f'--{source}: {word!r} is not KEY=PATH, KEY one of {", ".join(KEYS)}')
        found[key].append(os.path.abspath(os.path.expanduser(value)))
    return kinetics.Inputs(**{key: tuple(sorted(paths)) for key, paths in found.items()})


def read_synonyms(path: str) -> dict[str, str]:
    """A JSON object old name -> merged name.

    Raises:
      ValueError: something else.
    """
    synonyms = read_json(Path(path))
    if not isinstance(synonyms, dict) or not all(isinstance(v, str) for v in synonyms.values()):
        raise ValueError(f'{path}: expected an object, old name -> merged name')
    return synonyms


def report_text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    classes = report['classes']
    distinct = classes['distinct_names']
    lines = [
        'Kinetics-710',
        '',
        f'rule      {report["rule"]} ({report["rule_source"]})',
        f'K700      {report["k700_edition"]} edition',
        f'prefer    {" > ".join(report["prefer"])}',
        f'classes   {distinct["as_written"]} names as written, {distinct["normalised"]} after '
        f'normalisation, {distinct["merged"]} merged',
        f'total     {report["total"]["train"]} train, {report["total"]["val"]} val',
    ]
    for title, part in (
        ('training', 'train'),
        ('training, each set', 'train_of_sets'),
        ('validation, each set', 'val_of_sets'),
        ('validation, joint', 'val'),
    ):
        head = ('input', *REASONS, 'kept')
        rows = [
            [source, *(counts[name] for name in head)] for source, counts in part_of(report, part)
        ]
        lines += ['', *_table([title, *head], rows)]
    kinds = [[kind, number] for kind, number in report['duplicates'].items()]
    lines += ['', *_table(['duplicates by kind, against the kept copy', 'rows'], kinds)]
    shared = report['ids_shared_before']
    held_out = list(next(iter(shared.values())))
    rows = [[name, *(counts[h] for h in held_out)] for name, counts in shared.items()]
    after = report['ids_shared_after']
    rows.append(['after the merge', *(after[h] for h in held_out)])
    lines += ['', *_table(['ids shared with', *held_out], rows)]
    leaks = {name: number for name, number in after.items() if number}
    if leaks:
        named = ', '.join(f'{number} of {name}' for name, number in leaks.items())
        lines += ['', f'WARNING: this rule leaves held-out videos in training: {named}.']
    empty = classes['without_training_videos']
    if empty:
        named = ', '.join(empty[:MOST_NAMED]) + (', ...' if len(empty) > MOST_NAMED else '')
        lines += ['', f'WARNING: {len(empty)} classes have no training video: {named}.']
    rows = [[f'{own} -> {merged}', source] for source, own, merged in classes['respelled']]
    lines += ['', *_table(['classes under another name', 'set'], rows)]
    rows = [[name, *row.values()] for name, row in report['tables'].items()]
    lines += ['', *_table(['tables', 'rows', 'ids', 'SHA-256 of the sorted rows'], rows)]
    lines += ['', 'decided here, as no source says', *(f'- {d}' for d in report['decisions'])]
    return '\n'.join(lines) + '\n'


def part_of(report: Mapping[str, Any], part: str) -> list[tuple[str, Mapping[str, int]]]:
    """(set, counts) of a part of the report, and their sum."""
    total: dict[str, int] = {}
    for counts in report[part].values():
        for name, number in counts.items():
            total[name] = total.get(name, 0) + number
    return [*report[part].items(), ('sum', total)]


def _table(head: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        '  '.join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))])
        for first, *rest in cells
    ]


def draw_counts(merged: kinetics.Merge, path: Path) -> None:
    """Draws training videos of each class, by set, classes in order of their number."""
    rows = sorted(kinetics.class_counts(merged).items(), key=lambda row: (-row[1][-2], row[0]))
    figure = Figure(figsize=(11, 4.5))
    axes = figure.subplots()
    below = [0] * len(rows)
    for k, source in enumerate(SETS):
        heights = [counts[k] for _, counts in rows]
        label = f'from {source} ({sum(heights):,})'
        axes.bar(range(len(rows)), heights, 1.0, below, color=COLOURS[source], label=label)
        below = [a + b for a, b in zip(below, heights)]
    axes.set(
        xlim=(-0.5, len(rows) - 0.5),
        xlabel=f'{len(rows)} classes, by number of videos',
        ylabel='training videos',
        title=f'{sum(below):,} training videos, rule {merged.report["rule"]}',
    )
    for place, align in ((0, 'left'), (len(rows) - 1, 'right')):
        name, counts = rows[place]
        axes.annotate(
            f'{name}: {counts[-2]:,}',
            (place, counts[-2]),
            (0, 30),
            textcoords='offset points',
            ha=align,
            fontsize=8,
            arrowprops={'arrowstyle': '-', 'color': '#888888', 'lw': 0.6, 'relpos': (place > 0, 0)},
        )
    axes.margins(y=0.2)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write(merged: kinetics.Merge, out: Path, root: str, overwrite: bool) -> None:
    """Writes everything into a folder that appears whole or not at all.

    Raises:
      FileExistsError: the folder is there, and is not to be, or must not be, replaced.
    """
    check_destination(out, overwrite)
    staging = out.with_name(f'.{out.name}.partial')
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        kinetics.write_lists(merged, staging, root)
        draw_counts(merged, staging / 'class_counts.png')
        (staging / 'report.txt').write_text(report_text(merged.report), encoding='utf-8')
        text = json.dumps(merged.report, indent=1) + '\n'
        (staging / 'report.json').write_text(text, encoding='utf-8')
        if out.exists():
            old = out.with_name(f'.{out.name}.replaced')
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            staging.rename(out)
            shutil.rmtree(old)
        else:
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_destination(out: Path, overwrite: bool) -> None:
    """Raises FileExistsError if `write` would refuse this folder."""
    if not out.exists():
        return
    if not overwrite:
        raise FileExistsError(f'{out} exists; pass --overwrite to replace it, or name another')
    if not (out / 'report.json').exists() or not (out / 'dropped.csv').exists():
        raise FileExistsError(f'{out} exists and is no merge, so it is not replaced; name another')


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dist_jax dataset merge-kinetics',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to create')
    for source in SETS:
        parser.add_argument(
            f'--{source}',
            required=True,
            nargs='+',
            metavar='KEY=PATH',
            help='train, val and test tables; folder of videos; broken: report of unreadable ones',
        )
    parser.add_argument(
        '--k700_edition', required=True, type=int, choices=(2019, 2020), help='for the report'
    )
    rules = '; '.join(f'{name}: {rule.source}' for name, rule in RULES.items())
    parser.add_argument(
        '--rule',
        default=kinetics.DEFAULT_RULE,
        choices=RULES,
        help=f'{rules} (default %(default)s)',
    )
    parser.add_argument(
        '--prefer',
        nargs=3,
        default=list(reversed(SETS)),
        choices=SETS,
        help='whose copy of a video is kept (default %(default)s)',
    )
    parser.add_argument(
        '--root', default='', metavar='DIR', help='write paths from here (default: absolute)'
    )
    parser.add_argument(
        '--synonyms', default='', metavar='FILE', help='JSON, old name -> merged name (default: 15)'
    )
    parser.add_argument(
        '--any_classes',
        action='store_true',
        help='accept parts of the sets: other numbers of classes, unused synonyms',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace an earlier merge')
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code: 0, or 2 if an argument or a file is wrong."""
    arguments = parser().parse_args(argv)
    console = Console()
    out = Path(os.path.abspath(os.path.expanduser(arguments.out)))
    columns = (SpinnerColumn(), TextColumn('{task.description}'), TimeElapsedColumn())
    try:
        check_destination(out, arguments.overwrite)
        inputs = {source: parse_inputs(source, getattr(arguments, source)) for source in SETS}
        synonyms = read_synonyms(arguments.synonyms) if arguments.synonyms else SYNONYMS
        with Progress(*columns, console=console) as bar:
            task = bar.add_task('merging')

            def note(doing: str, count: int) -> None:
                bar.update(task, description=f'{doing}, {count}' if count else doing)

            merged = kinetics.merge(
                inputs,
                arguments.k700_edition,
                arguments.rule,
                prefer=arguments.prefer,
                synonyms=synonyms,
                complete=not arguments.any_classes,
                note=note,
            )
            note(f'writing {out.name}', 0)
            write(merged, out, arguments.root, arguments.overwrite)
    except (ValueError, OSError) as error:
        console.print(f'error: {error}', style='red', soft_wrap=True)
        return 2
    console.print((out / 'report.txt').read_text(), soft_wrap=True)
    console.print(f'wrote {out}; see class_counts.png', soft_wrap=True)
    return 0
